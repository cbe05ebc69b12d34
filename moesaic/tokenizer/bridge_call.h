// Owns what the Rust bridge returns. Private to this folder.
#pragma once
#include "moesaic/base/bridge_text.h"

namespace moesaic::tokenizer {

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
