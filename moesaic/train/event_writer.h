// TensorBoard event files: scalars only.
#pragma once
#include <filesystem>
#include <fstream>
#include <string>
#include <string_view>

namespace moesaic::train {

/// The CRC-32C (Castagnoli) of `bytes`, as TFRecord frames use it.
uint32_t crc32c(std::string_view bytes);

/// Appends scalars to an event file TensorBoard reads: TFRecord frames around Event protobuf messages (wall_time,
/// step, summary {tag, simple_value}).
/// Source: TensorFlow's record_writer and event.proto.
class EventWriter {
 public:
  /// Creates `dir`/events.out.tfevents.<seconds>.<host>.<pid>. Throws DataError when it can't.
  explicit EventWriter(const std::filesystem::path& dir);
  void add_scalar(const std::string& tag, double value, int64_t step);
  void flush() { file_.flush(); }
  const std::filesystem::path& path() const { return path_; }

 private:
  void write_event(const std::string& payload);

  std::filesystem::path path_;
  std::ofstream file_;
};

}  // namespace moesaic::train
