#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/tokenizer/tiny_tokenizer.h"

namespace moesaic::tokenizer {
namespace {

using testing::AllOf;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::ThrowsMessage;

// <bos>, then "role: content<eos>\n" for each message; the generation prompt is "assistant: ".
constexpr const char* kPlain =
    "{{ bos_token }}{% for m in messages %}{{ m.role + ': ' + m.content + eos_token + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}";
// Shows reasoning in the last message only.
constexpr const char* kThinking =
    "{% for m in messages %}{{ m.role }}: {% if m.reasoning_content and loop.last %}({{ m.reasoning_content }}) "
    "{% endif %}{{ m.content | trim }}<eos>{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}";

OrderedJson conversation(std::string_view text) { return OrderedJson::parse(text); }

std::string render(const char* source, std::string_view messages = "[]", bool prompt = false) {
  return ChatTemplate(source, *tiny_tokenizer()).render(conversation(messages), prompt);
}

std::vector<std::string> trained(const char* source, std::string_view messages) {
  const RenderedChat chat = ChatTemplate(source, *tiny_tokenizer()).render_for_training(conversation(messages));
  std::vector<std::string> texts;
  for (const auto& [begin, end] : chat.trained) texts.push_back(chat.text.substr(begin, end - begin));
  return texts;
}

TEST(ChatTemplate, Renders) {
  const char* messages = R"([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "a b"}])";
  EXPECT_EQ(render(kPlain, messages), "<bos>user: hi<eos>\nassistant: a b<eos>\n");
  EXPECT_EQ(render(kPlain, messages, true), "<bos>user: hi<eos>\nassistant: a b<eos>\nassistant: ");
}

TEST(ChatTemplate, GivesToolsAndFurtherVariables) {
  const ChatTemplate chat("{{ tools | tojson }} {{ bos_token }} {{ mood }} {{ documents is none }}", *tiny_tokenizer());
  EXPECT_EQ(chat.render(OrderedJson::array(), false, conversation(R"([{"z": 1, "a": "<\u00e9>"}])"),
                        {{"mood", "calm"}, {"bos_token", "[B]"}}),
            "[{\"z\": 1, \"a\": \"<\xC3\xA9>\"}] [B] calm True");
}

TEST(ChatTemplate, DropsNullsAndFindsReasoningUnderAllItsNames) {
  EXPECT_EQ(render("{{ messages[0].content is defined }}", R"([{"role": "user", "content": null}])"), "False");
  EXPECT_EQ(render("{{ messages[0].reasoning_content }} {{ messages[0].thinking }}",
                   R"([{"role": "assistant", "reasoning": "why", "thinking": null}])"),
            "why why");
}

TEST(ChatTemplate, CompileErrorsNameTheLine) {
  EXPECT_THAT([] { render("one\ntwo {% if %}\n"); }, ThrowsMessage<FormatError>(HasSubstr("line 2")));
  EXPECT_THAT([] { render("\xFF"); }, ThrowsMessage<FormatError>(HasSubstr("not valid UTF-8")));
  EXPECT_THAT([] { render(std::string(2 << 20, 'x').c_str()); }, ThrowsMessage<FormatError>(HasSubstr("at most")));
}

TEST(ChatTemplate, RefusalsKeepTheTemplatesWords) {
  EXPECT_THAT([] { render("\n{{ raise_exception('roles must alternate') }}"); },
              ThrowsMessage<DataError>(AllOf(HasSubstr("line 2: roles must alternate"))));
  EXPECT_THAT([] { render("{{ messages[3].role }}"); }, ThrowsMessage<DataError>(HasSubstr("undefined")));
  EXPECT_THAT([] { render("x", R"({"role": "user"})"); }, ThrowsMessage<DataError>(HasSubstr("messages are object")));
  EXPECT_THAT([] { render("x", R"(["hi"])"); }, ThrowsMessage<DataError>(HasSubstr("message 0 is string")));
}

TEST(ChatTemplate, InvalidTextIsADataError) {
  const ChatTemplate chat(kPlain, *tiny_tokenizer());
  const OrderedJson messages = {{{"role", "user"}, {"content", "\xC3"}}};
  EXPECT_THAT([&] { chat.render(messages, false); }, ThrowsMessage<DataError>(HasSubstr("not valid UTF-8")));
}

// Each of these would run for ages, or take all memory or stack, if nothing stopped it.
TEST(ChatTemplate, HostileTemplatesAreStopped) {
  for (const char* source : {
           "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}",
           "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
           "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
           "{% set s = 'a' * 600000 %}{{ s.replace('a', s) }}",
           "{% set s = 'a' * 600000 %}{{ s.join(range(50000)) }}",
           "{{ 'x' * 99999999999 }}",
           "{% set ns = namespace(x=[]) %}{% for i in range(100000) %}{% for j in range(100) %}{% set ns.x = [ns.x] %}"
           "{% endfor %}{% endfor %}{{ ns.x | tojson }}",
       }) {
    EXPECT_THROW(render(source), DataError) << source;
  }
}

// Each link of a chain is a level of the parser's recursion: all end in an answer or a message.
TEST(ChatTemplate, LongChainsOverflowNoStack) {
  constexpr size_t kSize = 250 << 10;  // just below what is taken at all
  const auto filled = [](const std::string& before, const std::string& link, const std::string& after) {
    std::string source = before;
    while (source.size() < kSize) source += link;
    return source + after;
  };
  for (const std::string& source :
       {filled("{{ ", "not ", "1 }}"), filled("{{ ", "-", "1 }}"), filled("{{ 1", "+1", " }}"),
        filled("{{ 'a'", "|trim", " }}"), filled("{{ a", ".b", " }}"), filled("{{ a", "[0]", " }}"),
        filled("{{ a", "()", " }}"), filled("{{ ", "1 if 0 else ", "1 }}"), filled("{{ ", "(", "1 }}"),
        filled("{{ 1", "~1", " }}"), filled("{{ 1", " and 1", " }}"), filled("{{ 1", "**1", " }}"),
        filled("{{ 1", "<1", " }}"), filled("{{ 1", " is odd", " }}"), filled("{{ ", "[", " }}"),
        filled("{% if 0 %}", "{% elif 0 %}", "{% endif %}"), filled("", "{% if 1 %}", ""),
        filled("", "{% for a in b %}", ""), filled("", "{% macro f() %}", "")}) {
    try {
      render(source.c_str());
    } catch (const DataError&) {
    }
  }
  EXPECT_THROW(render(std::string(300 << 10, 'x').c_str()), DataError);
}

TEST(RenderForTraining, TrainsTheWordsAndTheEndOfTurnToken) {
  // The line feed behind <eos> is the template's: generation stops before it.
  EXPECT_THAT(trained(kPlain, R"([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "a b "},
                                  {"role": "user", "content": "a b "}, {"role": "assistant", "content": ""}])"),
              ElementsAre("a b <eos>", "<eos>"));
  EXPECT_THAT(trained(kPlain, R"([{"role": "user", "content": "hi"}])"), ElementsAre());
}

TEST(RenderForTraining, WithoutAnEndOfTurnTokenTheSeparatorEndsTheTurn) {
  EXPECT_THAT(trained("{% for m in messages %}{{ m.role }}: {{ m.content }}\n\n{% endfor %}"
                      "{% if add_generation_prompt %}assistant: {% endif %}",
                      R"([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"},
                          {"role": "user", "content": "r"}])"),
              ElementsAre("a\n\n"));
}

