// Who may ask.
#pragma once
#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

namespace moesaic::serve {

/// A key, known by its hash alone.
struct ApiKey {
  std::string name;
  std::string sha256;  // of the key, lower-case hex
  bool admin = false;
};

/// A file with a key a line: a name, the SHA-256 of the key and, where it is not a user's, 'admin'; lines that begin
/// with # and empty ones are nothing. Throws UsageError when it can't be read, DataError with the line.
std::vector<ApiKey> read_keys(const std::filesystem::path& file);

/// The one that `given` is; nullptr: none. Takes as long whichever it is.
const ApiKey* matching(const std::vector<ApiKey>& keys, std::string_view given);

}  // namespace moesaic::serve
