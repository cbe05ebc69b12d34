#include "moesaic/formats/safetensors_writer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include "tests/formats/files.h"

namespace moesaic::formats {
namespace {

using test::TemporaryFolder;

const Declarations kTwo{{"bytes", {{3}, at::kByte}}, {"matrix", {{2, 2}, at::kFloat}}};
const at::Tensor kBytes = torch::tensor({1, 2, 3}, at::kByte), kMatrix = torch::tensor({{1.f, 2.f}, {3.f, 4.f}});

int64_t files_in(const TemporaryFolder& folder) {
  return std::distance(std::filesystem::directory_iterator(folder.path()), {});
}

TEST(SafetensorsWriter, TensorsMayComeInAnyOrder) {
  TemporaryFolder folder;
  for (const bool forwards : {true, false}) {
    SafetensorsWriter writer(folder / "m", kTwo, {{"note", "x"}});
    if (forwards) writer.put("bytes", kBytes);
    writer.put("matrix", kMatrix);
    if (!forwards) writer.put("bytes", kBytes);
    writer.commit();
    const SafetensorsFile file(folder / "m");
    EXPECT_TRUE(at::equal(file.tensor("bytes"), kBytes));
    EXPECT_TRUE(at::equal(file.tensor("matrix"), kMatrix));
    EXPECT_EQ(file.metadata().at("note"), "x");
  }
  EXPECT_EQ(files_in(folder), 1);
}

TEST(SafetensorsWriter, ViewsOfOneTensorMayBeWrittenUnderSeveralNames) {
  TemporaryFolder folder;
  SafetensorsWriter writer(folder / "m", {{"a", {{2, 2}, at::kFloat}}, {"b", {{2, 2}, at::kFloat}}});
  writer.put("a", kMatrix);
  writer.put("b", kMatrix.t());
  writer.commit();
  EXPECT_TRUE(at::equal(SafetensorsFile(folder / "m").tensor("b"), kMatrix.t()));
}

TEST(SafetensorsWriter, WhatWasNotDeclaredSoIsRefused) {
  TemporaryFolder folder;
  SafetensorsWriter writer(folder / "m", kTwo);
  EXPECT_ERROR(writer.put("other", kBytes), DataError, "'other' was not declared");
  EXPECT_ERROR(writer.put("bytes", kBytes.slice(0, 1)), DataError, "[2]", "expected", "[3]");
  EXPECT_ERROR(writer.put("bytes", kBytes.to(at::kInt)), DataError, "Int [3]", "expected Byte [3]");
  EXPECT_ERROR(writer.put("matrix", kMatrix / 0), DataError, "'matrix'", "not finite");
  writer.put("bytes", kBytes);
  EXPECT_ERROR(writer.put("bytes", kBytes), DataError, "'bytes' comes twice");
}

TEST(SafetensorsWriter, NothingIsLeftOfAFileThatIsNotWhole) {
  TemporaryFolder folder;
  {
    SafetensorsWriter writer(folder / "m", kTwo);
    writer.put("bytes", kBytes);
    EXPECT_ERROR(writer.commit(), DataError, "1 tensors have not come: matrix");
    EXPECT_FALSE(std::filesystem::exists(folder / "m"));
  }
  EXPECT_EQ(files_in(folder), 0);
}

}  // namespace
}  // namespace moesaic::formats