TEST(RenderForTraining, LeavesMarkedMessagesOut) {
  EXPECT_THAT(trained(kPlain, R"([{"role": "assistant", "content": "1", "train": false},
                                  {"role": "assistant", "content": "2", "weight": 0},
                                  {"role": "assistant", "content": "3", "weight": 1, "train": true}])"),
              ElementsAre("3<eos>"));
  EXPECT_EQ(ChatTemplate("{{ messages }}", *tiny_tokenizer())
                .render_for_training(conversation(R"([{"role": "user", "content": "a", "train": false}])"))
                .text,
            "[{'role': 'user', 'content': 'a'}]");
}

// <bos>, then "<role>content call,call<eos>" for each message; tools in front.
constexpr const char* kCalls =
    "{{ bos_token }}{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}{% for m in messages %}<{{ m.role }}>"
    "{{ m.content or '' }}{% for c in m.tool_calls or [] %}{{ ' ' }}{{ c.function.name }}"
    "{{ c.function.arguments | tojson }}{% endfor %}<eos>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif "
    "%}";

TEST(ChatTemplate, ChoosesTheTemplateForToolsByItsName) {
  const ChatTemplate chat({{"default", "D"}, {"tool_use", "T"}, {"rag", "{{"}}, *tiny_tokenizer());
  const OrderedJson messages = conversation(R"([{"role": "user", "content": "a"}])");
  EXPECT_EQ(chat.render(messages, false), "D");
  EXPECT_EQ(chat.render(messages, false, OrderedJson::array()), "D");
  EXPECT_EQ(chat.render(messages, false, conversation(R"([{"name": "f"}])")), "T");
  EXPECT_EQ(chat.source(), "D");
  const ChatTemplate nameless({{"tool_use", "T"}}, *tiny_tokenizer());
  EXPECT_THAT([&] { nameless.render(messages, false); },
              ThrowsMessage<DataError>(HasSubstr("only those named tool_use, expected one named default")));
}

