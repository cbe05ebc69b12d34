// Pages that draw the data put into them.
#pragma once
#include <string>

#include "moesaic/base/json.h"

namespace moesaic::eval {

/// `head`, which opens the script element "data" + the JSON, safe inside of it + a script's beginning with what all
/// pages use + `tail`, which goes on with that script.
std::string page_with(const char* head, const OrderedJson& data, const char* tail);

}  // namespace moesaic::eval
