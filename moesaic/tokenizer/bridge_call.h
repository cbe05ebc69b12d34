// Owns what the Rust bridge returns. Private to this folder.
#pragma once
#include <string>

#include "bridge/bridge.h"

namespace moesaic::tokenizer {

/// A text of the bridge, freed with the object.
class OwnedText {
 public:
  OwnedText() = default;
  explicit OwnedText(BridgeText text) : text_(text) {}
  OwnedText(const OwnedText&) = delete;
  OwnedText& operator=(const OwnedText&) = delete;
  ~OwnedText() { bridge_text_free(text_); }

  BridgeText* out() { return &text_; }
  std::string str() const { return std::string(text_.data, text_.size); }

 private:
  BridgeText text_{nullptr, 0};
};

/// Ids and offsets of the bridge, freed with the object.
class OwnedEncoding {
 public:
  OwnedEncoding() = default;
  OwnedEncoding(const OwnedEncoding&) = delete;
  OwnedEncoding& operator=(const OwnedEncoding&) = delete;
  ~OwnedEncoding() { bridge_encoding_free(encoding_); }

  BridgeEncoding* out() { return &encoding_; }
  const BridgeEncoding* operator->() const { return &encoding_; }

 private:
  BridgeEncoding encoding_{nullptr, nullptr, 0};
};

}  // namespace moesaic::tokenizer
