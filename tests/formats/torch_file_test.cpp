#include "moesaic/formats/torch_file.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include "moesaic/base/check.h"
#include "tests/formats/files.h"

namespace moesaic::formats {
namespace {

using test::raw;
using test::raw_all;

using Files = std::vector<std::pair<std::string, std::string>>;

/// A zip archive of stored files; with `zip64` as for one of more than 4 GiB.
std::string zip(const Files& files, uint16_t method = 0, bool zip64 = false) {
  std::string bytes, directory;
  for (const auto& [name, content] : files) {
    // version, flags, method, time, date, CRC (not looked at), sizes, length of the name
    auto common = [&](uint32_t size) {
      return raw<uint16_t>(0) + raw<uint16_t>(0) + raw(method) + raw<uint32_t>(0) + raw<uint32_t>(0) + raw(size) +
             raw(size) + raw(static_cast<uint16_t>(name.size()));
    };
    const uint64_t size = content.size(), offset = bytes.size();
    bytes += raw<uint32_t>(0x04034b50) + common(static_cast<uint32_t>(size)) + raw<uint16_t>(0) + name + content;
    const std::string extra =
        zip64 ? raw<uint16_t>(1) + raw<uint16_t>(24) + raw(size) + raw(size) + raw(offset) : std::string();
    directory += raw<uint32_t>(0x02014b50) + raw<uint16_t>(0) +
                 common(zip64 ? UINT32_MAX : static_cast<uint32_t>(size)) + raw(static_cast<uint16_t>(extra.size())) +
                 raw<uint16_t>(0) + raw<uint16_t>(0) + raw<uint16_t>(0) + raw<uint32_t>(0) +
                 raw(zip64 ? UINT32_MAX : static_cast<uint32_t>(offset)) + name + extra;
  }
  const uint64_t count = files.size(), start = bytes.size(), size = directory.size(), end = start + size;
  bytes += directory;
  if (zip64) {
    bytes += raw<uint32_t>(0x06064b50) + raw<uint64_t>(44) + raw<uint32_t>(0) + raw<uint64_t>(0) + raw(count) +
             raw(count) + raw(size) + raw(start) + raw<uint32_t>(0x07064b50) + raw<uint32_t>(0) + raw(end) +
             raw<uint32_t>(1);
    return bytes + raw<uint32_t>(0x06054b50) + std::string(16, '\xff') + raw<uint16_t>(0);
  }
  return bytes + raw<uint32_t>(0x06054b50) + raw<uint32_t>(0) + raw(static_cast<uint16_t>(count)) +
         raw(static_cast<uint16_t>(count)) + raw(static_cast<uint32_t>(size)) + raw(static_cast<uint32_t>(start)) +
         raw<uint16_t>(0);
}

// Pieces of pickles.
std::string text(const std::string& s) { return "X" + raw(static_cast<uint32_t>(s.size())) + s; }
std::string global(const std::string& module, const std::string& name) { return "c" + module + "\n" + name + "\n"; }
std::string number(int64_t value) { return "\x8a\x08" + raw(value); }
std::string tuple(const std::vector<int64_t>& values) {
  std::string code = "(";
  for (const int64_t value : values) code += number(value);
  return code + "t";
}
std::string storage(const std::string& type, const std::string& file, int64_t count) {
  return "(" + text("storage") + global("torch", type) + text(file) + text("cpu") + number(count) + "tQ";
}
std::string tensor(const std::string& storage, int64_t offset, const std::vector<int64_t>& sizes,
                   const std::vector<int64_t>& strides) {
  return global("torch._utils", "_rebuild_tensor_v2") + "(" + storage + number(offset) + tuple(sizes) + tuple(strides) +
         "\x89" + global("collections", "OrderedDict") + ")RtR";
}
std::string dict(const std::vector<std::pair<std::string, std::string>>& items) {
  std::string code = "\x80\x02}(";
  for (const auto& [key, value] : items) code += text(key) + value;
  return code + "u.";
}

TensorMap parse(const std::string& bytes) { return read_torch_file(Bytes::from_string(bytes, "model.bin")); }

const std::string kSix = raw_all<float>({1, 2, 3, 4, 5, 6});
std::string archive(const std::string& pickle) {
  return zip({{"m/data.pkl", pickle}, {"m/byteorder", "little"}, {"m/data/0", kSix}});
}
/// An archive with one tensor of the six numbers.
std::string one(const std::string& value) { return archive(dict({{"w", value}})); }
const std::string kStorage = storage("FloatStorage", "0", 6);

TEST(TorchFile, ReadsViewsOfStorages) {
  const auto tensors = parse(archive(dict({{"w", tensor(kStorage, 0, {2, 3}, {3, 1})},
                                           {"transposed", tensor(kStorage, 0, {3, 2}, {1, 3})},
                                           {"part", tensor(kStorage, 2, {2}, {2})},
                                           {"scalar", tensor(kStorage, 5, {}, {})},
                                           {"empty", tensor(kStorage, 6, {0, 7}, {7, 1})}})));
  EXPECT_EQ(tensors.size(), 5u);
  EXPECT_TRUE(torch::equal(tensors.at("w"), torch::tensor({{1.f, 2.f, 3.f}, {4.f, 5.f, 6.f}})));
  EXPECT_TRUE(torch::equal(tensors.at("transposed"), tensors.at("w").t()));
  EXPECT_TRUE(torch::equal(tensors.at("part"), torch::tensor({3.f, 5.f})));
  EXPECT_EQ(tensors.at("scalar").item<float>(), 6.f);
  EXPECT_EQ(tensors.at("empty").sizes(), (std::vector<int64_t>{0, 7}));
}

TEST(TorchFile, ReadsStateDictsWithAttributesAndParameters) {
  // An OrderedDict of one parameter, whose item is set alone and which carries the modules' versions.
  const std::string parameter = global("torch._utils", "_rebuild_parameter") + "(" + tensor(kStorage, 0, {6}, {1}) +
                                "\x88" + global("collections", "OrderedDict") + ")RtR";
  const std::string pickle = "\x80\x02" + global("collections", "OrderedDict") + ")Rq\x01" + text("w") + parameter +
                             "s}" + text("_metadata") + global("collections", "OrderedDict") + ")Rsbh\x01" + ".";
  EXPECT_TRUE(torch::equal(parse(archive(pickle)).at("w"), torch::tensor({1.f, 2.f, 3.f, 4.f, 5.f, 6.f})));
}

TEST(TorchFile, ReadsArchivesOfMoreThan4GiB) {
  const Files files{{"m/data.pkl", dict({{"w", tensor(kStorage, 0, {6}, {1})}})}, {"m/data/0", kSix}};
  EXPECT_TRUE(torch::equal(parse(zip(files, 0, true)).at("w"), parse(zip(files)).at("w")));
}

TEST(TorchFile, OtherDtypes) {
  const std::string bytes = zip({{"m/data.pkl", dict({{"h", tensor(storage("BFloat16Storage", "0", 2), 0, {2}, {1})},
                                                      {"i", tensor(storage("LongStorage", "1", 1), 0, {1}, {1})}})},
                                 {"m/data/0", raw<uint16_t>(0x3f80) + raw<uint16_t>(0xc000)},
                                 {"m/data/1", raw<int64_t>(-7)}});
  const auto tensors = parse(bytes);
  EXPECT_TRUE(torch::equal(tensors.at("h"), torch::tensor({1.0, -2.0}, torch::kBFloat16)));
  EXPECT_TRUE(torch::equal(tensors.at("i"), torch::tensor({-7})));
}

TEST(TorchFile, WhatAPickleCouldExecuteIsRefusedByName) {
  const std::string attack = "\x80\x02" + global("posix", "system") + "(" + text("true") + "tR.";
  EXPECT_ERROR(parse(archive(attack)), FormatError, "names posix.system, which a file of tensors does not need");
  EXPECT_ERROR(parse(archive("\x80\x02" + global("torch", "load") + ".")), FormatError, "torch.load");
  EXPECT_ERROR(parse(archive("\x80\x02" + global("torch", "FloatStorage") + ")R.")), FormatError, "storage type");
  EXPECT_ERROR(parse(archive("\x80\x04.")), FormatError, "protocol");
  EXPECT_ERROR(parse(archive(std::string("\x80\x02") + "i")), FormatError, "instruction 0x69");
}

TEST(TorchFile, TensorsOutsideOfTheirStorageAreRefused) {
  const int64_t huge = int64_t{1} << 62;
  for (const std::string& value : {tensor(kStorage, 0, {7}, {1}), tensor(kStorage, 1, {6}, {1}),
                                   tensor(kStorage, 0, {2, 3}, {4, 1}), tensor(kStorage, 7, {0}, {1}),
                                   tensor(kStorage, 0, {huge}, {0}), tensor(kStorage, 0, {huge, huge}, {huge, huge}),
                                   tensor(kStorage, -1, {2}, {1}), tensor(kStorage, 0, {2}, {1, 1})}) {
    EXPECT_ERROR(parse(one(value)), FormatError, "does not fit its storage");
  }
  EXPECT_ERROR(parse(one(tensor(kStorage, 0, {-1}, {1}))), FormatError, "negative size");
  EXPECT_ERROR(parse(one(tensor(kStorage, 5, {2}, {-1}))), FormatError, "negative size");
  EXPECT_ERROR(parse(one(tensor(storage("FloatStorage", "0", 7), 0, {7}, {1}))), FormatError,
               "'m/data/0' has 24 bytes, but 7 elements of Float");
  EXPECT_ERROR(parse(one(tensor(storage("FloatStorage", "0", huge), 0, {1}, {1}))), FormatError, "'m/data/0' has 24");
  EXPECT_ERROR(parse(one(tensor(storage("FloatStorage", "1", 6), 0, {6}, {1}))), FormatError, "'m/data/1' is missing");
}

TEST(TorchFile, DamagedPicklesAreRefused) {
  EXPECT_ERROR(parse(one(number(3))), FormatError, "'w' is no tensor");
  EXPECT_ERROR(parse(archive(dict({{"w", tensor(kStorage, 0, {6}, {1})}, {"w", tensor(kStorage, 0, {6}, {1})}}))),
               FormatError, "'w' is there twice");
  EXPECT_ERROR(parse(archive("\x80\x02).")), FormatError, "state dict");
  for (const char* code :
       {".", "}u", "(}R", "}}s.", "h\x05.", "q\x01.", "(tQ", ")Q", "\x86", "(s", "}(}u.", "b", "t"}) {
    EXPECT_THROW(parse(archive(std::string("\x80\x02") + code)), FormatError) << code;
  }
}

TEST(TorchFile, DamagedArchivesAreRefused) {
  const std::string whole = one(tensor(kStorage, 0, {6}, {1}));
  EXPECT_EQ(parse(whole).size(), 1u);
  for (size_t length = 1; length < whole.size(); ++length) {
    EXPECT_THROW(parse(whole.substr(0, length)), FormatError) << length;
  }
  EXPECT_ERROR(parse(whole.substr(0, whole.size() - 50)), FormatError, "truncated", "download");
  EXPECT_ERROR(parse(zip({{"m/data/0", kSix}})), FormatError, "no data.pkl");
  EXPECT_ERROR(parse(zip({{"m/data.pkl", "."}}, /*method=*/8)), FormatError, "compressed");
  EXPECT_ERROR(parse(zip({{"m/data.pkl", "."}, {"m/byteorder", "big"}})), FormatError, "big-endian");
  EXPECT_ERROR(parse(zip({{"m/data.pkl", "."}, {"m/data.pkl", "."}})), FormatError, "twice");
  EXPECT_ERROR(parse("\x80\x02\x8a\x0al\xfc\x9c..."), FormatError, "since PyTorch 1.6");
}

}  // namespace
}  // namespace moesaic::formats
