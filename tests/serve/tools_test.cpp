#include "moesaic/serve/tools.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace moesaic::serve {
namespace {

using testing::ElementsAre;
using testing::Field;
using testing::IsEmpty;

auto call(const std::string& name, const std::string& arguments) {
  return testing::AllOf(Field(&ToolCall::name, name), Field(&ToolCall::arguments, arguments));
}

TEST(Tools, HermesCallsAreTakenOutOfTheText) {
  const ToolAnswer answer =
      read_tool_calls(ToolFormat::kHermes,
                      "I look.\n<tool_call>\n{\"name\": \"find\", \"arguments\": {\"q\": \"a</b>\"}}\n</tool_call>\n"
                      "<tool_call>{\"name\": \"stop\", \"arguments\": {}}</tool_call>");
  EXPECT_EQ(answer.content, "I look.");
  EXPECT_THAT(answer.calls, ElementsAre(call("find", R"({"q":"a</b>"})"), call("stop", "{}")));
}

TEST(Tools, WhatIsNoCallStaysInTheText) {
  for (const char* text : {"no call", "<tool_call>\n{\"name\": \"find\"", "<tool_call>{broken}</tool_call> and more",
                           "<tool_call></tool_call>", "<tool_call>{\"name\": 3, \"arguments\": {}}</tool_call>",
                           "<tool_call>{\"name\": \"a\", \"arguments\": 1}</tool_call>"}) {
    const ToolAnswer answer = read_tool_calls(ToolFormat::kHermes, text);
    EXPECT_EQ(answer.content, text);
    EXPECT_THAT(answer.calls, IsEmpty());
  }
  const ToolAnswer mixed = read_tool_calls(
      ToolFormat::kHermes, "<tool_call>{broken</tool_call><tool_call>{\"name\": \"a\", \"arguments\": {}}</tool_call>");
  EXPECT_EQ(mixed.content, "<tool_call>{broken</tool_call>");
  EXPECT_THAT(mixed.calls, ElementsAre(call("a", "{}")));
}

TEST(Tools, Llama3CallsAreTheWholeText) {
  EXPECT_THAT(read_tool_calls(ToolFormat::kLlama3,
                              " {\"name\": \"a\", \"parameters\": {\"x\": \"1;2\"}}; "
                              "{\"name\": \"b\", \"parameters\": {}}")
                  .calls,
              ElementsAre(call("a", R"({"x":"1;2"})"), call("b", "{}")));
  for (const char* text : {"plain", "{\"name\": \"a\"}", "{\"name\": \"a\", \"parameters\": {}} and more"}) {
    EXPECT_EQ(read_tool_calls(ToolFormat::kLlama3, text).content, text);
  }
}

TEST(Tools, OfAnAnswerSoFarNoCallIsShown) {
  EXPECT_EQ(certain_content(ToolFormat::kHermes, "I look <"), 7U);
  EXPECT_EQ(certain_content(ToolFormat::kHermes, "I look <tool_c"), 7U);
  EXPECT_EQ(certain_content(ToolFormat::kHermes, "I look <tool_call>{"), 7U);
  EXPECT_EQ(certain_content(ToolFormat::kHermes, "a < b"), 5U);
  EXPECT_EQ(certain_content(ToolFormat::kLlama3, " \n"), 0U);
  EXPECT_EQ(certain_content(ToolFormat::kLlama3, " {\"na"), 0U);
  EXPECT_EQ(certain_content(ToolFormat::kLlama3, " so"), 3U);
}

TEST(Tools, DefinitionsOfParametersKeepTheirReferences) {
  const OrderedJson tools = OrderedJson::parse(R"([{"type": "function", "function": {"name": "a", "parameters": {
    "type": "object", "properties": {"p": {"$ref": "#/$defs/P"}}, "$defs": {"P": {"type": "integer"}}}}}])");
  const std::string grammar = tool_grammar(ToolFormat::kHermes, tools, true);
  EXPECT_THAT(grammar, testing::HasSubstr(R"({"$ref":"#/$defs/0.P"})"));
  EXPECT_THAT(grammar, testing::HasSubstr(R"("$defs":{"0.P":{"type":"integer"}})"));
}

}  // namespace
}  // namespace moesaic::serve
