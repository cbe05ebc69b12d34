#include "moesaic/serve/keys.h"

#include <fstream>
#include <sstream>

#include "moesaic/base/check.h"
#include "moesaic/base/sha256.h"

namespace moesaic::serve {
namespace {

/// Takes as long for any text of the same length.
bool same_text(std::string_view a, std::string_view b) {
  unsigned char difference = a.size() == b.size() ? 0 : 1;
  for (size_t i = 0; i < std::min(a.size(), b.size()); ++i) difference |= static_cast<unsigned char>(a[i] ^ b[i]);
  return difference == 0;
}

}  // namespace

std::vector<ApiKey> read_keys(const std::filesystem::path& file) {
  std::vector<ApiKey> keys;
  std::ifstream lines(file);
  MOESAIC_CHECK(lines.good(), UsageError, "api_keys {}: can't read this file", file.string());
  int64_t number = 0;
  for (std::string line; std::getline(lines, line);) {
    ++number;
    std::istringstream words(line);
    std::string name, hash, role, rest;
    if (!(words >> name) || name[0] == '#') continue;
    words >> hash >> role;
    const bool hex = hash.size() == 64 && hash.find_first_not_of("0123456789abcdef") == std::string::npos;
    MOESAIC_CHECK(hex && (role.empty() || role == "user" || role == "admin") && !(words >> rest), DataError,
                  "{}:{}: expected a name, the SHA-256 of its key in lower-case hex and, where it is not a user's, "
                  "'admin'",
                  file.string(), number);
    keys.push_back({name, hash, role == "admin"});
  }
  MOESAIC_CHECK(!keys.empty(), DataError, "{}: holds no key, expected at least one", file.string());
  return keys;
}

const ApiKey* matching(const std::vector<ApiKey>& keys, std::string_view given) {
  const std::string hash = sha256_hex(given);
  const ApiKey* found = nullptr;
  for (const ApiKey& key : keys) {
    if (same_text(hash, key.sha256)) found = &key;
  }
  return found;
}

}  // namespace moesaic::serve
