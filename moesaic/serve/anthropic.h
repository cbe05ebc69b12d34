// Anthropic's Messages API as a translation of chats, after platform.claude.com/docs/en/api/messages.
#pragma once
#include <string>

#include "moesaic/serve/dialect.h"

namespace moesaic::serve {

/// The chat that a body of /v1/messages means, or, `counts`, one of /v1/messages/count_tokens, which says no length.
/// Fields that neither API has alone go on to the chat. Throws ApiError.
OrderedJson chat_of_messages(const OrderedJson& body, bool counts);

class AnthropicDialect final : public Dialect {
 public:
  OrderedJson whole(OrderedJson answer) override;
  OrderedJson error(const ApiError& error) override;
  std::string first(const OrderedJson& answer, const OrderedJson& usage) override;
  std::string events(const OrderedJson& chunk) override;
  std::string last(const OrderedJson& usage) override;
  std::string broken(const ApiError& error) override;

 private:
  std::string close();

  bool open_ = false;  // a block of text
  int64_t block_ = 0;  // the next one's index
  OrderedJson reason_ = nullptr, stop_ = nullptr;
};

}  // namespace moesaic::serve
