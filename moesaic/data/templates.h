// Chat templates by name, for models that bring none.
#pragma once
#include <optional>
#include <string>
#include <vector>

namespace moesaic::data {

/// LLaMA-Factory's names of the formats that are here, sorted.
const std::vector<std::string>& template_names();

/// The Jinja source of a format; nullopt for a name that is none of template_names(). Rendered, a conversation is the
/// text LLaMA-Factory makes of it. Where a turn's words open the answer ("### Response:"), they stand at the end of the
/// question, whether an answer follows or not.
std::optional<std::string> template_source(const std::string& name);

}  // namespace moesaic::data
