#include "moesaic/data/templates.h"

#include <gmock/gmock.h>

#include "moesaic/formats/checkpoint.h"
#include "tests/data/fixtures.h"

namespace moesaic::data {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::ThrowsMessage;

OrderedJson talk(const std::vector<std::pair<const char*, const char*>>& turns) {
  OrderedJson messages = OrderedJson::array();
  for (const auto& [role, content] : turns) messages.push_back({{"role", role}, {"content", content}});
  return messages;
}

/// word_tokenizer() that knows the formats' ends of turn.
tokenizer::Tokenizer turn_tokenizer() {
  Json json = Json::parse(word_tokenizer()->json());
  int id = 6;
  for (const char* token : {"<|im_end|>", "<end_of_turn>", "<|eot_id|>"}) {
    Json added = json["added_tokens"][0];
    added["id"] = id;
    added["content"] = token;
    json["added_tokens"].push_back(added);
    json["model"]["vocab"][token] = id++;
  }
  return tokenizer::Tokenizer(json.dump(), word_tokenizer()->config(), "test");
}

struct Format {
  const char* name;
  const char* question;  // one user turn, and the answer begins
  const char* talk;      // system, user, assistant, user, assistant
  const char* learnt;    // of the last answer
};
void PrintTo(const Format& format, std::ostream* out) { *out << format.name; }

class Formats : public testing::TestWithParam<Format> {
 protected:
  const tokenizer::ChatTemplate chat_{*template_source(GetParam().name), turn_tokenizer()};
};

// The texts are those of LLaMA-Factory's templates, put down by hand; <s> and </s> are the tokenizer's BOS and EOS.
TEST_P(Formats, AreTextsOfLlamaFactory) {
  EXPECT_EQ(chat_.render(talk({{"user", "2+2?"}}), /*add_generation_prompt=*/true), GetParam().question);
  const OrderedJson messages = talk({{"system", "Be brief."},
                                     {"user", "2+2?"},
                                     {"assistant", "4"},
                                     {"user", "And it's squared?"},
                                     {"assistant", "16"}});
  EXPECT_EQ(chat_.render(messages, /*add_generation_prompt=*/false), GetParam().talk);
}

TEST_P(Formats, TheAnswerAndItsEndAreLearnt) {
  const auto chat = chat_.render_for_training(talk({{"user", "a"}, {"assistant", "b c"}}));
  ASSERT_EQ(chat.trained.size(), 1u);
  const auto [begin, end] = chat.trained[0];
  EXPECT_EQ(chat.text.substr(begin, end - begin), GetParam().learnt);
  EXPECT_EQ(chat.text.substr(0, begin), chat_.render(talk({{"user", "a"}}), /*add_generation_prompt=*/true));
}

TEST_P(Formats, RefuseWhatTheyHaveNoWordsFor) {
  EXPECT_THAT([&] { chat_.render(talk({{"user", "a"}}), true, OrderedJson::parse(R"([{"name": "f"}])")); },
              ThrowsMessage<DataError>(HasSubstr("no words for tools")));
  EXPECT_THAT([&] { chat_.render(talk({{"user", "a"}, {"narrator", "b"}}), true); },
              ThrowsMessage<DataError>(HasSubstr("user, assistant and tool turns alone")));
}

INSTANTIATE_TEST_SUITE_P(
    All, Formats,
    testing::Values(
        Format{"alpaca",
               "Below is an instruction that describes a task. Write a response that appropriately completes the "
               "request.\n\n### Instruction:\n2+2?\n\n### Response:\n",
               "Be brief.### Instruction:\n2+2?\n\n### Response:\n4</s>\n\n"
               "### Instruction:\nAnd it's squared?\n\n### Response:\n16</s>\n\n",
               "b c</s>"},
        Format{"chatml", "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n",
               "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n"
               "<|im_start|>assistant\n4<|im_end|>\n<|im_start|>user\nAnd it's squared?<|im_end|>\n"
               "<|im_start|>assistant\n16<|im_end|>\n",
               "b c<|im_end|>"},
        Format{"default", "Human: 2+2?</s>\nAssistant:",
               "System: Be brief.</s>\nHuman: 2+2?</s>\nAssistant:4</s>\n"
               "Human: And it's squared?</s>\nAssistant:16</s>\n",
               "b c</s>"},
        Format{"gemma", "<s><start_of_turn>user\n2+2?<end_of_turn>\n<start_of_turn>model\n",
               "<s><start_of_turn>user\nBe brief.\n\n2+2?<end_of_turn>\n<start_of_turn>model\n4<end_of_turn>\n"
               "<start_of_turn>user\nAnd it's squared?<end_of_turn>\n<start_of_turn>model\n16<end_of_turn>\n",
               "b c<end_of_turn>"},
        Format{"llama3",
               "<s><|start_header_id|>user<|end_header_id|>\n\n2+2?<|eot_id|>"
               "<|start_header_id|>assistant<|end_header_id|>\n\n",
               "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
               "<|start_header_id|>user<|end_header_id|>\n\n2+2?<|eot_id|>"
               "<|start_header_id|>assistant<|end_header_id|>\n\n4<|eot_id|>"
               "<|start_header_id|>user<|end_header_id|>\n\nAnd it's squared?<|eot_id|>"
               "<|start_header_id|>assistant<|end_header_id|>\n\n16<|eot_id|>",
               "b c<|eot_id|>"},
        Format{"mistral", "<s>[INST] 2+2?[/INST]",
               "<s>[INST] Be brief.\n\n2+2?[/INST] 4</s>[INST] And it's squared?[/INST] 16</s>", " b c</s>"}));

TEST(Templates, EveryNameHasATest) {
  EXPECT_THAT(template_names(), ElementsAre("alpaca", "chatml", "default", "gemma", "llama3", "mistral"));
  EXPECT_EQ(template_source("auto"), std::nullopt);
}

/// A checkpoint of words alone.
class Words : public formats::Checkpoint {
 public:
  Words() { config_ = {{"model_type", "llama"}}; }
  std::vector<std::string> names() const override { return {}; }
  bool contains(const std::string&) const override { return false; }
  std::vector<int64_t> shape(const std::string&) const override { return {}; }
  at::ScalarType dtype(const std::string&) const override { return at::kFloat; }
  at::Tensor tensor(const std::string&) const override { return {}; }
  void read_into(const std::string&, at::Tensor) const override {}
  std::optional<std::string> tokenizer_json() const override { return word_tokenizer()->json(); }
  Json tokenizer_config() const override { return word_tokenizer()->config(); }
  formats::ChatTemplates chat_templates() const override { return {{"default", "D"}, {"rag", "R"}}; }
  Json generation_config() const override { return Json::object(); }
  std::string fingerprint() const override { return ""; }
};

TEST(Templates, AreFoundByName) {
  EXPECT_EQ(chat_templates(Words(), "rag").at("default"), "R");
  EXPECT_EQ(chat_templates(Words(), "auto").at("default"), "D");
  EXPECT_EQ(chat_templates(Words(), "default").at("default"), *template_source("default"));
  EXPECT_THAT([] { chat_templates(Words(), "chat_ml"); },
              ThrowsMessage<UsageError>(testing::AllOf(
                  HasSubstr("auto, none, alpaca, chatml, default, gemma, llama3, mistral, rag, or a file"),
                  HasSubstr("Did you mean 'chatml'?"))));
}

TEST(Templates, AnEndOfTurnThatIsNoTokenIsRefused) {
  RenderOptions options;
  options.template_name = "chatml";
  EXPECT_THAT([&] { Renderer::open(Words(), options); },
              ThrowsMessage<UsageError>(HasSubstr("no special token of the model's tokenizer")));
  options.template_name = "alpaca";
  Row row;
  row.prompt = "w0";
  row.target = "w1";
  const auto example = Renderer::open(Words(), options)->render(row);
  EXPECT_EQ(example->ids[example->ids.size() - 1], 1);  // EOS
  EXPECT_EQ(example->mask.back(), 1);
}

}  // namespace
}  // namespace moesaic::data
