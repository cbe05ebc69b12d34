#include "moesaic/formats/folder_writer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include "moesaic/formats/checkpoint.h"
#include "tests/formats/files.h"

namespace moesaic::formats {
namespace {

using test::TemporaryFolder;

// Of each name a tensor of 8 numbers; in bfloat16 two fit into a shard of 40 bytes.
const std::vector<std::string> kNames{"model.a", "model.b", "model.c"};
const Declarations kTensors{{"model.a", {{4, 2}}}, {"model.b", {{8}}}, {"model.c", {{2, 4}}}, {"n", {{1}, at::kLong}}};

at::Tensor numbers(const std::string& name) {
  return (torch::arange(8, at::kFloat) + name.back()).reshape(kTensors.at(name).shape);
}

ModelFolder about() {
  ModelFolder model;
  model.config = {{"model_type", "llama"}, {"rope_parameters", {{"rope_type", "default"}, {"rope_theta", 1e4}}}};
  model.dtype = at::kBFloat16;
  model.max_shard_bytes = 40;
  return model;
}

std::vector<std::string> files_of(const std::filesystem::path& dir) {
  std::vector<std::string> names;
  for (const auto& entry : std::filesystem::directory_iterator(dir)) names.push_back(entry.path().filename());
  return names;
}

TEST(FolderWriter, TensorsComeOneByOneAndGoIntoTheirShards) {
  TemporaryFolder folder;
  FolderWriter writer(folder / "new", about(), kTensors);
  EXPECT_EQ(writer.bytes(), 3u * 16 + 8);
  writer.put("n", torch::tensor({7}));
  for (const auto& name : {"model.c", "model.a", "model.b"}) writer.put(name, numbers(name));
  writer.finish();
  EXPECT_THAT(files_of(folder / "new"),
              testing::UnorderedElementsAre("config.json", "model-00001-of-00002.safetensors",
                                            "model-00002-of-00002.safetensors", "model.safetensors.index.json"));
  const auto read = open_folder(folder / "new");
  for (const std::string& name : kNames) {
    EXPECT_EQ(read->dtype(name), at::kBFloat16);
    EXPECT_TRUE(at::equal(read->tensor(name).to(at::kFloat), numbers(name))) << name;
  }
  EXPECT_EQ(read->tensor("n").item<int64_t>(), 7) << "integers stay";
  EXPECT_EQ(read->config()["dtype"], "bfloat16");
}

TEST(FolderWriter, AnOlderSaveStaysUntilTheNewOneIsWhole) {
  TemporaryFolder folder;
  ModelFolder old;
  old.config = about().config;
  old.tensors = {{"model.a", torch::ones({4, 2})}};
  write_model_folder(folder.path(), old);
  {
    FolderWriter writer(folder.path(), about(), kTensors);
    for (const auto& name : {"model.a", "model.b"}) writer.put(name, numbers(name));  // the first shard is whole
    EXPECT_ERROR(writer.finish(), DataError, "2 tensors have not come: model.c, n");
  }
  EXPECT_THAT(files_of(folder.path()), testing::UnorderedElementsAre("config.json", "model.safetensors"));
  EXPECT_TRUE(at::equal(open_folder(folder.path())->tensor("model.a"), torch::ones({4, 2})));
}

TEST(FolderWriter, NothingIsLeftOfANewFolderThatIsNotWhole) {
  TemporaryFolder folder;
  {
    FolderWriter writer(folder / "new", about(), kTensors);
    EXPECT_ERROR(writer.put("model.x", torch::ones({1})), DataError, "'model.x' was not declared");
    EXPECT_ERROR(writer.put("model.a", torch::ones({2, 4})), DataError, "'model.a'", "[2, 4]", "[4, 2]");
    ModelFolder halves = about();
    halves.dtype = at::kHalf;
    FolderWriter narrow(folder / "narrow", halves, kTensors);
    EXPECT_ERROR(narrow.put("model.a", torch::full({4, 2}, 1e6f)), DataError, "not finite", "Half");
  }
  EXPECT_TRUE(std::filesystem::is_empty(folder.path()));
}

}  // namespace
}  // namespace moesaic::formats
