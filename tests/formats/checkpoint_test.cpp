#include "moesaic/formats/checkpoint.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include "moesaic/formats/model_folder.h"
#include "moesaic/formats/safetensors.h"
#include "tests/formats/files.h"

namespace moesaic::formats {
namespace {

using test::TemporaryFolder;
using test::write_file;

constexpr const char* kConfig = R"({"model_type": "llama", "hidden_size": 4, "rope_theta": 500.0})";

const char* kEmbedding = "model.embed_tokens.weight";
const char* kNorm = "model.norm.weight";

TensorMap two_tensors() {
  return {{kEmbedding, torch::arange(12, at::kFloat).reshape({3, 4})}, {kNorm, torch::ones({4}, at::kBFloat16)}};
}

/// Two shards and their index; the text of the index may be replaced.
void write_shards(
    const std::filesystem::path& dir,
    const std::string& index =
        R"({"metadata": {"total_size": 56}, "weight_map": {"model.embed_tokens.weight": "model-00001-of-00002.safetensors",
        "model.norm.weight": "model-00002-of-00002.safetensors"}})") {
  write_file(dir / "config.json", kConfig);
  save_safetensors(dir / "model-00001-of-00002.safetensors", {{kEmbedding, two_tensors()[kEmbedding]}});
  save_safetensors(dir / "model-00002-of-00002.safetensors", {{kNorm, two_tensors()[kNorm]}});
  write_file(dir / "model.safetensors.index.json", index);
}

TEST(Checkpoint, SingleFile) {
  TemporaryFolder folder;
  write_file(folder / "config.json", kConfig);
  save_safetensors(folder / "model.safetensors", two_tensors());
  const auto checkpoint = open_folder(folder.path());
  EXPECT_EQ(checkpoint->path(), folder.path());
  EXPECT_EQ(checkpoint->config()["rope_parameters"]["rope_theta"], 500.0);
  EXPECT_THAT(checkpoint->names(), testing::ElementsAre(kEmbedding, kNorm));
  EXPECT_TRUE(checkpoint->contains(kNorm));
  EXPECT_FALSE(checkpoint->contains("norm"));
  EXPECT_THAT(checkpoint->shape(kEmbedding), testing::ElementsAre(3, 4));
  EXPECT_EQ(checkpoint->dtype(kNorm), at::kBFloat16);
  EXPECT_TRUE(at::equal(checkpoint->tensor(kEmbedding), two_tensors()[kEmbedding]));
  EXPECT_EQ(checkpoint->tokenizer_json(), std::nullopt);
  EXPECT_TRUE(checkpoint->chat_templates().empty());
  EXPECT_EQ(checkpoint->generation_config(), Json::object());
  EXPECT_ERROR(checkpoint->tensor("x"), DataError, "'x'");
}

TEST(Checkpoint, ReadIntoConvertsToAnyDtypeAndStrides) {
  TemporaryFolder folder;
  write_file(folder / "config.json", kConfig);
  save_safetensors(folder / "model.safetensors", two_tensors());
  const auto checkpoint = open_folder(folder.path());
  at::Tensor transposed = torch::zeros({4, 3}, at::kBFloat16);
  checkpoint->read_into(kEmbedding, transposed.t());
  EXPECT_TRUE(at::equal(transposed, two_tensors()[kEmbedding].t().to(at::kBFloat16)));
  at::Tensor wide = torch::zeros({4}, at::kDouble);
  checkpoint->read_into(kNorm, wide);
  EXPECT_TRUE(at::equal(wide, torch::ones({4}, at::kDouble)));
  EXPECT_ERROR(checkpoint->read_into(kEmbedding, torch::zeros({4, 3})), ShapeError, kEmbedding, "3x4", "4x3");
}

TEST(Checkpoint, ShardsLookLikeOneFile) {
  TemporaryFolder one, two;
  write_file(one / "config.json", kConfig);
  save_safetensors(one / "model.safetensors", two_tensors());
  write_shards(two.path());
  const auto single = open_folder(one.path()), sharded = open_folder(two.path());
  EXPECT_EQ(sharded->names(), single->names());
  for (const auto& name : single->names()) EXPECT_TRUE(at::equal(sharded->tensor(name), single->tensor(name)));
  EXPECT_EQ(sharded->fingerprint(), single->fingerprint());
}

