#include "moesaic/models/causal_lm.h"

#include "moesaic/base/check.h"
#include "moesaic/formats/claim.h"
#include "moesaic/models/initialize.h"
#include "moesaic/models/registry.h"

namespace moesaic::models {
namespace {

/// Old checkpoints store the rotary frequencies, which follow from the config.
bool is_derived_buffer(const std::string& name) { return name.ends_with("rotary_emb.inv_freq"); }

/// Which of kTrainableParts each parameter belongs to.
std::map<std::string, std::string> parts_of(SingleModel& model) {
  using enum nn::Role;
  std::map<std::string, std::string> of_linear, parts;
  for (const nn::LinearSite& site : model.sites().linears) {
    const bool ffn = site.role == kGate || site.role == kUp || site.role == kDown;
    of_linear[site.name] = site.routed ? "experts" : ffn ? "mlp" : "attention";
  }
  for (const auto& item : model.named_parameters()) {
    const std::string& name = item.key();
    const auto linear = of_linear.find(name.substr(0, name.rfind('.')));
    std::string part = item.value().dim() == 1 ? "norms" : "embeddings";
    if (linear != of_linear.end()) part = linear->second;
    if (name.ends_with("relative_attention_bias.weight")) part = "attention";
    if (name.ends_with("shared_expert_gate.weight")) part = "router";
    parts[name] = part;
  }
  for (const std::string& router : model.sites().routers) parts[router] = "router";
  return parts;
}

/// Throws DataError listing every tensor of the file that has no place and every parameter without a fitting tensor.
void check_tensors(const formats::Checkpoint& checkpoint, const SingleModel& model, bool ignore_head) {
  formats::Declarations expected, present = formats::declarations(checkpoint);
  for (const auto& item : model.named_parameters()) expected[item.key()] = {item.value().sizes().vec()};
  std::erase_if(present, [&](const auto& item) {
    return is_derived_buffer(item.first) || (ignore_head && item.first == "lm_head.weight");
  });
  formats::check_fits(formats::misfits(expected, present, formats::Dtypes::kAny), checkpoint.path().string(),
                      fmt::format("config.json (model_type {})", model.facts().model_type),
                      "config.json and weights of one model?");
}

}  // namespace

CausalLM::CausalLM(const DecoderConfig& config, const torch::TensorOptions& options) : config_(config) {
  auto model = std::make_shared<torch::nn::Module>();
  stack_ = make_stack(*model, "model", config, /*first_index=*/0, {}, options, sites_);
  register_module("model", model);
  torch::Tensor head = stack_.embedding;
  if (!config.tie_word_embeddings) {
    head = register_module("lm_head", MatrixModule(config.vocab_size, config.hidden_size, options))->weight;
  }
  head_ = std::make_unique<nn::Head>(head, config.final_softcap);
  facts_ = {config.model_type, config.vocab_size, config.hidden_size, config.num_layers,
            config.eos_ids,    head.device(),     head.scalar_type()};
  add_weight_sites();
  sites_.has_qk_norm = config.qk_norm;
  sites_.model_type = config.model_type;
}

CausalLM::~CausalLM() { detach_all(); }

void CausalLM::add_weight_sites() {
  const std::vector<int64_t> shape = stack_.embedding.sizes().vec();
  sites_.tied_head = config_.tie_word_embeddings;
  sites_.weights.push_back({"model.embed_tokens.weight", shape,
                            [this, own = stack_.embedding](const torch::Tensor& t) {
                              stack_.embedding = t.defined() ? t.to(own.options()) : own;
                              config_.vocab_size = facts_.vocab_size = stack_.embedding.size(0);
                            },
                            [this] { return stack_.embedding; }});
  sites_.weights.push_back({"lm_head.weight", shape,
                            [this](const torch::Tensor& t) {
                              if (t.defined()) {
                                const bool quantized = !head_->weight().defined();
                                if (!own_head_) own_head_ = std::move(head_);
                                head_ =
                                    std::make_unique<nn::Head>(t.to(stack_.embedding.options()), config_.final_softcap);
                                if (quantized) head_->quantize_int8();
                              } else if (own_head_) {
                                head_ = std::move(own_head_);
                              }
                            },
                            [this] { return head_->weight(); }});
  add_parameter_sites({"model.embed_tokens.weight", "lm_head.weight"});
}

std::shared_ptr<CausalLM> CausalLM::load(const formats::Checkpoint& checkpoint, const LoadOptions& options) {
  torch::NoGradGuard no_grad;
  DecoderConfig config = parse_decoder_config(checkpoint.config(), checkpoint.path().string());
  // A tied config whose file holds a head of its own: the tensors decide.
  const bool stored_head = config.tie_word_embeddings && checkpoint.contains("lm_head.weight") &&
                           checkpoint.contains("model.embed_tokens.weight");
  if (stored_head && !at::equal(checkpoint.tensor("lm_head.weight"), checkpoint.tensor("model.embed_tokens.weight"))) {
    config.tie_word_embeddings = false;
  }
  // Nothing is allocated before every shape fits.
  check_tensors(checkpoint, CausalLM(config, torch::TensorOptions(torch::kMeta).dtype(options.dtype)),
                config.tie_word_embeddings && stored_head);
  if (options.num_blocks >= 0) {
    config.num_layers = std::min(config.num_layers, options.num_blocks);
    config.tie_word_embeddings = true;  // no head of its own
  }

  auto model = std::make_shared<CausalLM>(config, torch::TensorOptions(options.device).dtype(options.dtype));
  if (options.device.is_meta()) return model;
  auto read = [&](torch::nn::Module& module, const std::string& prefix) { read_weights(checkpoint, module, prefix); };
  const auto modules = model->named_modules();
  read(*modules["model.embed_tokens"], "model.embed_tokens.");
  for (int64_t i = 0; i < config.num_layers; ++i) {
    const std::string name = fmt::format("model.layers.{}", i);
    auto& layer = static_cast<nn::DecoderLayerImpl&>(*modules[name]);
    read(layer, name + ".");
    if (!options.quantize_int8) continue;
    layer.quantize_int8();  // layer by layer: only one is held twice
    give_back_freed();
  }
  read(*modules["model.norm"], "model.norm.");
  if (!config.tie_word_embeddings) read(*modules["lm_head"], "lm_head.");
  if (options.quantize_int8 && options.num_blocks < 0) {
    model->quantize_head(*model->head_, config.tie_word_embeddings);
  }
  return model;
}

nn::Needs CausalLM::needs() const {
  nn::Needs all = LanguageModel::needs();
  all.routed = all.routed || !sites_.routers.empty();
  return all;
}

OrderedJson CausalLM::sizes() const {
  OrderedJson sizes = {{"hidden_size", config_.hidden_size},      {"intermediate_size", config_.intermediate_size},
                       {"num_layers", config_.num_layers},        {"num_heads", config_.num_heads},
                       {"num_kv_heads", config_.num_kv_heads},    {"head_dim", config_.head_dim},
                       {"vocab_size", config_.vocab_size},        {"max_position", config_.max_position},
                       {"tied_head", config_.tie_word_embeddings}};
  if (config_.sparse) {
    sizes["num_experts"] = config_.sparse->experts;
    sizes["num_experts_per_tok"] = config_.sparse->top_k;
    sizes["expert_width"] = config_.sparse->width;
    sizes["active_parameters"] =
        active_parameters(static_cast<double>(config_.sparse->top_k) / static_cast<double>(config_.sparse->experts));
    if (config_.sparse->shared_width > 0) sizes["shared_expert_width"] = config_.sparse->shared_width;
  }
  return sizes;
}

void CausalLM::initialize(uint64_t seed) { models::initialize(*this, seed); }

void CausalLM::prepare(const nn::RaggedBatch& batch, nn::Pass& pass) const { stack_.prepare(batch, pass); }

torch::Tensor CausalLM::embed(const torch::Tensor& tokens) const { return stack_.embed(tokens); }

torch::Tensor CausalLM::run_blocks(torch::Tensor h, int64_t first, int64_t last, nn::Pass& pass) {
  for (int64_t i = first; i < last; ++i) h = pass.forward(*stack_.blocks[i], h);
  return h;
}

torch::Tensor CausalLM::finish(const torch::Tensor& h, const torch::Tensor& rows) const {
  // A holder of modules has no const forward.
  const torch::Tensor y = nn::RmsNorm(stack_.norm)->forward(rows.defined() ? h.index_select(0, rows) : h);
  return config_.logit_scale == 1.0 ? y : y * config_.logit_scale;
}

torch::Tensor CausalLM::run(const Text& text, nn::Pass& pass, Memory* memory) {
  auto* remembered = static_cast<CacheMemory*>(memory);
  pass.cache = remembered != nullptr ? &remembered->cache : nullptr;
  prepare(text.tokens, pass);
  const torch::Tensor h = run_blocks(embed(text.tokens.tokens), 0, config_.num_layers, pass);
  if (remembered != nullptr) remembered->cache.commit(text.tokens.counts());
  return finish(h, text.rows);
}

nn::KvCache CausalLM::make_cache(int64_t blocks, int64_t sequences) const {
  return nn::KvCache(blocks, config_.num_kv_heads, config_.head_dim, sequences,
                     torch::TensorOptions(device()).dtype(dtype()));
}

std::unique_ptr<Memory> CausalLM::memory(int64_t sequences) const {
  return std::make_unique<CacheMemory>(make_cache(config_.num_layers, sequences));
}

int64_t CausalLM::exact_memory() const {
  int64_t most = INT64_MAX;
  for (const nn::RopeConfig& rope : {config_.rope, config_.rope_local.value_or(nn::RopeConfig())}) {
    if (rope.type == "dynamic") most = std::min(most, rope.original_max_position);
  }
  return most;
}

AllWeights::AllWeights(std::shared_ptr<SingleModel> model, formats::ModelFolder folder, std::vector<std::string> parts)
    : model_(std::move(model)), folder_(std::move(folder)), parts_(std::move(parts)) {
  MOESAIC_CHECK(
      model_->facts().model_type != "t5gemma2", UsageError,
      "finetuning_type: got full for a t5gemma2, expected an adapter: what it reads images with is not loaded, "
      "and would be missing in the folder that is written");
  std::set<std::string> there;
  for (const auto& [_, part] : parts_of(*model_)) there.insert(part);
  for (const std::string& part : parts_) {
    MOESAIC_CHECK(there.contains(part), UsageError, "trainable: got '{}', expected parts that this {} has: {}", part,
                  model_->facts().model_type, fmt::join(there, ", "));
  }
  const bool routers = parts_.empty() || std::find(parts_.begin(), parts_.end(), "router") != parts_.end();
  const auto* decoder = dynamic_cast<const CausalLM*>(model_.get());
  const auto sparse = decoder != nullptr ? decoder->config().sparse : std::nullopt;
  MOESAIC_CHECK(!routers || !sparse || sparse->top_k > 1 || !sparse->renormalize, UsageError,
                "num_experts_per_tok: got 1 for a {} whose router is trained, expected 2 or more, or norm_topk_prob "
                "false: the weight of the one expert is always 1, so its router gets no gradient\nhint: trainable "
                "names the parts that are trained",
                model_->facts().model_type);
}

std::vector<nn::Parameter> AllWeights::parameters() {
  using Kind = nn::Parameter::Kind;
  const std::map<std::string, std::string> parts = parts_of(*model_);
  std::vector<nn::Parameter> trained;
  for (auto& item : model_->named_parameters()) {
    const std::string& part = parts.at(item.key());
    if (!parts_.empty() && std::find(parts_.begin(), parts_.end(), part) == parts_.end()) continue;
    item.value().set_requires_grad(true);
    const Kind kind = part == "router" ? Kind::kRouter : item.value().dim() == 1 ? Kind::kVector : Kind::kWeight;
    trained.push_back({item.key(), item.value(), kind});
  }
  return trained;
}

void AllWeights::save(const std::filesystem::path& dir) const {
  formats::ModelFolder folder = folder_;
  for (const auto& item : model_->named_parameters()) folder.tensors[item.key()] = item.value().detach();
  formats::write_model_folder(dir, folder);
}

void AllWeights::load(const std::filesystem::path& dir) {
  torch::NoGradGuard no_grad;
  const auto checkpoint = open_checkpoint(dir);
  check_tensors(*checkpoint, *model_, /*ignore_head=*/false);
  for (auto& item : model_->named_parameters()) item.value().copy_(checkpoint->tensor(item.key()));
}

}  // namespace moesaic::models
