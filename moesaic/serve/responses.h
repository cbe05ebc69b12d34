// OpenAI's Responses API as a translation of chats, after platform.openai.com/docs/api-reference/responses.
#pragma once
#include <string>

#include "moesaic/serve/dialect.h"

namespace moesaic::serve {

/// The chat that a body of /v1/responses means. Fields of a chat that this API lacks go on to it. Throws ApiError.
OrderedJson chat_of_response(const OrderedJson& body);

class ResponsesDialect final : public Dialect {
 public:
  /// body: the request's, of which a response tells some fields again.
  explicit ResponsesDialect(const OrderedJson& body);
  OrderedJson whole(OrderedJson answer) override;
  std::string first(const OrderedJson& answer, const OrderedJson& usage) override;
  std::string events(const OrderedJson& chunk) override;
  std::string last(const OrderedJson& usage) override;
  std::string broken(const ApiError& error) override;

 private:
  OrderedJson response(const OrderedJson& answer) const;
  OrderedJson ended(OrderedJson response, OrderedJson output, const OrderedJson& finish,
                    const OrderedJson& usage) const;
  std::string event(const char* type, OrderedJson json);
  /// Of the item at work.
  std::string item_event(const char* type, const OrderedJson& item, OrderedJson json);
  std::string close(const OrderedJson& finish);

  OrderedJson told_;                                                      // of the request
  OrderedJson response_, output_ = OrderedJson::array(), finish_, item_;  // item_: the message at work; null: none
  std::string text_;
  int64_t number_ = 0;  // of the next event
};

}  // namespace moesaic::serve
