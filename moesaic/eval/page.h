// Pages that draw the data put into them.
#pragma once
#include <string>

#include "moesaic/base/json.h"

namespace moesaic::eval {

/// `head` + the JSON, safe inside of a script element + `tail`.
std::string page_with(const char* head, const OrderedJson& data, const char* tail);

}  // namespace moesaic::eval
