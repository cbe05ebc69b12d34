// What a run or a composition is, for people.
#pragma once
#include <string>
#include <utility>
#include <vector>

namespace moesaic::run {

/// Labelled lines: {"model", "SmolLM2 (llama, ...)"}; an empty label goes on with the one before.
struct Plan {
  std::vector<std::pair<std::string, std::string>> lines;

  void add(const std::string& label, const std::string& text) { lines.emplace_back(label, text); }
  std::string text() const;
};

}  // namespace moesaic::run
