#include "moesaic/models/seq2seq_lm.h"

#include "moesaic/base/check.h"
#include "moesaic/base/seed.h"
#include "moesaic/formats/claim.h"
#include "moesaic/models/registry.h"
#include "moesaic/nn/seq2seq_block.h"

namespace moesaic::models {
namespace {

constexpr const char *kEmbedding = "shared.weight", *kHead = "lm_head.weight";
constexpr const char* kCopies[] = {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight"};
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

/// Offsets, positions and segments of `batch`.
void lay_out(const nn::RaggedBatch& batch, torch::Device device, nn::Pass& pass) {
  std::vector<int64_t> positions, segments;
  for (int64_t b = 0; b < batch.batch_size(); ++b) {
    const int64_t rows = batch.offsets[b + 1] - batch.offsets[b], start = pass.cache ? pass.cache->length(b) : 0;
    for (int64_t i = 0; i < rows; ++i) positions.push_back(start + i);
    segments.insert(segments.end(), rows, b);
  }
  pass.offsets = batch.offsets;
  pass.positions = on_device(positions, device);
  pass.segments = on_device(segments, device);
}

}  // namespace

int64_t Seq2SeqMemory::length(int64_t b) const {
  return sources.length(b) + std::max<int64_t>(answers.length(b) - 1, 0);
}

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
  const auto shared = register_module("shared", MatrixModule(config.vocab_size, config.hidden_size, options));
  encoder_ = make_stack("encoder", config.encoder_layers, 0, options);
  decoder_ = make_stack("decoder", config.decoder_layers, config.encoder_layers, options);
  encoder_.embedding = decoder_.embedding = shared->weight;
  torch::Tensor head = shared->weight;
  if (!config.tie_word_embeddings) {
    head = register_module("lm_head", MatrixModule(config.vocab_size, config.hidden_size, options))->weight;
  }
  head_ = std::make_unique<nn::Head>(head, /*softcap=*/0.0);
  facts_ = {.model_type = config.model_type,
            .vocab_size = config.vocab_size,
            .width = config.hidden_size,
            .blocks = config.encoder_layers + config.decoder_layers,
            .eos_ids = config.eos_ids,
            .device = head.device(),
            .dtype = head.scalar_type()};
  add_parameter_sites({"shared.weight", "lm_head.weight"});
  sites_.model_type = config.model_type;
  sites_.task_type = "SEQ_2_SEQ_LM";
}

Seq2SeqLM::~Seq2SeqLM() { detach_all(); }

/// The modules "encoder" or "decoder". Blocks of the decoder read the encoder's states.
Stack Seq2SeqLM::make_stack(const char* name, int64_t layers, int64_t first_index,
                            const torch::TensorOptions& options) {
  const bool decodes = first_index > 0;
  const auto half = register_module(name, std::make_shared<torch::nn::Module>());
  const auto list = half->register_module("block", std::make_shared<torch::nn::Module>());
  Stack stack;
  nn::Seq2SeqBlockConfig block;
  block.reads_source = decodes;
  block.intermediate_size = config_.intermediate_size;
  block.activation = config_.activation;
  block.ffn_names =
      config_.gated ? nn::FeedForwardNames{"wi_0", "wi_1", "wo"} : nn::FeedForwardNames{"wi", nullptr, "wo"};
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
    const auto layer = list->register_module(index, nn::Seq2SeqBlock(block, first_index + i, options));
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
  // What a file may call the embedding, and what in it is a copy.
  formats::Declarations present = formats::declarations(checkpoint);
  std::string embedding = kEmbedding;
  for (const char* name : kCopies) {
    if (!present.contains(embedding) && present.contains(name)) embedding = name;
  }
  formats::Misfits found;
  auto is_embedding = [&](const char* name) {
    return present.contains(name) && present.contains(embedding) &&
           at::equal(checkpoint.tensor(name), checkpoint.tensor(embedding));
  };
  for (const char* name : kCopies) {
    if (name == embedding || !present.contains(name)) continue;
    if (!is_embedding(name)) found.wrong.push_back(fmt::format("{}: is another matrix than {}", name, embedding));
    present.erase(name);
  }
  config.tie_word_embeddings = !present.contains(kHead) || is_embedding(kHead);
  if (config.tie_word_embeddings) present.erase(kHead);
  present.erase(kUnused);
  // Nothing is allocated before every shape fits.
  formats::Declarations expected;
  const Seq2SeqLM shapes(config, torch::TensorOptions(torch::kMeta).dtype(options.dtype));
  for (const auto& item : shapes.named_parameters()) {
    expected[item.key() == kEmbedding ? embedding : item.key()] = {item.value().sizes().vec()};
  }
  found.add(formats::misfits(expected, present, formats::Dtypes::kAny));
  formats::check_fits(found, checkpoint.path().string(), fmt::format("config.json (model_type {})", config.model_type),
                      "config.json and weights of one model?");
  const bool encoder_alone = options.num_blocks >= 0;
  if (encoder_alone) {
    config.encoder_layers = std::min(config.encoder_layers, options.num_blocks);
    config.decoder_layers = 0;
    config.tie_word_embeddings = true;  // no head of its own
  }

  auto model = std::make_shared<Seq2SeqLM>(config, torch::TensorOptions(options.device).dtype(options.dtype));
  if (options.device.is_meta()) return model;
  const auto modules = model->named_modules();
  auto read = [&](const std::string& name) { read_weights(checkpoint, *modules[name], name + "."); };
  const std::string stored = embedding.substr(0, embedding.rfind('.') + 1);
  read_weights(checkpoint, *modules["shared"], stored);
  for (const auto& [half, layers] :
       {std::pair("encoder", config.encoder_layers), std::pair("decoder", config.decoder_layers)}) {
    for (int64_t i = 0; i < layers; ++i) {
      const std::string name = fmt::format("{}.block.{}", half, i);
      read(name);
      // Block by block: only one is held twice.
      if (!options.quantize_int8) continue;
      static_cast<nn::Seq2SeqBlockImpl&>(*modules[name]).quantize_int8();
      give_back_freed();
    }
    read(fmt::format("{}.final_layer_norm", half));
  }
  if (!config.tie_word_embeddings) read("lm_head");
  if (options.quantize_int8 && !encoder_alone) model->quantize_head(*model->head_, config.tie_word_embeddings);
  return model;
}

OrderedJson Seq2SeqLM::sizes() const {
  return {{"hidden_size", config_.hidden_size},       {"intermediate_size", config_.intermediate_size},
          {"encoder_layers", config_.encoder_layers}, {"decoder_layers", config_.decoder_layers},
          {"num_heads", config_.num_heads},           {"head_dim", config_.head_dim},
          {"vocab_size", config_.vocab_size},         {"gated", config_.gated},
          {"tied_head", config_.tie_word_embeddings}};
}

/// Normal(0, s) as T5's authors draw them: s = 1/sqrt(fan in), of queries 1/sqrt(d k) because scores are not divided by
/// sqrt(k), of the relative bias 1/sqrt(d), of the embedding 1.
void Seq2SeqLM::initialize(uint64_t seed) {
  torch::NoGradGuard no_grad;
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
    if (name == kEmbedding) fan_in = 1.0;
    parameter.copy_(torch::empty(parameter.sizes(), torch::kFloat32).normal_(0.0, 1.0 / std::sqrt(fan_in), generator));
  }
}

