#include "moesaic/data/shape.h"

#include <gmock/gmock.h>

#include "tests/data/fixtures.h"

namespace moesaic::data {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::ThrowsMessage;

Row row_of(const char* record, DatasetConfig config = {}, const OrderedJson& header = nullptr) {
  OrderedJson json = OrderedJson::parse(record);
  return Shape(config, header, json, "f line 1").row(json, "f line 1");
}

std::string messages_of(const char* record, DatasetConfig config = {}) {
  return row_of(record, std::move(config)).messages.dump();
}

std::string error_of(const char* record, DatasetConfig config = {}) {
  try {
    row_of(record, std::move(config));
  } catch (const Error& error) {
    return error.what();
  }
  return "no error";
}

TEST(Shape, Alpaca) {
  EXPECT_EQ(messages_of(R"({"instruction": "Add.", "input": "1 2", "output": "3"})"),
            R"([{"role":"user","content":"Add.\n1 2"},{"role":"assistant","content":"3"}])");
  EXPECT_EQ(
      messages_of(R"({"instruction": "Hi", "input": "", "output": "Hello", "system": "Be kind.",
                            "history": [["a", "b"], ["c", "d"]]})"),
      R"([{"role":"system","content":"Be kind."},{"role":"user","content":"a"},{"role":"assistant","content":"b"},)"
      R"({"role":"user","content":"c"},{"role":"assistant","content":"d"},{"role":"user","content":"Hi"},)"
      R"({"role":"assistant","content":"Hello"}])");
  // CSV has no lists: history is JSON text there.
  EXPECT_EQ(row_of(R"({"instruction": "x", "output": "y", "history": "[[\"a\",\"b\"]]"})").messages.size(), 4u);
}

TEST(Shape, AlpacaWithOtherColumns) {
  DatasetConfig config;
  config.formatting = "alpaca";
  config.columns = {{"prompt", "question"}, {"response", "answer"}};
  EXPECT_EQ(messages_of(R"({"question": "q", "answer": "a", "id": 7})", config),
            R"([{"role":"user","content":"q"},{"role":"assistant","content":"a"}])");
  EXPECT_EQ(row_of(R"({"question": "q", "answer": "a", "id": 7})", config).id, "7");
}

TEST(Shape, ShareGpt) {
  EXPECT_EQ(
      messages_of(R"({"system": "S", "conversations": [{"from": "human", "value": "a"},
                            {"from": "function_call", "value": "{\"name\": \"f\", \"arguments\": {\"x\": 1}}"},
                            {"from": "observation", "value": "o"}, {"from": "gpt", "value": "b"}]})"),
      R"([{"role":"system","content":"S"},{"role":"user","content":"a"},)"
      R"({"role":"assistant","content":"","tool_calls":[{"type":"function","function":{"name":"f","arguments":{"x":1}}}]},)"
      R"({"role":"tool","content":"o"},{"role":"assistant","content":"b"}])");
  // LLaMA-Factory's way to name OpenAI's keys.
  DatasetConfig config;
  config.formatting = "sharegpt";
  config.columns = {{"messages", "messages"}};
  config.tags = {
      {"role_tag", "role"}, {"content_tag", "content"}, {"user_tag", "user"}, {"assistant_tag", "assistant"}};
  EXPECT_EQ(
      messages_of(R"({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})", config),
      R"([{"role":"user","content":"a"},{"role":"assistant","content":"b"}])");
  EXPECT_EQ(
      row_of(R"({"conversations": [{"from": "gpt", "value": "b"}], "tools": "[{\"name\": \"f\"}]"})").tools.dump(),
      R"([{"name":"f"}])");
}

TEST(Shape, TheKeysOfATurnTellItsShape) {
  const char* expected = R"([{"role":"user","content":"a"},{"role":"assistant","content":"b"}])";
  for (
      const char* record : {
          R"({"conversations": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})",
          R"({"conversations": [{"role": "human", "content": "a"}, {"role": "gpt", "content": "b"}]})",
          R"({"conversations": [{"from": "user", "value": "a"}, {"from": "assistant", "value": "b"}]})",
          R"({"messages": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]})",
          R"({"conversations": "[{\"role\": \"user\", \"content\": \"a\"}, {\"role\": \"assistant\", \"content\": \"b\"}]"})",
      }) {
    EXPECT_EQ(messages_of(record), expected) << record;
  }
  DatasetConfig config;
  config.formatting = "sharegpt";
  EXPECT_EQ(
      messages_of(R"({"conversations": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})",
                  config),
      expected);
}

TEST(Shape, TurnsKeepWhatTheySayOfThemselves) {
  EXPECT_EQ(
      messages_of(R"({"conversations": [{"from": "human", "value": "a", "weight": null},
                            {"from": "gpt", "value": "b", "weight": 0, "train": false},
                            {"from": "function_call", "value": "{\"name\": \"f\"}", "weight": 1}]})"),
      R"([{"role":"user","content":"a"},{"role":"assistant","content":"b","weight":0,"train":false},)"
      R"({"role":"assistant","content":"","tool_calls":[{"type":"function","function":{"name":"f"}}],"weight":1}])");
}

