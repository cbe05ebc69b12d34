// Cells of CSV files.
#pragma once
#include <string>

namespace moesaic {

/// `text` as one cell, in quotes where it needs them. Source: RFC 4180.
inline std::string csv_cell(const std::string& text) {
  if (text.find_first_of(",\"\r\n") == std::string::npos) return text;
  std::string quoted = "\"";
  for (const char c : text) quoted += c == '"' ? "\"\"" : std::string(1, c);
  return quoted + "\"";
}

}  // namespace moesaic
