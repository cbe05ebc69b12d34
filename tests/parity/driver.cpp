// Runs the C++ side of the parity tests: one JSON job per line on stdin, one JSON answer per line on stdout; tensors go
// to the safetensors file a job names.
//
//   model, dtype, quantize      the base (a folder or .gguf)
//   adapter, scale              a folder to load, or
//   create                      {method, preset, rank, alpha, experts, seed, perturb}: a new adapter
//   sequences, mask, sentence   the ragged batch; normalization: tokens | sequences
//   prompts                     tokens of each prompt, for `cached`
//   mode                        logits | adapter | full (with the gradients of the adapter's, or of every base
//                               parameter) | cached (logits through the KV cache) | generate (with the options
//                               `generation`) | filter (rows of `logits` as a draw with `generation` sees them) | step
//                               (one step of the trainer, with a learning rate of 0: micro_batch, moe_aux_loss_coef,
//                               router_z_loss_coef, gradient_checkpointing; normalization `tokens`)
//   save_adapter, output        what to write

#include "moesaic/adapters/adapter.h"
#include "moesaic/data/example.h"
#include "moesaic/generate/generate.h"
#include "moesaic/generate/sampling.h"
#include "moesaic/models/registry.h"
#include "moesaic/train/trainer.h"
#include "tests/parity/answer_lines.h"

namespace {

using moesaic::Json;
using namespace moesaic;
using Sequences = std::vector<std::vector<int64_t>>;

std::shared_ptr<adapters::Adapter> attach(const Json& job, models::SingleModel& model,
                                          const formats::Checkpoint& checkpoint) {
  if (job.contains("adapter")) {
    auto adapter = adapters::Adapter::open(job["adapter"].get<std::string>(), model.sites(), model.device(),
                                           checkpoint.fingerprint(), job.value("scale", 1.0));
    for (const nn::Parameter& parameter : adapter->parameters())
      torch::Tensor(parameter.tensor).set_requires_grad(true);
    model.attach("adapter", adapter);
    return adapter;
  }
  if (!job.contains("create")) return nullptr;
  const Json& create = job["create"];
  const uint64_t seed = create.value("seed", 0);
  adapters::AdapterConfig config;
  config.method = create["method"];
  config.num_experts = create.value("experts", 1);
  config.lora_rank = create.value("rank", 4);
  config.lora_alpha = create.value("alpha", 8.0);
  config.base_model_name_or_path = checkpoint.path().string();
  config.base_fingerprint = checkpoint.fingerprint();
  config = adapters::resolve_targets(config, create.value("preset", ""), model.sites());
  auto adapter = adapters::Adapter::create(config, model.sites(), model.device(), seed);
  if (create.value("perturb", true)) {
    torch::NoGradGuard no_grad;
    torch::manual_seed(seed);
    for (const nn::Parameter& parameter : adapter->parameters()) {
      const bool scales = parameter.name.ends_with("ia3_l") || parameter.name.ends_with("mov");
      parameter.tensor.normal_(scales ? 1.0 : 0.0, scales ? 0.4 : 0.3);
    }
  }
  model.attach("adapter", adapter);
  return adapter;
}

/// Loss weight of each label row: 1/M, or 1/(the sequence's targets * sequences that have any).
torch::Tensor row_weights(const data::Batch& batch, const std::string& normalization) {
  if (normalization == "tokens") return torch::full({batch.num_targets()}, 1.0 / batch.num_targets());
  const torch::Tensor counts = torch::bincount(batch.label_sequences, {}, batch.tokens.batch_size());
  const torch::Tensor sequences = (counts > 0).sum();
  return 1.0 / (counts.index_select(0, batch.label_sequences) * sequences).to(torch::kFloat32);
}

/// Logits of all rows when each sequence's first half (or its prompt, of `prompts` tokens) is prefilled and the rest
/// fed one token at a time, all sequences together; those that end leave the batch.
torch::Tensor cached_logits(models::SingleModel& model, const Sequences& sequences, const torch::Tensor& sentence,
                            const std::vector<int64_t>& prompts) {
  std::vector<std::vector<torch::Tensor>> rows(sequences.size());
  std::vector<int64_t> live(sequences.size());
  std::iota(live.begin(), live.end(), 0);
  const auto memory = model.memory(std::ssize(sequences));
  bool first = true;
  std::vector<size_t> done(sequences.size(), 0);
  while (!live.empty()) {
    Sequences next;
    for (int64_t b : live) {
      const size_t half = prompts.empty() ? (sequences[b].size() + 1) / 2 : prompts[b];
      const size_t count = done[b] == 0 ? half : 1;
      next.emplace_back(sequences[b].begin() + done[b], sequences[b].begin() + done[b] + count);
      done[b] += count;
    }
    models::Text text{nn::RaggedBatch::from_sequences(next, model.device())};
    if (std::exchange(first, false)) text.sentence = sentence;
    const auto& batch = text.tokens;
    nn::Pass pass;
    const torch::Tensor logits = model.head().logits(model.hidden(text, pass, memory.get()));
    std::vector<int64_t> kept, places;
    for (size_t i = 0; i < live.size(); ++i) {
      rows[live[i]].push_back(logits.slice(0, batch.offsets[i], batch.offsets[i + 1]));
      if (done[live[i]] == sequences[live[i]].size()) continue;
      kept.push_back(live[i]);
      places.push_back(static_cast<int64_t>(i));
    }
    if (places.size() < live.size()) memory->keep(places);
    live = kept;
  }
  std::vector<torch::Tensor> all;
  for (const auto& sequence : rows) all.insert(all.end(), sequence.begin(), sequence.end());
  return torch::cat(all);
}

std::vector<data::Example> examples_of(const Json& job, const Sequences& sequences) {
  std::vector<data::Example> examples;
  for (size_t b = 0; b < sequences.size(); ++b) {
    data::Example example;
    example.ids = sequences[b];
    example.mask = job["mask"][b].get<std::vector<uint8_t>>();
    example.end_prompts_by_mask();
    if (job.contains("sentence") && !job["sentence"].is_null()) {
      example.sentence = job["sentence"][b].get<std::vector<float>>();
    }
    examples.push_back(std::move(example));
  }
  return examples;
}

/// The given examples, once.
class ListStream : public data::ExampleStream {
 public:
  explicit ListStream(std::vector<data::Example> examples) : examples_(std::move(examples)) {}
  std::optional<data::Example> next() override {
    if (next_ == examples_.size()) return std::nullopt;
    return examples_[next_++];
  }
  Json state() const override { return next_; }
  void set_state(const Json& state) override { next_ = state; }

