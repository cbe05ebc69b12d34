#include "moesaic/train/memory.h"

#include <unistd.h>

#include "moesaic/train/loss.h"

namespace moesaic::train {
namespace {

/// What this process holds now: code, libraries, and whatever was read before.
int64_t resident_bytes() {
  std::ifstream statm("/proc/self/statm");
  int64_t virtual_pages = 0, resident_pages = 0;
  statm >> virtual_pages >> resident_pages;
  return resident_pages * sysconf(_SC_PAGESIZE);
}

/// Experts at one site, as far as memory goes.
struct LayerExperts {
  int64_t ranks = 0;                                           // sum of E*r over the low-rank sites of the layer
  int64_t routed = 0;                                          // sum of E over those with a router
  bool qkv = false, o = false, gate_up = false, down = false;  // groups with low-rank experts
  int64_t head_scales = 0, branch_scales = 0;                  // scaled activations
  int64_t scale_routed = 0;                                    // numbers of routing weights per row
};

bool ends_with_any(const std::string& name, std::initializer_list<const char*> suffixes) {
  return std::any_of(suffixes.begin(), suffixes.end(), [&](const char* suffix) { return name.ends_with(suffix); });
}

std::vector<LayerExperts> experts_by_layer(models::CausalLM& model, adapters::Adapter* adapter) {
  std::vector<LayerExperts> layers(static_cast<size_t>(model.config().num_layers));
  if (adapter == nullptr) return layers;
  std::map<std::string, const nn::LinearSite*> linears;
  for (const auto& site : model.sites().linears) linears[site.name] = &site;
  for (const auto& parameter : adapter->parameters()) {
    const size_t dot = parameter.name.rfind(".lora_A");
    const std::string site = parameter.name.substr(0, parameter.name.rfind('.'));
    if (dot != std::string::npos) {
      const nn::LinearSite& linear = *linears.at(parameter.name.substr(0, dot));
      LayerExperts& layer = layers[static_cast<size_t>(linear.layer)];
      layer.ranks += parameter.tensor.numel() / linear.in;
      const int64_t experts = adapter->config().experts_at(linear.layer);
      layer.routed += experts > 1 ? experts : 0;
      layer.qkv |= ends_with_any(linear.name, {"q_proj", "k_proj", "v_proj"});
      layer.o |= linear.name.ends_with("o_proj");
      layer.gate_up |= ends_with_any(linear.name, {"gate_proj", "up_proj"});
      layer.down |= linear.name.ends_with("down_proj");
    }
    if (parameter.router || dot != std::string::npos || parameter.name.find(".lora_") != std::string::npos) continue;
    for (const auto& scale : model.sites().scales) {
      if (scale.name != site) continue;
      LayerExperts& layer = layers[static_cast<size_t>(scale.layer)];
      (scale.heads > 0 ? layer.head_scales : layer.branch_scales) += 1;
      layer.scale_routed += adapter->config().experts_at(scale.layer) * std::max<int64_t>(1, scale.heads);
      break;  // a linear may carry several scale sites; one of them is used
    }
  }
  return layers;
}

/// Numbers per row that the backward pass of one layer needs.
int64_t saved_per_row(const models::DecoderConfig& c, const LayerExperts& e, bool full) {
  const int64_t q = c.num_heads * c.head_dim, kv = c.num_kv_heads * c.head_dim;
  int64_t n = 2 * c.hidden_size;          // inputs of the two norms
  n += 2 * q + 2 * kv + c.num_heads;      // rotated queries and keys, values, attention output, log-sum-exp
  n += 2 * c.intermediate_size;           // gate and up
  if (e.qkv || full) n += c.hidden_size;  // normed input
  if (e.gate_up || full) n += c.hidden_size;
  if (e.down || full) n += c.intermediate_size;
  if (c.pre_post_norms) n += 2 * c.hidden_size;
  n += 2 * e.ranks + 2 * e.routed;             // x A^T with the logits, gated ranks, routing weights
  n += e.head_scales * (q + 2 * kv) / 2;       // unscaled keys or values, views of the whole projection
  n += e.branch_scales * c.intermediate_size;  // act(gate)
  n += e.scale_routed;
  return n;
}

/// Bytes of a model's weights at `element` bytes each.
int64_t weight_bytes(const models::CausalLM& model, int64_t element) {
  int64_t bytes = 0;
  for (const auto& item : model.named_parameters()) {
    const bool tied_head = model.config().tie_word_embeddings && item.key() == "lm_head.weight";
    if (!tied_head) bytes += item.value().numel() * element;
  }
  return bytes;
}

/// What the backward pass needs of the blocks `first` .. of a model.
int64_t activation_bytes(const models::DecoderConfig& c, const std::vector<LayerExperts>& layers, int64_t first,
                         bool full, bool checkpointing, int64_t row_bytes) {
  int64_t saved = 0, largest = 0;
  for (size_t layer = static_cast<size_t>(first); layer < layers.size(); ++layer) {
    const int64_t bytes = saved_per_row(c, layers[layer], full) * row_bytes;
    largest = std::max(largest, bytes);
    saved += checkpointing ? c.hidden_size * row_bytes : bytes;
  }
  return checkpointing ? saved + largest : saved;
}

/// The backward pass of a layer holds, at its widest, the gradients of gate and up, of the branch's product and of the
/// layer's input beside what was saved.
int64_t scratch_bytes(const models::DecoderConfig& c, int64_t row_bytes) {
  return (3 * c.intermediate_size + 3 * c.hidden_size) * row_bytes;
}

int64_t loss_bytes(const models::DecoderConfig& c, int64_t targets, int64_t element, torch::Device device) {
  const int64_t logits = std::min(cross_entropy_chunk_bytes(device), targets * c.vocab_size * 4);
  return logits + 3 * targets * c.hidden_size * element;
}

int64_t optimizer_slots(const TrainConfig& config) { return config.optim == "adamw" ? 2 : 1; }

}  // namespace

int64_t MemoryEstimate::total() const {
  int64_t sum = 0;
  for (const auto& [name, bytes] : parts) sum += bytes;
  return sum;
}

MemoryEstimate estimate_memory(models::CausalLM& model, adapters::Adapter* adapter, const TrainConfig& config,
                               int64_t tokens, int64_t targets, torch::ScalarType dtype, torch::Device device) {
  const auto& c = model.config();
  const int64_t element = static_cast<int64_t>(c10::elementSize(dtype));
  const bool full = adapter == nullptr;
  MemoryEstimate estimate;
  auto add = [&](const std::string& name, int64_t bytes) { estimate.parts.emplace_back(name, bytes); };

  const bool loaded = !model.device().is_meta();
  const int64_t weights = weight_bytes(model, element);
  // Where the weights are loaded already, what the process holds includes them.
  const int64_t resident = resident_bytes();
  add("program", std::max<int64_t>(0, loaded && device.is_cpu() ? resident - weights : resident));
  add(full ? "weights" : "frozen weights", weights);

  int64_t trained = full ? weights : 0;
  if (!full) {
    for (const auto& parameter : adapter->parameters()) trained += parameter.tensor.numel() * 4;
  }
  if (!full && !(loaded && device.is_cpu())) add("adapter", trained);
  add("gradients", trained);
  add("optimizer state", optimizer_slots(config) * trained);
  const auto layers = experts_by_layer(model, adapter);
  add("activations", activation_bytes(c, layers, 0, full, config.gradient_checkpointing, tokens * element));
  add("backward scratch", scratch_bytes(c, tokens * element));
  add("loss", loss_bytes(c, targets, element, device));
  return estimate;
}

MemoryEstimate estimate_memory(compose::Composition& composition, const TrainConfig& config, int64_t tokens,
                               int64_t targets) {
  models::CausalLM& anchor = composition.anchor();
  const auto& c = anchor.config();
  const int64_t element = static_cast<int64_t>(c10::elementSize(anchor.dtype()));
  const bool on_cpu = anchor.device().is_cpu();
  MemoryEstimate estimate;
  auto add = [&](const std::string& name, int64_t bytes) { estimate.parts.emplace_back(name, bytes); };

  int64_t weights = weight_bytes(anchor, element), trained = 0;
  for (const auto& member : composition.augmenting()) weights += weight_bytes(*member.model, element);
  for (const auto& tensor : trainable_tensors(composition, config)) trained += tensor.tensor.numel() * 4;
  const int64_t resident = resident_bytes();
  add("program", std::max<int64_t>(0, on_cpu ? resident - weights - trained : resident));
  add("frozen weights", weights);
  add("trained tensors", trained);
  add("gradients", trained);
  add("optimizer state", optimizer_slots(config) * trained);

  adapters::Adapter* adapter = composition.trains_adapters() ? composition.anchor_member().adapter.get() : nullptr;
  const int64_t first = composition.first_trained_block();
  int64_t activations = activation_bytes(c, experts_by_layer(anchor, adapter), first, /*full=*/false,
                                         config.gradient_checkpointing, tokens * element);
  int64_t connections = 0, states_per_token = first > 0 ? c.hidden_size : 0;
  for (size_t m = 0; m < composition.augmenting().size(); ++m) {
    const compose::Member& member = composition.augmenting()[m];
    const auto& aug = member.model->config();
    const auto count = std::ssize(composition.config().augmenting[m].connections);
    // The state and P; keys and values before and after the rotation; queries likewise, the attention's output, Y.
    connections += count * (aug.hidden_size + 4 * c.hidden_size + 4 * c.hidden_size) * tokens * 4;
    if (member.adapter && composition.trains_adapters()) {
      activations += activation_bytes(aug, experts_by_layer(*member.model, member.adapter.get()), 0, /*full=*/false,
                                      /*checkpointing=*/false, tokens * element);
    } else {
      states_per_token += count * aug.hidden_size;
    }
  }
  add("activations", activations);
  add("connections", connections);
  add("backward scratch", scratch_bytes(c, tokens * element));
  add("loss", loss_bytes(c, targets, element, anchor.device()));
  if (config.state_cache_gib > 0 && config.state_cache_dir.empty()) {
    const double limit = config.state_cache_gib * (1 << 30);
    const double all = config.max_steps > 0
                           ? static_cast<double>(states_per_token * tokens * element) *
                                 static_cast<double>(config.max_steps * config.gradient_accumulation_steps)
                           : limit;
    add("state cache, most", static_cast<int64_t>(std::min(limit, all)));
  }
  return estimate;
}

}  // namespace moesaic::train
