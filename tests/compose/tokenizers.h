// The tokenizers of golden/, and texts that are hard on them.
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "moesaic/base/json.h"
#include "moesaic/tokenizer/tokenizer.h"

namespace moesaic::test {

/// gpt2, llama3 (byte-level BPE), llama2 (BPE with byte fallback and a blank put in front), unigram. `start`: the name
/// of its BOS, or "" for a tokenizer without BOS and EOS.
inline std::shared_ptr<tokenizer::Tokenizer> golden_tokenizer(const std::string& name,
                                                              const std::string& start = "<s>") {
  const std::string path = std::string(MOESAIC_SOURCE_DIR) + "/tests/compose/golden/" + name + ".json";
  const Json config = start.empty() ? Json::object() : Json{{"bos_token", start}, {"eos_token", "</s>"}};
  return std::make_shared<tokenizer::Tokenizer>(read_file(path), config, path);
}

/// The unigram vocabulary as T5 reads with one: words by white space, </s> behind a text, prompts apart.
inline std::shared_ptr<tokenizer::Tokenizer> encoder_tokenizer() {
  const auto unigram = golden_tokenizer("unigram");
  Json json = Json::parse(unigram->json());
  const Json text{{"Sequence", {{"id", "A"}, {"type_id", 0}}}}, end{{"SpecialToken", {{"id", "</s>"}, {"type_id", 0}}}};
  const Json id = *unigram->token_to_id("</s>");
  json["post_processor"] = {{"type", "TemplateProcessing"},
                            {"single", {text, end}},
                            {"pair", {text, end}},
                            {"special_tokens", {{"</s>", {{"id", "</s>"}, {"ids", {id}}, {"tokens", {"</s>"}}}}}}};
  json["pre_tokenizer"] = {{"type", "Sequence"},
                           {"pretokenizers", {Json{{"type", "WhitespaceSplit"}}, json["pre_tokenizer"]}}};
  return std::make_shared<tokenizer::Tokenizer>(json.dump(), Json{{"eos_token", "</s>"}}, "unigram", true);
}

/// The text of each prefix as far as its characters are complete.
inline std::vector<std::string> complete_texts(const std::shared_ptr<const tokenizer::Tokenizer>& anchor,
                                               const std::vector<int64_t>& ids) {
  tokenizer::StreamDecoder decoder(anchor);
  std::vector<std::string> texts;
  std::string text;
  for (const int64_t id : ids) texts.push_back(text += decoder.push(id));
  return texts;
}

inline const std::vector<std::string>& hard_texts() {
  static const std::vector<std::string> texts{
      "The keeper wrote until tomorrow, and nobody'll ask.",
      "  two  blanks\n\n   and\tlines \r\n",
      "Möwen über den Dächern: élèves, crêpes — naïve café",
      "смотритель маяка считал корабли",
      "老守塔人数着黎明前经过的船只，把每一个名字都写进一本灰色的长书里。书里还有风暴和沉船的故事。",
      "คนเฝ้าประภาคารนับเรือที่แล่นผ่านก่อนรุ่งสาง",
      "👍🏽 family 👨‍👩‍👧‍👦 flags 🇨🇭🇹🇭 end",
      "def f(x):\n    return x**2  # 1234567",
      "a",
      "supercalifragilisticexpialidociousantidisestablishmentarianism!",
  };
  return texts;
}

}  // namespace moesaic::test
