#include "moesaic/formats/claim.h"

#include <c10/core/ScalarType.h>

#include <algorithm>

#include "moesaic/base/check.h"
#include "moesaic/base/text.h"

namespace moesaic::formats {
namespace {

constexpr size_t kShown = 20;  // of each kind

std::string listed(const char* title, const std::vector<std::string>& lines) {
  if (lines.empty()) return "";
  std::string text = fmt::format("\n  {} ({}):", title, lines.size());
  for (size_t i = 0; i < std::min(lines.size(), kShown); ++i) text += "\n    " + lines[i];
  if (lines.size() > kShown) text += fmt::format("\n    and {} more", lines.size() - kShown);
  return text;
}

bool fits(const std::optional<at::ScalarType>& present, const std::optional<at::ScalarType>& expected, Dtypes dtypes) {
  if (dtypes == Dtypes::kAny || !present) return true;
  if (dtypes == Dtypes::kFloating) return at::isFloatingType(*present);
  return !expected || *present == *expected;
}

std::string expected_dtype(const Declaration& expected, Dtypes dtypes) {
  return dtypes == Dtypes::kFloating ? "numbers with a fraction" : c10::toString(*expected.dtype);
}

template <class File>
Declarations declarations_of(const File& file) {
  Declarations all;
  for (const std::string& name : file.names()) all[name] = {file.shape(name), file.dtype(name)};
  return all;
}

}  // namespace

Declarations declarations(const TensorMap& tensors) {
  Declarations all;
  for (const auto& [name, tensor] : tensors) all[name] = {tensor.sizes().vec(), tensor.scalar_type()};
  return all;
}

Declarations declarations(const SafetensorsFile& file) { return declarations_of(file); }

Declarations declarations(const Checkpoint& checkpoint) { return declarations_of(checkpoint); }

void Misfits::add(const Misfits& others) {
  missing.insert(missing.end(), others.missing.begin(), others.missing.end());
  unexpected.insert(unexpected.end(), others.unexpected.begin(), others.unexpected.end());
  wrong.insert(wrong.end(), others.wrong.begin(), others.wrong.end());
}

std::string Misfits::text() const {
  return listed("missing", missing) + listed("unexpected", unexpected) + listed("wrong", wrong);
}

Misfits misfits(const Declarations& expected, const Declarations& present, Dtypes dtypes) {
  Misfits found;
  for (const auto& [name, wanted] : expected) {
    const auto it = present.find(name);
    if (it == present.end()) {
      found.missing.push_back(name);
      continue;
    }
    const Declaration& got = it->second;
    if (got.shape != wanted.shape) {
      found.wrong.push_back(
          fmt::format("{}: got {}, expected {}", name, shape_text(got.shape), shape_text(wanted.shape)));
    }
    if (!fits(got.dtype, wanted.dtype, dtypes)) {
      found.wrong.push_back(
          fmt::format("{}: got {}, expected {}", name, c10::toString(*got.dtype), expected_dtype(wanted, dtypes)));
    }
  }
  for (const auto& [name, got] : present) {
    if (!expected.contains(name)) found.unexpected.push_back(name);
  }
  return found;
}

void check_fits(const Misfits& misfits, const std::string& where, const std::string& what, const std::string& hint) {
  MOESAIC_CHECK(misfits.empty(), DataError, "{}: the tensors do not fit {}:{}\nhint: {}", where, what, misfits.text(),
                hint);
}

}  // namespace moesaic::formats