 private:
  std::vector<data::Example> examples_;
  size_t next_ = 0;
};

/// Loss, auxiliary loss and gradients of one step over all `examples`.
formats::TensorMap train_step(const Json& job, models::SingleModel& model, adapters::Adapter& adapter,
                              std::vector<data::Example> examples) {
  train::TrainConfig config;
  config.per_device_train_batch_size = job["micro_batch"];
  config.gradient_accumulation_steps = static_cast<int64_t>(examples.size()) / config.per_device_train_batch_size;
  config.max_steps = 1;
  config.learning_rate = 0;
  config.max_grad_norm = 0;
  config.moe_aux_loss_coef = job["moe_aux_loss_coef"];
  config.router_z_loss_coef = job["router_z_loss_coef"];
  config.gradient_checkpointing = job["gradient_checkpointing"];
  ListStream stream(std::move(examples));
  formats::TensorMap result;
  train::train(model, adapter, stream, {}, config, 0, {[&](const train::StepLog& log) {
                 result["loss"] = torch::tensor(log.loss);
                 result["aux_loss"] = torch::tensor(log.aux_loss);
               }});
  for (const auto& [name, gradient] : adapter.gradients()) result["grad:" + name] = gradient;
  return result;
}

generate::SamplingOptions sampling_of(const Json& given, const std::vector<int64_t>& eos_ids) {
  generate::SamplingOptions options;
  options.max_new_tokens = given.value("max_new_tokens", options.max_new_tokens);
  options.temperature = given.value("temperature", options.temperature);
  options.top_k = given.value("top_k", options.top_k);
  options.top_p = given.value("top_p", options.top_p);
  options.min_p = given.value("min_p", options.min_p);
  options.repetition_penalty = given.value("repetition_penalty", options.repetition_penalty);
  options.stop = given.value("stop", options.stop);
  options.eos_ids = given.value("eos_ids", eos_ids);
  options.num_beams = given.value("num_beams", options.num_beams);
  options.length_penalty = given.value("length_penalty", options.length_penalty);
  options.early_stopping = given.value("early_stopping", options.early_stopping);
  options.num_return_sequences = given.value("num_return_sequences", options.num_return_sequences);
  options.seed = given.value("seed", options.seed);
  return options;
}

/// The logits that a draw with `generation` is made from, null where a token is left out.
Json filtered(const Json& job) {
  Json rows = Json::array();
  for (std::vector<float> logits : job["logits"].get<std::vector<std::vector<float>>>()) {
    generate::apply_filters(logits, sampling_of(job["generation"], {}));
    rows.push_back(logits);
  }
  return {{"ok", true}, {"logits", rows}};
}

Json run(const Json& job) {
  if (job.value("mode", "") == "filter") return filtered(job);
  const auto checkpoint = models::open_checkpoint(job["model"].get<std::string>());
  models::LoadOptions options;
  const std::string dtype = job.value("dtype", "float32");
  options.dtype = dtype == "bfloat16" ? torch::kBFloat16 : dtype == "float16" ? torch::kHalf : torch::kFloat32;
  options.quantize_int8 = job.value("quantize", false);
  const auto model = models::load_model(*checkpoint, options);
  const auto adapter = attach(job, *model, *checkpoint);
  const Sequences sequences = job["sequences"];
  const std::string mode = job.value("mode", "logits");
  torch::Tensor sentence;
  if (job.contains("sentence") && !job["sentence"].is_null()) {
    std::vector<torch::Tensor> vectors;
    for (const auto& row : job["sentence"]) vectors.push_back(torch::tensor(row.get<std::vector<float>>()));
    sentence = torch::stack(vectors);
  }
  if (job.contains("save_adapter")) adapter->save(job["save_adapter"].get<std::string>());

  if (mode == "generate") {
    const generate::SamplingOptions sampling = sampling_of(job["generation"], model->facts().eos_ids);
    const auto tokenizer = tokenizer::Tokenizer::open(*checkpoint);
    Json answers = Json::array();
    std::vector<generate::Prompt> prompts;
    for (size_t b = 0; b < sequences.size(); ++b) {
      prompts.push_back({sequences[b]});
      if (sentence.defined()) prompts.back().sentence = job["sentence"][b].get<std::vector<float>>();
    }
    for (const auto& generation : generate::generate(*model, *tokenizer, prompts, sampling)) {
      answers.push_back({{"ids", generation.ids},
                         {"finish_reason", generation.finish_reason},
                         {"score", generation.score},
                         {"text", generation.text}});
    }
    return {{"ok", true}, {"generations", answers}};
  }

  formats::TensorMap result;
  if (mode == "step") {
    result = train_step(job, *model, *adapter, examples_of(job, sequences));
  } else if (mode == "cached") {
    torch::NoGradGuard no_grad;
    result["logits"] = cached_logits(*model, sequences, sentence, job.value("prompts", std::vector<int64_t>()));
  } else {
    if (mode == "full") {
      for (torch::Tensor& parameter : model->parameters()) parameter.set_requires_grad(true);
    }
    const torch::AutoGradMode gradients(mode != "logits");
    const data::Batch batch = data::collate(examples_of(job, sequences), model->device());
    models::Text text{batch.tokens, batch.prompt_ends};
    text.sentence = batch.sentence;
    nn::Pass pass;
    const torch::Tensor hidden = model->hidden(text, pass);
    result["logits"] = model->head().logits(hidden.detach()).detach();
    if (options.quantize_int8) {  // a quantised head has no loss
      formats::save_safetensors(job["output"].get<std::string>(), result);
      return {{"ok", true}};
    }
    const torch::Tensor loss = model->head().loss(hidden.index_select(0, batch.label_rows), batch.labels,
                                                  row_weights(batch, job.value("normalization", "tokens")));
    result["loss"] = loss.detach();
    if (mode != "logits") {
      loss.backward();
      if (mode == "adapter") {
        for (const auto& [name, gradient] : adapter->gradients()) result["grad:" + name] = gradient;
      } else {
        for (const auto& item : model->named_parameters()) {
          if (item.value().grad().defined()) result["grad:" + item.key()] = item.value().grad().contiguous();
        }
      }
    }
  }
  formats::save_safetensors(job["output"].get<std::string>(), result);
  return {{"ok", true}};
}

}  // namespace

int main() { return moesaic::test::answer_lines(run); }
