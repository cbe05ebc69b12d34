// What is trained beside a frozen model: LoRA, (IA)^3, MoV and MoLoRA, attached to the model's sites.
#pragma once
#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "moesaic/adapters/claim.h"
#include "moesaic/adapters/targets.h"
#include "moesaic/formats/adapter_folder.h"
#include "moesaic/nn/learner.h"
#include "moesaic/nn/site.h"

namespace moesaic::adapters {

/// How a router weighs the experts. The keys are those of a run's `router:` block and of adapter_config.json's
/// `moesaic.router` block.
struct RouterConfig {
  std::string type = "soft";       // soft | top_k
  int64_t top_k = 0;               // experts kept when type is top_k
  std::string topk_mode = "mask";  // mask (reference) | renorm | residual
  std::string input = "token";     // token | sentence | layer_input | ffn_product
  int64_t sentence_dim = 0;        // d_e for input `sentence`; 0 = the model's hidden size
  /// hidden (the frozen model's mean-pooled last state) | column | the folder of a sentence encoder
  std::string sentence_source = "hidden";
  double init_std = 0.02;         // of the normal distribution that a router's weights begin with
  double jitter = 0.0;            // multiplicative uniform(1-j, 1+j) on the router's input while training
  double temperature = 1.0;       // divides the logits
  std::string logits = "signed";  // signed | absolute: their magnitude, as the sign of arrows is arbitrary
  bool head_wise = true;          // mov at heads: a vector and a router row per head, or one of each over all heads
};

/// Everything that defines an adapter. Parsed from a run's keys or from adapter_config.json.
struct AdapterConfig {
  std::string method;                          // lora | ia3 | mov | molora
  int64_t num_experts = 1;                     // at every site, or the largest of `layer_experts`
  std::map<int64_t, int64_t> layer_experts;    // experts by layer; empty = num_experts everywhere
  int64_t lora_rank = 8;                       // r of each expert
  double lora_alpha = 16;                      // the delta is multiplied by alpha / r
  double lora_dropout = 0.0;                   // of the low-rank input, while training
  bool use_rslora = false;                     // alpha / sqrt(r) instead
  bool use_dora = false;                       // lora: a magnitude per row of the sum; see Method::fold. Frozen only
  std::string bias = "none";                   // lora: none | lora_only | all: biases of the base that the file holds
  TargetPattern targets;                       // names or dotted suffixes, or one full regex
  TargetPattern feedforward;                   // (IA)^3 and MoV: targets that scale their input; see scales_input
  TargetPattern exclude;                       // same rule as targets, taken away
  std::vector<std::string> target_parameters;  // of PEFT's file, until settle_expert_pairs has seen to it
  PatternValues<int64_t> rank_pattern;         // lora_rank of the sites a pattern matches
  PatternValues<double> alpha_pattern;         // lora_alpha likewise
  std::vector<int64_t> layers_to_transform;    // empty = all
  std::vector<std::string> modules_to_save;    // modules whose weights the file holds whole; see replacements.h
  bool ensure_weight_tying = false;            // of these: a tied head and embedding stay one
  std::string spelling;                        // how these name the sites of a multi-modal model; formats/config.h
  /// Where keys are scaled: auto | output | post_qk_norm (after the per-head norm, which would cancel a gain before
  /// it). auto: post_qk_norm for mov on models with q/k norm, else output (what PEFT's (IA)^3 does).
  std::string k_site = "auto";
  RouterConfig router;                  // of every site with more than one expert
  std::string base_model_name_or_path;  // the model it was trained on, for people
  std::string base_fingerprint;         // Checkpoint::fingerprint()
  std::string base_dtype;               // number format the base had in training
  std::string sentence_fingerprint;     // of the sentence encoder's weights
  Json extra = Json::object();          // PEFT keys we carry but do not use

