#include <gmock/gmock.h>

#include "tests/data/fixtures.h"

namespace moesaic::data {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::ThrowsMessage;

constexpr int64_t kBos = 0, kEos = 1, kUser = 2, kBot = 3, kEnd = 4;

Renderer renderer(RenderOptions options = {}) {
  auto tokenizer = word_tokenizer();
  return Renderer(tokenizer, word_template(*tokenizer), options);
}

Renderer raw_renderer(RenderOptions options = {}) {
  options.template_name = "none";
  return renderer(options);
}

Row pair(std::string prompt, std::string target) {
  Row row;
  row.prompt = std::move(prompt);
  row.target = std::move(target);
  return row;
}

Row chat(std::vector<std::pair<std::string, std::string>> turns) {
  Row row;
  row.messages = OrderedJson::array();
  for (auto& [role, content] : turns) row.messages.push_back({{"role", role}, {"content", content}});
  return row;
}

std::vector<int64_t> targets(const Example& example) {
  std::vector<int64_t> ids;
  for (size_t i = 0; i < example.ids.size(); ++i) {
    if (example.mask[i]) ids.push_back(example.ids[i]);
  }
  return ids;
}

TEST(Renderer, RawPairsAreBosPromptAnswerEos) {
  auto example = raw_renderer().render(pair("w0 w1", "w2 w3"));
  EXPECT_THAT(example->ids, ElementsAre(kBos, 10, 11, 12, 13, kEos));
  EXPECT_THAT(example->mask, ElementsAre(0, 0, 0, 1, 1, 1));
  // The prompt's ids are what generation is given.
  EXPECT_THAT(raw_renderer().render_prompt(pair("w0 w1", "w2 w3")), ElementsAre(kBos, 10, 11));
  // A prompt that holds its BOS gets no second one.
  EXPECT_THAT(raw_renderer().render(pair("<s> w0", "w1"))->ids, ElementsAre(kBos, 10, 11, kEos));
}

TEST(Renderer, TextIsAllTarget) {
  for (const Renderer& r : {renderer(), raw_renderer()}) {
    auto example = r.render(pair("", "w5 w6"));
    EXPECT_THAT(example->ids, ElementsAre(kBos, 15, 16, kEos));
    EXPECT_THAT(example->mask, ElementsAre(0, 1, 1, 1));
  }
}

TEST(Renderer, ConversationsTrainTheAssistantAndItsEndOfTurn) {
  auto example = renderer().render(chat({{"user", "w0"}, {"assistant", "w1"}, {"user", "w2"}, {"assistant", "w3 w4"}}));
  EXPECT_THAT(example->ids, ElementsAre(kBos, kUser, 10, kBot, 11, kEnd, kUser, 12, kBot, 13, 14, kEnd));
  EXPECT_THAT(targets(*example), ElementsAre(11, kEnd, 13, 14, kEnd));
  // inputs/targets become the same conversation.
  EXPECT_EQ(renderer().render(pair("w0", "w1"))->ids,
            renderer().render(chat({{"user", "w0"}, {"assistant", "w1"}}))->ids);
}

TEST(Renderer, PromptsAreTheStartOfExamples) {
  Row row = chat({{"user", "w0"}, {"assistant", "w1"}, {"user", "w2"}, {"assistant", "w3"}});
  EXPECT_THAT(renderer().render_prompt(row), ElementsAre(kBos, kUser, 10, kBot, 11, kEnd, kUser, 12, kBot));
  OrderedJson messages = {{{"role", "user"}, {"content", "w7"}}};
  EXPECT_THAT(renderer().render_prompt(messages), ElementsAre(kBos, kUser, 17, kBot));
  EXPECT_THAT(raw_renderer().render_prompt(messages), ElementsAre(kBos, 17));
}

TEST(Renderer, UntrainedTurnsAreNotTargets) {
  Row row = chat({{"user", "w0"}, {"assistant", "w1"}, {"user", "w2"}, {"assistant", "w3"}});
  row.messages[1]["train"] = false;
  EXPECT_THAT(targets(*renderer().render(row)), ElementsAre(13, kEnd));
  row.messages[3]["weight"] = 0;
  EXPECT_EQ(renderer().render(row), std::nullopt);
}

TEST(Renderer, ATemplateThatNeverEndsATurnGetsEos) {
  auto tokenizer = word_tokenizer();
  auto open =
      std::make_shared<tokenizer::ChatTemplate>("{% for m in messages %}{{ m.content }} {% endfor %}", *tokenizer);
  auto example = Renderer(tokenizer, open, {}).render(chat({{"user", "w0"}, {"assistant", "w1"}}));
  EXPECT_EQ(example->ids.back(), kEos);
  EXPECT_EQ(example->mask.back(), 1);
}

TEST(Renderer, EveryUncutExampleEndsInATargetThatStops) {
  // Also where the answer's last word is the EOS token's own text: masks go by place, never by id.
  for (const Row& row :
       {pair("w0", "w1"), pair("w0", "w1 </s>"), chat({{"user", "w0"}, {"assistant", "w1 <|end|>"}})}) {
    for (const Renderer& r : {renderer(), raw_renderer()}) {
      auto example = r.render(row);
      EXPECT_EQ(example->mask.back(), 1);
      EXPECT_EQ(example->ids.back(), r.chat_template() != nullptr ? kEnd : kEos);
    }
  }
}

TEST(Renderer, LongPromptsLoseTheirMiddle) {
  // 1 BOS + 8 words of prompt, 2 + EOS of answer; 8 tokens leave 5 of the prompt: 3 at its head, 2 at its tail.
  RenderOptions options;
  options.cutoff_len = 8;
  auto example = raw_renderer(options).render(pair("w0 w1 w2 w3 w4 w5 w6 w7", "w20 w21"));
  EXPECT_THAT(example->ids, ElementsAre(kBos, 10, 11, 16, 17, 30, 31, kEos));
  EXPECT_THAT(example->mask, ElementsAre(0, 0, 0, 0, 0, 1, 1, 1));
}

TEST(Renderer, LongAnswersLoseTheirEnd) {
  RenderOptions options;
  options.cutoff_len = 6;
  auto example = raw_renderer(options).render(pair("w0", "w20 w21 w22 w23 w24 w25"));
  EXPECT_THAT(example->ids, ElementsAre(kBos, 10, 30, 31, 32, 33));
  // Both long: half each.
  example = raw_renderer(options).render(pair("w0 w1 w2 w3 w4", "w20 w21 w22 w23"));
  EXPECT_THAT(example->ids, ElementsAre(kBos, 10, 14, 30, 31, 32));
  options.cutoff_len = 100;
  options.target_cutoff_len = 2;
  example = raw_renderer(options).render(pair("w0 w1", "w20 w21 w22"));
  EXPECT_THAT(example->ids, ElementsAre(kBos, 10, 11, 30, 31));
}

TEST(Renderer, NothingToTrainOnIsNoExample) {
  EXPECT_EQ(raw_renderer().render(pair("w0", " ")), std::nullopt);
  EXPECT_EQ(renderer().render(pair("w0", "")), std::nullopt);
  EXPECT_EQ(renderer().render(pair("", "")), std::nullopt);
}

TEST(Renderer, TrainOnPromptMarksEverythingAndKeepsWherePromptsEnd) {
  RenderOptions options;
  options.train_on_prompt = true;
  const auto example = raw_renderer(options).render(pair("w0", "w1"));
  EXPECT_THAT(example->mask, ElementsAre(1, 1, 1, 1));
  EXPECT_THAT(example->prompt_ends, ElementsAre(2));
}

TEST(Renderer, TextsThatSpellBosOrEosGetNoOther) {
  EXPECT_THAT(raw_renderer().render(pair("", "<s> w5 </s>"))->ids, ElementsAre(kBos, 15, kEos));
  EXPECT_THAT(raw_renderer().render(pair("w0", "w1 </s>"))->ids, ElementsAre(kBos, 10, 11, kEos));
}

TEST(Renderer, Errors) {
  Row row = chat({{"system", "w9"}, {"user", "w0"}, {"assistant", "w1"}});
  row.where = "f.jsonl line 3";
  EXPECT_THAT([&] { raw_renderer().render(row); },
              ThrowsMessage<DataError>(HasSubstr("f.jsonl line 3: without a chat template")));
  auto tokenizer = word_tokenizer();
  auto strict = std::make_shared<tokenizer::ChatTemplate>("{{ raise_exception('no system turn') }}", *tokenizer);
  EXPECT_THAT([&] { Renderer(tokenizer, strict, {}).render(row); },
              ThrowsMessage<DataError>(AllOf(HasSubstr("f.jsonl line 3"), HasSubstr("no system turn"))));
  RenderOptions options;
  options.cutoff_len = 1;
  EXPECT_THROW(renderer(options), UsageError);
}

}  // namespace
}  // namespace moesaic::data
