#include "moesaic/formats/model_folder.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include "moesaic/formats/checkpoint.h"
#include "tests/formats/files.h"

namespace moesaic::formats {
namespace {

using test::TemporaryFolder;

ModelFolder tiny() {
  ModelFolder model;
  model.config = {{"model_type", "llama"},
                  {"tie_word_embeddings", true},
                  {"rope_parameters", {{"rope_type", "linear"}, {"rope_theta", 9e3}, {"factor", 2.0}}}};
  const at::Tensor embedding = torch::arange(8, at::kFloat).reshape({4, 2});
  model.tensors = {{"model.embed_tokens.weight", embedding},
                   {"lm_head.weight", embedding},
                   {"model.norm.weight", torch::tensor({1.f, 2.f})},
                   {"position_ids", torch::arange(3)}};
  return model;
}

std::vector<std::string> files_of(const std::filesystem::path& dir) {
  std::vector<std::string> names;
  for (const auto& entry : std::filesystem::directory_iterator(dir)) names.push_back(entry.path().filename());
  return names;
}

TEST(ModelFolder, RoundTripWithTheTiedHeadOnce) {
  TemporaryFolder folder;
  ModelFolder model = tiny();
  model.dtype = at::kBFloat16;
  model.tokenizer.json = "{}";
  model.tokenizer.config = {{"bos_token", "<s>"}};
  model.tokenizer.chat_templates = {{"default", "{{ x }}"}, {"tool_use", "{{ tools }}"}};
  model.generation_config = {{"eos_token_id", 3}};
  write_model_folder(folder / "deep" / "er", model);

  const auto read = open_folder(folder / "deep" / "er");
  EXPECT_THAT(read->names(), testing::ElementsAre("model.embed_tokens.weight", "model.norm.weight", "position_ids"));
  EXPECT_EQ(read->dtype("model.norm.weight"), at::kBFloat16);
  EXPECT_EQ(read->dtype("position_ids"), at::kLong) << "integers stay";
  EXPECT_TRUE(at::equal(read->tensor("model.embed_tokens.weight").to(at::kFloat), model.tensors["lm_head.weight"]));
  EXPECT_EQ(read->config()["dtype"], "bfloat16");
  EXPECT_EQ(read->config()["rope_parameters"], model.config["rope_parameters"]);
  EXPECT_EQ(read_json(folder / "deep" / "er" / "config.json")["rope_theta"], 9e3) << "for older readers";
  EXPECT_EQ(read->tokenizer_json(), "{}");
  EXPECT_EQ(read->tokenizer_config()["bos_token"], "<s>");
  EXPECT_EQ(read->chat_templates(), model.tokenizer.chat_templates);
  EXPECT_EQ(read->generation_config()["eos_token_id"], 3);
}

TEST(ModelFolder, ShardsOfALimitedSize) {
  TemporaryFolder folder;
  ModelFolder model = tiny();
  model.max_shard_bytes = 40;  // embedding 32 + norm 8 | position_ids 24
  write_model_folder(folder.path(), model);
  EXPECT_THAT(files_of(folder.path()),
              testing::UnorderedElementsAre("config.json", "model-00001-of-00002.safetensors",
                                            "model-00002-of-00002.safetensors", "model.safetensors.index.json"));
  EXPECT_EQ(read_json(folder / "model.safetensors.index.json")["metadata"]["total_size"], 64);
  const auto read = open_folder(folder.path());
  EXPECT_EQ(read->names().size(), 3u);
  EXPECT_TRUE(at::equal(read->tensor("position_ids"), torch::arange(3)));

  model.max_shard_bytes = 1000;
  write_model_folder(folder.path(), model);
  EXPECT_THAT(files_of(folder.path()), testing::UnorderedElementsAre("config.json", "model.safetensors"));
  model.max_shard_bytes = 1;
  write_model_folder(folder.path(), model);
  EXPECT_EQ(open_folder(folder.path())->names().size(), 3u) << "no old model.safetensors in the way";
}

TEST(ModelFolder, AHeadThatIsNotTiedIsKeptOrRefused) {
  TemporaryFolder folder;
  ModelFolder model = tiny();
  model.tensors["lm_head.weight"] = torch::zeros({4, 2});
  EXPECT_ERROR(write_model_folder(folder.path(), model), DataError, "lm_head.weight", "differs");
  test::write_file(folder / "file", "");
  EXPECT_ERROR(write_model_folder(folder / "file" / "model", tiny()), DataError, "can't be made");
  model.config["tie_word_embeddings"] = false;
  write_model_folder(folder.path(), model);
  EXPECT_TRUE(open_folder(folder.path())->contains("lm_head.weight"));
}

}  // namespace
}  // namespace moesaic::formats