TEST(ChatTemplate, CallsAndToolsHaveOneForm) {
  const OrderedJson tools = conversation(R"([{"name": "f"}, {"type": "function", "function": {"name": "g"}}])");
  for (const char* call : {R"({"type": "function", "function": {"name": "f", "arguments": {"x": 1}}})",
                           R"({"type": "function", "function": {"name": "f", "arguments": "{\"x\": 1}"}})",
                           R"({"name": "f", "arguments": {"x": 1}})"}) {
    const OrderedJson messages = {{{"role", "assistant"}, {"tool_calls", {conversation(call)}}}};
    EXPECT_EQ(ChatTemplate(kCalls, *tiny_tokenizer()).render(messages, false, tools),
              R"(<bos>[f][g]<assistant> f{"x": 1}<eos>)")
        << call;
  }
  // Text that is no object stays text, and a template that puts texts together gets text.
  auto arguments = [](const char* source, const char* text) {
    const OrderedJson call = {{"function", {{"name", "f"}, {"arguments", conversation(text)}}}};
    return ChatTemplate(source, *tiny_tokenizer()).render({{{"role", "assistant"}, {"tool_calls", {call}}}}, false);
  };
  EXPECT_EQ(arguments("{{ messages[0].tool_calls[0].function.arguments | tojson }}", R"("x = 1")"), R"("x = 1")");
  EXPECT_EQ(arguments("{{ 'a' + messages[0].tool_calls[0].function.arguments }}", R"("{\"x\": 1}")"), R"(a{"x": 1})");
  EXPECT_EQ(arguments("{{ 'a' + messages[0].tool_calls[0].function.arguments }}", R"({"x":1})"), R"(a{"x":1})");
}

TEST(ChatTemplate, KnowsWhatItWritesBehindAnAnswer) {
  EXPECT_EQ(ChatTemplate(kPlain, *tiny_tokenizer()).end_of_turn(), "<eos>");
  EXPECT_EQ(ChatTemplate("{% for m in messages %}{{ m.content }}\n{% endfor %}", *tiny_tokenizer()).end_of_turn(),
            std::nullopt);
  EXPECT_EQ(ChatTemplate("{{ raise_exception('no') }}", *tiny_tokenizer()).end_of_turn(), std::nullopt);
}

TEST(RenderForTraining, LearnsCallsAndTheirEnds) {
  const char* messages = R"([{"role": "user", "content": "q"},
      {"role": "assistant", "content": null, "tool_calls": [{"function": {"name": "f", "arguments": {"x": "f"}}}]},
      {"role": "tool", "content": "f"},
      {"role": "assistant", "content": "a", "tool_calls": [{"function": {"name": "g", "arguments": {"n": 2}}},
                                                         {"function": {"name": "h", "arguments": {}}}]},
      {"role": "assistant", "tool_calls": [{"name": "k", "arguments": "{\"y\": \"\\n z\"}"}]},
      {"role": "tool", "content": "g{}"}, {"role": "tool", "content": "h"}, {"role": "assistant", "content": "b"}])";
  EXPECT_THAT(trained(kCalls, messages),
              ElementsAre(R"( f{"x": "f"}<eos>)", R"(a g{"n": 2} h{}<eos>)", R"( k{"y": "\n z"}<eos>)", "b<eos>"));
}

