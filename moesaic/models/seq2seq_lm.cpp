#include "moesaic/models/seq2seq_lm.h"

#include "moesaic/base/check.h"
#include "moesaic/base/seed.h"
#include "moesaic/formats/claim.h"
#include "moesaic/models/initialize.h"
#include "moesaic/models/registry.h"
#include "moesaic/moe/sparse_ffn.h"
#include "moesaic/nn/dropout.h"
#include "moesaic/nn/seq2seq_block.h"

namespace moesaic::models {
namespace {

/// What the two kinds call their parts. `block` and `norm` are of a half, and of a block's number in it.
struct Names {
  const char *embedding, *head;  // the embedding that may be the head
  std::string_view block, norm;
  std::vector<std::string> embeddings;  // modules
  std::vector<const char*> copies{};    // of the embedding and what belongs to it
};
const Names kT5{"shared.weight", "lm_head.weight",
                "{}.block.{}",   "{}.final_layer_norm",
                {"shared"},      {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}};
const Names kHalves{"model.decoder.embed_tokens.weight",
                    "lm_head.out_proj.weight",
                    "model.{}.layers.{}",
                    "model.{}.norm",
                    {"model.encoder.embed_tokens", "model.decoder.embed_tokens"}};
const Names kMerged{"model.encoder.embed_tokens.weight",
                    "lm_head.out_proj.weight",
                    "model.{}.layers.{}",
                    "model.{}.norm",
                    {"model.encoder.embed_tokens"},
                    {"model.decoder.embed_tokens.weight"}};
const Names& names_of(const Seq2SeqConfig& config) {
  return !config.halves ? kT5 : config.halves->merged ? kMerged : kHalves;
}

// What a T5Gemma 2 has for images, which are not read here.
constexpr const char* kOfImages[] = {"model.encoder.vision_tower.", "model.encoder.multi_modal_projector."};
constexpr const char *kImageEnd = "eoi_embedding", *kImageEndCopy = "model.decoder.embed_tokens.eoi_embedding";
// Old checkpoints hold it; nothing reads it.
constexpr const char* kUnused = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight";

torch::Tensor on_device(const std::vector<int64_t>& values, torch::Device device) {
  return torch::tensor(values, torch::kInt64).to(device);
}

/// A text as the two halves read it.
struct Cut {
  nn::RaggedBatch source, target;
  /// [N]: the row of [source; target] that stands in the place of each of the text's; undefined: the target's are.
  torch::Tensor rows;
};

Cut cut(const Text& text, const Seq2SeqMemory* memory, int64_t start_id, torch::Device device) {
  const std::vector<int64_t>& offsets = text.tokens.offsets;
  std::vector<int64_t> source, target, starts, rows;  // of tokens, rows in the target, and Cut::rows
  Cut cut;
  cut.source.offsets = cut.target.offsets = {0};
  for (int64_t b = 0; b < text.tokens.batch_size(); ++b) {
    const int64_t begin = offsets[b], end = offsets[b + 1];
    const bool begins = begin < end && (memory == nullptr || memory->length(b) == 0);
    int64_t border = begin;
    if (begins) {
      const bool whole = text.borders.empty() || text.borders[b].empty();
      border = whole ? end : begin + std::clamp<int64_t>(text.borders[b].front(), 1, end - begin);
      starts.push_back(std::ssize(target));
      target.push_back(begin);  // its token is replaced
    }
    for (int64_t n = begin; n < border; ++n) source.push_back(n);
    for (int64_t n = border; n < end; ++n) target.push_back(n);
    cut.source.offsets.push_back(std::ssize(source));
    cut.target.offsets.push_back(std::ssize(target));
  }
  if (source.empty()) {
    cut.target = text.tokens;
    return cut;
  }
  const int64_t sources = std::ssize(source);
  for (int64_t b = 0; b < text.tokens.batch_size(); ++b) {
    const int64_t read = cut.source.offsets[b + 1] - cut.source.offsets[b];
    for (int64_t n = 0; n + 1 < read; ++n) rows.push_back(cut.source.offsets[b] + n);
    for (int64_t n = cut.target.offsets[b]; n < cut.target.offsets[b + 1]; ++n) rows.push_back(sources + n);
  }
  const torch::Tensor& tokens = text.tokens.tokens;
  cut.source.tokens = tokens.index_select(0, on_device(source, device));
  cut.target.tokens =
      tokens.index_select(0, on_device(target, device)).index_fill(0, on_device(starts, device), start_id);
  cut.rows = on_device(rows, device);
  return cut;
}

}  // namespace

int64_t Seq2SeqMemory::length(int64_t b) const {
  return sources.length(b) + std::max<int64_t>(answers.length(b) - 1, 0);
}

int64_t Seq2SeqMemory::token_bytes() const { return answers.token_bytes(); }

void Seq2SeqMemory::truncate(int64_t b, int64_t length) {
  const bool keeps_source = length > 0 && length >= sources.length(b);
  answers.truncate(b, keeps_source ? length - sources.length(b) + 1 : 0);
  if (!keeps_source) sources.begin(b, 0);
}

void Seq2SeqMemory::keep_sequences(const std::vector<int64_t>& rows) {
  answers.keep(rows);
  sources.keep(rows);
}

void Seq2SeqMemory::add_sequences(int64_t count) {
  answers.add(count);
  sources.add(count);
}

Seq2SeqLM::Seq2SeqLM(const Seq2SeqConfig& config, const torch::TensorOptions& options) : config_(config) {
  MOESAIC_CHECK(options.dtype().toScalarType() != torch::kHalf, UsageError,
                "{}: dtype: got float16, expected bfloat16 or float32: its activations exceed float16's largest "
                "number, 65504",
                config.model_type);
  const torch::Tensor embedding = config.halves ? make_halves(options) : make_t5(options);
  torch::Tensor head = embedding;
  if (!config.tie_word_embeddings) {
    const MatrixModule own(config.vocab_size, config.hidden_size, options);
    if (config.halves) {
      register_module("lm_head", std::make_shared<torch::nn::Module>())->register_module("out_proj", own);
    } else {
      register_module("lm_head", own);
    }
    head = own->weight;
  }
  head_ = std::make_unique<nn::Head>(head, config.halves ? config.halves->decoder.final_softcap : 0.0);
  facts_ = {.model_type = config.model_type,
            .vocab_size = config.vocab_size,
            .width = config.hidden_size,
            .blocks = config.encoder_layers + config.decoder_layers,
            .eos_ids = config.eos_ids,
            .device = head.device(),
            .dtype = head.scalar_type(),
            .has_dropout = !config.halves};
  std::set<std::string> matrices{names_of(config).head};
  for (const std::string& name : names_of(config).embeddings) matrices.insert(name + ".weight");
  add_parameter_sites(matrices);
  sites_.has_qk_norm = config.halves && config.halves->decoder.qk_norm;
  sites_.model_type = config.model_type;
  sites_.task_type = "SEQ_2_SEQ_LM";
}

Seq2SeqLM::~Seq2SeqLM() { detach_all(); }

/// Both return the decoder's embedding.
torch::Tensor Seq2SeqLM::make_t5(const torch::TensorOptions& options) {
  const auto shared = register_module("shared", MatrixModule(config_.vocab_size, config_.hidden_size, options));
  encoder_ = make_t5_stack("encoder", config_.encoder_layers, 0, options);
  decoder_ = make_t5_stack("decoder", config_.decoder_layers, config_.encoder_layers, options);
  return encoder_.embedding = decoder_.embedding = shared->weight;
}

torch::Tensor Seq2SeqLM::make_halves(const torch::TensorOptions& options) {
  const auto model = register_module("model", std::make_shared<torch::nn::Module>());
  const DecoderConfig &encoder = config_.halves->encoder, &decoder = config_.halves->decoder;
  const bool merged = config_.halves->merged;
  auto named = [](nn::DecoderLayerConfig& layer) {
    layer.before_attention = "pre_self_attn_layernorm";
    layer.behind_attention = "post_self_attn_layernorm";
  };
  auto of_encoder = [&](nn::DecoderLayerConfig& layer, int64_t) {
    named(layer);
    nn::AttentionOptions& attention = layer.attention.options;
    attention.causal = false;
    if (!merged || attention.window == 0) return;
    attention.behind =
        attention.window / 2;  // its window is of both sides together, its own position with those before
    attention.window = (attention.window + 1) / 2 - 1;
  };
  auto of_decoder = [&](nn::DecoderLayerConfig& layer, int64_t i) {
    named(layer);
    layer.attention.cache_layer = i;
    if (merged) {
      layer.merged = true;
      return;
    }
    layer.cross = layer.attention;
    layer.cross->source_size = encoder.hidden_size;
    layer.cross->rotary = false;
    layer.cross->options.causal = false;
    layer.cross->options.window = 0;
  };
  const auto half = [&](const char* name) {
    return model->register_module(name, std::make_shared<torch::nn::Module>());
  };
  const auto reader = half("encoder");
  // transformers' module; its files leave `text_model` out.
  const char* path = merged ? "model.encoder.text_model" : "model.encoder";
  encoder_ = make_stack(*reader, path, encoder, 0, of_encoder, options, sites_);
  decoder_ = make_stack(*half("decoder"), "model.decoder", decoder, encoder.num_layers, of_decoder, options, sites_,
                        merged ? encoder_.embedding : torch::Tensor());
  if (!merged) return decoder_.embedding;
  encoder_.image_end_id = decoder_.image_end_id = config_.halves->image_end_id;
  encoder_.image_end = decoder_.image_end = reader->named_children()["embed_tokens"]->register_parameter(
      kImageEnd, torch::empty({encoder.hidden_size}, options), /*requires_grad=*/false);
  return encoder_.embedding;
}

/// Layer i of a half; `index`: the layer's among all of the model.
std::shared_ptr<nn::Ffn> Seq2SeqLM::make_t5_ffn(bool decodes, int64_t i, int64_t index,
                                                const torch::TensorOptions& options) {
  const nn::FeedForwardNames names =
      config_.gated ? nn::FeedForwardNames{"wi_0", "wi_1", "wo"} : nn::FeedForwardNames{"wi", nullptr, "wo"};
  const auto& sparse = config_.sparse;
  if (!sparse || (decodes ? sparse->in_decoder : sparse->in_encoder)[i] == 0) {
    return nn::FeedForward(config_.hidden_size, config_.intermediate_size, /*bias=*/false, config_.activation, index,
                           options, names)
        .ptr();
  }
  const moe::SparseFfnConfig wanted{.hidden_size = config_.hidden_size,
                                    .experts = sparse->experts,
                                    .top_k = 1,
                                    .width = config_.intermediate_size,
                                    .renormalize = false,
                                    .activation = config_.activation,
                                    .names = names,
                                    .router = "router.classifier",
                                    .expert_prefix = "expert_",
                                    .capacity = sparse->capacity,
                                    .jitter = sparse->jitter,
                                    .cache_layer = i};
  return moe::SparseFfn(wanted, index, options).ptr();
}

/// The modules "encoder" or "decoder". Blocks of the decoder read the encoder's states.
Stack Seq2SeqLM::make_t5_stack(const char* name, int64_t layers, int64_t first_index,
                               const torch::TensorOptions& options) {
  const bool decodes = first_index > 0;
  const auto half = register_module(name, std::make_shared<torch::nn::Module>());
  const auto list = half->register_module("block", std::make_shared<torch::nn::Module>());
  Stack stack;
  nn::Seq2SeqBlockConfig block;
  block.reads_source = decodes;
  block.attention = {.names = {"q", "k", "v", "o"},
                     .hidden_size = config_.hidden_size,
                     .heads = config_.num_heads,
                     .kv_heads = config_.num_heads,
                     .head_dim = config_.head_dim,
                     .norm_eps = config_.norm_eps,
                     .options = {.scale = 1.0, .causal = decodes},
                     .rotary = false};
  for (int64_t i = 0; i < layers; ++i) {
    block.attention.owns_bias = i == 0 || config_.bias_per_layer;
    if (block.attention.owns_bias) {
      block.attention.options.bias =
          nn::RelativeBias(config_.buckets, config_.max_distance, config_.num_heads, /*both_ways=*/!decodes, options);
    }
    block.attention.cache_layer = i;
    const std::string index = std::to_string(i);
    const auto layer = list->register_module(
        index, nn::Seq2SeqBlock(block, make_t5_ffn(decodes, i, first_index + i, options),
                                config_.sparse ? "mlp" : "DenseReluDense", first_index + i, options));
    layer->add_sites(fmt::format("{}.block.{}", name, index), sites_);
    stack.blocks.push_back(layer.get());
  }
  stack.norm =
      half->register_module("final_layer_norm", nn::RmsNorm(config_.hidden_size, config_.norm_eps, 0.0, options));
  return stack;
}

std::shared_ptr<Seq2SeqLM> Seq2SeqLM::load(const formats::Checkpoint& checkpoint, const LoadOptions& options) {
  torch::NoGradGuard no_grad;
  Seq2SeqConfig config = parse_seq2seq_config(checkpoint.config(), checkpoint.path().string());
  const Names& parts = names_of(config);
  // What a file may call T5's embedding, and what in it is a copy.
  formats::Declarations present = formats::declarations(checkpoint);
  std::string embedding = parts.embedding;
  formats::Misfits found;
  auto is_embedding = [&](const char* name) {
    return present.contains(name) && present.contains(embedding) &&
           at::equal(checkpoint.tensor(name), checkpoint.tensor(embedding));
  };
  if (!config.halves) {
    for (const char* name : parts.copies) {
      if (!present.contains(embedding) && present.contains(name)) embedding = name;
    }
    present.erase(kUnused);
  }
  for (const char* name : parts.copies) {
    if (name == embedding || !present.contains(name)) continue;
    if (!is_embedding(name)) found.wrong.push_back(fmt::format("{}: is another matrix than {}", name, embedding));
    present.erase(name);
  }
  if (config.halves && config.halves->merged) {
    present.erase(kImageEndCopy);
    std::erase_if(present, [](const auto& item) {
      return std::any_of(std::begin(kOfImages), std::end(kOfImages),
                         [&](const char* start) { return item.first.starts_with(start); });
    });
  }
  config.tie_word_embeddings = !present.contains(parts.head) || is_embedding(parts.head);
  if (config.tie_word_embeddings) present.erase(parts.head);
  // Nothing is allocated before every shape fits.
  formats::Declarations expected;
  const Seq2SeqLM shapes(config, torch::TensorOptions(torch::kMeta).dtype(options.dtype));
  for (const auto& item : shapes.named_parameters()) {
    if (config.encoder_alone && item.key().starts_with("decoder.")) continue;
    expected[item.key() == parts.embedding ? embedding : item.key()] = {item.value().sizes().vec()};
  }
  found.add(formats::misfits(expected, present, formats::Dtypes::kAny));
  formats::check_fits(found, checkpoint.path().string(), fmt::format("config.json (model_type {})", config.model_type),
                      "config.json and weights of one model?");
  const bool encoder_alone = options.num_blocks >= 0 || config.encoder_alone;
  if (encoder_alone) {
    if (options.num_blocks >= 0) config.encoder_layers = std::min(config.encoder_layers, options.num_blocks);
    config.decoder_layers = 0;
    if (config.halves) {
      config.halves->encoder.num_layers = config.encoder_layers;
      config.halves->decoder.num_layers = 0;
    }
    config.tie_word_embeddings = true;  // no head of its own
  }

  auto model = std::make_shared<Seq2SeqLM>(config, torch::TensorOptions(options.device).dtype(options.dtype));
  if (options.device.is_meta()) return model;
  const auto modules = model->named_modules();
  auto read = [&](const std::string& name) { read_weights(checkpoint, *modules[name], name + "."); };
  if (config.halves) {
    for (const std::string& name : parts.embeddings) read(name);
  } else {
    read_weights(checkpoint, *modules["shared"], embedding.substr(0, embedding.rfind('.') + 1));
  }
  for (const auto& [half, layers] :
       {std::pair("encoder", config.encoder_layers), std::pair("decoder", config.decoder_layers)}) {
    for (int64_t i = 0; i < layers; ++i) {
      const std::string name = fmt::format(fmt::runtime(parts.block), half, i);
      read(name);
      // Block by block: only one is held twice.
      if (!options.quantize_int8) continue;
      dynamic_cast<nn::SitedBlock&>(*modules[name]).quantize_int8();
      give_back_freed();
    }
    if (config.encoder_alone && layers == 0) continue;
    read(fmt::format(fmt::runtime(parts.norm), half));
  }
  if (!config.tie_word_embeddings) read("lm_head");
  if (options.quantize_int8 && !encoder_alone) model->quantize_head(*model->head_, config.tie_word_embeddings);
  return model;
}

nn::Needs Seq2SeqLM::needs() const {
  nn::Needs all = LanguageModel::needs();
  all.routed = all.routed || !sites_.routers.empty();
  return all;
}

OrderedJson Seq2SeqLM::sizes() const {
  OrderedJson sizes{{"hidden_size", config_.hidden_size},
                    {"encoder_layers", config_.encoder_layers},
                    {"decoder_layers", config_.decoder_layers},
                    {"vocab_size", config_.vocab_size},
                    {"tied_head", config_.tie_word_embeddings}};
  auto add = [&](const char* key, int64_t of_encoder, int64_t of_decoder) {
    sizes[key] = of_encoder == of_decoder ? OrderedJson(of_decoder) : OrderedJson{of_encoder, of_decoder};
  };
  if (config_.halves) {
    const DecoderConfig &encoder = config_.halves->encoder, &decoder = config_.halves->decoder;
    add("hidden_size", encoder.hidden_size, decoder.hidden_size);
    add("intermediate_size", encoder.intermediate_size, decoder.intermediate_size);
    add("num_heads", encoder.num_heads, decoder.num_heads);
    add("num_kv_heads", encoder.num_kv_heads, decoder.num_kv_heads);
    add("head_dim", encoder.head_dim, decoder.head_dim);
    return sizes;
  }
  add("intermediate_size", config_.intermediate_size, config_.intermediate_size);
  add("num_heads", config_.num_heads, config_.num_heads);
  add("head_dim", config_.head_dim, config_.head_dim);
  sizes["gated"] = config_.gated;
  if (config_.sparse) {
    sizes["num_experts"] = config_.sparse->experts;
    sizes["num_experts_per_tok"] = 1;
    sizes["expert_capacity"] = config_.sparse->capacity;
    sizes["active_parameters"] = active_parameters(1.0 / static_cast<double>(config_.sparse->experts));
  }
  return sizes;
}

/// Halves of Gemma's kind as models::initialize draws them. T5 as its authors do, Normal(0, s): s = 1/sqrt(fan in), of
/// queries 1/sqrt(d k) because scores are not divided by sqrt(k), of the relative bias 1/sqrt(d), of the embedding 1.
void Seq2SeqLM::initialize(uint64_t seed) {
  torch::NoGradGuard no_grad;
  if (config_.halves) return models::initialize(*this, config_.halves->decoder, seed);
  at::Generator generator = make_generator(seed);
  for (auto& item : named_parameters()) {
    const std::string& name = item.key();
    torch::Tensor& parameter = item.value();
    if (parameter.dim() == 1) {
      parameter.fill_(1.0);
      continue;
    }
    double fan_in = static_cast<double>(parameter.size(1));
    if (name.ends_with(".q.weight")) fan_in *= static_cast<double>(config_.head_dim);
    if (name.ends_with("relative_attention_bias.weight")) fan_in = static_cast<double>(config_.hidden_size);
    if (name == kT5.embedding) fan_in = 1.0;
    parameter.copy_(torch::empty(parameter.sizes(), torch::kFloat32).normal_(0.0, 1.0 / std::sqrt(fan_in), generator));
  }
}

std::vector<nn::Block*> Seq2SeqLM::blocks() {
  std::vector<nn::Block*> all = encoder_.blocks;
  all.insert(all.end(), decoder_.blocks.begin(), decoder_.blocks.end());
  return all;
}

std::unique_ptr<Memory> Seq2SeqLM::memory(int64_t sequences) const {
  const int64_t heads = config_.halves ? config_.halves->decoder.num_kv_heads : config_.num_heads;
  const int64_t width = config_.halves ? config_.halves->decoder.head_dim : config_.head_dim;
  return std::make_unique<Seq2SeqMemory>(
      nn::KvCache(config_.decoder_layers, heads, width, sequences, torch::TensorOptions(device()).dtype(dtype())),
      nn::SourceCache(config_.decoder_layers, sequences));
}

std::vector<int64_t> Seq2SeqLM::continued(const std::vector<int64_t>&) const { return {config_.start_id}; }

void Seq2SeqLM::prepare(const nn::RaggedBatch& batch, nn::Pass& pass) const { encoder_.prepare(batch, pass); }

torch::Tensor Seq2SeqLM::embed(const torch::Tensor& tokens) const { return encoder_.embed(tokens); }

torch::Tensor Seq2SeqLM::run_blocks(torch::Tensor h, int64_t first, int64_t last, nn::Pass& pass) {
  for (int64_t i = first; i < last; ++i) h = pass.forward(*encoder_.blocks[i], h);
  return h;
}

torch::Tensor Seq2SeqLM::finish(const torch::Tensor& h, const torch::Tensor& rows) const {
  // A holder of modules has no const forward.
  return nn::RmsNorm(encoder_.norm)->forward(rows.defined() ? h.index_select(0, rows) : h);
}

nn::KvCache Seq2SeqLM::make_cache(int64_t, int64_t sequences) const {
  return nn::KvCache(/*layers=*/0, 1, 1, sequences, torch::TensorOptions(device()).dtype(dtype()));
}

torch::Tensor Seq2SeqLM::encode(const nn::RaggedBatch& source, nn::Pass& pass) {
  prepare(source, pass);
  const torch::Tensor h = nn::drop_columns(embed(source.tokens), pass);
  return nn::drop_columns(finish(run_blocks(h, 0, config_.encoder_layers, pass), {}), pass);
}

torch::Tensor Seq2SeqLM::prompt_states(const nn::RaggedBatch& prompts) {
  MOESAIC_CHECK(reading_width() == config_.hidden_size, UsageError,
                "router.input sentence: got an encoder of width {} and a decoder of width {}, expected one width for "
                "vectors of the model itself\nhint: router.sentence_source: column",
                reading_width(), config_.hidden_size);
  nn::Pass pass;
  return encode(prompts, pass);
}

torch::Tensor Seq2SeqLM::run(const Text& text, nn::Pass& pass, Memory* memory) {
  MOESAIC_CHECK(config_.decoder_layers > 0, UsageError,
                "{}: got an encoder alone, expected a model with a decoder: there is nothing that writes or predicts",
                config_.model_type);
  auto* remembered = static_cast<Seq2SeqMemory*>(memory);
  const Cut halves = cut(text, remembered, config_.start_id, device());
  pass.source = std::make_shared<nn::Source>();
  pass.source->offsets = halves.source.offsets;
  if (halves.rows.defined()) {
    nn::Pass reading = pass.sibling();
    reading.place = pass.place;
    reading.dropout = pass.dropout;
    reading.sentence = pass.sentence;
    reading.mixture = pass.mixture;
    pass.source->states = encode(halves.source, reading);
    pass.source->segments = reading.segments;
  }
  if (remembered != nullptr) {
    pass.source->kept = &remembered->sources;
    for (int64_t b = 0; b < halves.source.batch_size(); ++b) {
      const int64_t read = halves.source.offsets[b + 1] - halves.source.offsets[b];
      if (read > 0) remembered->sources.begin(b, read);
    }
  }
  pass.cache = remembered != nullptr ? &remembered->answers : nullptr;
  decoder_.prepare(halves.target, pass);
  torch::Tensor h = nn::drop_columns(decoder_.embed(halves.target.tokens), pass);
  for (nn::Block* block : decoder_.blocks) h = pass.forward(*block, h);
  if (remembered != nullptr) remembered->answers.commit(halves.target.counts());

  torch::Tensor rows = text.rows;  // of the target
  const bool all = halves.rows.defined() && !text.rows.defined();
  if (halves.rows.defined() && text.rows.defined()) {
    rows = halves.rows.index_select(0, text.rows) - halves.source.num_tokens();
    MOESAIC_CHECK(rows.numel() == 0 || rows.min().item<int64_t>() >= 0, UsageError,
                  "{}: a token of a prompt was to be predicted, expected answers alone: an encoder reads prompts, and "
                  "predicts nothing",
                  config_.model_type);
  }
  if (rows.defined()) h = h.index_select(0, rows);
  h = nn::drop_columns(decoder_.norm->forward(h), pass, rows);
  if (config_.scale_output) h = h * (1.0 / std::sqrt(static_cast<double>(config_.hidden_size)));
  if (!all) return h;
  torch::Tensor read = pass.source->states;
  if (read.size(1) != h.size(1)) read = torch::zeros({read.size(0), h.size(1)}, h.options().requires_grad(false));
  return torch::cat({read, h}).index_select(0, halves.rows);
}

}  // namespace moesaic::models