  /// The sentence encoder whose vectors the routers read; "" = none.
  std::string sentence_encoder() const;
  /// Experts at a site of `layer`, which must be one of layer_experts' when that is not empty.
  int64_t experts_at(int64_t layer) const { return layer_experts.empty() ? num_experts : layer_experts.at(layer); }
  /// Whether the site `path` is adapted.
  bool adapts(const std::string& path, int64_t layer) const;
  /// Whether an (IA)^3 or MoV site scales what it reads. PEFT's rule: the path ends in one of the names, or one regex
  /// matches the whole of it.
  bool scales_input(const std::string& path) const;
  int64_t rank_at(const std::string& path) const;
  /// What the delta of the site `path` is multiplied by: alpha / r, or alpha / sqrt(r).
  double scale_at(const std::string& path) const;
};

/// The method's preset targets at these sites, by role: `reference` or `all-linear` (lora, molora; "" means
/// all-linear for decoders, reference for encoder-decoders); keys, values and the FFN branch for ia3 and mov.
AdapterConfig resolve_targets(AdapterConfig config, const std::string& preset, const nn::Sites& sites);

struct Replacement;

/// One trained thing beside a frozen model: what a run learns, and what a model carries.
class Adapter : public nn::Learner, public nn::Attachment {
 public:
  /// Attaches new parameters (start state of the spec) to `sites`, trainable. Throws UsageError when a target matches
  /// no site, with the nearest site name and all hit counts.
  static std::shared_ptr<Adapter> create(AdapterConfig config, nn::Sites& sites, const torch::Device& device,
                                         uint64_t seed);
  /// Attaches a folder's adapter, frozen. Every tensor is claimed once and every target gets one, or DataError lists
  /// all offenders. `scale` multiplies its effect.
  static std::shared_ptr<Adapter> open(const std::filesystem::path& dir, nn::Sites& sites, const torch::Device& device,
                                       const std::string& base_fingerprint, double scale = 1.0);

  const AdapterConfig& config() const { return config_; }
  /// The parameters' gradients in the file's names and layouts (zeros where none was computed). For parity tests.
  formats::TensorMap gradients() const;
  /// The adapter in the file's names and layouts (float32).
  formats::AdapterFolder folder() const;
  /// Replaces the parameters by those of a folder() of the same config. Every tensor is claimed once and every
  /// parameter gets one, or DataError lists all that do not fit.
  void load_tensors(const formats::TensorMap& tensors);
  /// Sites per target pattern: {"q_proj", 30}.
  const std::vector<std::pair<std::string, int64_t>>& matches() const { return matches_; }
  /// Whether the embedding is its own, or another one through it.
  bool embeds() const;
  /// Whether its parameters require gradients.
  void set_trainable(bool on);

  // nn::Learner
  void save(const std::filesystem::path& dir) const override { formats::write_adapter_folder(dir, folder()); }
  void load(const std::filesystem::path& dir) override { load_tensors(formats::read_adapter_folder(dir).tensors); }
  // nn::Attachment
  nn::Needs needs() const override;

 protected:
  /// Every parameter as it stands in the folder.
  virtual std::vector<FileTensor> file_tensors() const = 0;
  /// Gives the model its own weights back; part of detach().
  void restore_weights();

  AdapterConfig config_;
  std::vector<std::pair<std::string, int64_t>> matches_;

 private:
  struct Replaced {
    std::string name;
    torch::Tensor weight;  // undefined: a sum with a pair
    bool in_file;
    std::function<void(const torch::Tensor&)> replace;
  };
  void replace(const nn::Sites& sites, const Replacement& replacement);
  /// Folds low-rank pairs into the weights they belong to, in whose place the sums stand while this is attached.
  void apply_whole(const nn::Sites& sites, const formats::TensorMap& pairs);

