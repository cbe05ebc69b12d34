// Sites: the named points of a model where an adapter may act. Layers own slots; adapters fill them. Base parameter
// names never change, and neither side includes the other.
#pragma once
#include <torch/torch.h>

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "moesaic/nn/pass.h"

namespace moesaic::nn {

class LinearGroup;

/// What a linear is to its model; its name stays the file's.
enum class Role { kQuery, kKey, kValue, kAttentionOut, kGate, kUp, kDown };

/// Adds to the outputs of a group of linears that read the same input (q, k, v; gate, up; o; down).
class GroupAdapter {
 public:
  virtual ~GroupAdapter() = default;
  /// x: [N, in]. Returns [N, sum of out]: group.base(x) plus what the adapters add.
  virtual torch::Tensor forward(const torch::Tensor& x, const LinearGroup& group, Pass& pass) = 0;
  /// True when a tensor of it requires a gradient.
  virtual bool trains() const = 0;
  /// Numbers per row that its backward pass needs, the group's input apart.
  virtual int64_t saved_per_row() const = 0;
};

/// Rescales an activation.
class ScaleAdapter {
 public:
  virtual ~ScaleAdapter() = default;
  /// y: [N, H, k] at a head site, [N, f] at a flat one. Returns the same shape and dtype.
  virtual torch::Tensor forward(const torch::Tensor& y, Pass& pass) = 0;
  /// The FFN branch site: y = act(gate) [N, f] and up [N, f]; returns the input of down_proj,
  /// scale(act(gate)) * up. `ffn_product` routers read act(gate) * up.
  virtual torch::Tensor forward_ffn(const torch::Tensor& act, const torch::Tensor& up, Pass& pass) = 0;
  virtual bool trains() const = 0;
  /// Numbers per row that its backward pass needs beside the activation.
  virtual int64_t saved_per_row() const = 0;
};

/// While one lives, this thread's forward passes run the frozen model alone.
class AdapterDisabled {
 public:
  AdapterDisabled() : previous_(disabled()) { disabled() = true; }
  ~AdapterDisabled() { disabled() = previous_; }
  AdapterDisabled(const AdapterDisabled&) = delete;
  AdapterDisabled& operator=(const AdapterDisabled&) = delete;
  static bool& disabled() {
    thread_local bool value = false;
    return value;
  }

 private:
  bool previous_;
};

/// A point where an activation may be rescaled; several scales multiply. Empty: the identity, for nothing.
struct ScaleSlot {
  std::vector<std::shared_ptr<ScaleAdapter>> adapters;
  bool empty() const { return adapters.empty() || AdapterDisabled::disabled(); }
  /// y through every adapter of the slot.
  torch::Tensor apply(torch::Tensor y, Pass& pass) const;
  bool trains() const;
  int64_t saved_per_row() const;
};

/// One adaptable linear: a row of a group.
struct LinearSite {
  std::string name;  // module path: "model.layers.0.self_attn.q_proj"
  Role role;
  int64_t layer;
  LinearGroup* group;
  int64_t index;  // in the group
  int64_t in;
  int64_t out;
  bool routed = false;  // of an expert of a sparse model: it sees the rows that are routed to it
  double share = 1.0;   // how many of all rows these are, when the experts have equally many: k / E
};

/// Where a scale acts.
enum class ScaleKind {
  kInput,         // what a linear reads
  kOutput,        // output of a linear, after its bias and before what low-rank adapters add; [N, H, k] when heads > 0
  kPostHeadNorm,  // keys (queries) after the per-head norm of models with q/k norm, before RoPE
  kFfn,           // act(gate), before the product with up; PEFT's (IA)^3 on the input of down_proj equals it
};

/// One point where a scale may act.
struct ScaleSite {
  std::string name;  // module path of the linear it belongs to: "model.layers.0.self_attn.k_proj", "...mlp.down_proj"
  Role role;         // of that linear
  int64_t layer;
  ScaleKind kind;
  ScaleSlot* slot;
  int64_t heads;   // H (KV heads for k and v), or 0 for a flat site
  int64_t width;   // k (per head) or the flat width
  int64_t hidden;  // d, the width of layer_input
};

/// A weight that an adapter may replace as a whole while it is attached.
struct WeightSite {
  std::string name;  // "model.embed_tokens.weight"
  std::vector<int64_t> shape;
  /// Puts `weight` in its place, undefined: the model's own again. An embedding and a head may have other rows, both
  /// the same: the vocabulary is then theirs.
  std::function<void(const torch::Tensor& weight)> replace;
  /// What stands there; undefined or empty where it is quantised.
  std::function<torch::Tensor()> value;
};

/// Every site of a model, in layer order.
struct Sites {
  std::vector<LinearSite> linears;
  std::vector<ScaleSite> scales;
  std::vector<WeightSite> weights;   // every parameter, and lm_head
  std::vector<std::string> routers;  // names of the weights of the model's own routers
  bool tied_head = false;            // lm_head.weight is the embedding until it is replaced itself
  bool has_qk_norm = false;
  std::string model_type;               // "llama", "qwen2", ...: for messages
  std::string task_type = "CAUSAL_LM";  // what PEFT calls such a model's use
};

/// What an adapter wants to know of a text.
struct Needs {
  enum class Sentence { kNone, kHidden, kColumn, kEncoder };
  bool routed = false;                  // a router mixes experts
  Sentence sentence = Sentence::kNone;  // vectors of a whole prompt, and whose
  int64_t sentence_width = 0;           // d_e
  bool replaces = false;                // weights of the model: it is attached alone, with weight 1
};

/// An adapter, as the model that owns it sees it.
class Attachment {
 public:
  virtual ~Attachment() = default;
  virtual Needs needs() const = 0;
  /// Who it is: `owner` in routing records, `column` in mixtures (-1: its weight is always 1).
  virtual void name_as(const std::string& owner, int64_t column) = 0;
  const std::string& owner() const { return owner_; }
  /// Takes it out of the slots; called by the model before these die, and harmless when repeated.
  virtual void detach() = 0;

 protected:
  std::string owner_;
};

}  // namespace moesaic::nn
