#include "moesaic/formats/safetensors.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <torch/torch.h>

#include <fstream>

#include "moesaic/base/check.h"
#include "tests/formats/files.h"

namespace moesaic::formats {
namespace {

using test::raw;
using test::raw_all;
using test::safetensors_bytes;
using test::TemporaryFolder;

SafetensorsFile parse(const std::string& bytes) {
  return SafetensorsFile(Bytes::from_string(bytes, "test.safetensors"));
}

TEST(Bytes, APipeIsNoFile) {
  TemporaryFolder folder;
  ASSERT_EQ(mkfifo((folder / "pipe").c_str(), 0600), 0);
  EXPECT_ERROR(Bytes::map(folder / "pipe"), DataError, "not a regular file");
}

TEST(Safetensors, ReadsAFileWrittenByHand) {
  const std::string header =
      R"({"__metadata__":{"format":"pt"},"b":{"dtype":"I32","shape":[3],"data_offsets":[16,28]},)"
      R"("a":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]}})";
  const auto file = parse(safetensors_bytes(header, raw_all<float>({1, 2, 3, 4}) + raw_all<int32_t>({7, 8, 9})));
  EXPECT_THAT(file.names(), testing::ElementsAre("a", "b"));
  EXPECT_THAT(file.shape("a"), testing::ElementsAre(2, 2));
  EXPECT_EQ(file.dtype("b"), at::kInt);
  EXPECT_EQ(file.metadata().at("format"), "pt");
  EXPECT_TRUE(at::equal(file.tensor("a"), torch::tensor({{1.f, 2.f}, {3.f, 4.f}})));
  EXPECT_TRUE(at::equal(file.tensor("b"), torch::tensor({7, 8, 9}, at::kInt)));
  EXPECT_ERROR(file.tensor("c"), DataError, "no tensor 'c'");
}

TEST(Safetensors, EveryDtypeAndShapeSurvivesARoundTrip) {
  TemporaryFolder folder;
  torch::manual_seed(1);
  TensorMap tensors;
  for (const auto dtype : {at::kDouble, at::kFloat, at::kHalf, at::kBFloat16, at::kLong, at::kInt, at::kShort,
                           at::kChar, at::kByte, at::kBool}) {
    tensors[c10::toString(dtype)] = (torch::rand({3, 5}) * 2).to(dtype);
  }
  tensors["scalar"] = torch::tensor(2.5f);
  tensors["empty"] = torch::empty({0, 4});
  tensors["transposed"] = torch::rand({4, 3}).t();
  tensors["odd bytes first"] = torch::ones({3}, at::kByte);
  tensors["name \" with \\ and ü"] = torch::ones({1});
  save_safetensors(folder / "m.safetensors", tensors, {{"note", "ü"}});

  const SafetensorsFile file(folder / "m.safetensors");
  EXPECT_EQ(file.names().size(), tensors.size());
  EXPECT_EQ(file.metadata().at("format"), "pt");
  EXPECT_EQ(file.metadata().at("note"), "ü");
  for (const auto& [name, tensor] : tensors) {
    EXPECT_TRUE(at::equal(file.tensor(name), tensor)) << name;
    EXPECT_EQ(file.dtype(name), tensor.scalar_type()) << name;
  }
  EXPECT_EQ(std::distance(std::filesystem::directory_iterator(folder.path()), {}), 1) << "a temporary file was left";
}

TEST(Safetensors, UnalignedTensorsAreCopied) {
  const std::string header = R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},)"
                             R"("b":{"dtype":"F64","shape":[1],"data_offsets":[1,9]}})";
  const auto file = parse(safetensors_bytes(header, raw<uint8_t>(3) + raw(1.25)));
  EXPECT_EQ(file.tensor("b").item<double>(), 1.25);
  EXPECT_EQ(reinterpret_cast<uintptr_t>(file.tensor("b").const_data_ptr()) % 8, 0u);
}

TEST(Safetensors, ATensorOutlivesItsFile) {
  TemporaryFolder folder;
  save_safetensors(folder / "m.safetensors", {{"a", torch::full({1000}, 3.f)}});
  at::Tensor tensor;
  {
    const SafetensorsFile file(folder / "m.safetensors");
    tensor = file.tensor("a");
  }
  std::filesystem::remove(folder / "m.safetensors");
  EXPECT_EQ(tensor.sum().item<float>(), 3000.f);
}

