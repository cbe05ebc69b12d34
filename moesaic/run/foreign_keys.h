// Keys of LLaMA-Factory's run files that moesaic has no use for.
#pragma once
#include <string>
#include <vector>

#include "moesaic/base/json.h"

namespace moesaic::run {

/// Takes out of a run's keys those that change nothing of what is learnt (how work is spread over processes, caches,
/// services that are told), and returns their names. Adds a line to `refused` for each whose value asks for something
/// that is not done here.
std::vector<std::string> take_foreign_keys(OrderedJson& run, std::vector<std::string>& refused);

/// The same as a sentence of docs/config.md.
std::string foreign_keys_markdown();

}  // namespace moesaic::run
