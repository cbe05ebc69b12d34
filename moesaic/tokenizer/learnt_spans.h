// Where in a rendered conversation the words of its messages stand. Private to this folder.
#pragma once
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "moesaic/base/json.h"

namespace moesaic::tokenizer {

/// What renders messages, with signs kept and with {% generation %} blocks in signs of their own when `blocks`.
using RenderSigned = std::function<std::string(const OrderedJson& messages, bool add_generation_prompt, bool blocks)>;

/// The byte ranges of `text`, the rendered `messages`, that a model is trained to produce: what stands in the
/// template's {% generation %} blocks, or, where it has none, each turn of the assistant from the end of the generation
/// prompt to its end of turn. `learnt`: one flag per message. `special_texts`: tokens that may end a turn.
///
/// The words of every message are rendered a second time between signs, so that one rendering says where each message's
/// words came to stand; what the template writes in front of and behind a turn is read off one conversation that ends
/// there for each kind of turn, not for each turn: the work grows with the conversation's length alone.
///
/// Throws DataError when the template does not show a learnt message, or writes it otherwise when it stands in signs.
std::vector<std::pair<size_t, size_t>> learnt_spans(const std::string& text, const OrderedJson& messages,
                                                    const std::vector<bool>& learnt,
                                                    const std::vector<std::string>& special_texts,
                                                    const RenderSigned& render);

}  // namespace moesaic::tokenizer
