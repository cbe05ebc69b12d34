#include "moesaic/serve/dialect.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "moesaic/serve/anthropic.h"
#include "moesaic/serve/responses.h"

namespace moesaic::serve {
namespace {

using testing::ElementsAre;

const OrderedJson kUsage = {{"prompt_tokens", 7},
                            {"completion_tokens", 3},
                            {"total_tokens", 10},
                            {"prompt_tokens_details", {{"cached_tokens", 4}}}};

OrderedJson chunk(OrderedJson delta, OrderedJson finish = nullptr) {
  OrderedJson choice = {
      {"index", 0}, {"delta", std::move(delta)}, {"finish_reason", std::move(finish)}, {"stop_reason", nullptr}};
  return {{"id", "chatcmpl-12"}, {"created", 5}, {"model", "m"}, {"choices", OrderedJson::array({std::move(choice)})}};
}

OrderedJson call(const char* id, const char* name) {
  const OrderedJson one = {
      {"id", id}, {"type", "function"}, {"function", {{"name", name}, {"arguments", R"({"a":1})"}}}};
  return {{"tool_calls", OrderedJson::array({one})}};
}

/// What the events of a stream say that has a text and two calls: their data, whose type is the event's.
std::vector<OrderedJson> told(Dialect& dialect) {
  std::string text = dialect.first(chunk(nullptr), kUsage);
  for (const OrderedJson& each :
       {chunk({{"role", "assistant"}, {"content", ""}}), chunk({{"content", "I "}}), chunk({{"content", "look"}}),
        chunk(call("a1", "find")), chunk(call("b2", "read")), chunk(OrderedJson::object(), "tool_calls")}) {
    text += dialect.events(each);
  }
  text += dialect.last(kUsage);
  std::vector<OrderedJson> events;
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = text.find("\n\n", begin), line = text.find('\n', begin);
    events.push_back(OrderedJson::parse(text.substr(line + 7, end - line - 7)));
    EXPECT_EQ(text.substr(begin, line - begin), "event: " + events.back()["type"].get<std::string>());
    begin = end + 2;
  }
  return events;
}

TEST(Dialect, AnthropicsBlocksFollowOneAnother) {
  AnthropicDialect dialect;
  const std::vector<OrderedJson> events = told(dialect);
  std::vector<std::string> said;
  for (const OrderedJson& event : events) {
    said.push_back(event["type"].get<std::string>() + (event.contains("index") ? " " + event["index"].dump() : ""));
  }
  EXPECT_THAT(said, ElementsAre("message_start", "content_block_start 0", "content_block_delta 0",
                                "content_block_delta 0", "content_block_stop 0", "content_block_start 1",
                                "content_block_delta 1", "content_block_stop 1", "content_block_start 2",
                                "content_block_delta 2", "content_block_stop 2", "message_delta", "message_stop"));
  EXPECT_EQ(events[0]["message"]["id"], "msg_12");
  EXPECT_EQ(events[0]["message"]["usage"]["input_tokens"], 3);
  EXPECT_EQ(events[0]["message"]["usage"]["cache_read_input_tokens"], 4);
  EXPECT_EQ(events[8]["content_block"],
            (OrderedJson{{"type", "tool_use"}, {"id", "b2"}, {"name", "read"}, {"input", OrderedJson::object()}}));
  EXPECT_EQ(events[9]["delta"]["partial_json"], R"({"a":1})");
  EXPECT_EQ(events[11]["delta"]["stop_reason"], "tool_use");
}

TEST(Dialect, ItemsOfAResponseFollowOneAnother) {
  ResponsesDialect dialect(OrderedJson{{"input", "a"}, {"instructions", "be"}, {"temperature", 0}});
  const std::vector<OrderedJson> events = told(dialect);
  std::vector<std::string> said;
  for (size_t i = 0; i < events.size(); ++i) {
    EXPECT_EQ(events[i]["sequence_number"], i);
    said.push_back(events[i]["type"].get<std::string>().substr(9) +
                   (events[i].contains("output_index") ? " " + events[i]["output_index"].dump() : ""));
  }
  EXPECT_THAT(
      said, ElementsAre("created", "in_progress", "output_item.added 0", "content_part.added 0", "output_text.delta 0",
                        "output_text.delta 0", "output_text.done 0", "content_part.done 0", "output_item.done 0",
                        "output_item.added 1", "function_call_arguments.delta 1", "function_call_arguments.done 1",
                        "output_item.done 1", "output_item.added 2", "function_call_arguments.delta 2",
                        "function_call_arguments.done 2", "output_item.done 2", "completed"));
  const OrderedJson& response = events.back()["response"];
  ASSERT_EQ(response["output"].size(), 3U);
  EXPECT_EQ(response["output"][0]["content"][0]["text"], "I look");
  EXPECT_EQ(response["output"][2], events[16]["item"]);
  EXPECT_EQ(response["status"], "completed");
  EXPECT_EQ(response["instructions"], "be");
  EXPECT_EQ(response["usage"]["input_tokens_details"]["cached_tokens"], 4);
}

TEST(Dialect, ATextBesideCallsIsWholeToo) {
  OrderedJson message = call("a1", "find");
  message["role"] = "assistant";
  message["content"] = "I look";
  OrderedJson answer = chunk(OrderedJson::object());
  answer["choices"][0] = {
      {"index", 0}, {"message", message}, {"finish_reason", "tool_calls"}, {"stop_reason", nullptr}};
  answer["usage"] = kUsage;
  const OrderedJson anthropic = AnthropicDialect().whole(answer),
                    response = ResponsesDialect(OrderedJson::object()).whole(answer);
  ASSERT_EQ(anthropic["content"].size(), 2U);
  EXPECT_EQ(anthropic["content"][0]["text"], "I look");
  EXPECT_EQ(anthropic["content"][1]["input"], (OrderedJson{{"a", 1}}));
  ASSERT_EQ(response["output"].size(), 2U);
  EXPECT_EQ(response["output"][0]["content"][0]["text"], "I look");
  EXPECT_EQ(response["output"][1]["call_id"], "a1");
  EXPECT_EQ(response["status"], "completed");
}

TEST(Dialect, AnErrorBreaksAStreamInItsWords) {
  const ApiError error(503, "no step", "", 1);
  EXPECT_EQ(
      AnthropicDialect().broken(error),
      "event: error\ndata: {\"type\":\"error\",\"error\":{\"type\":\"overloaded_error\",\"message\":\"no step\"}}\n\n");
  EXPECT_EQ(ResponsesDialect(OrderedJson::object()).broken(error),
            "event: error\ndata: {\"type\":\"error\",\"sequence_number\":0,\"message\":\"no "
            "step\",\"param\":null,\"code\":503}\n\n");
}

}  // namespace
}  // namespace moesaic::serve
