// LoRAs that one already has, as the experts of one MoLoRA.
#pragma once
#include <filesystem>
#include <set>
#include <string>
#include <vector>

#include "moesaic/adapters/adapter.h"

namespace moesaic::adapters {

/// A LoRA on its way into a mix.
struct MixPart {
  std::string where;  // its folder, for messages
  AdapterConfig config;
  formats::TensorMap tensors;   // "<site>.lora_A.weight" [r, in] and "<site>.lora_B.weight" [out, r]
  std::set<std::string> sites;  // module paths
};

/// Reads a LoRA folder, PEFT's or ours. Throws UsageError for another method and for what no expert can be (DoRA,
/// biases, replaced modules, pairs of embedding or head), DataError listing every tensor that has no partner or
/// another rank than the config says.
MixPart read_mix_part(const std::filesystem::path& dir);

/// A MoLoRA whose expert e is parts[e]. At every site that any of them adapts
///
///   A_e = [A; 0] [r, in]     B_e = [s B, 0] [out, r]     s = alpha / r or alpha / sqrt(r) of the part at the site
///
/// with r the largest rank that the parts have at linears of that name; both are zero where a part has nothing. Alpha
/// is r, so that the scale of the whole is 1, and an expert with weight 1 is its part. Routers are even_routers() or
/// arrow_routers(), or are drawn and trained; `router` says how they are used.
/// Throws UsageError for fewer than two parts and for parts of different bases, DataError for shapes that differ. Where
/// fingerprints can't tell, other names of the base are a warning.
formats::AdapterFolder mix(const std::vector<MixPart>& parts, const RouterConfig& router);

/// What a part brings: "runs/a: 60 of 210 sites, rank 8, scale 2".
std::string describe(const MixPart& part, const formats::AdapterFolder& mix);

/// Routers of zeros: every expert has the weight 1 / E. Named "<site>.router.weight", [E, in].
formats::TensorMap even_routers(const formats::AdapterFolder& mix);

/// Row e is the direction of the input that expert e's delta B_e A_e stretches most, its first right singular vector,
/// known but for its sign; zero where the expert is. Computed of the small factors in float64: with A^T = Q R_A and
/// B = P R_B it is Q v, v the first right singular vector of R_B R_A^T.
/// Source: Arrow, arXiv 2405.11157; its logits are |v . x|, RouterConfig::logits `absolute`.
formats::TensorMap arrow_routers(const formats::AdapterFolder& mix);

/// The routers of an adapter whose experts stay as they are: what is trained of a mix. What is kept is the whole.
class Routers : public nn::Learner {
 public:
  /// Throws UsageError for an adapter without a router.
  explicit Routers(std::shared_ptr<Adapter> adapter);
  std::vector<nn::Parameter> parameters() override;
  void save(const std::filesystem::path& dir) const override { adapter_->save(dir); }
  void load(const std::filesystem::path& dir) override { adapter_->load(dir); }

 private:
  std::shared_ptr<Adapter> adapter_;
};

}  // namespace moesaic::adapters
