// A text that the Rust bridge returns.
#pragma once
#include <new>
#include <string>

#include "bridge/bridge.h"

namespace moesaic {

/// Freed with the object.
class OwnedText {
 public:
  OwnedText() = default;
  explicit OwnedText(BridgeText text) : text_(text) {}
  OwnedText(const OwnedText&) = delete;
  OwnedText& operator=(const OwnedText&) = delete;
  ~OwnedText() { bridge_text_free(text_); }

  BridgeText* out() { return &text_; }
  std::string str() const { return std::string(text_.data, text_.size); }
  /// Why a call failed. Throws std::bad_alloc where memory or threads ran out.
  std::string reason() const {
    if (text_.data == nullptr) throw std::bad_alloc();
    return str();
  }

 private:
  BridgeText text_{nullptr, 0};
};

}  // namespace moesaic
