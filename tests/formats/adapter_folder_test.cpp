#include "moesaic/formats/adapter_folder.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include "tests/formats/files.h"

namespace moesaic::formats {
namespace {

using test::TemporaryFolder;
using test::write_file;

const AdapterFolder kAdapter = {
    {{"peft_type", "LORA"}, {"r", 2}},
    {{"model.layers.0.self_attn.q_proj.lora_A.weight", torch::arange(6, at::kFloat).reshape({2, 3})}}};

TEST(AdapterFolder, RoundTripUnderPeftsNames) {
  TemporaryFolder folder;
  write_adapter_folder(folder / "new", kAdapter);
  EXPECT_THAT(SafetensorsFile(folder / "new" / "adapter_model.safetensors").names(),
              testing::ElementsAre("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"));
  const AdapterFolder read = read_adapter_folder(folder / "new");
  EXPECT_EQ(read.config, kAdapter.config);
  ASSERT_EQ(read.tensors.size(), 1u);
  EXPECT_TRUE(at::equal(read.tensors.begin()->second, kAdapter.tensors.begin()->second));
  EXPECT_EQ(read.tensors.begin()->first, kAdapter.tensors.begin()->first);
}

TEST(AdapterFolder, TheDefaultSubFolderIsFound) {
  TemporaryFolder folder;
  write_adapter_folder(folder / "default", kAdapter);
  EXPECT_EQ(read_adapter_folder(folder.path()).config, kAdapter.config);
}

TEST(AdapterFolder, OfAMultiModalModelTheTextPartIsRead) {
  TemporaryFolder folder;
  write_file(folder / "adapter_config.json", "{}");
  for (const std::string spelling : {"model.language_model.", "language_model.model."}) {
    save_safetensors(folder / "adapter_model.safetensors",
                     {{"base_model.model." + spelling + "layers.0.q_proj.lora_A.weight", torch::ones({1})},
                      {"base_model.model.model.vision_tower.layers.0.q_proj.lora_A.weight", torch::ones({1})}});
    const AdapterFolder read = read_adapter_folder(folder.path());
    ASSERT_EQ(read.tensors.size(), 1u);
    EXPECT_EQ(read.tensors.begin()->first, "model.layers.0.q_proj.lora_A.weight");
    write_adapter_folder(folder / "again", read);
    EXPECT_THAT(SafetensorsFile(folder / "again" / "adapter_model.safetensors").names(),
                testing::ElementsAre("base_model.model." + spelling + "layers.0.q_proj.lora_A.weight"));
  }
}

TEST(AdapterFolder, WhatIsMissingIsExplained) {
  TemporaryFolder folder;
  EXPECT_ERROR(read_adapter_folder(folder / "none"), DataError, "no such folder");
  EXPECT_ERROR(read_adapter_folder(folder.path()), DataError, "no adapter_config.json");
  write_adapter_folder(folder / "sql", kAdapter);
  EXPECT_ERROR(read_adapter_folder(folder.path()), DataError, "sub-folders: sql");
  write_file(folder / "adapter_config.json", "{}");
  EXPECT_ERROR(read_adapter_folder(folder.path()), DataError, "no adapter_model.safetensors");
  write_file(folder / "adapter_model.bin", "x");
  EXPECT_ERROR(read_adapter_folder(folder.path()), DataError, "pickle", "save_file");
  save_safetensors(folder / "adapter_model.safetensors",
                   {{"a", torch::ones({1})}, {"base_model.model.b", torch::ones({1})}});
  EXPECT_ERROR(read_adapter_folder(folder.path()), FormatError, "base_model.model.", "got 1: a");
  write_file(folder / "adapter_config.json", "[]");
  EXPECT_ERROR(read_adapter_folder(folder.path()), FormatError, "adapter_config.json");
}

}  // namespace
}  // namespace moesaic::formats
