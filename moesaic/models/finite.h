// A number that is not finite is no result.
#pragma once
#include <string>

#include "moesaic/models/language_model.h"

namespace moesaic::models {

/// Where numbers first stop being finite when `model` reads `text` from its beginning: "the input of layer 0", "the
/// output of layer 3 of the model at anchor", "the final norm", "the head's weights"; "" when they never do.
std::string first_not_finite(LanguageModel& model, const Text& text);

/// Throws DataError naming that place unless all `figures`, which were computed of `text`, are finite.
void check_figures(const torch::Tensor& figures, LanguageModel& model, const Text& text);

}  // namespace moesaic::models
