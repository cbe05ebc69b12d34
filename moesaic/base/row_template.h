// Jinja templates over rows of data.
#pragma once
#include <cstdint>
#include <memory>
#include <string>

#include "moesaic/base/json.h"

struct BridgeRowTemplate;

namespace moesaic {

/// A Jinja template whose variables are the fields of a row, as Jinja2 renders it in the environment of promptsource:
/// blocks keep the line ends around them, what is undefined prints nothing, and there are zip(), `choice` and
/// `most_frequent`. It may come from anybody: size, steps and memory are bounded. Lists can't be changed in place
/// (list.append).
class RowTemplate {
 public:
  enum class Undefined { kEmpty, kError };

  /// `where` names it in messages. kError: lm-evaluation-harness's environment, in which what is undefined is an error
  /// and the line end at the end stays; and there is `tojson`. Throws FormatError with the template's line when it is
  /// broken.
  RowTemplate(const std::string& source, const std::string& where, Undefined undefined = Undefined::kEmpty);

  /// `row`: an object. `seed` decides what the filters choice and random take. Safe from several threads. Throws
  /// DataError with the template's line.
  std::string render(const OrderedJson& row, uint64_t seed) const;

 private:
  std::string where_;
  std::shared_ptr<const BridgeRowTemplate> compiled_;
};

}  // namespace moesaic