TEST(Checkpoint, BadIndexes) {
  const auto expect = [](const std::string& index, std::vector<std::string> pieces) {
    TemporaryFolder folder;
    write_shards(folder.path(), index);
    SCOPED_TRACE(index);
    try {
      open_folder(folder.path());
      ADD_FAILURE() << "was accepted";
    } catch (const FormatError& error) {
      for (const auto& piece : pieces) EXPECT_THAT(error.what(), testing::HasSubstr(piece));
    }
  };
  expect(R"({"weight_map": {"a": "../../etc/secret.safetensors", "b": "/etc/x.safetensors", "c": "d\\e.safetensors",
             "d": ".hidden.safetensors", "e": "model.safetensors.index.json", "f": 3, "g": "sub/x.safetensors"}})",
         {"'a'", "'b'", "'c'", "'d'", "'e'", "'f'", "'g'", "same folder"});
  expect(R"({"weight_map": {"a": "none.safetensors"}})", {"'none.safetensors' is missing"});
  expect(R"({"weight_map": {"model.embed_tokens.weight": "model-00002-of-00002.safetensors",
             "model.norm.weight": "model-00002-of-00002.safetensors"}})",
         {"'model.embed_tokens.weight' is missing in shard"});
  expect(R"({"weight_map": {"other": "model-00001-of-00002.safetensors"}})",
         {"'model.embed_tokens.weight' stands in shard", "not in the index", "'other' is missing"});
  expect(R"({"weight_map": []})", {"weight_map"});
  expect(R"([])", {"weight_map"});
  expect("{", {"index.json"});
}

TEST(Checkpoint, ATensorInTwoShardsIsRefused) {
  TemporaryFolder folder;
  write_shards(folder.path());
  std::filesystem::remove(folder / "model-00002-of-00002.safetensors");
  save_safetensors(folder / "model-00002-of-00002.safetensors", two_tensors());
  EXPECT_ERROR(open_folder(folder.path()), FormatError, kEmbedding, "more than one shard");
}

TEST(Checkpoint, AShardThatPointsToItselfEndsInAnError) {
  TemporaryFolder folder;
  write_shards(folder.path());
  std::filesystem::remove(folder / "model-00002-of-00002.safetensors");
  std::filesystem::create_symlink("model-00002-of-00002.safetensors", folder / "model-00002-of-00002.safetensors");
  EXPECT_ERROR(open_folder(folder.path()), FormatError, "'model-00002-of-00002.safetensors' is missing");
}

TEST(Checkpoint, MissingPartsAreExplained) {
  TemporaryFolder folder;
  EXPECT_ERROR(open_folder(folder.path()), DataError, "no config.json");
  write_file(folder / "small.gguf", "x");
  EXPECT_ERROR(open_folder(folder.path()), DataError, "Did you mean", "small.gguf");
  write_file(folder / "adapter_config.json", "{}");
  EXPECT_ERROR(open_folder(folder.path()), DataError, "adapter");
  write_file(folder / "config.json", kConfig);
  EXPECT_ERROR(open_folder(folder.path()), DataError, "no model.safetensors");
  write_file(folder / "pytorch_model.bin", "x");
  EXPECT_ERROR(open_folder(folder.path()), FormatError, "pytorch_model.bin: is not what torch.save writes");
  EXPECT_THAT(open_folder(folder.path(), false)->names(), testing::IsEmpty());
  write_file(folder / "config.json", "{\"rope_theta\": NaN}");
  EXPECT_ERROR(open_folder(folder.path(), false), FormatError, "config.json");
}

TEST(Checkpoint, MultiModalPrefixesAreTakenOff) {
  TemporaryFolder folder;
  write_file(folder / "config.json",
             R"({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text", "num_hidden_layers": 1}})");
  save_safetensors(folder / "model.safetensors", {{"language_model.model.embed_tokens.weight", torch::ones({2, 2})},
                                                  {"language_model.lm_head.weight", torch::ones({2, 2})},
                                                  {"vision_tower.x.weight", torch::ones({2})},
                                                  {"multi_modal_projector.y", torch::ones({2})}});
  EXPECT_THAT(open_folder(folder.path())->names(), testing::ElementsAre("lm_head.weight", kEmbedding));
  save_safetensors(folder / "model.safetensors", {{"model.language_model.norm.weight", torch::ones({2})},
                                                  {"model.vision_tower.x.weight", torch::ones({2})},
                                                  {"lm_head.weight", torch::ones({2, 2})}});
  EXPECT_THAT(open_folder(folder.path())->names(), testing::ElementsAre("lm_head.weight", kNorm));
  save_safetensors(folder / "model.safetensors", {{"model.language_model.norm.weight", torch::ones({2})},
                                                  {"language_model.model.norm.weight", torch::ones({2})}});
  EXPECT_ERROR(open_folder(folder.path()), FormatError, "two tensors", kNorm);
}

