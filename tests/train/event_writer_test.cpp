#include "moesaic/train/event_writer.h"

#include <gtest/gtest.h>

#include <cstring>

#include "moesaic/base/json.h"
#include "tests/temporary_folder.h"

namespace moesaic::train {
namespace {

using test::TemporaryFolder;
template <class T>
T read(const std::string& bytes, size_t at) {
  T value;
  std::memcpy(&value, bytes.data() + at, sizeof(T));
  return value;
}

uint32_t masked(uint32_t crc) { return ((crc >> 15) | (crc << 17)) + 0xA282EAD8u; }

TEST(Crc32c, CheckValues) {
  EXPECT_EQ(crc32c("123456789"), 0xE3069283u);            // the check value of CRC-32C
  EXPECT_EQ(crc32c(std::string(32, '\0')), 0x8A9136AAu);  // RFC 3720, B.4
  EXPECT_EQ(crc32c(""), 0u);
}

TEST(EventWriter, FramesAndFields) {
  TemporaryFolder folder;
  EventWriter writer(folder.path());
  writer.add_scalar("train/loss", 1.5, 300);
  writer.flush();
  const std::string bytes = read_file(writer.path());

  std::vector<std::string> events;
  for (size_t at = 0; at < bytes.size();) {
    const auto length = read<uint64_t>(bytes, at);
    ASSERT_LE(at + 16 + length, bytes.size());
    EXPECT_EQ(read<uint32_t>(bytes, at + 8), masked(crc32c(bytes.substr(at, 8))));
    events.push_back(bytes.substr(at + 12, length));
    EXPECT_EQ(read<uint32_t>(bytes, at + 12 + length), masked(crc32c(events.back())));
    at += 16 + length;
  }
  ASSERT_EQ(events.size(), 2u);
  EXPECT_EQ(events[0].substr(9), std::string("\x1A\x0D") + "brain.Event:2");  // field 3, 13 bytes
  // After wall_time (key 0x09 + double): step 300 = varint AC 02; summary (field 5, 19 bytes) { value (field 1, 17
  // bytes) { tag (field 1, 10 bytes), simple_value (field 2, float) } }.
  const float value = 1.5f;
  std::string expected("\x10\xAC\x02\x2A\x13\x0A\x11\x0A\x0A");
  expected += "train/loss";
  expected += "\x15" + std::string(reinterpret_cast<const char*>(&value), 4);
  EXPECT_EQ(events[1].substr(9), expected);
}

}  // namespace
}  // namespace moesaic::train
