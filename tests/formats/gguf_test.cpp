#include "moesaic/formats/gguf.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <cmath>

#include "moesaic/base/check.h"
#include "moesaic/formats/safetensors.h"
#include "tests/formats/files.h"

namespace moesaic::formats {
namespace {

using test::GgufBuilder;
using test::raw;

TEST(Gguf, ReadsMetadataOfEveryType) {
  GgufBuilder builder;
  builder.value("u8", 0, raw<uint8_t>(200))
      .value("i8", 1, raw<int8_t>(-5))
      .value("u16", 2, raw<uint16_t>(60000))
      .value("i16", 3, raw<int16_t>(7))
      .u32("u32", 4'000'000'000u)
      .value("i32", 5, raw<int32_t>(9))
      .f32("f32", 0.5f)
      .boolean("yes", true)
      .string("s", "text")
      .value("u64", 10, raw<uint64_t>(uint64_t{1} << 40))
      .value("i64", 11, raw<int64_t>(-3))
      .value("f64", 12, raw(0.25))
      .strings("list", {"a", "ü"})
      .i32s("numbers", {1, -2})
      .value("nested", 9, raw<uint32_t>(9) + raw<uint64_t>(1) + raw<uint32_t>(0) + raw<uint64_t>(2) + "ab");
  const GgufFile file(builder.bytes());
  EXPECT_EQ(file.find_uint("u8"), 200u);
  EXPECT_EQ(file.find_uint("u16"), 60000u);
  EXPECT_EQ(file.find_uint("u32"), 4'000'000'000u);
  EXPECT_EQ(file.find_uint("i16"), 7u);
  EXPECT_EQ(file.find_uint("u64"), uint64_t{1} << 40);
  EXPECT_EQ(file.find_number("i8"), -5.0);
  EXPECT_EQ(file.find_number("i64"), -3.0);
  EXPECT_EQ(file.find_number("f32"), 0.5);
  EXPECT_EQ(file.find_number("f64"), 0.25);
  EXPECT_EQ(file.find_bool("yes"), true);
  EXPECT_EQ(file.find_string("s"), "text");
  EXPECT_THAT(file.strings("list"), testing::ElementsAre("a", "ü"));
  EXPECT_THAT(file.numbers("numbers"), testing::ElementsAre(1, -2));
  EXPECT_TRUE(file.contains("nested"));
  EXPECT_EQ(file.find_uint("none"), std::nullopt);
  EXPECT_THAT(file.strings("none"), testing::IsEmpty());

  EXPECT_ERROR(file.find_uint("i8"), FormatError, "'i8' is not a natural number");
  EXPECT_ERROR(file.find_uint("s"), FormatError, "'s'");
  EXPECT_ERROR(file.find_bool("u8"), FormatError, "'u8'");
  EXPECT_ERROR(file.find_string("u8"), FormatError, "'u8'");
  EXPECT_ERROR(file.strings("numbers"), FormatError, "'numbers'");
  EXPECT_ERROR(file.numbers("list"), FormatError, "'list'");
}

TEST(Gguf, Version2ReadsAlike) {
  GgufBuilder builder;
  builder.version = 2;
  builder.tensor("w", {2, 3}, {1, 2, 3, 4, 5, 6});
  const GgufFile file(builder.bytes());
  ASSERT_EQ(file.tensors().size(), 1u);
  EXPECT_THAT(file.tensors()[0].shape, testing::ElementsAre(3, 2)) << "outermost first";
  EXPECT_EQ(file.tensors()[0].bytes.size(), 24u);
}

TEST(Gguf, AlignmentOfTheFileIsUsed) {
  GgufBuilder builder;
  builder.alignment = 256;
  builder.u32("general.alignment", 256).tensor("a", {1}, {5}).tensor("b", {1}, {6});
  const GgufFile file(builder.bytes());
  float value;
  std::memcpy(&value, file.tensors()[1].bytes.data(), 4);
  EXPECT_EQ(value, 6.f);
}

TEST(Gguf, DequantisesBitForBitAsTheGgufPackage) {
  const SafetensorsFile golden(MOESAIC_SOURCE_DIR "/tests/formats/golden/dequantize.safetensors");
  for (const auto type : {GgmlType::kF16, GgmlType::kBF16, GgmlType::kQ4_0, GgmlType::kQ4_1, GgmlType::kQ5_0,
                          GgmlType::kQ5_1, GgmlType::kQ8_0, GgmlType::kQ2_K, GgmlType::kQ3_K, GgmlType::kQ4_K,
                          GgmlType::kQ5_K, GgmlType::kQ6_K, GgmlType::kIQ4_NL, GgmlType::kIQ4_XS}) {
    const std::string name = ggml_type_info(type).name;
    const at::Tensor blocks = golden.tensor(name + ".blocks"), expected = golden.tensor(name + ".values");
    ASSERT_EQ(blocks.numel() / ggml_type_info(type).bytes * ggml_type_info(type).elements, expected.numel()) << name;
    at::Tensor values = torch::empty_like(expected);
    dequantize(type, blocks.data_ptr<uint8_t>(), expected.numel(), values.data_ptr<float>());
    EXPECT_TRUE(at::equal(values, expected))
        << name << ": largest error " << (values - expected).abs().max().item<float>();
  }
}

struct Damaged {
  const char* name;
  std::string bytes;
  std::vector<std::string> message;
};

GgufBuilder with_tensor(const std::vector<uint64_t>& dims, uint32_t type, const std::string& data,
                        std::optional<uint64_t> offset = std::nullopt) {
  GgufBuilder builder;
  builder.tensor("w", dims, type, data, offset);
  return builder;
}

GgufBuilder with_value(uint32_t type, const std::string& payload) {
  GgufBuilder builder;
  builder.value("key", type, payload);
  return builder;
}

std::vector<Damaged> damaged_files() {
  std::vector<Damaged> files;
  const auto add = [&](const char* name, const GgufBuilder& builder, std::vector<std::string> message) {
    files.push_back({name, builder.build(), std::move(message)});
  };
  files.push_back({"other magic", std::string("GGML") + std::string(100, '\0'), {"does not begin"}});
  files.push_back({"only the magic", "GGUF", {"does not begin"}});
  GgufBuilder one;
  one.version = 1;
  add("version 1", one, {"version 1", "2 or 3"});
  one.version = 0x03000000;
  add("big-endian", one, {"big-endian"});

  GgufBuilder counts;
  counts.tensors = 1'000'000'000;
  add("10^9 tensors", counts, {"1000000000 tensors"});
  counts.tensors = UINT64_MAX;
  add("2^64-1 tensors", counts, {"18446744073709551615 tensors"});
  counts.tensors = 0;
  counts.values = uint64_t{1} << 62;
  add("2^62 values", counts, {"metadata values"});

  add("unknown value type", with_value(77, "12345678"), {"'key'", "type 77"});
  add("string longer than the file", with_value(8, raw<uint64_t>(1'000'000) + "abc"), {"1000000 bytes"});
  add("string of 2^64-1 bytes", with_value(8, raw<uint64_t>(UINT64_MAX) + "abc"), {"18446744073709551615"});
  add("array of 2^61 numbers", with_value(9, raw<uint32_t>(10) + raw<uint64_t>(uint64_t{1} << 61)), {"array elements"});
  add("array of 2^60 strings", with_value(9, raw<uint32_t>(8) + raw<uint64_t>(uint64_t{1} << 60)), {"array strings"});
  add("array of unknown type", with_value(9, raw<uint32_t>(50) + raw<uint64_t>(1)), {"array type 50"});
  std::string deep;
  for (int i = 0; i < 100; ++i) deep += raw<uint32_t>(9) + raw<uint64_t>(1);
  add("deep arrays", with_value(9, deep), {"nested deeper"});
  GgufBuilder twice;
  twice.u32("key", 1).u32("key", 2);
  add("a key twice", twice, {"'key' stands twice"});
  GgufBuilder binary;
  binary.u32("\xff\xfe", 1);
  add("a key that is not UTF-8", binary, {"UTF-8"});

  for (const uint32_t alignment : {0u, 3u, 48u, 1u << 30}) {
    GgufBuilder builder;
    builder.u32("general.alignment", alignment);
    add("alignment", builder, {"general.alignment", std::to_string(alignment)});
  }
  add("split", GgufBuilder().u32("split.count", 3), {"split", "--merge"});

  const std::string data(64, 'x');
  add("no dimensions", with_tensor({}, 0, data), {"'w'", "0 dimensions"});
  add("5 dimensions", with_tensor({1, 1, 1, 1, 1}, 0, data), {"5 dimensions"});
  add("a size of zero", with_tensor({4, 0}, 0, data), {"'w'", "impossible shape [4, 0]"});
  add("sizes overflow", with_tensor({uint64_t{1} << 32, uint64_t{1} << 32, 4}, 0, data), {"impossible shape"});
  add("bytes overflow", with_tensor({uint64_t{1} << 62}, 0, data), {"overflow"});
  add("a size of 2^64-1", with_tensor({UINT64_MAX}, 0, data), {"impossible shape"});
  add("unknown quantisation", with_tensor({16}, 9999, data), {"type 9999", "Q4_1", "Q6_K"});
  add("unsupported quantisation IQ2_XXS", with_tensor({256}, 16, data), {"type 16 (IQ2_XXS)"});
  add("half a block", with_tensor({16, 2}, 2, data), {"16 elements", "Q4_0 packs 32"});
  add("more data than the file", with_tensor({1000}, 0, data), {"4000", "3936 are missing"});
  add("offset past the end", with_tensor({4}, 0, data, 64), {"truncated or its offsets lie"});
  add("offset of 2^64-32", with_tensor({4}, 0, data, UINT64_MAX - 31), {"truncated or its offsets lie"});
  add("unaligned offset", with_tensor({4}, 0, data, 4), {"offset 4", "multiple of 32"});
  GgufBuilder same;
  same.tensor("w", {4}, {1, 2, 3, 4}).tensor("w", {4}, {1, 2, 3, 4});
  add("a name twice", same, {"'w' stands twice"});
  GgufBuilder overlap;
  overlap.tensor("a", {16}, 0, data, 0).tensor("b", {8}, 0, data, 32);
  add("overlap", overlap, {"'a' and 'b' overlap"});
  GgufBuilder long_name;
  long_name.tensor(std::string(300, 'n'), {1}, {1});
  add("a name of 300 bytes", long_name, {"at most 255"});
  return files;
}

TEST(Gguf, DamagedFilesAreRefusedWithTheReason) {
  for (const auto& file : damaged_files()) {
    SCOPED_TRACE(file.name);
    try {
      GgufFile parsed(Bytes::from_string(file.bytes, "test.gguf"));
      ADD_FAILURE() << "was accepted";
    } catch (const FormatError& error) {
      EXPECT_THAT(error.what(), testing::HasSubstr("test.gguf"));
      for (const auto& piece : file.message) EXPECT_THAT(error.what(), testing::HasSubstr(piece));
    }
  }
}

TEST(Gguf, AllWrongTensorsAreNamedAtOnce) {
  GgufBuilder builder;
  builder.tensor("a", {7}, 2, "").tensor("b", {7}, 555, "");
  EXPECT_ERROR(GgufFile(builder.bytes()), FormatError, "'a'", "'b'");
}

TEST(Gguf, NumbersThatAreNotFiniteAreRefused) {
  const GgufFile file(GgufBuilder().f32("nan", std::nanf("")).f32("inf", INFINITY).bytes());
  EXPECT_ERROR(file.find_number("nan"), FormatError, "'nan' is not a finite number");
  EXPECT_ERROR(file.find_number("inf"), FormatError, "'inf'");
}

TEST(Gguf, StringsThatAreNotUtf8AreRefused) {
  for (const std::string& wrong :
       {"\x80", "\xc0\x80", "\xe2\x96", "\xed\xa0\x80", "\xf5\x80\x80\x80", "\xe0\x80\x80"}) {
    const GgufFile file(GgufBuilder().string("s", wrong).strings("list", {"fine", wrong}).bytes());
    EXPECT_ERROR(file.find_string("s"), FormatError, "UTF-8");
    EXPECT_ERROR(file.strings("list"), FormatError, "string 1 is not valid UTF-8");
  }
  const GgufFile file(GgufBuilder().string("s", "aü▁😀").bytes());
  EXPECT_EQ(file.find_string("s"), "aü▁😀");
}

TEST(Gguf, EveryTruncationIsRefused) {
  GgufBuilder builder;
  builder.u32("a", 1).strings("b", {"x", "yz"}).tensor("w", {8}, {1, 2, 3, 4, 5, 6, 7, 8});
  const std::string whole = builder.build();
  EXPECT_NO_THROW(GgufFile(Bytes::from_string(whole, "")));
  for (size_t size = 0; size < whole.size(); ++size) {
    EXPECT_THROW(GgufFile(Bytes::from_string(whole.substr(0, size), "")), FormatError) << size << " bytes";
  }
}

}  // namespace
}  // namespace moesaic::formats