int64_t resident_file_bytes() {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);) {
    if (line.starts_with("RssFile:")) return std::stoll(line.substr(8)) * 1024;
  }
  return -1;
}

TEST(Safetensors, ReleaseGivesBackAMappedFilesMemoryAndNothingElse) {
  constexpr int64_t kCount = 4 << 20;
  const torch::Tensor values = torch::arange(kCount, torch::kFloat32);
  TemporaryFolder folder;
  save_safetensors(folder.path() / "a.safetensors", {{"a", values}});
  const SafetensorsFile file(folder.path() / "a.safetensors");
  EXPECT_TRUE(at::equal(file.tensor("a"), values));
  const int64_t before = resident_file_bytes();
  file.release("a");
  EXPECT_LT(resident_file_bytes(), before - 3 * kCount);  // 4 bytes each; other mappings may grow a little meanwhile
  EXPECT_TRUE(at::equal(file.tensor("a"), values));

  std::ifstream stored(folder.path() / "a.safetensors", std::ios::binary);
  const auto in_memory = parse(std::string(std::istreambuf_iterator<char>(stored), {}));
  in_memory.release("a");
  EXPECT_TRUE(at::equal(in_memory.tensor("a"), values));
}

TEST(Safetensors, WriterRefusesSharedMemoryAndStrangeDtypes) {
  TemporaryFolder folder;
  const at::Tensor tied = torch::ones({2, 2});
  EXPECT_ERROR(save_safetensors(folder / "m", {{"embed", tied}, {"head", tied}}), DataError, "embed", "head", "share");
  EXPECT_ERROR(save_safetensors(folder / "m", {{"c", torch::ones({1}, at::kComplexFloat)}}), DataError, "'c'");
  EXPECT_ERROR(save_safetensors(folder / "no" / "m", {}), DataError, "can't be created");
  EXPECT_TRUE(std::filesystem::is_empty(folder.path()));
  // A transposed view is another tensor: it can be stored.
  save_safetensors(folder / "m", {{"a", tied}, {"b", tied.t()}});
}

TEST(Safetensors, WideTypesComeFirstSoThatAllAreAligned) {
  TemporaryFolder folder;
  save_safetensors(folder / "m", {{"a", torch::ones({3}, at::kByte)}, {"b", torch::ones({2})}});
  const SafetensorsFile file(folder / "m");
  EXPECT_LT(file.bytes("b").data(), file.bytes("a").data());
  EXPECT_EQ(reinterpret_cast<uintptr_t>(file.bytes("b").data()) % 8, 0u);
}

struct Damaged {
  const char* name;
  std::string bytes;
  std::vector<std::string> message;
};

std::string one_tensor(const std::string& entry, size_t data_bytes) {
  return safetensors_bytes("{\"w\":" + entry + "}", std::string(data_bytes, 'x'));
}