TEST(Shape, NumbersAreTextsAndBlankToolsAreNone) {
  EXPECT_EQ(messages_of(R"({"instruction": "2 + 2", "output": 4})"),
            R"([{"role":"user","content":"2 + 2"},{"role":"assistant","content":"4"}])");
  EXPECT_EQ(row_of(R"({"prompt": 1.5, "response": -3})").prompt, "1.5");
  for (const char* tools : {R"("")", R"("  ")", R"("[]")", "[]", "null", R"("null")"}) {
    const std::string record =
        fmt::format(R"({{"messages": [{{"role": "assistant", "content": "a"}}], "tools": {}}})", tools);
    EXPECT_TRUE(row_of(record.c_str()).tools.is_null()) << tools;
  }
}

TEST(Shape, Messages) {
  EXPECT_EQ(messages_of(R"({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"},
                            {"type": "text", "text": "b"}]}, {"role": "assistant", "content": "c", "train": false},
                            {"role": "assistant", "content": null, "tool_calls": [1], "weight": 0}]})"),
            R"([{"role":"user","content":"ab"},{"role":"assistant","content":"c","train":false},)"
            R"({"role":"assistant","content":"","tool_calls":[1],"weight":0}])");
}

// P3's own files: ids of T5's tokenizer beside the texts.
TEST(Shape, P3) {
  const Row row = row_of(R"({"inputs": [37, 1712], "targets": [2163, 1], "inputs_pretokenized": "The cat?",
                             "targets_pretokenized": "Yes", "answer_choices": ["No", "Yes"]})");
  EXPECT_EQ(row.prompt, "The cat?");
  EXPECT_EQ(row.target, "Yes");
}

TEST(Shape, InputsTargetsAndText) {
  for (const char* record : {R"({"inputs": "a", "targets": "b"})", R"({"inputs": "a", "target": "b"})",
                             R"({"prompt": "a", "response": "b"})", R"({"prompt": "a", "completion": "b"})"}) {
    Row row = row_of(record);
    EXPECT_TRUE(row.messages.is_null());
    EXPECT_EQ(row.prompt + "|" + row.target, "a|b") << record;
  }
  Row text = row_of(R"({"text": "abc", "meta": 1})");
  EXPECT_EQ(text.prompt + "|" + text.target, "|abc");
}

TEST(Shape, PromptAndCompletionMayBeChats) {
  EXPECT_EQ(messages_of(R"({"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
                                 {"role": "user", "content": "c"}],
                      "completion": [{"role": "assistant", "content": "d"}]})"),
            R"([{"role":"user","content":"a"},{"role":"assistant","content":"b","train":false},)"
            R"({"role":"user","content":"c"},{"role":"assistant","content":"d"}])");
  EXPECT_THAT(error_of(R"({"prompt": [{"role": "user", "content": "a"}], "completion": []})"),
              HasSubstr("'completion' is missing or empty"));
}