  int64_t hidden_width_ = 0;  // d, the default width of sentence vectors
  bool tied_head_ = false;
  std::vector<Replaced> replaced_;  // weights of the model
  formats::TensorMap whole_pairs_;  // as the file has them; what they make of the model's weights is in replaced_
};

/// A linear on its way into a merged model, float32.
struct FoldedLinear {
  torch::Tensor weight;  // [out, in]
  torch::Tensor bias;    // [out] or undefined
};

/// What a method is: one row per method, in its own file; the table is in registry.cpp.
struct Method {
  const char* name;                  // finetuning_type: "molora"
  const char* peft_type;             // adapter_config.json: "MOLORA"
  const char* summary;               // for help texts
  bool mixes;                        // has several experts and a router
  const char* expert;                // the method each expert alone is: "lora"; of one that does not mix itself
  bool low_rank;                     // has ranks, else vectors
  std::vector<const char*> tensors;  // what its tensors' names in a file end in, behind the site's: ".lora_A.weight"
  std::vector<nn::Role> reference, all_linear;  // roles that the target presets name
  std::shared_ptr<Adapter> (*make)(AdapterConfig config, nn::Sites& sites, const torch::Device& device, uint64_t seed,
                                   bool trainable, double effect);
  /// Folds one expert into the linear `site`, float32; see fold(). Takes what it uses out of `tensors`.
  void (*fold)(const AdapterConfig& config, const std::string& site, formats::TensorMap& tensors, FoldedLinear& linear);
  /// Expert e of a tensor of the folder under PEFT's name; undefined when there is none.
  std::pair<std::string, torch::Tensor> (*expert_tensor)(const AdapterConfig& config, const std::string& name,
                                                         const torch::Tensor& tensor, int64_t e);
};
/// Throws UsageError with the known names.
const Method& method_of(const std::string& name);
/// Throws ConfigError with the known types; `where` names the file.
const Method& method_of_peft_type(const std::string& peft_type, const std::string& where);
std::vector<std::string> method_names();
/// Warns when an adapter of `config`, read from `where`, was trained on other weights than those of `base_fingerprint`.
void warn_of_other_base(const AdapterConfig& config, const std::string& base_fingerprint, const std::string& where);
/// The linear, embedding or head that a tensor of a method belongs to; "" for a router's and for any other tensor.
std::string module_of(const std::string& tensor);
/// Folds an adapter with one expert per site into a model's tensors (names and layouts of Hugging Face), in float32:
///
///   LoRA      W' = W + (alpha / r) B A;  of an embedding [V, d] its transpose
///   DoRA      W' = diag(m / |w|) w, w = W + (alpha / r) B A with norms |w| of its rows
///   (IA)^3    output sites: W' = diag(l) W, b' = l b;  input sites: W' = W diag(l)
///
/// MoLoRA and MoV with one expert are LoRA and (IA)^3. Every tensor of the adapter is used once. Throws UsageError for
/// more than one expert (the mixture depends on the token, so no single weight equals it) and for scales behind a
/// per-head norm; DataError that lists every tensor without a fitting base weight.
void fold(const formats::AdapterFolder& adapter, const std::string& where, formats::TensorMap& model);

/// adapter_config.json <-> AdapterConfig. Every key is understood, or known to be harmless at its value, or refused by
/// name (pissa, aLoRA, ...), all in one message.
AdapterConfig parse_adapter_config(const OrderedJson& json, const std::string& where);
OrderedJson adapter_config_json(const AdapterConfig& config);
/// The same of a folder, whose tensors may be spelled as a multi-modal model's.
AdapterConfig parse_adapter_config(const formats::AdapterFolder& folder, const std::string& where);
/// A run's or a file's `num_experts`: a number, or {"0-7": 4, "8": 10} by layer. Throws ConfigError naming every range
/// that is none, overlaps another or has no fitting number.
void parse_experts(const Json& json, const std::string& where, AdapterConfig& config);
Json experts_json(const AdapterConfig& config);
/// The keys of a `router:` block.
RouterConfig parse_router_config(const Json& json, const std::string& where);
Json router_config_json(const RouterConfig& router);
/// Throws ConfigError with everything that is out of range, in one message.
void validate(const AdapterConfig& config, const std::string& where);

}  // namespace moesaic::adapters
