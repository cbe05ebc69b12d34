#include "moesaic/base/row_template.h"

#include "moesaic/base/bridge_text.h"

namespace moesaic {

RowTemplate::RowTemplate(const std::string& source, const std::string& where, Undefined undefined) : where_(where) {
  OwnedText reason;
  const bool strict = undefined == Undefined::kError;
  compiled_.reset(
      bridge_row_template_new(source.data(), source.size(), strict, reason.out()),
      [](const BridgeRowTemplate* made) { bridge_row_template_free(const_cast<BridgeRowTemplate*>(made)); });
  MOESAIC_CHECK(compiled_, FormatError, "{}: {}", where_, reason.reason());
}

std::string RowTemplate::render(const OrderedJson& row, uint64_t seed) const {
  std::string variables;
  try {
    variables = row.dump();
  } catch (const nlohmann::json::exception& error) {
    throw DataError(fmt::format("{}: the row is not valid UTF-8: {}", where_, error.what()));
  }
  OwnedText text, reason;
  MOESAIC_CHECK(
      bridge_row_template_render(compiled_.get(), variables.data(), variables.size(), seed, text.out(), reason.out()),
      DataError, "{}: {}", where_, reason.reason());
  return text.str();
}

}  // namespace moesaic
