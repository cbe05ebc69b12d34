// The one law of loading: every tensor of a file has its place and every place gets its tensor, or all that does not
// fit is said in one message.
#pragma once
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "moesaic/formats/checkpoint.h"
#include "moesaic/formats/safetensors.h"

namespace moesaic::formats {

/// A tensor without its numbers. No dtype: any will do.
struct Declaration {
  std::vector<int64_t> shape;
  std::optional<at::ScalarType> dtype = std::nullopt;
};
using Declarations = std::map<std::string, Declaration>;

/// What is there.
Declarations declarations(const TensorMap& tensors);
Declarations declarations(const SafetensorsFile& file);
Declarations declarations(const Checkpoint& checkpoint);

/// Which dtypes fit.
enum class Dtypes {
  kAny,
  kFloating,  // numbers with a fraction
  kSame,      // the declared one
};

/// What does not fit; a caller may add findings of its own.
struct Misfits {
  std::vector<std::string> missing, unexpected;  // names
  std::vector<std::string> wrong;                // "name: got [3, 24], expected [12, 24]"

  void add(const Misfits& others);
  bool empty() const { return missing.empty() && unexpected.empty() && wrong.empty(); }
  /// Indented lines under "missing (2):", "unexpected (1):" and "wrong (1):", 20 of each; begins with a line end.
  std::string text() const;
};

Misfits misfits(const Declarations& expected, const Declarations& present, Dtypes dtypes = Dtypes::kFloating);

/// Throws DataError "`where`: the tensors do not fit `what`:..., hint: `hint`" unless nothing is amiss.
void check_fits(const Misfits& misfits, const std::string& where, const std::string& what, const std::string& hint);

}  // namespace moesaic::formats
