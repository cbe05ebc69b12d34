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
  int64_t weights = 0;
  std::set<std::string> counted;
  for (const auto& item : model.named_parameters()) {
    const bool tied_head = c.tie_word_embeddings && item.key() == "lm_head.weight";
    if (!tied_head) weights += item.value().numel() * element;
  }
  // Where the weights are loaded already, what the process holds includes them.
  const int64_t resident = resident_bytes();
  add("program", std::max<int64_t>(0, loaded && device.is_cpu() ? resident - weights : resident));
  add(full ? "weights" : "frozen weights", weights);

  int64_t trained = full ? weights : 0;
  if (!full) {
    for (const auto& parameter : adapter->parameters()) trained += parameter.tensor.numel() * 4;
  }
  const int64_t slots = config.optim == "adamw" ? 2 : 1;
  if (!full && !(loaded && device.is_cpu())) add("adapter", trained);
  add("gradients", trained);
  add("optimizer state", slots * trained);

  const auto layers = experts_by_layer(model, adapter);
  int64_t saved = 0, largest = 0;
  for (const auto& layer : layers) {
    const int64_t bytes = saved_per_row(c, layer, full) * tokens * element;
    largest = std::max(largest, bytes);
    saved += config.gradient_checkpointing ? c.hidden_size * tokens * element : bytes;
  }
  add("activations", config.gradient_checkpointing ? saved + largest : saved);
  // The backward pass of a layer holds, at its widest, the gradients of gate and up, of the branch's product and of
  // the layer's input beside what was saved.
  add("backward scratch", (3 * c.intermediate_size + 3 * c.hidden_size) * tokens * element);
  const int64_t logits = std::min(cross_entropy_chunk_bytes(device), targets * c.vocab_size * 4);
  add("loss", logits + 3 * targets * c.hidden_size * element);
  return estimate;
}

}  // namespace moesaic::train