std::vector<Damaged> damaged_files() {
  const std::string good = R"({"dtype":"F32","shape":[2],"data_offsets":[0,8]})";
  const std::string deep(100'000, '[');
  return {
      {"empty header", safetensors_bytes("", ""), {"too short"}},
      {"short", "12345", {"5 bytes"}},
      {"header longer than the file",
       raw<uint64_t>(1000) + "{\"a\":1}  ",
       {"1000", "truncated: 17 bytes are there, 991 are missing"}},
      {"header of 2^63 bytes", raw<uint64_t>(uint64_t{1} << 63) + "{}        ", {"at most 100000000"}},
      {"header of 2^64-1 bytes", raw<uint64_t>(UINT64_MAX) + "{}        ", {"at most 100000000"}},
      {"git lfs pointer", "version https://git-lfs.github.com/spec/v1\noid sha256:00", {"Git LFS"}},
      {"not JSON", safetensors_bytes("{\"w\": nope}", ""), {"header"}},
      {"deep JSON", safetensors_bytes(deep, ""), {"200"}},
      {"a list", safetensors_bytes("[1, 2, 3]", ""), {"not a JSON object"}},
      {"metadata is a number", safetensors_bytes(R"({"__metadata__":{"a":1}})", ""), {"__metadata__ 'a'"}},
      {"entry is a number", one_tensor("7", 8), {"'w' is not an object"}},
      {"no dtype", one_tensor(R"({"shape":[2],"data_offsets":[0,8]})", 8), {"no dtype"}},
      {"unknown dtype", one_tensor(R"({"dtype":"F33","shape":[2],"data_offsets":[0,8]})", 8), {"'F33'", "BF16"}},
      {"negative size", one_tensor(R"({"dtype":"F32","shape":[-2],"data_offsets":[0,8]})", 8), {"-2"}},
      {"fraction", one_tensor(R"({"dtype":"F32","shape":[2.5],"data_offsets":[0,8]})", 8), {"2.5"}},
      {"NaN", one_tensor(R"({"dtype":"F32","shape":[NaN],"data_offsets":[0,8]})", 8), {"header"}},
      {"shape overflows",
       one_tensor(R"({"dtype":"F32","shape":[4294967296,4294967296,4294967296],"data_offsets":[0,8]})", 8),
       {"overflow"}},
      {"17 dimensions",
       one_tensor(R"({"dtype":"F32","shape":[1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,2],"data_offsets":[0,8]})", 8),
       {"at most 16"}},
      {"wrong byte count",
       one_tensor(R"({"dtype":"F32","shape":[3],"data_offsets":[0,8]})", 8),
       {"8 bytes", "needs 12"}},
      {"begin after end", one_tensor(R"({"dtype":"F32","shape":[2],"data_offsets":[8,0]})", 8), {"[8, 0]", "outside"}},
      {"end after the file",
       one_tensor(R"({"dtype":"F32","shape":[2],"data_offsets":[8,16]})", 8),
       {"[8, 16]", "outside"}},
      {"offsets of 2^64-1",
       one_tensor(R"({"dtype":"F32","shape":[2],"data_offsets":[18446744073709551607,18446744073709551615]})", 8),
       {"outside"}},
      {"a hole", one_tensor(R"({"dtype":"F32","shape":[2],"data_offsets":[4,12]})", 12), {"hole"}},
      {"data after the last tensor", one_tensor(good, 12), {"end at data byte 8", "12"}},
      {"truncated data", one_tensor(good, 7), {"outside of the file's 7 data bytes", "1 are missing"}},
      {"overlap",
       safetensors_bytes(R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},)"
                         R"("b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}})",
                         std::string(12, 'x')),
       {"'b'", "overlap"}},
  };
}

TEST(Safetensors, DamagedFilesAreRefusedWithTheReason) {
  for (const auto& file : damaged_files()) {
    SCOPED_TRACE(file.name);
    try {
      parse(file.bytes);
      ADD_FAILURE() << "was accepted";
    } catch (const FormatError& error) {
      EXPECT_THAT(error.what(), testing::HasSubstr("test.safetensors"));
      for (const auto& piece : file.message) EXPECT_THAT(error.what(), testing::HasSubstr(piece));
    }
  }
}

TEST(Safetensors, AllWrongTensorsAreNamedAtOnce) {
  const std::string header = R"({"a":{"dtype":"F3","shape":[2],"data_offsets":[0,8]},"b":7})";
  EXPECT_ERROR(parse(safetensors_bytes(header, "")), FormatError, "'a'", "'b'");
}

TEST(Safetensors, EveryTruncationIsRefused) {
  const std::string whole = safetensors_bytes(R"({"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})", "12345678");
  EXPECT_EQ(parse(whole).names().size(), 1u);
  for (size_t size = 0; size < whole.size(); ++size) {
    EXPECT_THROW(parse(whole.substr(0, size)), FormatError) << size << " bytes";
  }
}

TEST(Safetensors, FilesThatCantBeOpened) {
  TemporaryFolder folder;
  EXPECT_ERROR(SafetensorsFile(folder / "none"), DataError, "can't be opened");
  EXPECT_ERROR(SafetensorsFile(folder.path()), DataError, "not a regular file");
  test::write_file(folder / "empty", "");
  EXPECT_ERROR(SafetensorsFile(folder / "empty"), FormatError, "empty");
}

}  // namespace
}  // namespace moesaic::formats
