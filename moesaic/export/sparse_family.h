// The sparse families that dense models become: names on disk and config.json.
#pragma once
#include <array>
#include <string>

#include "moesaic/base/json.h"

namespace moesaic::exporting {

/// The three matrices of a gated feed-forward network: down (act(gate x) * up x).
enum class Part { kGate, kUp, kDown };
inline constexpr std::array kParts{Part::kGate, Part::kUp, Part::kDown};

/// The name of a dense layer's matrix, in all families.
std::string dense_name(int64_t layer, Part part);

/// A family whose feed-forward networks are a router and experts. Names are those that transformers 4 and 5 save.
struct SparseFamily {
  const char* model_type;
  const char* architecture;
  const char* from;  // model_types it is made of, for messages
  bool shared;       // every layer has a shared expert, weighed by a sigmoid of its own gate
  bool qwen;         // config.json's words for experts

  std::string router(int64_t layer) const;
  std::string expert(int64_t layer, int64_t e, Part part) const;
  std::string shared_expert(int64_t layer, Part part) const;
  std::string shared_gate(int64_t layer) const;
};

/// Sizes of every sparse layer.
struct SparseSizes {
  int64_t experts = 0, per_token = 0;
  int64_t width = 0;         // of an expert
  int64_t shared_width = 0;  // of the shared expert; 0 in families without one
};

/// The family that a model with this config.json becomes. Throws UsageError with the reason where there is none.
const SparseFamily& sparse_family(const Json& dense, const std::string& where);

/// config.json of `family` for a dense one. Every key is carried; what `dense` leaves to its family's defaults is
/// written out, as the other family's are others. Throws UsageError naming the keys that it can't hold.
Json sparse_config(const Json& dense, const SparseFamily& family, const SparseSizes& sizes, const std::string& where);

}  // namespace moesaic::exporting
