#include "moesaic/models/language_model.h"

#include "moesaic/base/check.h"

namespace moesaic::models {
namespace {

using Sentence = nn::Needs::Sentence;

torch::Tensor index_of(const std::vector<int64_t>& rows, torch::Device device) {
  return torch::tensor(rows, torch::kInt64).to(device);
}

/// `kept` with the rows of `fresh` where its sequence has not begun.
torch::Tensor of_beginning(const torch::Tensor& kept, const torch::Tensor& fresh, const std::vector<uint8_t>& begins) {
  if (!kept.defined() || !fresh.defined()) return fresh.defined() ? fresh : kept;
  if (std::find(begins.begin(), begins.end(), 1) == begins.end()) return kept;
  torch::Tensor rows = kept.clone();
  for (size_t b = 0; b < begins.size(); ++b) {
    if (begins[b]) rows[static_cast<int64_t>(b)].copy_(fresh[static_cast<int64_t>(b)]);
  }
  return rows;
}

/// Which sequences of the text begin with it.
std::vector<uint8_t> beginnings(const Text& text, const Memory* memory) {
  std::vector<uint8_t> begins;
  for (int64_t b = 0; b < text.tokens.batch_size(); ++b) {
    const bool has_rows = text.tokens.offsets[b] < text.tokens.offsets[b + 1];
    begins.push_back(memory == nullptr || (has_rows && memory->length(b) == 0));
  }
  return begins;
}

}  // namespace

void Memory::keep(const std::vector<int64_t>& rows) {
  keep_sequences(rows);
  for (torch::Tensor* each : {&sentence, &mixture}) {
    if (each->defined()) *each = each->index_select(0, index_of(rows, each->device()));
    MOESAIC_ASSERT(!each->defined() || each->size(0) == sequences());
  }
}

void Memory::add(int64_t count) {
  add_sequences(count);
  for (torch::Tensor* each : {&sentence, &mixture}) {
    if (!each->defined()) continue;
    // Weights are 1 and vectors 0 until the first text brings its own.
    const double value = each == &mixture ? 1.0 : 0.0;
    *each = torch::cat({*each, torch::full({count, each->size(1)}, value, each->options())});
    MOESAIC_ASSERT(each->size(0) == sequences());
  }
}

int64_t LanguageModel::saved_bytes(const std::vector<nn::Block*>& blocks, const Facts& facts, int64_t tokens,
                                   bool checkpointing) {
  const int64_t input = facts.width * tokens * static_cast<int64_t>(c10::elementSize(facts.dtype));
  int64_t saved = 0, largest = 0;
  for (const nn::Block* block : blocks) {
    const int64_t bytes = block->saved_bytes(tokens);
    largest = std::max(largest, bytes);
    saved += checkpointing ? input : bytes;
  }
  return checkpointing ? saved + largest : saved;
}

int64_t LanguageModel::activation_bytes(int64_t tokens, bool checkpointing) {
  std::vector<nn::Block*> all = blocks();
  // Below the first block that trains there is no graph.
  all.erase(all.begin(), std::find_if(all.begin(), all.end(), [](const nn::Block* block) { return block->trains(); }));
  return saved_bytes(all, facts(), tokens, checkpointing);
}

int64_t LanguageModel::scratch_bytes(int64_t tokens) {
  int64_t numbers = 0;
  for (const nn::Block* block : blocks()) numbers = std::max(numbers, block->scratch_per_row());
  return numbers * tokens * static_cast<int64_t>(c10::elementSize(facts().dtype));
}

std::vector<std::string> LanguageModel::source_texts(int64_t, const std::vector<int64_t>&) const { return {}; }

void LanguageModel::attach(const std::string& name, std::shared_ptr<nn::Attachment> attachment, Memory* memory) {
  const nn::Needs before = needs(), wants = attachment->needs();
  for (const auto& other : attachments_) {
    MOESAIC_CHECK(other->owner() != name, UsageError,
                  "--adapter: two adapters have the name '{}'; name them apart: NAME=DIR", name);
  }
  for (const Part& part : parts()) {
    MOESAIC_CHECK(part.place.empty() || part.place != name, UsageError,
                  "--adapter: '{}' names a member of the composition; name the adapter apart: NAME=DIR", name);
  }
  MOESAIC_CHECK(before.sentence == Sentence::kNone || wants.sentence == Sentence::kNone ||
                    (before.sentence == wants.sentence && before.sentence_width == wants.sentence_width),
                UsageError,
                "adapter {}: its router reads sentence embeddings of another source or width than another adapter's. "
                "Use them one at a time.",
                name);
  MOESAIC_CHECK(wants.sentence != Sentence::kEncoder || sentence_encoder_ != nullptr, UsageError,
                "adapter {}: its router reads vectors of a sentence encoder (router.sentence_source), which is not "
                "loaded; expected the adapter among those that the program begins with",
                name);
  MOESAIC_CHECK(attachments_.empty() || !(before.replaces || wants.replaces), UsageError,
                "adapter {}: of {} adapters one replaces weights of the model (DoRA, or weights held whole), expected "
                "it alone",
                name, attachments_.size() + 1);
  attachment->name_as(name, std::ssize(attachments_));
  attachments_.push_back(std::move(attachment));
  if (memory == nullptr || memory->sequences() == 0) return;
  const torch::Tensor kept = memory->mixture;
  const torch::Tensor none =
      torch::zeros({memory->sequences(), 1}, torch::dtype(torch::kFloat32).device(facts().device));
  memory->mixture = kept.defined() ? torch::cat({kept, none}, 1) : none;
}

std::shared_ptr<nn::Attachment> LanguageModel::detach(const std::string& name, Memory* memory) {
  const int64_t gone = column(name);
  std::shared_ptr<nn::Attachment> attachment = std::move(attachments_[gone]);
  attachments_.erase(attachments_.begin() + gone);
  attachment->detach();
  for (int64_t c = gone; c < std::ssize(attachments_); ++c) attachments_[c]->name_as(attachments_[c]->owner(), c);
  if (memory != nullptr && memory->mixture.defined()) {
    const torch::Tensor& kept = memory->mixture;
    memory->mixture = attachments_.empty()
                          ? torch::Tensor()
                          : torch::cat({kept.narrow(1, 0, gone), kept.narrow(1, gone + 1, kept.size(1) - gone - 1)}, 1);
  }
  return attachment;
}

int64_t LanguageModel::column(const std::string& name) const {
  std::vector<std::string> names;
  for (const auto& attachment : attachments_) {
    if (attachment->owner() == name) return std::ssize(names);
    names.push_back(attachment->owner());
  }
  const std::string nearest = nearest_name(name, names);
  throw UsageError(fmt::format(
      "adapter '{}': not attached; {}{}", name,
      names.empty() ? std::string("the model has none") : fmt::format("expected one of {}", fmt::join(names, ", ")),
      nearest.empty() ? "" : fmt::format(". Did you mean '{}'?", nearest)));
}

nn::Needs LanguageModel::needs() const {
  nn::Needs all;
  for (const auto& attachment : attachments_) {
    const nn::Needs needs = attachment->needs();
    all.routed = all.routed || needs.routed;
    all.replaces = all.replaces || needs.replaces;
    if (needs.sentence == Sentence::kNone) continue;
    all.sentence = needs.sentence;
    all.sentence_width = needs.sentence_width;
  }
  return all;
}

void LanguageModel::detach_all() {
  for (const auto& attachment : attachments_) attachment->detach();
  attachments_.clear();
}

torch::Tensor LanguageModel::prompt_states(const nn::RaggedBatch& prompts) {
  Text text;
  text.tokens = prompts;
  nn::Pass pass;
  return run(text, pass, nullptr);
}

torch::Tensor LanguageModel::sentence_vectors(const Text& text, const Memory* memory) {
  const nn::Needs wants = needs();
  if (wants.sentence == Sentence::kNone) return {};
  const int64_t batch = text.tokens.batch_size();
  const torch::Tensor kept = memory != nullptr ? memory->sentence : torch::Tensor();
  const std::vector<uint8_t> begins = beginnings(text, memory);
  if (std::find(begins.begin(), begins.end(), 1) == begins.end()) return kept;
  if (text.sentence.defined()) {
    MOESAIC_CHECK(text.sentence.dim() == 2 && text.sentence.size(0) == batch, ShapeError,
                  "sentence vectors: got [{}], expected [{}, {}]", fmt::join(text.sentence.sizes(), ", "), batch,
                  wants.sentence_width);
    MOESAIC_CHECK(text.sentence.size(1) == wants.sentence_width, DataError,
                  "sentence vectors: got {} numbers a row, expected {}: the router's input", text.sentence.size(1),
                  wants.sentence_width);
    return of_beginning(kept, text.sentence.to(facts().device), begins);
  }
  MOESAIC_CHECK(wants.sentence != Sentence::kColumn, UsageError,
                "an adapter's router reads sentence embeddings from a data column; they can't be made from a prompt. "
                "Give a \"sentence\" list of {} numbers with each row.",
                wants.sentence_width);
  MOESAIC_CHECK(text.prompts.empty() || std::ssize(text.prompts) == batch, ShapeError,
                "prompts: got {} for {} sequences", text.prompts.size(), batch);
  torch::NoGradGuard no_grad;
  nn::AdapterDisabled disabled;
  std::vector<int64_t> beginning;
  std::vector<std::vector<int64_t>> prompts;
  for (int64_t b = 0; b < batch; ++b) {
    if (!begins[b]) continue;
    beginning.push_back(b);
    if (!text.prompts.empty()) prompts.push_back(text.prompts[b]);
  }
  const bool encoded = wants.sentence == Sentence::kEncoder;
  const bool whole = text.prompts.empty() && std::ssize(beginning) == batch && !encoded;
  for (size_t i = 0; i < beginning.size() && text.prompts.empty() && !whole; ++i) {
    const torch::Tensor ids =
        text.tokens.tokens.slice(0, text.tokens.offsets[beginning[i]], text.tokens.offsets[beginning[i] + 1]).cpu();
    prompts.emplace_back(ids.data_ptr<int64_t>(), ids.data_ptr<int64_t>() + ids.numel());
  }
  if (encoded) {
    const torch::Tensor vectors = sentence_encoder_->vectors(prompts);
    torch::Tensor rows = torch::zeros({batch, vectors.size(1)}, torch::kFloat32);
    for (size_t i = 0; i < beginning.size(); ++i) rows[beginning[i]].copy_(vectors[static_cast<int64_t>(i)]);
    return of_beginning(kept, rows.to(facts().device), begins);
  }
  const nn::RaggedBatch read = whole ? text.tokens : nn::RaggedBatch::from_sequences(prompts, facts().device);
  const torch::Tensor hidden = prompt_states(read);
  torch::Tensor means = torch::zeros({batch, hidden.size(1)}, torch::dtype(torch::kFloat32).device(hidden.device()));
  for (size_t i = 0; i < beginning.size(); ++i) {
    means[beginning[i]].copy_(
        hidden.slice(0, read.offsets[i], read.offsets[i + 1]).mean(0, /*keepdim=*/false, torch::kFloat32));
  }
  return of_beginning(kept, means, begins);
}

torch::Tensor LanguageModel::mixture_rows(const Text& text, const Memory* memory) const {
  const torch::Tensor kept = memory != nullptr ? memory->mixture : torch::Tensor();
  if (!text.mixture.defined()) {
    const torch::Tensor whole = kept.defined() ? torch::ones_like(kept) : kept;
    return of_beginning(kept, whole, beginnings(text, memory));
  }
  const auto adapters = std::ssize(attachments_);
  MOESAIC_CHECK(
      text.mixture.dim() == 2 && text.mixture.size(0) == text.tokens.batch_size() && text.mixture.size(1) == adapters,
      UsageError, "mixture: got [{}], expected [{}, {}]: a weight of every attached adapter for each sequence",
      fmt::join(text.mixture.sizes(), ", "), text.tokens.batch_size(), adapters);
  MOESAIC_CHECK(text.mixture.isfinite().all().item<bool>(), UsageError,
                "mixture: got a weight that is not finite, expected numbers");
  MOESAIC_CHECK(!needs().replaces || (text.mixture == 1).all().item<bool>(), UsageError,
                "mixture: got a weight for an adapter that replaces weights of the model, expected 1");
  return of_beginning(kept, text.mixture.to(facts().device, torch::kFloat32), beginnings(text, memory));
}

torch::Tensor LanguageModel::hidden(const Text& text, nn::Pass& pass, Memory* memory) {
  const int64_t batch = text.tokens.batch_size();
  MOESAIC_ASSERT(text.tokens.offsets.front() == 0 && text.tokens.num_tokens() == text.tokens.tokens.size(0) &&
                 std::is_sorted(text.tokens.offsets.begin(), text.tokens.offsets.end()));
  MOESAIC_CHECK(memory == nullptr || memory->sequences() == batch, ShapeError,
                "memory: got a text of {} sequences, expected {}", batch, memory != nullptr ? memory->sequences() : 0);
  MOESAIC_CHECK(text.borders.empty() || std::ssize(text.borders) == batch, ShapeError,
                "borders: got those of {} sequences, expected {}", text.borders.size(), batch);
  const auto [least, most] = text.tokens.tokens.aminmax();
  for (const int64_t id : {least.item<int64_t>(), most.item<int64_t>()}) {
    MOESAIC_CHECK(id >= 0 && id < facts().vocab_size, DataError, "token id: got {}, expected 0 to {} (the vocabulary)",
                  id, facts().vocab_size - 1);
  }
  std::optional<torch::NoGradGuard> no_grad;
  if (memory != nullptr) no_grad.emplace();
  pass.sentence = sentence_vectors(text, memory);
  pass.mixture = mixture_rows(text, memory);
  if (memory != nullptr) {
    memory->sentence = pass.sentence;
    memory->mixture = pass.mixture;
  }
  torch::Tensor states = run(text, pass, memory);
  MOESAIC_ASSERT(states.dim() == 2 && states.size(1) == facts().width &&
                 states.size(0) == (text.rows.defined() ? text.rows : text.tokens.tokens).size(0));
  return states;
}

}  // namespace moesaic::models