TEST(Checkpoint, AModelSavedWithoutItsHeadGetsItsPrefix) {
  TemporaryFolder folder;
  write_file(folder / "config.json", kConfig);
  save_safetensors(folder / "model.safetensors", {{"embed_tokens.weight", torch::ones({2, 2})},
                                                  {"layers.0.self_attn.rotary_emb.inv_freq", torch::ones({2})},
                                                  {"norm.weight", torch::ones({2})}});
  EXPECT_THAT(open_folder(folder.path())->names(), testing::ElementsAre(kEmbedding, kNorm));
}

TEST(Checkpoint, TokenizerFilesAndChatTemplates) {
  TemporaryFolder folder;
  write_file(folder / "config.json", kConfig);
  write_file(folder / "tokenizer.json", "{\"x\": 1}");
  write_file(folder / "generation_config.json", R"({"eos_token_id": 7})");
  write_file(folder / "tokenizer_config.json",
             R"({"bos_token": {"content": "<s>", "special": true}, "eos_token": "</s>",
                 "chat_template": [{"name": "tools", "template": "T"}, {"name": "default", "template": "D"}]})");
  const auto checkpoint = open_folder(folder.path(), false);
  EXPECT_EQ(checkpoint->tokenizer_json(), "{\"x\": 1}");
  EXPECT_EQ(checkpoint->tokenizer_config()["bos_token"], "<s>");
  EXPECT_EQ(checkpoint->tokenizer_config()["eos_token"], "</s>");
  EXPECT_EQ(checkpoint->generation_config()["eos_token_id"], 7);
  EXPECT_EQ(checkpoint->chat_templates(), (ChatTemplates{{"default", "D"}, {"tools", "T"}}));
  write_file(folder / "special_tokens_map.json", R"({"eos_token": {"content": "<end>"}, "pad_token": "<pad>"})");
  EXPECT_EQ(checkpoint->tokenizer_config()["eos_token"], "<end>");
  EXPECT_EQ(checkpoint->tokenizer_config()["pad_token"], "<pad>");
  // Files of their own win over tokenizer_config.json, all together.
  write_file(folder / "chat_template.jinja", "J");
  EXPECT_EQ(checkpoint->chat_templates(), (ChatTemplates{{"default", "J"}}));
  std::filesystem::create_directory(folder / "additional_chat_templates");
  write_file(folder / "additional_chat_templates" / "tool_use.jinja", "U");
  EXPECT_EQ(checkpoint->chat_templates(), (ChatTemplates{{"default", "J"}, {"tool_use", "U"}}));
  write_file(folder / "tokenizer_config.json", "[]");
  EXPECT_ERROR(checkpoint->tokenizer_config(), FormatError, "tokenizer_config.json");
}

TEST(Checkpoint, FingerprintsOfAnOlderKindAreNoAnswer) {
  EXPECT_TRUE(may_be_same_weights("sha256-all:1", "sha256-all:1"));
  EXPECT_TRUE(may_be_same_weights("sha256-all:1", "sha256:2"));
  EXPECT_FALSE(may_be_same_weights("sha256-all:1", "sha256-all:2"));
  EXPECT_FALSE(may_be_same_weights("sha256-all:1", ""));
}

TEST(Checkpoint, FingerprintSeesEveryKindOfChange) {
  const auto fingerprint = [](const TensorMap& tensors) {
    TemporaryFolder folder;
    write_file(folder / "config.json", kConfig);
    save_safetensors(folder / "model.safetensors", tensors);
    return open_folder(folder.path())->fingerprint();
  };
  const at::Tensor large = torch::zeros({300'000});
  const TensorMap tensors = {{"a", torch::zeros({2, 3})}, {"b", large}};
  const std::string first = fingerprint(tensors);
  EXPECT_THAT(first, testing::MatchesRegex("sha256-all:[0-9a-f]{64}"));
  EXPECT_EQ(fingerprint(tensors), first);
  EXPECT_NE(fingerprint({{"a", torch::zeros({3, 2})}, {"b", large}}), first) << "shape";
  EXPECT_NE(fingerprint({{"c", torch::zeros({2, 3})}, {"b", large}}), first) << "name";
  EXPECT_NE(fingerprint({{"a", torch::zeros({2, 3}, at::kInt)}, {"b", large}}), first) << "dtype";
  for (const int64_t index : {0, 3000, 171'717, 299'999}) {
    at::Tensor changed = large.clone();
    changed[index] = 1;
    EXPECT_NE(fingerprint({{"a", torch::zeros({2, 3})}, {"b", changed}}), first) << "element " << index;
  }
}

}  // namespace
}  // namespace moesaic::formats
