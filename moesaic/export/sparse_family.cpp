#include "moesaic/export/sparse_family.h"

#include "moesaic/formats/expert_names.h"
#include "moesaic/models/registry.h"

namespace moesaic::exporting {
namespace {

const SparseFamily kFamilies[] = {
    {"mixtral", "MixtralForCausalLM", "llama, mistral", false, false},
    {"qwen2_moe", "Qwen2MoeForCausalLM", "qwen2", true, true},
    {"qwen3_moe", "Qwen3MoeForCausalLM", "qwen3", false, true},
};

formats::ExpertNames names_of(const SparseFamily& family) { return *formats::expert_names(family.model_type); }

const char* part_name(const formats::ExpertNames& names, Part part) {
  return part == Part::kGate ? names.gate_proj : part == Part::kUp ? names.up_proj : names.down_proj;
}

const SparseFamily* family_of(const std::string& dense_type) {
  if (dense_type == "llama" || dense_type == "mistral") return &kFamilies[0];
  if (dense_type == "qwen2") return &kFamilies[1];
  if (dense_type == "qwen3") return &kFamilies[2];
  return nullptr;
}

std::string refused_because(const std::string& model_type, const Json& config, const std::string& where) {
  if (model_type.starts_with("gemma")) return "no sparse family has gemma's norms and embedding scale";
  if (formats::expert_names(model_type)) return "it is sparse already";
  if (!models::is_decoder(config, where)) return "of encoder-decoders only T5 has a sparse family, Switch";
  return "no sparse family is made of it";
}

bool is_set(const Json& json, const char* key) {
  const auto it = json.find(key);
  return it != json.end() && !it->is_null() && *it != false;
}

void fill(Json& config, const char* key, const Json& value) {
  if (!config.contains(key) || config.at(key).is_null()) config[key] = value;
}

bool slides(const models::DecoderConfig& dense, int64_t layer) {
  return dense.sliding_window > 0 && (dense.layer_is_sliding.empty() || dense.layer_is_sliding[layer] != 0);
}

/// What the family's attention can't do, by key.
void check_holds(const Json& config, const models::DecoderConfig& dense, const SparseFamily& family,
                 const std::string& where) {
  std::vector<std::string> problems;
  auto problem = [&](const char* key, const char* why) {
    problems.push_back(fmt::format("{}: got {}, but {}", key, config.value(key, Json()).dump().substr(0, 80), why));
  };
  for (const char* key : {"attention_bias", "mlp_bias"}) {
    if (!family.qwen && is_set(config, key)) problem(key, "mixtral has no biases");
  }
  for (const char* key : {"quantization_config", "auto_map"}) {
    if (is_set(config, key)) problem(key, "what it says of the dense model does not hold for the sparse one");
  }
  int64_t sliding = 0;
  for (int64_t i = 0; i < dense.num_layers; ++i) sliding += slides(dense, i);
  const bool by_layer = sliding > 0 && sliding < dense.num_layers;
  if (by_layer && !family.shared) {
    problem(config.contains("layer_types") ? "layer_types" : "max_window_layers",
            "a window is for all layers there or for none");
  }
  MOESAIC_CHECK(problems.empty(), UsageError, "{}: {} can't hold\n  {}", where, family.model_type,
                fmt::join(problems, "\n  "));
}

void say_windows(Json& config, const models::DecoderConfig& dense, const SparseFamily& family) {
  const bool any = dense.sliding_window > 0;
  config["sliding_window"] = any ? Json(dense.sliding_window) : Json();
  if (!family.qwen) return;
  config["use_sliding_window"] = any;
  Json types = Json::array();
  for (int64_t i = 0; i < dense.num_layers; ++i) {
    types.push_back(slides(dense, i) ? "sliding_attention" : "full_attention");
  }
  config["layer_types"] = types;
}

void say_experts(Json& config, const models::DecoderConfig& dense, const SparseFamily& family,
                 const SparseSizes& sizes) {
  config["num_local_experts"] = sizes.experts;  // the writer adds num_experts
  config["num_experts_per_tok"] = sizes.per_token;
  config["output_router_logits"] = false;
  config["router_aux_loss_coef"] = 0.001;
  if (!family.qwen) {
    config["intermediate_size"] = sizes.width;
    config["router_jitter_noise"] = 0.0;
    return;
  }
  config["intermediate_size"] = dense.intermediate_size;
  config["moe_intermediate_size"] = sizes.width;
  config["norm_topk_prob"] = true;
  config["decoder_sparse_step"] = 1;
  config["mlp_only_layers"] = Json::array();
  if (family.shared) {
    config["shared_expert_intermediate_size"] = sizes.shared_width;
    config["qkv_bias"] = true;
  }
}

}  // namespace

std::string dense_name(int64_t layer, Part part) {
  return fmt::format("model.layers.{}.mlp.{}.weight", layer, part_name({}, part));
}

std::string SparseFamily::router(int64_t layer) const {
  return fmt::format("model.layers.{}.{}.gate.weight", layer, names_of(*this).block);
}
std::string SparseFamily::expert(int64_t layer, int64_t e, Part part) const {
  const formats::ExpertNames names = names_of(*this);
  return fmt::format("model.layers.{}.{}.experts.{}.{}.weight", layer, names.block, e, part_name(names, part));
}
std::string SparseFamily::shared_expert(int64_t layer, Part part) const {
  const formats::ExpertNames names = names_of(*this);
  return fmt::format("model.layers.{}.{}.shared_expert.{}.weight", layer, names.block, part_name(names, part));
}
std::string SparseFamily::shared_gate(int64_t layer) const {
  return fmt::format("model.layers.{}.{}.shared_expert_gate.weight", layer, names_of(*this).block);
}

const SparseFamily& sparse_family(const Json& dense, const std::string& where) {
  const auto model_type = get<std::string>(dense, "model_type", where);
  const SparseFamily* family = family_of(model_type);
  if (family != nullptr) return *family;
  std::vector<std::string> made;
  for (const SparseFamily& each : kFamilies) made.push_back(fmt::format("{} of {}", each.model_type, each.from));
  throw UsageError(fmt::format("{}: model_type {} can't become sparse: {}\nhint: there are {}", where, model_type,
                               refused_because(model_type, dense, where), fmt::join(made, "; ")));
}

Json sparse_config(const Json& config, const SparseFamily& family, const SparseSizes& sizes, const std::string& where) {
  const models::DecoderConfig dense = models::parse_decoder_config(config, where);
  check_holds(config, dense, family, where);
  Json sparse = config;
  sparse["model_type"] = family.model_type;
  sparse["architectures"] = {family.architecture};
  fill(sparse, "vocab_size", dense.vocab_size);
  fill(sparse, "hidden_size", dense.hidden_size);
  fill(sparse, "num_hidden_layers", dense.num_layers);
  fill(sparse, "num_attention_heads", dense.num_heads);
  fill(sparse, "num_key_value_heads", dense.num_kv_heads);
  fill(sparse, "head_dim", dense.head_dim);
  fill(sparse, "hidden_act", "silu");
  fill(sparse, "max_position_embeddings", dense.max_position);
  fill(sparse, "rms_norm_eps", dense.rms_norm_eps);
  fill(sparse, "tie_word_embeddings", dense.tie_word_embeddings);
  fill(sparse["rope_parameters"], "rope_theta", dense.rope.theta);
  say_windows(sparse, dense, family);
  say_experts(sparse, dense, family, sizes);
  return sparse;
}

}  // namespace moesaic::exporting
