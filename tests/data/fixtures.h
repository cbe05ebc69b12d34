// A folder that is removed at the end of a test, and a tokenizer of whole words.
#pragma once
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <memory>
#include <string>

#include "moesaic/data/dataset.h"
#include "moesaic/tokenizer/tokenizer.h"
#include "tests/temporary_folder.h"

namespace moesaic::data {

class FolderTest : public testing::Test {
 protected:
  std::filesystem::path write(const std::string& name, std::string_view bytes) const {
    std::filesystem::create_directories((folder_ / name).parent_path());
    std::ofstream(folder_ / name, std::ios::binary) << bytes;
    return folder_ / name;
  }

  /// A dataset of the one file `name` with these bytes.
  DatasetConfig dataset(const std::string& name, std::string_view bytes) const {
    DatasetConfig config;
    config.name = name;
    config.path = write(name, bytes);
    return config;
  }

  const test::TemporaryFolder temporary_;
  const std::filesystem::path folder_ = temporary_.path();
};

inline std::vector<Row> read_all(const DatasetConfig& config) {
  auto reader = RowReader::open(config);
  std::vector<Row> rows;
  while (auto row = reader->next()) rows.push_back(std::move(*row));
  return rows;
}

/// Words between spaces; BOS 0 (added by the post-processor), EOS 1, <|user|> 2, <|bot|> 3, <|end|> 4, unknown 5;
/// then w0 = 10, w1 = 11, ... w89 = 99.
inline std::shared_ptr<tokenizer::Tokenizer> word_tokenizer() {
  Json json = Json::parse(R"({
    "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "decoder": null,
    "added_tokens": [],
    "pre_tokenizer": {"type": "WhitespaceSplit"},
    "post_processor": {"type": "TemplateProcessing",
      "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
      "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
      "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}}},
    "model": {"type": "WordLevel", "unk_token": "<unk>", "vocab": {}}
  })");
  int id = 0;
  for (const char* token : {"<s>", "</s>", "<|user|>", "<|bot|>", "<|end|>", "<unk>"}) {
    json["added_tokens"].push_back({{"id", id},
                                    {"content", token},
                                    {"single_word", false},
                                    {"lstrip", false},
                                    {"rstrip", false},
                                    {"normalized", false},
                                    {"special", true}});
    json["model"]["vocab"][token] = id++;
  }
  for (int word = 0; word < 90; ++word) json["model"]["vocab"][fmt::format("w{}", word)] = 10 + word;
  return std::make_shared<tokenizer::Tokenizer>(json.dump(), Json{{"bos_token", "<s>"}, {"eos_token", "</s>"}}, "test");
}

/// <s><|user|>question<|bot|>answer<|end|>...
inline std::shared_ptr<tokenizer::ChatTemplate> word_template(const tokenizer::Tokenizer& tokenizer) {
  return std::make_shared<tokenizer::ChatTemplate>(
      "{{ bos_token }}{% for m in messages %}{{ '<|bot|>' if m.role == 'assistant' else '<|user|>' }} {{ m.content }} "
      "{% if m.role == 'assistant' %}<|end|>{% endif %}{% endfor %}{% if add_generation_prompt %}<|bot|>{% endif %}",
      tokenizer);
}

}  // namespace moesaic::data