TEST(RenderForTraining, LearnsGenerationBlocksAsTheyAre) {
  const char* source =
      "{% for m in messages %}{{ m.role }}:{% if m.role == 'assistant' %} {% generation %}{{ m.content }}!"
      "{% endgeneration %}<eos>{% else %}{{ m.content }}{% endif %}{% endfor %}";
  EXPECT_THAT(
      trained(source, R"([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "train": false},
                                  {"role": "assistant", "content": ""}, {"role": "assistant", "content": "b"}])"),
      ElementsAre("!", "b!"));
}

TEST(RenderForTraining, WorkGrowsWithTheLengthAlone) {
  // Each round adds a step of work; comparing renderings of every beginning would take about 4000 * 4000.
  OrderedJson messages = OrderedJson::array();
  for (int round = 0; round < 2000; ++round) {
    messages.push_back({{"role", "user"}, {"content", "a"}});
    messages.push_back({{"role", "assistant"}, {"content", fmt::format("b{}", round)}});
  }
  const RenderedChat chat = ChatTemplate(kPlain, *tiny_tokenizer()).render_for_training(messages);
  ASSERT_EQ(chat.trained.size(), 2000u);
  EXPECT_EQ(chat.text.substr(chat.trained[1999].first, 10), "b1999<eos>");
}

TEST(RenderForTraining, ATemplateThatReadsWordsByTheLetterIsRefused) {
  EXPECT_THAT(
      [] {
        trained("{% for m in messages %}{{ m.content | length }}{{ m.content }}<eos>{% endfor %}",
                R"([{"role": "assistant", "content": "a"}])");
      },
      ThrowsMessage<DataError>(HasSubstr("cannot tell which part")));
  EXPECT_THAT([] { trained(kPlain, "[{\"role\": \"assistant\", \"content\": \"\xEF\xB7\x90\"}]"); },
              ThrowsMessage<DataError>(HasSubstr("noncharacters")));
}

TEST(RenderForTraining, FindsTurnsThatLoseTheirReasoning) {
  EXPECT_THAT(trained(kThinking, R"([{"role": "user", "content": "q"},
                                     {"role": "assistant", "content": " one ", "reasoning_content": "because"},
                                     {"role": "user", "content": "one"},
                                     {"role": "assistant", "content": "two", "reasoning_content": "so"}])"),
              ElementsAre("one<eos>", "(so) two<eos>"));
}

TEST(RenderForTraining, ATurnNeverEndsInsideACharacter) {
  // The sign behind a turn is é in the last one and è before; both begin with the same byte.
  const char* source = "{% for m in messages %}{{ m.content }}{% if loop.last %}é{% else %}è{% endif %}{% endfor %}";
  EXPECT_THAT(trained(source, R"([{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}])"),
              ElementsAre("a"));
}

TEST(RenderForTraining, ATurnTheTemplateDoesNotShowIsAnError) {
  const char* last_only = "{{ messages[-1].content }}";
  EXPECT_THAT(
      [&] { trained(last_only, R"([{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}])"); },
      ThrowsMessage<DataError>(HasSubstr("message 0")));
}

}  // namespace
}  // namespace moesaic::tokenizer
