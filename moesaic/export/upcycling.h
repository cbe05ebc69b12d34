// What a file of `moesaic upcycle` asks for: Moesaic's own keys, or mergekit-moe's.
#pragma once
#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "moesaic/base/json.h"

namespace moesaic::exporting {

/// An expert that is another model's feed-forward networks, as mergekit-moe describes it.
struct SourceExpert {
  std::filesystem::path model;
  std::vector<std::string> positive, negative;  // prompts that its gate is made of
  double noise_scale = 0;                       // times a normal draw, added to all three matrices
  double residual_scale = 1;                    // multiplies down
};

struct Upcycling {
  std::filesystem::path base_model;
  std::string method;                        // copy | virtual_group | drop | residual | lora | mergekit
  int64_t num_experts = 0;                   // E of every layer
  int64_t experts_per_token = 2;             // k
  std::optional<int64_t> expert_capacity{};  // copy of a T5: tokens of one text that an expert takes
  double noise = 0;                          // copy: the standard deviation of what is added to every number
  int64_t granularity = 1;                   // virtual_group: G, parts that each copy is cut into
  double drop_ratio = 0.5;                   // drop: the share of the width that is drawn anew
  bool drop_independent = false;             // drop: other positions in each of the three matrices
  double router_init_std = 0.02;             // of the normal distribution of the routers
  std::string dtype;                         // float32 | bfloat16 | float16; "" = the base's
  uint64_t seed = 42;
  std::vector<std::filesystem::path> adapters;  // lora: one per expert
  std::string attention;                        // lora: average | drop what adapters have beside the experts

  // mergekit's
  std::string architecture;  // the sparse family it names; "" = whatever the base becomes
  std::string gate_mode;     // hidden | hidden_last | hidden_avg | cheap_embed | random | uniform_random
  std::vector<SourceExpert> experts, shared;

  /// Every folder that is read.
  std::vector<std::filesystem::path> inputs() const;
};

/// Every key is understood or refused by name, with the nearest known one; so is a key of another method. The file is
/// mergekit-moe's when it has `experts` or `gate_mode`. `seed` is used where the keys give none. Throws UsageError.
Upcycling parse_upcycling(const Json& keys, const std::string& where, uint64_t seed);

}  // namespace moesaic::exporting
