// Typed, bounded look-ups in a config.json that remember everything wrong with it.
#pragma once
#include <optional>
#include <string>
#include <vector>

#include "moesaic/base/json.h"
#include "moesaic/models/causal_lm.h"
#include "moesaic/models/seq2seq_lm.h"

namespace moesaic::models {

/// Reads config.json. A wrong value is noted and replaced by a harmless one, so that one message can list them all.
class ConfigReader {
 public:
  ConfigReader(const Json& json, std::string where) : json_(json), where_(std::move(where)) {}

  /// json[key] as an integer in [1, max]; noted as missing when absent or null without a fallback.
  int64_t size(const char* key, std::optional<int64_t> fallback, int64_t max);
  /// json[key] as a finite number above 0.
  double positive(const char* key, double fallback);
  /// The same; 0 when absent or null.
  double positive_or_off(const char* key);
  bool flag(const char* key, bool fallback);
  std::string text(const char* key, const std::string& fallback);
  /// json[key] as an integer, or as a list of integers; `fallback` when absent, none when null.
  std::vector<int64_t> ids(const char* key, std::vector<int64_t> fallback);

  bool has(const char* key) const { return json_.contains(key) && !json_.at(key).is_null(); }
  /// Present, even when null: some defaults apply only to an absent key.
  bool mentions(const char* key) const { return json_.contains(key); }
  const Json& json() const { return json_; }
  const std::string& where() const { return where_; }
  /// Notes that `key` is wrong.
  void error(const std::string& key, const std::string& message);
  /// Throws ConfigError with every note.
  void finish() const;

 private:
  const Json& json_;
  std::string where_;
  std::vector<std::string> errors_;
};

/// What the families' configuration classes assume where config.json is silent.
struct FamilyDefaults {
  std::optional<int64_t> vocab_size = {}, hidden_size = {}, intermediate_size = {}, num_layers = {}, num_heads = {};
  std::optional<int64_t> num_kv_heads = {};  // nullopt: as many as heads
  std::optional<int64_t> head_dim = {};      // nullopt: hidden_size / heads
  int64_t max_position = 2048;
  double rms_norm_eps = 1e-6;
  bool tie_word_embeddings = false;
  std::vector<int64_t> eos_ids = {};
  int64_t bos_id = -1;
  const char* activation_key = "hidden_act";
  const char* activation = "silu";
};

/// Sizes, norms, head and token ids: what every family has under the same keys.
DecoderConfig read_common(ConfigReader& reader, const FamilyDefaults& defaults);
/// The one rope object of a family without local layers. `theta` applies when it has none.
RopeConfig read_flat_rope(ConfigReader& reader, const DecoderConfig& config, double theta = 10'000.0);
/// One rope object. `name` is its key, for messages; `theta` applies when it has none of its own.
RopeConfig read_rope(ConfigReader& reader, const Json& rope, const std::string& name, double theta,
                     const DecoderConfig& config);
/// What a family of sparse models assumes where config.json is silent. nullptr: it has no such key.
struct SparseDefaults {
  int64_t experts = 8, top_k = 2;
  const char* width_key = "intermediate_size";  // of an expert
  int64_t width = 0;
  const char* shared_width_key = nullptr;  // of the expert that every token has; 0 = none
  int64_t shared_width = 0;
  bool renormalize = true;          // where there is no norm_topk_prob
  bool has_norm_topk_prob = false;  // false by default
  bool may_mix = false;             // layers may be dense: decoder_sparse_step, mlp_only_layers
};
/// The sparse layers of `config`, whose sizes are read. E may be num_experts or num_local_experts: transformers 4 and 5
/// differ in which they write.
SparseConfig read_sparse(ConfigReader& reader, const DecoderConfig& config, const SparseDefaults& defaults);
/// layer_types, or `is_sliding(layer)` where the file has none. All zero without a sliding layer.
std::vector<uint8_t> read_layer_types(ConfigReader& reader, const DecoderConfig& config,
                                      const std::function<bool(int64_t)>& is_sliding);

}  // namespace moesaic::models
