#include "moesaic/compose/composition.h"

#include "moesaic/base/check.h"
#include "moesaic/base/seed.h"
#include "moesaic/base/sha256.h"

namespace moesaic::compose {
namespace {

/// Rows of a frozen pass, for each thread, from which MKL computes every row of a product alike whatever their number.
constexpr int64_t kRowsPerThread = 16;

std::vector<int64_t> flat(const std::vector<std::vector<int64_t>>& sequences) {
  std::vector<int64_t> all;
  for (const auto& sequence : sequences) all.insert(all.end(), sequence.begin(), sequence.end());
  return all;
}

std::vector<std::vector<int64_t>> sequences_of(const nn::RaggedBatch& batch) {
  const torch::Tensor ids = batch.tokens.to(torch::kCPU).contiguous();
  const auto* data = ids.data_ptr<int64_t>();
  std::vector<std::vector<int64_t>> sequences;
  for (int64_t b = 0; b < batch.batch_size(); ++b) {
    sequences.emplace_back(data + batch.offsets[b], data + batch.offsets[b + 1]);
  }
  return sequences;
}

/// Rotary tables for rows at `places` of the anchor's sequences.
nn::RotaryTables rotary_tables(const nn::Rope* rope, const torch::Tensor& places) {
  return rope ? rope->tables(places, {}, {}) : nn::RotaryTables{};
}

/// The context of a forward pass through part of a model.
nn::ForwardContext context_of(const models::CausalLM& model, const nn::RaggedBatch& batch, nn::KvCache* cache) {
  nn::ForwardContext context;
  context.cache = cache;
  model.prepare(batch, context);
  return context;
}

void commit(nn::KvCache& cache, const std::vector<int64_t>& offsets) {
  std::vector<int64_t> counts;
  for (size_t b = 0; b + 1 < offsets.size(); ++b) counts.push_back(offsets[b + 1] - offsets[b]);
  cache.commit(counts);
}

}  // namespace

std::vector<ConnectionPair> evenly_spaced(int64_t num_connections, int64_t anchor_layers, int64_t aug_layers) {
  MOESAIC_CHECK(num_connections > 0 && num_connections <= std::min(anchor_layers, aug_layers), ConfigError,
                "num_connections: got {}, expected 1 to {} (the anchor has {} blocks, the augmenting model {})",
                num_connections, std::min(anchor_layers, aug_layers), anchor_layers, aug_layers);
  auto block = [&](int64_t m, int64_t layers) {
    return ((m + 1) * layers + num_connections - 1) / num_connections - 1;
  };
  std::vector<ConnectionPair> pairs;
  for (int64_t m = 0; m < num_connections; ++m) pairs.push_back({block(m, anchor_layers), block(m, aug_layers)});
  return pairs;
}

int64_t num_blocks(const AugmentingConfig& config) {
  int64_t highest = -1;
  for (const ConnectionPair& pair : config.connections) highest = std::max(highest, pair.aug);
  return highest + 1;
}

int64_t default_heads(const models::DecoderConfig& anchor) {
  int64_t heads = anchor.num_heads;
  while (heads > 1 && anchor.hidden_size % (2 * heads) != 0) --heads;
  return heads;
}

void validate(const CompositionConfig& config, const models::DecoderConfig& anchor,
              const std::vector<models::DecoderConfig>& augmenting, const std::string& where) {
  std::vector<std::string> wrong;
  auto require = [&](bool ok, const std::string& message) {
    if (!ok) wrong.push_back(message);
  };
  auto one_of = [&](const char* key, const std::string& value, const std::vector<std::string>& known) {
    require(std::find(known.begin(), known.end(), value) != known.end(),
            fmt::format("{}: got '{}', expected {}", key, value, fmt::join(known, " or ")));
  };
  const ConnectionConfig& shared = config.connection;
  one_of("cross_position", shared.cross_position, {"rope", "none"});
  one_of("norm", shared.norm, {"none", "pre", "post"});
  one_of("output_init", shared.output_init, {"zero", "normal"});
  const bool divides = shared.num_heads > 0 && anchor.hidden_size % shared.num_heads == 0;
  require(divides, fmt::format("num_heads: got {}, expected a divisor of the anchor's width {}", shared.num_heads,
                               anchor.hidden_size));
  require(!divides || shared.cross_position != "rope" || anchor.hidden_size / shared.num_heads % 2 == 0,
          fmt::format("num_heads: got {}, which makes heads of width {}; rope needs an even one", shared.num_heads,
                      divides ? anchor.hidden_size / shared.num_heads : 0));
  require(!config.augmenting.empty(), "augmenting: got no model, expected at least one");
  require(config.augmenting.size() == augmenting.size(),
          fmt::format("augmenting: got {} models for {} entries", augmenting.size(), config.augmenting.size()));
  for (size_t m = 0; m < std::min(config.augmenting.size(), augmenting.size()); ++m) {
    const AugmentingConfig& entry = config.augmenting[m];
    const std::string name = fmt::format("augmenting[{}]", m);
    one_of((name + ".align").c_str(), entry.align, {"word", "token", "mixed"});
    one_of((name + ".mask").c_str(), entry.mask, {"causal", "prefix", "full"});
    require(!entry.connections.empty(), name + ".connections: got none, expected at least one");
    for (const ConnectionPair& pair : entry.connections) {
      const bool fits =
          pair.anchor >= -1 && pair.anchor < anchor.num_layers && pair.aug >= -1 && pair.aug < augmenting[m].num_layers;
      require(fits, fmt::format("{}.connections: got anchor {}, aug {}, expected -1 to {} and -1 to {}", name,
                                pair.anchor, pair.aug, anchor.num_layers - 1, augmenting[m].num_layers - 1));
    }
  }
  MOESAIC_CHECK(wrong.empty(), ConfigError, "{}: {}", where, fmt::join(wrong, "; "));
}

void CompositionState::truncate(int64_t b, int64_t length) {
  anchor.truncate(b, length);
  for (Stream& stream : streams) {
    stream.aligners[b].truncate(length);
    stream.model.truncate(b, stream.aligners[b].committed());
    stream.connections.truncate(b, stream.aligners[b].committed());
  }
}

CompositionState CompositionState::select(const std::vector<int64_t>& rows) const {
  CompositionState chosen{anchor.select(rows), {}};
  for (const Stream& stream : streams) {
    std::vector<Aligner> aligners;
    for (const int64_t b : rows) aligners.push_back(stream.aligners.at(b));
    chosen.streams.push_back({std::move(aligners), stream.model.select(rows), stream.connections.select(rows)});
  }
  return chosen;
}

Composition::Composition(CompositionConfig config, Member anchor, std::vector<Member> augmenting, uint64_t seed)
    : config_(std::move(config)), anchor_(std::move(anchor)), augmenting_(std::move(augmenting)) {
  const models::DecoderConfig& anchor_config = anchor_.model->config();
  std::vector<models::DecoderConfig> configs;
  for (const Member& member : augmenting_) configs.push_back(member.model->config());
  validate(config_, anchor_config, configs, "composition");
  config_.connection.norm_eps = anchor_config.rms_norm_eps;  // as the released code
  if (config_.connection.cross_position == "rope") {
    nn::RopeConfig rope;
    rope.theta = anchor_config.rope.theta;
    rope_ = std::make_unique<nn::Rope>(rope, anchor_config.hidden_size / config_.connection.num_heads);
  }
  auto list = register_module("connections", std::make_shared<torch::nn::Module>());
  const auto options = torch::dtype(torch::kFloat32).device(anchor_.model->device());
  lowest_anchor_block_ = anchor_config.num_layers;
  int64_t k = 0;
  for (size_t m = 0; m < augmenting_.size(); ++m) {
    Stream stream;
    for (const ConnectionPair& pair : config_.augmenting[m].connections) {
      stream.blocks.push_back(pair.aug);
      lowest_anchor_block_ = std::min(lowest_anchor_block_, pair.anchor);
    }
    stream.alignment = std::make_shared<Alignment>(anchor_.tokenizer, augmenting_[m].tokenizer,
                                                   config_.augmenting[m].align, config_.augmenting[m].mask);
    for (size_t c = 0; c < config_.augmenting[m].connections.size(); ++c, ++k) {
      Connection connection(config_.connection, configs[m].hidden_size, anchor_config.hidden_size, options);
      connection->initialize(make_generator(derive_seed(seed, "connection", static_cast<uint64_t>(k))));
      stream.connections.push_back(list->register_module(std::to_string(k), connection));
    }
    streams_.push_back(std::move(stream));
  }
  train_adapters(false);
}

std::vector<std::pair<std::string, adapters::Adapter*>> Composition::adapters() const {
  std::vector<std::pair<std::string, adapters::Adapter*>> found;
  if (anchor_.adapter) found.emplace_back("anchor", anchor_.adapter.get());
  for (size_t m = 0; m < augmenting_.size(); ++m) {
    if (augmenting_[m].adapter) found.emplace_back(fmt::format("augmenting.{}", m), augmenting_[m].adapter.get());
  }
  return found;
}

void Composition::train_adapters(bool on) {
  trains_adapters_ = on;
  identities_.clear();  // adapters that were trained are others than they were
  for (const auto& [place, adapter] : adapters()) {
    for (const auto& parameter : adapter->parameters()) parameter.tensor.set_requires_grad(on);
  }
}

int64_t Composition::first_trained_block() const { return is_trained(anchor_) ? 0 : lowest_anchor_block_ + 1; }

std::vector<AlignedBatch> Composition::align(const nn::RaggedBatch& batch, const Borders& borders,
                                             CompositionState* state) const {
  const int64_t count = batch.batch_size();
  MOESAIC_CHECK(borders.empty() || std::ssize(borders) == count, ShapeError,
                "composition: got borders of {} sequences, expected {}", borders.size(), count);
  const torch::Tensor ids = batch.tokens.to(torch::kCPU).contiguous();
  std::vector<AlignedBatch> result;
  for (size_t m = 0; m < streams_.size(); ++m) {
    const bool full = streams_[m].alignment->policy() == "full";
    AlignedBatch aligned{
        std::vector<std::vector<int64_t>>(count), std::vector<std::vector<int64_t>>(count), {batch.offsets, {}}};
    for (int64_t b = 0; b < count; ++b) {
      Aligner fresh(streams_[m].alignment);
      Aligner& aligner = state ? state->streams[m].aligners[b] : fresh;
      for (int64_t n = batch.offsets[b]; n < batch.offsets[b + 1]; ++n) {
        const int64_t place = aligner.tokens();
        const bool border = (!borders.empty() && std::binary_search(borders[b].begin(), borders[b].end(), place + 1)) ||
                            (full && n + 1 == batch.offsets[b + 1]);
        const std::vector<int64_t> committed = aligner.push(ids.data_ptr<int64_t>()[n], border);
        aligned.tokens[b].insert(aligned.tokens[b].end(), committed.begin(), committed.end());
        aligned.coordinates[b].resize(aligned.tokens[b].size(), place);
        aligned.seen.visible.push_back(aligner.committed());
      }
      if (full)
        std::fill(aligned.seen.visible.end() - (batch.offsets[b + 1] - batch.offsets[b]), aligned.seen.visible.end(),
                  aligner.committed());
    }
    result.push_back(std::move(aligned));
  }
  return result;
}

namespace {

/// The outputs of `blocks` (-1: the embedding's) for a batch, [N, D] each.
std::vector<torch::Tensor> states_at(models::CausalLM& model, const nn::RaggedBatch& batch,
                                     const std::vector<int64_t>& blocks, nn::ForwardContext& context) {
  std::vector<torch::Tensor> states(blocks.size());
  const int64_t highest = *std::max_element(blocks.begin(), blocks.end());
  torch::Tensor h = model.embed(batch.tokens);
  for (int64_t block = -1; block <= highest; ++block) {
    if (block >= 0) h = model.run_layers(h, block, block + 1, context);
    for (size_t i = 0; i < blocks.size(); ++i) {
      if (blocks[i] == block) states[i] = h;
    }
  }
  return states;
}

/// `sequences` end to end, without those that are empty.
nn::RaggedBatch batch_of(const std::vector<std::vector<int64_t>>& sequences, torch::Device device) {
  nn::RaggedBatch batch{torch::tensor(flat(sequences), torch::kInt64).to(device), {0}};
  for (const auto& sequence : sequences) {
    if (!sequence.empty()) batch.offsets.push_back(batch.offsets.back() + std::ssize(sequence));
  }
  return batch;
}

/// The frozen states of `sequences`, [rows, D] per block; a sequence's do not depend on the others.
std::vector<torch::Tensor> compute_frozen_states(models::CausalLM& model, const std::vector<int64_t>& blocks,
                                                 std::vector<std::vector<int64_t>> sequences) {
  torch::NoGradGuard no_grad;
  const auto rows = std::ssize(flat(sequences));
  const int64_t wanted = model.device().is_cpu() ? kRowsPerThread * at::get_num_threads() : 0;
  if (rows < wanted) sequences.emplace_back(wanted - rows, /*any id*/ 0);
  const nn::RaggedBatch batch = batch_of(sequences, model.device());
  nn::ForwardContext context = context_of(model, batch, nullptr);
  std::vector<torch::Tensor> states = states_at(model, batch, blocks, context);
  for (torch::Tensor& state : states) state = state.slice(0, 0, rows);
  return states;
}

}  // namespace

/// What the frozen states of a model depend on beside its input.
std::string Composition::identity(const Member& member, const std::string& role) const {
  std::string text = fmt::format("{} {} {}", role, c10::toString(member.model->dtype()),
                                 member.checkpoint ? member.checkpoint->fingerprint() : "in memory");
  if (member.random_seed) text += fmt::format(" random {}", *member.random_seed);
  if (member.adapter) {
    Sha256 hash;
    for (const auto& [name, tensor] : member.adapter->folder().tensors) {
      const torch::Tensor stored = tensor.to(torch::kCPU).contiguous();
      hash.update(name);
      hash.update(stored.data_ptr(), stored.nbytes());
    }
    text += " adapter " + hash.hex();
  }
  return text;
}

/// compute_frozen_states of all sequences, end to end, from `cache` where it has them.
std::vector<torch::Tensor> Composition::frozen_states(const Member& member, const std::string& role,
                                                      const std::vector<int64_t>& blocks,
                                                      const std::vector<std::vector<int64_t>>& sequences,
                                                      StateCache* cache) const {
  models::CausalLM& model = *member.model;
  if (cache == nullptr) return compute_frozen_states(model, blocks, sequences);
  auto [known, added] = identities_.try_emplace(role);
  if (added) known->second = identity(member, role);
  std::vector<std::string> keys;
  std::vector<std::optional<std::vector<torch::Tensor>>> found;
  std::vector<std::vector<int64_t>> missing;
  for (const auto& ids : sequences) {
    const std::vector<int64_t> shape{std::ssize(ids), model.config().hidden_size};
    const auto fits = [&](const torch::Tensor& state) {
      return state.sizes() == shape && state.dtype() == model.dtype();
    };
    keys.push_back(StateCache::key(known->second, blocks, ids));
    found.push_back(ids.empty() ? std::vector<torch::Tensor>() : cache->find(keys.back()));
    if (found.back() && !ids.empty() &&
        (found.back()->size() != blocks.size() || !std::all_of(found.back()->begin(), found.back()->end(), fits))) {
      found.back().reset();  // a file that something else wrote
    }
    if (!found.back()) missing.push_back(ids);
  }
  const auto computed = missing.empty() ? std::vector<torch::Tensor>() : compute_frozen_states(model, blocks, missing);
  std::vector<std::vector<torch::Tensor>> parts(blocks.size());
  int64_t row = 0;
  for (size_t b = 0; b < sequences.size(); ++b) {
    if (sequences[b].empty()) continue;
    if (!found[b]) {
      const int64_t end = row + std::ssize(sequences[b]);
      found[b].emplace();
      for (const torch::Tensor& state : computed) found[b]->push_back(state.slice(0, row, end));
      cache->add(keys[b], *found[b]);
      row = end;
    }
    for (size_t i = 0; i < blocks.size(); ++i) parts[i].push_back((*found[b])[i].to(model.device()));
  }
  std::vector<torch::Tensor> states;
  for (const auto& part : parts) states.push_back(at::cat(part));
  return states;
}

/// Runs augmenting model m over what it reads and makes the keys and values of its connections.
std::vector<KeysValues> Composition::read(size_t m, const AlignedBatch& aligned, CompositionState::Stream* state,
                                          bool training, StateCache* cache) {
  const Member& member = augmenting_[m];
  models::CausalLM& model = *member.model;
  Stream& stream = streams_[m];
  const torch::Device device = anchor_.model->device();
  std::vector<int64_t> offsets{0};
  for (const auto& tokens : aligned.tokens) offsets.push_back(offsets.back() + std::ssize(tokens));
  const int64_t heads = config_.connection.num_heads;
  const torch::Tensor none = torch::empty({0, heads, anchor_.model->config().hidden_size / heads},
                                          torch::dtype(torch::kFloat32).device(device));
  std::vector<KeysValues> result(stream.blocks.size(), KeysValues{none, none, offsets, {}});
  if (offsets.back() > 0) {
    std::vector<torch::Tensor> states;
    if (state || is_trained(member)) {
      // A cache has its place for every sequence, also for one that reads nothing now.
      nn::RaggedBatch batch = batch_of(aligned.tokens, model.device());
      if (state) batch.offsets = offsets;
      nn::ForwardContext context = context_of(model, batch, state ? &state->model : nullptr);
      context.training = training;
      states = states_at(model, batch, stream.blocks, context);
      if (state) commit(state->model, offsets);
    } else {
      states = frozen_states(member, fmt::format("augmenting.{}", m), stream.blocks, aligned.tokens, cache);
    }
    const nn::RotaryTables rope =
        rotary_tables(rope_.get(), torch::tensor(flat(aligned.coordinates), torch::kInt64).to(device));
    for (size_t c = 0; c < states.size(); ++c) {
      std::tie(result[c].k, result[c].v) = stream.connections[c]->keys_values(states[c].to(device), rope);
    }
  }
  if (!state) return result;
  for (size_t c = 0; c < result.size(); ++c) {
    for (size_t b = 0; b + 1 < offsets.size(); ++b) {
      const int64_t begin = offsets[b], end = offsets[b + 1];
      if (end == begin && state->connections.length(static_cast<int64_t>(b)) == 0) {
        result[c].cached.emplace_back();
        continue;
      }
      result[c].cached.push_back(state->connections.append(static_cast<int64_t>(c), static_cast<int64_t>(b),
                                                           result[c].k.slice(0, begin, end),
                                                           result[c].v.slice(0, begin, end)));
    }
  }
  commit(state->connections, offsets);
  return result;
}

torch::Tensor Composition::run(const nn::RaggedBatch& batch, const std::vector<AlignedBatch>& aligned,
                               nn::ForwardContext& context, CompositionState* state, const TrainingPass& pass,
                               std::vector<ConnectionRecord>* records) {
  const bool training = context.training && trains_adapters_;
  std::vector<std::vector<KeysValues>> streams;
  for (size_t m = 0; m < streams_.size(); ++m) {
    streams.push_back(read(m, aligned[m], state ? &state->streams[m] : nullptr, training, pass.states));
  }
  models::CausalLM& model = *anchor_.model;
  if (state) context.cache = &state->anchor;
  context.training = training;
  model.prepare(batch, context);
  const nn::RotaryTables rope = rotary_tables(rope_.get(), context.positions);
  auto add_connections = [&](int64_t block, const torch::Tensor& h) {
    torch::Tensor sum;
    for (size_t m = 0; m < streams_.size(); ++m) {
      const auto& pairs = config_.augmenting[m].connections;
      for (size_t c = 0; c < pairs.size(); ++c) {
        if (pairs[c].anchor != block) continue;
        Connection& connection = streams_[m].connections[c];
        const torch::Tensor y = connection->forward(h, rope, streams[m][c], aligned[m].seen);
        if (records) {
          const auto norm = [](const torch::Tensor& rows) { return rows.to(torch::kFloat32).norm(2, 1); };
          records->push_back(
              {m, c, norm(y) / norm(h), connection->attention_weights(h, rope, streams[m][c], aligned[m].seen)});
        }
        sum = sum.defined() ? sum + y : y;
      }
    }
    return sum.defined() ? h + sum : h;
  };
  const int64_t frozen = state ? -1 : first_trained_block() - 1;
  torch::Tensor h = frozen < 0 ? model.embed(batch.tokens)
                               : frozen_states(anchor_, "anchor", {frozen}, sequences_of(batch), pass.states)[0];
  h = add_connections(frozen, h);
  for (int64_t block = frozen + 1; block < model.config().num_layers; ++block) {
    h = pass.run_block ? pass.run_block(block, h) : model.run_layers(h, block, block + 1, context);
    h = add_connections(block, h);
  }
  if (state) commit(state->anchor, batch.offsets);
  return h;
}

std::vector<ConnectionRecord> Composition::watch(const nn::RaggedBatch& batch,
                                                 const std::vector<AlignedBatch>& aligned) {
  torch::NoGradGuard no_grad;
  std::vector<ConnectionRecord> records;
  nn::ForwardContext context;
  run(batch, aligned, context, nullptr, {}, &records);
  std::sort(records.begin(), records.end(), [](const ConnectionRecord& a, const ConnectionRecord& b) {
    return std::tie(a.augmenting, a.connection) < std::tie(b.augmenting, b.connection);
  });
  return records;
}

torch::Tensor Composition::run_layers(const nn::RaggedBatch& batch, const std::vector<AlignedBatch>& aligned,
                                      nn::ForwardContext& context, const TrainingPass& pass) {
  return run(batch, aligned, context, nullptr, pass);
}

torch::Tensor Composition::hidden_states(const nn::RaggedBatch& batch, const Borders& borders,
                                         nn::ForwardContext& context, CompositionState* state) {
  if (!state) return anchor_.model->final_norm(run(batch, align(batch, borders), context, nullptr, {}));
  torch::NoGradGuard no_grad;
  for (const Stream& stream : streams_) {
    MOESAIC_CHECK(stream.alignment->policy() != "full", UsageError,
                  "mask full: positions see the future, so a text can't be generated with it; expected causal or "
                  "prefix");
  }
  return anchor_.model->final_norm(run(batch, align(batch, borders, state), context, state, {}));
}

CompositionState Composition::make_state(int64_t batch_size) const {
  const models::CausalLM& model = *anchor_.model;
  CompositionState state{model.make_cache(batch_size), {}};
  const int64_t heads = config_.connection.num_heads;
  for (size_t m = 0; m < streams_.size(); ++m) {
    const models::CausalLM& aug = *augmenting_[m].model;
    state.streams.push_back(
        {std::vector<Aligner>(batch_size, Aligner(streams_[m].alignment)),
         nn::KvCache(num_blocks(config_.augmenting[m]), aug.config().num_kv_heads, aug.config().head_dim, batch_size,
                     torch::dtype(aug.dtype()).device(aug.device())),
         nn::KvCache(std::ssize(streams_[m].connections), heads, model.config().hidden_size / heads, batch_size,
                     torch::dtype(torch::kFloat32).device(model.device()))});
  }
  return state;
}

}  // namespace moesaic::compose