TEST(Shape, SuperNaturalInstructions) {
  OrderedJson header = OrderedJson::parse(R"({"Definition": ["Negate."]})");
  Row row = row_of(R"({"id": "task1-x", "input": "yes", "output": ["no", "nope"]})", {}, header);
  EXPECT_EQ(row.messages.dump(), R"([{"role":"user","content":"Negate.\n\nyes"},{"role":"assistant","content":"no"}])");
  EXPECT_EQ(row.id, "task1-x");
  EXPECT_THAT([&] { row_of(R"({"input": "yes", "output": []})", {}, header); },
              ThrowsMessage<DataError>(HasSubstr("'output' is array [], expected a list of strings")));
}

TEST(Shape, SentenceColumn) {
  DatasetConfig config;
  config.columns = {{"sentence", "e"}};
  EXPECT_THAT(row_of(R"({"text": "a", "e": [1, 0.5]})", config).sentence, ElementsAre(1.0f, 0.5f));
  EXPECT_THAT(error_of(R"({"text": "a"})", config), HasSubstr("'e' is missing or empty"));
  EXPECT_THAT(error_of(R"({"text": "a", "e": ["x"]})", config), HasSubstr("expected finite numbers"));
}

TEST(Shape, WrongRowsSayWhatIsWrong) {
  EXPECT_THAT(error_of(R"({"question": "a"})"),
              HasSubstr("f line 1: got the keys question, expected one of: messages"));
  EXPECT_THAT(error_of("[1]"), HasSubstr("got array [1], expected an object"));
  EXPECT_THAT(error_of(R"({"instruction": "a"})"), HasSubstr("'output' is missing; got the keys instruction"));
  EXPECT_THAT(error_of(R"({"inputs": true, "targets": "b"})"),
              HasSubstr("'inputs' is boolean true, expected a string"));
  EXPECT_THAT(error_of(R"({"messages": []})"), HasSubstr("'messages' is missing or empty"));
  EXPECT_THAT(error_of(R"({"messages": "hello"})"), HasSubstr("f line 1 'messages'"));
  EXPECT_THAT(error_of(R"({"messages": [{"role": "user"}]})"), HasSubstr("'content' is missing"));
  EXPECT_THAT(error_of(R"({"messages": [{"role": "bot", "content": "a"}]})"), HasSubstr("role 'bot', expected one of"));
  EXPECT_THAT(error_of(R"({"messages": [{"role": "user", "content": "a"}]})"), HasSubstr("no turn of the assistant"));
  EXPECT_THAT(error_of(R"({"messages": [{"role": "user", "content": [{"type": "image"}]}]})"), HasSubstr("type text"));
  EXPECT_THAT(error_of(R"({"conversations": [{"from": "alice", "value": "a"}]})"), HasSubstr("expected one of human"));
  EXPECT_THAT(error_of(R"({"instruction": "a", "output": "b", "history": [["x"]]})"),
              HasSubstr("expected [question, answer]"));
}

TEST(Shape, WrongConfigs) {
  DatasetConfig config;
  config.formatting = "alpacca";
  EXPECT_THAT(error_of(R"({"text": "a"})", config), HasSubstr("formatting is 'alpacca'"));
  config.formatting = "alpaca";
  config.columns = {{"promt", "x"}};
  EXPECT_THAT(error_of(R"({"text": "a"})", config), HasSubstr("unknown column 'promt'"));
  config.columns = Json::object();
  config.tags = {{"role_tag", "x"}};
  EXPECT_THAT(error_of(R"({"text": "a"})", config), HasSubstr("unknown tag 'role_tag'"));
}

}  // namespace
}  // namespace moesaic::data
