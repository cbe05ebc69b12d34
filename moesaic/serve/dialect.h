// In whose words a client hears its answer.
#pragma once
#include <string>

#include "moesaic/serve/api_error.h"

namespace moesaic::serve {

/// OpenAI's words, in which an Exchange speaks; other APIs translate them. One for each request.
class Dialect {
 public:
  virtual ~Dialect() = default;
  virtual OrderedJson whole(OrderedJson answer) { return answer; }
  virtual OrderedJson error(const ApiError& error) { return error.json(); }
  /// Of a stream, server-sent events of its start (answer: what all its chunks have), of a chunk, of its end and of an
  /// error that breaks it. usage: until then.
  virtual std::string first(const OrderedJson& answer, const OrderedJson& usage) { return ""; }
  virtual std::string events(const OrderedJson& chunk) { return fmt::format("data: {}\n\n", json_text(chunk)); }
  virtual std::string last(const OrderedJson& usage) { return "data: [DONE]\n\n"; }
  virtual std::string broken(const ApiError& error) { return fmt::format("data: {}\n\n", json_text(error.json())); }
};

}  // namespace moesaic::serve
