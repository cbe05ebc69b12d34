#include "moesaic/train/event_writer.h"

#include <unistd.h>

#include <array>
#include <bit>
#include <chrono>

#include "moesaic/base/check.h"

namespace moesaic::train {
namespace {

constexpr std::array<uint32_t, 256> make_crc_table() {
  std::array<uint32_t, 256> table{};
  for (uint32_t i = 0; i < 256; ++i) {
    uint32_t crc = i;
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ ((crc & 1) ? 0x82F63B78u : 0u);  // reflected polynomial
    table[i] = crc;
  }
  return table;
}

template <class T>
std::string little_endian(T value) {
  std::string bytes(sizeof(T), '\0');
  std::memcpy(bytes.data(), &value, sizeof(T));
  return bytes;
}

/// TFRecord stores CRCs rotated and offset, so that a CRC over data that holds CRCs stays meaningful.
std::string masked_crc(std::string_view bytes) {
  const uint32_t crc = crc32c(bytes);
  return little_endian<uint32_t>(((crc >> 15) | (crc << 17)) + 0xA282EAD8u);
}

std::string varint(uint64_t value) {
  std::string bytes;
  for (; value >= 0x80; value >>= 7) bytes.push_back(static_cast<char>((value & 0x7F) | 0x80));
  bytes.push_back(static_cast<char>(value));
  return bytes;
}

// Protobuf wire format: key = field << 3 | wire type (0 varint, 1 64-bit, 2 length-delimited, 5 32-bit).
std::string key(int field, int wire_type) { return varint(static_cast<uint64_t>(field << 3 | wire_type)); }
std::string bytes_field(int field, const std::string& bytes) { return key(field, 2) + varint(bytes.size()) + bytes; }

std::string event_header() {
  const double now = std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch()).count();
  return key(1, 1) + little_endian<double>(now);  // Event.wall_time
}

}  // namespace

uint32_t crc32c(std::string_view bytes) {
  static constexpr auto kTable = make_crc_table();
  uint32_t crc = 0xFFFFFFFFu;
  for (unsigned char byte : bytes) crc = kTable[(crc ^ byte) & 0xFF] ^ (crc >> 8);
  return crc ^ 0xFFFFFFFFu;
}

EventWriter::EventWriter(const std::filesystem::path& dir) {
  static_assert(std::endian::native == std::endian::little);
  std::filesystem::create_directories(dir);
  std::array<char, 256> host{};
  gethostname(host.data(), host.size() - 1);
  const auto seconds =
      std::chrono::duration_cast<std::chrono::seconds>(std::chrono::system_clock::now().time_since_epoch()).count();
  path_ = dir / fmt::format("events.out.tfevents.{:010d}.{}.{}", seconds, host.data(), getpid());
  file_.open(path_, std::ios::binary | std::ios::app);
  MOESAIC_CHECK(file_, DataError, "{}: can't be created", path_.string());
  write_event(event_header() + bytes_field(3, "brain.Event:2"));  // Event.file_version
}

void EventWriter::add_scalar(const std::string& tag, double value, int64_t step) {
  const std::string scalar = bytes_field(1, tag) + key(2, 5) + little_endian<float>(static_cast<float>(value));
  const std::string summary = bytes_field(1, scalar);
  write_event(event_header() + key(2, 0) + varint(static_cast<uint64_t>(step)) + bytes_field(5, summary));
}

void EventWriter::write_event(const std::string& payload) {
  const std::string length = little_endian<uint64_t>(payload.size());
  file_ << length << masked_crc(length) << payload << masked_crc(payload);
}

}  // namespace moesaic::train