std::vector<nn::Block*> Seq2SeqLM::blocks() {
  std::vector<nn::Block*> all = encoder_.blocks;
  all.insert(all.end(), decoder_.blocks.begin(), decoder_.blocks.end());
  return all;
}

std::unique_ptr<Memory> Seq2SeqLM::memory(int64_t sequences) const {
  return std::make_unique<Seq2SeqMemory>(nn::KvCache(config_.decoder_layers, config_.num_heads, config_.head_dim,
                                                     sequences, torch::TensorOptions(device()).dtype(dtype())),
                                         nn::SourceCache(config_.decoder_layers, sequences));
}

std::vector<int64_t> Seq2SeqLM::continued(const std::vector<int64_t>&) const { return {config_.start_id}; }

void Seq2SeqLM::prepare(const nn::RaggedBatch& batch, nn::Pass& pass) const { lay_out(batch, device(), pass); }

torch::Tensor Seq2SeqLM::embed(const torch::Tensor& tokens) const { return at::embedding(encoder_.embedding, tokens); }

torch::Tensor Seq2SeqLM::run_blocks(torch::Tensor h, int64_t first, int64_t last, nn::Pass& pass) {
  for (int64_t i = first; i < last; ++i) h = pass.forward(*encoder_.blocks[i], h);
  return h;
}

nn::KvCache Seq2SeqLM::make_cache(int64_t, int64_t sequences) const {
  return nn::KvCache(/*layers=*/0, config_.num_heads, config_.head_dim, sequences,
                     torch::TensorOptions(device()).dtype(dtype()));
}

torch::Tensor Seq2SeqLM::encode(const nn::RaggedBatch& source, nn::Pass& pass) {
  prepare(source, pass);
  return encoder_.norm->forward(run_blocks(embed(source.tokens), 0, config_.encoder_layers, pass));
}

torch::Tensor Seq2SeqLM::prompt_states(const nn::RaggedBatch& prompts) {
  nn::Pass pass;
  return encode(prompts, pass);
}

torch::Tensor Seq2SeqLM::run(const Text& text, nn::Pass& pass, Memory* memory) {
  auto* remembered = static_cast<Seq2SeqMemory*>(memory);
  const Cut halves = cut(text, remembered, config_.start_id, device());
  pass.source = std::make_shared<nn::Source>();
  pass.source->offsets = halves.source.offsets;
  if (halves.rows.defined()) {
    nn::Pass reading = pass.sibling();
    reading.place = pass.place;
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
  lay_out(halves.target, device(), pass);
  torch::Tensor h = at::embedding(decoder_.embedding, halves.target.tokens);
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
  h = decoder_.norm->forward(h);
  if (config_.scale_output) h = h * (1.0 / std::sqrt(static_cast<double>(config_.hidden_size)));
  return all ? torch::cat({pass.source->states, h}).index_select(0, halves.rows) : h;
}

}  // namespace moesaic::models
