// What a request can be answered with instead of what it asked for.
#pragma once
#include <fmt/format.h>

#include <stdexcept>
#include <string>

#include "moesaic/base/json.h"

namespace moesaic::serve {

/// An answer in the shape of OpenAI's errors.
class ApiError : public std::runtime_error {
 public:
  /// param: the field of the body it is about. retry_after: seconds, 0 = it says nothing.
  ApiError(int status, const std::string& message, std::string param = "", int retry_after = 0)
      : std::runtime_error(message), status(status), param(std::move(param)), retry_after(retry_after) {}

  /// {"error": {"message", "type", "param", "code"}}.
  OrderedJson json() const;

  int status;
  std::string param;
  int retry_after;
};

/// What an exception of any kind is to a client; the details of ours alone are told.
ApiError api_error_of(const std::exception_ptr& error);

/// `json` as text that any client can read: bytes that are no UTF-8 become U+FFFD.
inline std::string json_text(const OrderedJson& json) {
  return json.dump(-1, ' ', false, OrderedJson::error_handler_t::replace);
}

}  // namespace moesaic::serve
