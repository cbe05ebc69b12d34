#include "moesaic/compose/composition.h"

#include "moesaic/base/check.h"
#include "moesaic/base/seed.h"
#include "moesaic/base/sha256.h"
#include "moesaic/models/registry.h"
#include "moesaic/nn/kernels.h"

namespace moesaic::compose {
namespace {

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

/// Of the blocks that read in an augmenting model, how many are run.
int64_t blocks_run(const AugmentingConfig& how, const models::SingleModel& model) {
  return std::min(num_blocks(how), model.reading_blocks());
}

/// Rotary tables for rows at `places` of the anchor's sequences.
nn::RotaryTables rotary_tables(const nn::Rope* rope, const torch::Tensor& places) {
  return rope ? rope->tables(places, {}, {}) : nn::RotaryTables{};
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

Reader reader_of(const models::SingleModel& model) {
  return {model.reading_blocks(), model.reading_width(), model.reads_ahead()};
}

Reader reader_of(const Json& config, const std::string& where) {
  if (models::is_decoder(config, where)) {
    const models::DecoderConfig decoder = models::parse_decoder_config(config, where);
    return {decoder.num_layers, decoder.hidden_size, false};
  }
  const models::Seq2SeqConfig both = models::parse_seq2seq_config(config, where);
  return {both.encoder_layers, both.halves ? both.halves->encoder.hidden_size : both.hidden_size, true};
}

namespace {

Anchor anchor_of(const models::DecoderConfig& decoder, bool has_encoder) {
  return {decoder.num_layers,   decoder.hidden_size, decoder.num_heads,
          decoder.rms_norm_eps, decoder.rope.theta,  has_encoder};
}

Anchor anchor_of(const models::Seq2SeqConfig& both) {
  if (both.halves) return anchor_of(both.halves->decoder, /*has_encoder=*/true);
  return {both.decoder_layers, both.hidden_size, both.num_heads, both.norm_eps, nn::RopeConfig{}.theta, true};
}

}  // namespace

Anchor anchor_of(const Json& config, const std::string& where) {
  if (models::is_decoder(config, where)) return anchor_of(models::parse_decoder_config(config, where), false);
  return anchor_of(models::parse_seq2seq_config(config, where));
}

Anchor anchor_of(const models::SingleModel& model) {
  if (const auto* both = dynamic_cast<const models::Seq2SeqLM*>(&model)) return anchor_of(both->config());
  return anchor_of(dynamic_cast<const models::CausalLM&>(model).config(), /*has_encoder=*/false);
}

ConnectionPair parse_pair(const Json& json, const std::string& where) {
  MOESAIC_CHECK(json.is_object(), ConfigError, "{}: connections: got {}, expected {{anchor: block, aug: block}}", where,
                json.dump().substr(0, 80));
  for (const auto& [key, value] : json.items()) {
    MOESAIC_CHECK(key == "anchor" || key == "aug" || key == "reads", ConfigError,
                  "{}: connections: unknown key '{}', expected anchor, aug and reads", where, key);
  }
  auto place = [&](const char* key) {
    const Json value = get<Json>(json, key, where);
    if (value == "final") return kFinal;
    MOESAIC_CHECK(value.is_number_integer(), ConfigError, "{}: {}: got {}, expected a block's number or final", where,
                  key, value.dump().substr(0, 80));
    return value.get<int64_t>();
  };
  const auto reads = get_or<std::string>(json, "reads", "all", where);
  MOESAIC_CHECK(reads == "all" || reads == "newest", ConfigError, "{}: reads: got '{}', expected all or newest", where,
                reads);
  return {place("anchor"), place("aug"), reads == "newest"};
}

OrderedJson pair_json(const ConnectionPair& pair) {
  auto place = [](int64_t value) { return value == kFinal ? OrderedJson("final") : OrderedJson(value); };
  OrderedJson json{{"anchor", place(pair.anchor)}, {"aug", place(pair.aug)}};
  if (pair.newest) json["reads"] = "newest";
  return json;
}

int64_t num_blocks(const AugmentingConfig& config) {
  int64_t highest = -1;
  for (const ConnectionPair& pair : config.connections) highest = std::max(highest, pair.aug);
  return highest + 1;
}

int64_t default_heads(const Anchor& anchor) {
  int64_t heads = anchor.heads;
  while (heads > 1 && anchor.width % (2 * heads) != 0) --heads;
  return heads;
}

void validate(const CompositionConfig& config, const Anchor& anchor, const std::vector<Reader>& augmenting,
              const std::string& where) {
  std::vector<std::string> wrong;
  auto require = [&](bool ok, const std::string& message) {
    if (!ok) wrong.push_back(message);
  };
  auto one_of = [&](const char* key, const std::string& value, const std::vector<std::string>& known) {
    require(std::find(known.begin(), known.end(), value) != known.end(),
            fmt::format("{}: got '{}', expected {}", key, value, fmt::join(known, " or ")));
  };
  const ConnectionConfig& shared = config.connection;
  one_of("cross_position", shared.cross_position, {"rope", "recency", "none"});
  one_of("norm", shared.norm, {"none", "pre", "standard", "post"});
  require(shared.output_scale >= 0 && shared.output_scale < 1e3,
          fmt::format("output_scale: got {}, expected 0 (off) to 1000", shared.output_scale));
  one_of("output_init", shared.output_init, {"zero", "normal"});
  const bool divides = shared.num_heads > 0 && anchor.width % shared.num_heads == 0;
  require(divides, fmt::format("num_heads: got {}, expected a divisor of the anchor's width {}", shared.num_heads,
                               anchor.width));
  require(!divides || shared.cross_position != "rope" || anchor.width / shared.num_heads % 2 == 0,
          fmt::format("num_heads: got {}, which makes heads of width {}; rope needs an even one", shared.num_heads,
                      divides ? anchor.width / shared.num_heads : 0));
  require(!config.augmenting.empty(), "augmenting: got no model, expected at least one");
  require(config.augmenting.size() == augmenting.size(),
          fmt::format("augmenting: got {} models for {} entries", augmenting.size(), config.augmenting.size()));
  for (size_t m = 0; m < std::min(config.augmenting.size(), augmenting.size()); ++m) {
    const AugmentingConfig& entry = config.augmenting[m];
    const std::string name = fmt::format("augmenting[{}]", m);
    one_of((name + ".align").c_str(), entry.align, {"word", "token", "mixed", "text"});
    one_of((name + ".mask").c_str(), entry.mask, {"causal", "prefix", "full"});
    if (augmenting[m].ahead) {
      require(entry.mask == "prefix", fmt::format("{}.mask: got '{}', expected prefix: an encoder's states depend on "
                                                  "all it reads, so that it reads the prompt alone",
                                                  name, entry.mask));
      require(entry.align == "word",
              fmt::format("{}.align: got '{}', expected word: an encoder reads the prompt at once", name, entry.align));
    }
    require(!entry.connections.empty(), name + ".connections: got none, expected at least one");
    for (const ConnectionPair& pair : entry.connections) {
      auto is_place = [](int64_t place, int64_t blocks) { return place == kFinal || (place >= -1 && place < blocks); };
      require(is_place(pair.anchor, anchor.blocks) && is_place(pair.aug, augmenting[m].blocks),
              fmt::format("{}.connections: got anchor {}, aug {}, expected -1 to {} and -1 to {}, or final", name,
                          pair.anchor, pair.aug, anchor.blocks - 1, augmenting[m].blocks - 1));
      require(pair.anchor != kFinal || !anchor.has_encoder,
              fmt::format("{}.connections: got anchor final, expected a block of the decoder's: an encoder-decoder's "
                          "final states are not connected",
                          name));
    }
  }
  MOESAIC_CHECK(wrong.empty(), ConfigError, "{}: {}", where, fmt::join(wrong, "; "));
}

CompositionMemory::CompositionMemory(std::unique_ptr<models::Memory> of_anchor, std::vector<Stream> all)
    : anchor(std::move(of_anchor)), streams(std::move(all)) {}

void CompositionMemory::Stream::truncate(int64_t b, int64_t tokens) {
  model.truncate(b, tokens);
  connections.truncate(b, tokens);
}

int64_t CompositionMemory::token_bytes() const {
  int64_t bytes = anchor->token_bytes();
  // An augmenting model's tokens may be smaller; twice as many are rare.
  for (const Stream& stream : streams) bytes += 2 * (stream.model.token_bytes() + stream.connections.token_bytes());
  return bytes;
}

void CompositionMemory::truncate(int64_t b, int64_t length) {
  anchor->truncate(b, length);
  for (Stream& stream : streams) {
    stream.aligners[b].truncate(anchor->length(b));
    stream.truncate(b, stream.aligners[b].committed());  // a tail is read again
  }
}

void CompositionMemory::keep_sequences(const std::vector<int64_t>& rows) {
  anchor->keep(rows);
  for (Stream& stream : streams) {
    std::vector<Aligner> aligners;
    for (const int64_t b : rows) aligners.push_back(stream.aligners.at(b));
    stream.aligners = std::move(aligners);
    stream.model.keep(rows);
    stream.connections.keep(rows);
  }
}

void CompositionMemory::add_sequences(int64_t count) {
  anchor->add(count);
  for (Stream& stream : streams) {
    stream.aligners.resize(stream.aligners.size() + count, Aligner(stream.alignment));
    stream.model.add(count);
    stream.connections.add(count);
  }
}

Composition::Composition(CompositionConfig config, Member anchor, std::vector<Member> augmenting, uint64_t seed)
    : config_(std::move(config)),
      anchor_(std::move(anchor)),
      augmenting_(std::move(augmenting)),
      facts_(anchor_.model->facts()),
      encoder_decoder_(dynamic_cast<models::Seq2SeqLM*>(anchor_.model.get())) {
  facts_.has_dropout = false;  // the anchor is frozen
  if (encoder_decoder_ != nullptr) encoder_blocks_ = anchor_.model->reading_blocks();
  const Anchor anchor_config = anchor_of(*anchor_.model);
  std::vector<Reader> readers;
  for (const Member& member : augmenting_) readers.push_back(reader_of(*member.model));
  validate(config_, anchor_config, readers, "composition");
  config_.connection.norm_eps = anchor_config.norm_eps;  // as the released code
  if (config_.connection.cross_position == "rope") {
    nn::RopeConfig rope;
    rope.theta = anchor_config.rope_theta;
    rope_ = std::make_unique<nn::Rope>(rope, anchor_config.width / config_.connection.num_heads);
  }
  auto list = register_module("connections", std::make_shared<torch::nn::Module>());
  const auto options = torch::dtype(torch::kFloat32).device(anchor_.model->device());
  lowest_anchor_block_ = kFinal;
  int64_t k = 0;
  for (size_t m = 0; m < augmenting_.size(); ++m) {
    Stream stream;
    for (const ConnectionPair& pair : config_.augmenting[m].connections) {
      stream.blocks.push_back(pair.aug);
      lowest_anchor_block_ = std::min(lowest_anchor_block_, pair.anchor);
      highest_anchor_block_ = std::max(highest_anchor_block_, pair.anchor);
    }
    stream.alignment =
        std::make_shared<Alignment>(anchor_.tokenizer, augmenting_[m].tokenizer, config_.augmenting[m].align,
                                    config_.augmenting[m].mask, readers[m].ahead);
    for (size_t c = 0; c < config_.augmenting[m].connections.size(); ++c, ++k) {
      Connection connection(config_.connection, config_.augmenting[m].connections[c].newest, readers[m].width,
                            anchor_config.width, options);
      connection->initialize(make_generator(derive_seed(seed, "connection", static_cast<uint64_t>(k))));
      stream.connections.push_back(list->register_module(std::to_string(k), connection));
    }
    streams_.push_back(std::move(stream));
  }
  for (const auto& [place, adapter] : adapters()) adapter->name_as(place, /*column=*/-1);
  train_adapters(false);
  eval();
}

Composition::~Composition() {
  detach_all();
  for (const auto& [place, adapter] : adapters()) adapter->detach();
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
  for (const auto& [place, adapter] : adapters()) adapter->set_trainable(on);
}

nn::Needs Composition::needs() const {
  nn::Needs all = LanguageModel::needs();
  for (const auto& [place, adapter] : adapters()) all.routed = all.routed || adapter->needs().routed;
  all.routed = all.routed || anchor_.model->needs().routed;
  for (const auto& member : augmenting_) all.routed = all.routed || member.model->needs().routed;
  return all;
}

std::vector<models::Part> Composition::parts() {
  std::vector<models::Part> all{{"anchor", &anchor_.model->sites()}};
  for (size_t m = 0; m < augmenting_.size(); ++m) {
    all.push_back({fmt::format("augmenting.{}", m), &augmenting_[m].model->sites()});
  }
  return all;
}

std::vector<nn::Block*> Composition::blocks() {
  std::vector<nn::Block*> all = anchor_.model->blocks();
  for (size_t m = 0; m < augmenting_.size(); ++m) {
    const std::vector<nn::Block*> of_member = augmenting_[m].model->blocks();
    all.insert(all.end(), of_member.begin(),
               of_member.begin() + blocks_run(config_.augmenting[m], *augmenting_[m].model));
  }
  return all;
}

std::vector<torch::Tensor> Composition::weights() const {
  std::vector<torch::Tensor> all = anchor_.model->weights();
  for (const Member& member : augmenting_) {
    const std::vector<torch::Tensor> of_member = member.model->weights();
    all.insert(all.end(), of_member.begin(), of_member.end());
  }
  return all;
}

int64_t Composition::activation_bytes(int64_t tokens, bool checkpointing) {
  const models::Facts& facts = this->facts();
  std::vector<nn::Block*> of_anchor = anchor_.model->blocks();
  of_anchor.erase(of_anchor.begin(), of_anchor.begin() + std::min(first_trained_block(), facts.blocks));
  int64_t bytes = saved_bytes(of_anchor, facts, tokens, checkpointing);
  for (size_t m = 0; m < augmenting_.size(); ++m) {
    models::SingleModel& model = *augmenting_[m].model;
    // The state and P; keys and values before and after the rotation; queries likewise, the attention's output, Y.
    bytes += std::ssize(config_.augmenting[m].connections) * (model.reading_width() + 8 * facts.width) * tokens * 4;
    if (!is_trained(augmenting_[m])) continue;
    std::vector<nn::Block*> blocks = model.blocks();
    blocks.resize(blocks_run(config_.augmenting[m], model));
    bytes += saved_bytes(blocks, model.facts(), tokens, checkpointing);
  }
  return bytes;
}

int64_t Composition::state_bytes(int64_t tokens) const {
  int64_t numbers = first_trained_block() > 0 && encoder_decoder_ == nullptr ? facts().width : 0;
  for (size_t m = 0; m < augmenting_.size(); ++m) {
    if (is_trained(augmenting_[m])) continue;
    numbers += std::ssize(config_.augmenting[m].connections) * augmenting_[m].model->reading_width();
  }
  return numbers * tokens * static_cast<int64_t>(c10::elementSize(facts().dtype));
}

OrderedJson Composition::structure() const {
  auto member_json = [](const Member& member, int64_t blocks) {
    return OrderedJson{{"model", member.checkpoint ? member.checkpoint->path().string() : ""}, {"blocks", blocks}};
  };
  OrderedJson augmenting = OrderedJson::array(), connections = OrderedJson::array();
  for (size_t m = 0; m < augmenting_.size(); ++m) {
    const AugmentingConfig& how = config_.augmenting[m];
    OrderedJson entry = member_json(augmenting_[m], augmenting_[m].model->reading_blocks());
    entry["align"] = how.align;
    entry["mask"] = how.mask;
    augmenting.push_back(std::move(entry));
    for (const ConnectionPair& pair : how.connections) {
      OrderedJson& entry = connections.emplace_back(OrderedJson{{"augmenting", m}});
      entry.update(pair_json(pair));
    }
  }
  return {{"num_heads", config_.connection.num_heads},
          {"anchor", member_json(anchor_, anchor_of(*anchor_.model).blocks)},
          {"augmenting", std::move(augmenting)},
          {"connections", std::move(connections)}};
}

std::vector<int64_t> Composition::continued(const std::vector<int64_t>& prompt) const {
  return anchor_.model->continued(prompt);
}

std::vector<std::string> Composition::source_texts(int64_t source, const std::vector<int64_t>& ids) const {
  const Member& member = augmenting_.at(source);
  tokenizer::StreamDecoder decoder(member.tokenizer ? member.tokenizer : anchor_.tokenizer,
                                   /*skip_special_tokens=*/false);
  std::vector<std::string> texts;
  for (const int64_t id : ids) texts.push_back(decoder.push(id));
  if (!texts.empty()) texts.back() += decoder.finish();
  return texts;
}

namespace {

/// What one sequence reads on.
struct SequenceReading {
  int64_t first;  // so many tokens stand in front of these
  std::vector<int64_t> tokens;
  std::vector<Aside> asides;
  std::vector<int64_t> coordinates;  // of tokens and asides
};

/// Reads `ids` behind what the aligner has read, of which the first `kept` tokens are known; appends to `seen` what
/// each of them sees. full: all of them see everything.
SequenceReading read_on(Aligner& aligner, std::span<const int64_t> ids, const std::function<bool(int64_t)>& ends_behind,
                        bool full, int64_t kept, Visibility& seen) {
  SequenceReading reading;
  int64_t& first = reading.first = kept;
  std::vector<int64_t>& tokens = reading.tokens;
  tokens.assign(aligner.tail().begin() + std::max<int64_t>(kept - aligner.committed(), 0), aligner.tail().end());
  // Of every row how many tokens it saw, the last of them, and how many of those of the row before stand.
  std::vector<int64_t> saw, standing;
  std::vector<std::vector<int64_t>> tails, tail_places;
  for (const int64_t id : ids) {
    const int64_t place = aligner.tokens(), before = aligner.committed();
    std::vector<int64_t> now = aligner.push(id, ends_behind(place));
    now.insert(now.end(), aligner.tail().begin(), aligner.tail().end());
    first = std::min(first, aligner.standing());
    tokens.resize(aligner.standing() - first);
    tokens.insert(tokens.end(), now.begin() + (aligner.standing() - before), now.end());
    saw.push_back(before + std::ssize(now));
    standing.push_back(aligner.standing());
    tails.push_back(aligner.tail());
    tail_places.emplace_back(aligner.places().end() - std::ssize(aligner.tail()), aligner.places().end());
    seen.query_places.push_back(place);
  }
  const int64_t all = first + std::ssize(tokens), rows = std::ssize(saw);
  const auto places = aligner.places().begin();
  reading.coordinates.assign(places + first, places + all);
  std::vector<int64_t>& key_places = seen.key_places.emplace_back(places, places + all);
  std::vector<int64_t> stays = saw;  // how many of what each row saw stand to the end
  for (int64_t t = rows - 2; t >= 0; --t) stays[t] = std::min({stays[t], stays[t + 1], standing[t + 1]});
  for (int64_t t = 0; t < rows; ++t) {
    seen.visible.push_back(full ? all : stays[t]);
    const int64_t aside = full ? 0 : saw[t] - stays[t], keys = std::ssize(key_places);
    seen.aside.emplace_back(keys, keys + aside);
    if (aside == 0) continue;
    reading.asides.push_back({stays[t], {tails[t].end() - aside, tails[t].end()}});
    for (auto* where : {&reading.coordinates, &key_places}) {
      where->insert(where->end(), tail_places[t].end() - aside, tail_places[t].end());
    }
  }
  return reading;
}

}  // namespace

std::vector<AlignedBatch> Composition::align(const nn::RaggedBatch& batch, const nn::Borders& borders,
                                             CompositionMemory* memory) const {
  const int64_t count = batch.batch_size();
  MOESAIC_CHECK(borders.empty() || std::ssize(borders) == count, ShapeError,
                "composition: got borders of {} sequences, expected {}", borders.size(), count);
  const torch::Tensor ids = batch.tokens.to(torch::kCPU).contiguous();
  std::vector<AlignedBatch> result;
  for (size_t m = 0; m < streams_.size(); ++m) {
    const bool full = streams_[m].alignment->policy() == "full";
    AlignedBatch& aligned = result.emplace_back();
    aligned.seen.query_offsets = batch.offsets;
    bool any_aside = false;
    for (int64_t b = 0; b < count; ++b) {
      CompositionMemory::Stream* stream = memory ? &memory->streams[m] : nullptr;
      Aligner fresh(streams_[m].alignment);
      Aligner& aligner = stream ? stream->aligners[b] : fresh;
      const int64_t rows = batch.offsets[b + 1] - batch.offsets[b], end = aligner.tokens() + rows;
      auto ends_behind = [&](int64_t place) {
        return (!borders.empty() && std::binary_search(borders[b].begin(), borders[b].end(), place + 1)) ||
               (full && place + 1 == end);
      };
      SequenceReading reading =
          read_on(aligner, {ids.data_ptr<int64_t>() + batch.offsets[b], static_cast<size_t>(rows)}, ends_behind, full,
                  stream ? stream->connections.length(b) : 0, aligned.seen);
      if (stream) stream->truncate(b, reading.first);
      any_aside = any_aside || !reading.asides.empty();
      aligned.tokens.push_back(std::move(reading.tokens));
      aligned.asides.push_back(std::move(reading.asides));
      aligned.coordinates.push_back(std::move(reading.coordinates));
    }
    if (!any_aside) {
      aligned.seen.aside.clear();
      aligned.asides.clear();
    }
  }
  return result;
}

namespace {

/// What stands at `blocks` (-1: the embedding's output; kFinal) for a batch that `pass` was prepared for, [N, D] each.
std::vector<torch::Tensor> states_at(models::SingleModel& model, const nn::RaggedBatch& batch,
                                     const std::vector<int64_t>& blocks, nn::Pass& pass) {
  std::vector<torch::Tensor> states(blocks.size());
  auto keep = [&](int64_t block, const torch::Tensor& h) {
    for (size_t i = 0; i < blocks.size(); ++i) {
      if (blocks[i] == block) states[i] = h;
    }
    return h;
  };
  pass.run = [&keep, inner = pass.run](nn::Block& block, const torch::Tensor& h, nn::Pass& own) {
    return keep(block.index(), inner ? inner(block, h, own) : block.forward(h, own));
  };
  const int64_t highest = *std::max_element(blocks.begin(), blocks.end());
  const int64_t run = std::min(highest + 1, model.reading_blocks());
  const torch::Tensor h = model.run_blocks(keep(-1, model.embed(batch.tokens)), 0, run, pass);
  if (highest == kFinal) keep(kFinal, model.finish(h, {}));
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

/// What `asides` make of the states of their sequences, which `cache` holds up to where they stand, [rows, D] per
/// block, sequence by sequence. Cuts the cache.
std::vector<torch::Tensor> states_aside(models::SingleModel& model, const std::vector<int64_t>& blocks,
                                        const std::vector<std::vector<Aside>>& asides, nn::KvCache& cache,
                                        const nn::Pass& pass) {
  // Those at a text's end first: one that stands earlier cuts off what these read. One of each sequence at a time.
  std::vector<std::vector<std::vector<torch::Tensor>>> found(asides.size());  // [b][aside][block]
  for (size_t round = 0;; ++round) {
    nn::RaggedBatch batch{{}, {0}};
    std::vector<int64_t> tokens;
    for (size_t b = 0; b < asides.size(); ++b) {
      if (round < asides[b].size()) {
        const Aside& aside = asides[b][asides[b].size() - 1 - round];
        cache.truncate(static_cast<int64_t>(b), aside.behind);
        tokens.insert(tokens.end(), aside.tokens.begin(), aside.tokens.end());
      }
      batch.offsets.push_back(std::ssize(tokens));
    }
    if (tokens.empty()) break;
    batch.tokens = torch::tensor(tokens, torch::kInt64).to(model.device());
    nn::Pass own = pass;
    own.cache = &cache;
    model.prepare(batch, own);
    const std::vector<torch::Tensor> states = states_at(model, batch, blocks, own);
    for (size_t b = 0; b < asides.size(); ++b) {
      const int64_t begin = batch.offsets[b], end = batch.offsets[b + 1];
      if (begin == end) continue;
      auto& of_aside = found[b].emplace_back();
      for (const torch::Tensor& state : states) of_aside.push_back(state.slice(0, begin, end));
    }
  }
  std::vector<torch::Tensor> result;
  for (size_t i = 0; i < blocks.size(); ++i) {
    std::vector<torch::Tensor> rows;
    for (auto& of_sequence : found) {
      for (auto aside = of_sequence.rbegin(); aside != of_sequence.rend(); ++aside) rows.push_back((*aside)[i]);
    }
    result.push_back(at::cat(rows));
  }
  return result;
}

int64_t rows_of(const std::vector<Aside>& asides) {
  int64_t rows = 0;
  for (const Aside& aside : asides) rows += std::ssize(aside.tokens);
  return rows;
}

/// The states of `sequences` and of what stands aside of each (none = of no sequence), [rows, D] per block: a
/// sequence's tokens, then its asides'. With a cache the sequences go on where it ends, and are left in it.
std::vector<torch::Tensor> states_of(models::SingleModel& model, const std::vector<int64_t>& blocks,
                                     const std::vector<std::vector<int64_t>>& sequences,
                                     const std::vector<std::vector<Aside>>& asides, const nn::Pass& pass,
                                     nn::KvCache* cache) {
  nn::RaggedBatch batch = batch_of(sequences, model.device());
  std::vector<int64_t> offsets{0};
  for (const auto& tokens : sequences) offsets.push_back(offsets.back() + std::ssize(tokens));
  std::optional<nn::KvCache> own_cache;
  if (cache == nullptr && !asides.empty()) {
    cache = &own_cache.emplace(model.make_cache(
        std::min(*std::max_element(blocks.begin(), blocks.end()) + 1, model.reading_blocks()), std::ssize(sequences)));
  }
  std::vector<torch::Tensor> states(blocks.size());
  if (offsets.back() > 0) {
    // A cache has its place for every sequence, also for one that reads nothing now.
    if (cache != nullptr) batch.offsets = offsets;
    nn::Pass own = pass;
    own.cache = cache;
    model.prepare(batch, own);
    states = states_at(model, batch, blocks, own);
  }
  if (cache != nullptr) cache->commit(nn::RaggedBatch{{}, offsets}.counts());
  if (asides.empty()) return states;
  nn::KvCache cut = own_cache ? *std::move(own_cache) : cache->clone();
  const std::vector<torch::Tensor> aside = states_aside(model, blocks, asides, cut, pass);
  for (size_t i = 0; i < blocks.size(); ++i) {
    std::vector<torch::Tensor> parts;
    int64_t row = 0;
    for (size_t b = 0; b < sequences.size(); ++b) {
      if (states[i].defined()) parts.push_back(states[i].slice(0, offsets[b], offsets[b + 1]));
      const int64_t end = row + rows_of(asides[b]);
      parts.push_back(aside[i].slice(0, row, end));
      row = end;
    }
    states[i] = at::cat(parts);
  }
  return states;
}

/// The frozen states of `sequences`, as states_of gives them; a sequence's do not depend on the others.
std::vector<torch::Tensor> compute_frozen_states(models::SingleModel& model, const std::vector<int64_t>& blocks,
                                                 const std::vector<std::vector<int64_t>>& sequences,
                                                 const std::vector<std::vector<Aside>>& asides) {
  torch::NoGradGuard no_grad;
  const nn::AlikeRows alike(nn::AlikeRows::Number::kMany);
  return states_of(model, blocks, sequences, asides, {}, nullptr);
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

/// compute_frozen_states of all sequences, end to end, from the cache where it has them.
std::vector<torch::Tensor> Composition::frozen_states(const Member& member, const std::string& role,
                                                      const std::vector<int64_t>& blocks,
                                                      const std::vector<std::vector<int64_t>>& sequences,
                                                      const std::vector<std::vector<Aside>>& asides) const {
  models::SingleModel& model = *member.model;
  if (!states_) return compute_frozen_states(model, blocks, sequences, asides);
  auto [known, added] = identities_.try_emplace(role);
  if (added) known->second = identity(member, role);
  std::vector<std::string> keys;
  std::vector<std::optional<std::vector<torch::Tensor>>> found;
  std::vector<std::vector<int64_t>> missing;
  std::vector<std::vector<Aside>> missing_asides;
  std::vector<int64_t> rows;
  for (size_t b = 0; b < sequences.size(); ++b) {
    std::vector<int64_t> ids = sequences[b];
    rows.push_back(std::ssize(ids) + (asides.empty() ? 0 : rows_of(asides[b])));
    const std::vector<int64_t> shape{rows.back(), model.reading_width()};
    const auto fits = [&](const torch::Tensor& state) {
      return state.sizes() == shape && state.dtype() == model.dtype();
    };
    for (const Aside& aside : asides.empty() ? std::vector<Aside>() : asides[b]) {
      ids.insert(ids.end(), {/*no id*/ -1, aside.behind});
      ids.insert(ids.end(), aside.tokens.begin(), aside.tokens.end());
    }
    keys.push_back(StateCache::key(known->second, blocks, ids));
    found.push_back(ids.empty() ? std::vector<torch::Tensor>() : states_->find(keys.back()));
    if (found.back() && !ids.empty() &&
        (found.back()->size() != blocks.size() || !std::all_of(found.back()->begin(), found.back()->end(), fits))) {
      found.back().reset();  // a file that something else wrote
    }
    if (found.back()) continue;
    missing.push_back(sequences[b]);
    if (!asides.empty()) missing_asides.push_back(asides[b]);
  }
  const auto computed =
      missing.empty() ? std::vector<torch::Tensor>() : compute_frozen_states(model, blocks, missing, missing_asides);
  std::vector<std::vector<torch::Tensor>> parts(blocks.size());
  int64_t row = 0;
  for (size_t b = 0; b < sequences.size(); ++b) {
    if (rows[b] == 0) continue;
    if (!found[b]) {
      const int64_t end = row + rows[b];
      found[b].emplace();
      for (const torch::Tensor& state : computed) found[b]->push_back(state.slice(0, row, end));
      states_->add(keys[b], *found[b]);
      row = end;
    }
    for (size_t i = 0; i < blocks.size(); ++i) parts[i].push_back((*found[b])[i].to(model.device()));
  }
  std::vector<torch::Tensor> states;
  for (const auto& part : parts) states.push_back(at::cat(part));
  return states;
}

/// Runs augmenting model m over what it reads and makes the keys and values of its connections.
std::vector<KeysValues> Composition::read(size_t m, const AlignedBatch& aligned, CompositionMemory::Stream* memory,
                                          const nn::Pass& pass) {
  const Member& member = augmenting_[m];
  models::SingleModel& model = *member.model;
  Stream& stream = streams_[m];
  const torch::Device device = facts().device;
  std::vector<int64_t> offsets{0};  // of what is read now: each sequence's tokens, then its asides
  for (const auto& coordinates : aligned.coordinates) offsets.push_back(offsets.back() + std::ssize(coordinates));
  const int64_t heads = config_.connection.num_heads;
  const torch::Tensor none =
      torch::empty({0, heads, facts().width / heads}, torch::dtype(torch::kFloat32).device(device));
  std::vector<KeysValues> result(stream.blocks.size(), KeysValues{none, none, offsets, {}});
  std::vector<int64_t> counts;  // of tokens alone
  for (const auto& tokens : aligned.tokens) counts.push_back(std::ssize(tokens));
  if (offsets.back() > 0) {
    const std::string place = fmt::format("augmenting.{}", m);
    std::vector<torch::Tensor> states;
    if (frozen_apart(pass) && !memory && !is_trained(member)) {
      states = frozen_states(member, place, stream.blocks, aligned.tokens, aligned.asides);
    } else {
      nn::Pass own = pass.sibling();
      own.place = place;
      const bool cached = memory && !model.reads_ahead();
      states = states_of(model, stream.blocks, aligned.tokens, aligned.asides, own, cached ? &memory->model : nullptr);
      if (memory && !cached) memory->model.commit(counts);
    }
    const nn::RotaryTables rope =
        rotary_tables(rope_.get(), torch::tensor(flat(aligned.coordinates), torch::kInt64).to(device));
    for (size_t c = 0; c < states.size(); ++c) {
      std::tie(result[c].k, result[c].v) = stream.connections[c]->keys_values(states[c].to(device), rope);
    }
  }
  if (!memory) return result;
  for (size_t c = 0; c < result.size(); ++c) {
    for (size_t b = 0; b + 1 < offsets.size(); ++b) {
      const int64_t begin = offsets[b], end = offsets[b + 1];
      if (end == begin && memory->connections.length(static_cast<int64_t>(b)) == 0) {
        result[c].cached.emplace_back();
        continue;
      }
      const int64_t stay = begin + counts[b];
      auto& [k, v] = result[c].cached.emplace_back(
          memory->connections.append(static_cast<int64_t>(c), static_cast<int64_t>(b),
                                     result[c].k.slice(0, begin, stay), result[c].v.slice(0, begin, stay)));
      if (stay == end) continue;
      k = at::cat({k, result[c].k.slice(0, stay, end)});
      v = at::cat({v, result[c].v.slice(0, stay, end)});
    }
  }
  memory->connections.commit(counts);
  return result;
}

namespace {

/// Weights of keys aside as weights of the tokens that came to stand in their place.
void show_in_place(const Visibility& seen, nn::ReadingRecord& record) {
  for (size_t b = 0; b < record.weights.size(); ++b) {
    const int64_t tokens = std::ssize(record.sources[b]), first = seen.query_offsets[b];
    const torch::Tensor all = record.weights[b];
    torch::Tensor& shown = record.weights[b] = all.slice(2, 0, tokens).clone();
    for (int64_t n = first; n < seen.query_offsets[b + 1]; ++n) {
      const auto [begin, end] = seen.aside[n];
      for (int64_t s = begin; s < end; ++s) {
        const int64_t place = std::min(seen.visible[n] + s - begin, tokens - 1);
        shown.select(1, n - first).select(1, place).add_(all.select(1, n - first).select(1, s));
        record.visible[n] = place + 1;
      }
    }
  }
}

}  // namespace

torch::Tensor Composition::connected(int64_t block, const torch::Tensor& h, const nn::RotaryTables& rope,
                                     const std::vector<AlignedBatch>& aligned,
                                     const std::vector<std::vector<KeysValues>>& streams, nn::Pass& pass) {
  torch::Tensor sum;
  for (size_t m = 0; m < streams_.size(); ++m) {
    const auto& pairs = config_.augmenting[m].connections;
    for (size_t c = 0; c < pairs.size(); ++c) {
      if (pairs[c].anchor != block) continue;
      Connection& connection = streams_[m].connections[c];
      const Visibility& seen = aligned[m].seen;
      const torch::Tensor y = connection->forward(h, rope, streams[m][c], seen);
      if (pass.readings != nullptr) {
        const auto norm = [](const torch::Tensor& rows) { return rows.to(torch::kFloat32).norm(2, 1); };
        nn::ReadingRecord& record = pass.readings->emplace_back(
            nn::ReadingRecord{static_cast<int64_t>(m), static_cast<int64_t>(c), norm(y) / norm(h),
                              connection->attention_weights(h, rope, streams[m][c], seen), seen.query_offsets,
                              seen.visible, aligned[m].tokens});
        if (!seen.aside.empty()) show_in_place(seen, record);
      }
      sum = sum.defined() ? sum + y : y;
    }
  }
  return sum.defined() ? h + sum : h;
}

torch::Tensor Composition::run(const models::Text& text, nn::Pass& pass, models::Memory* memory) {
  auto* remembered = static_cast<CompositionMemory*>(memory);
  for (const Stream& stream : streams_) {
    MOESAIC_CHECK(remembered == nullptr || stream.alignment->policy() != "full", UsageError,
                  "mask full: positions see the future, so a text can't be generated with it; expected causal or "
                  "prefix");
  }
  const std::vector<AlignedBatch> aligned = align(text.tokens, text.borders, remembered);
  nn::Pass own = pass;
  own.place = "anchor";
  own.training = pass.training && trains_adapters_;
  std::vector<std::vector<KeysValues>> streams;
  for (size_t m = 0; m < streams_.size(); ++m) {
    streams.push_back(read(m, aligned[m], remembered ? &remembered->streams[m] : nullptr, own));
  }

  const bool apart = frozen_apart(pass) && !remembered && attachments().empty();
  const torch::Tensor h = encoder_decoder_ != nullptr ? run_encoder_decoder(text, aligned, streams, own, remembered)
                                                      : run_decoder(text, aligned, streams, own, remembered, apart);
  if (pass.readings != nullptr) {
    std::stable_sort(pass.readings->begin(), pass.readings->end(),
                     [](const nn::ReadingRecord& a, const nn::ReadingRecord& b) {
                       return std::tie(a.source, a.connection) < std::tie(b.source, b.connection);
                     });
  }
  return h;
}

torch::Tensor Composition::run_decoder(const models::Text& text, const std::vector<AlignedBatch>& aligned,
                                       const std::vector<std::vector<KeysValues>>& streams, nn::Pass& own,
                                       CompositionMemory* memory, bool apart) {
  models::SingleModel& model = *anchor_.model;
  own.cache = memory ? &dynamic_cast<models::CacheMemory&>(*memory->anchor).cache : nullptr;
  model.prepare(text.tokens, own);
  const nn::RotaryTables rope = rotary_tables(rope_.get(), own.positions);
  auto add = [&](int64_t block, const torch::Tensor& h) { return connected(block, h, rope, aligned, streams, own); };
  own.run = [&add, inner = own.run](nn::Block& block, const torch::Tensor& h, nn::Pass& of_block) {
    return add(block.index(), inner ? inner(block, h, of_block) : block.forward(h, of_block));
  };
  const int64_t frozen = apart ? first_trained_block() - 1 : -1;
  torch::Tensor h = frozen < 0 ? model.embed(text.tokens.tokens)
                               : frozen_states(anchor_, "anchor", {frozen}, sequences_of(text.tokens), {})[0];
  h = add(frozen, h);
  if (frozen < kFinal) {
    h = model.run_blocks(h, frozen + 1, model.reading_blocks(), own);
    h = highest_anchor_block_ == kFinal ? add(kFinal, model.finish(h, {})) : model.finish(h, text.rows);
  }
  if (highest_anchor_block_ == kFinal && text.rows.defined()) h = h.index_select(0, text.rows);
  if (memory) own.cache->commit(text.tokens.counts());
  return h;
}

namespace {

/// Of each sequence what its last rows see, as many as lie between `offsets`.
Visibility seen_by_last_rows(const Visibility& seen, const std::vector<int64_t>& offsets) {
  Visibility last{.query_offsets = offsets, .visible = {}, .key_places = seen.key_places};
  for (size_t b = 0; b + 1 < offsets.size(); ++b) {
    const int64_t end = seen.query_offsets[b + 1], begin = end - (offsets[b + 1] - offsets[b]);
    auto take = [&](const auto& all, auto& rows) {
      if (!all.empty()) rows.insert(rows.end(), all.begin() + begin, all.begin() + end);
    };
    take(seen.visible, last.visible);
    take(seen.query_places, last.query_places);
    take(seen.aside, last.aside);
  }
  return last;
}

/// Lays a record of each sequence's last rows where these stand among all, whose others have read nothing.
void spread(nn::ReadingRecord& record, const std::vector<int64_t>& offsets) {
  const nn::ReadingRecord last = record;
  record.added = torch::zeros({offsets.back()}, last.added.options());
  record.visible.assign(offsets.back(), 0);
  record.query_offsets = offsets;
  for (size_t b = 0; b + 1 < offsets.size(); ++b) {
    const int64_t rows = last.query_offsets[b + 1] - last.query_offsets[b], from = last.query_offsets[b];
    const int64_t unread = offsets[b + 1] - offsets[b] - rows;
    record.added.narrow(0, offsets[b] + unread, rows).copy_(last.added.narrow(0, from, rows));
    std::copy_n(last.visible.begin() + from, rows, record.visible.begin() + offsets[b] + unread);
    record.weights[b] = at::constant_pad_nd(last.weights[b], {0, 0, unread, 0});
  }
}

}  // namespace

torch::Tensor Composition::run_encoder_decoder(const models::Text& text, const std::vector<AlignedBatch>& aligned,
                                               const std::vector<std::vector<KeysValues>>& streams, nn::Pass& own,
                                               CompositionMemory* memory) {
  std::vector<AlignedBatch> of_rows;  // of the decoder's, once they are known
  nn::RotaryTables rope;
  auto add = [&](int64_t block, const torch::Tensor& h, const nn::Pass& of_block) {
    if (of_rows.empty()) {
      of_rows = aligned;
      for (AlignedBatch& each : of_rows) each.seen = seen_by_last_rows(each.seen, of_block.offsets);
      const std::vector<int64_t>& places = of_rows.front().seen.query_places;
      rope = rotary_tables(rope_.get(), torch::tensor(places, torch::kInt64).to(facts().device));
    }
    const size_t before = own.readings != nullptr ? own.readings->size() : 0;
    const torch::Tensor sum = connected(block, h, rope, of_rows, streams, own);
    for (size_t i = before; own.readings != nullptr && i < own.readings->size(); ++i) {
      spread((*own.readings)[i], text.tokens.offsets);
    }
    return sum;
  };
  own.run = [&add, this, inner = own.run](nn::Block& block, const torch::Tensor& h, nn::Pass& of_block) {
    const int64_t index = block.index() - encoder_blocks_;
    const torch::Tensor in = index == 0 ? add(-1, h, of_block) : h;
    const torch::Tensor out = inner ? inner(block, in, of_block) : block.forward(in, of_block);
    return index < 0 ? out : add(index, out, of_block);
  };
  return encoder_decoder_->run(text, own, memory ? memory->anchor.get() : nullptr);
}

torch::Tensor Composition::prompt_states(const nn::RaggedBatch& prompts) {
  models::SingleModel& model = *anchor_.model;
  nn::Pass pass;
  model.prepare(prompts, pass);
  return model.finish(model.run_blocks(model.embed(prompts.tokens), 0, model.reading_blocks(), pass), {});
}

int64_t Composition::exact_memory() const {
  int64_t most = anchor_.model->exact_memory();
  for (const Member& member : augmenting_) {
    if (member.model->exact_memory() < INT64_MAX) most = 0;  // other tokens, of which there may be any number
  }
  return most;
}

std::unique_ptr<models::Memory> Composition::memory(int64_t sequences) const {
  const int64_t heads = config_.connection.num_heads;
  std::vector<CompositionMemory::Stream> streams;
  for (size_t m = 0; m < streams_.size(); ++m) {
    streams.push_back(
        {streams_[m].alignment, std::vector<Aligner>(sequences, Aligner(streams_[m].alignment)),
         augmenting_[m].model->make_cache(blocks_run(config_.augmenting[m], *augmenting_[m].model), sequences),
         nn::KvCache(std::ssize(streams_[m].connections), heads, facts().width / heads, sequences,
                     torch::dtype(torch::kFloat32).device(facts().device))});
  }
  return std::make_unique<CompositionMemory>(anchor_.model->memory(sequences), std::move(streams));
}

}  // namespace moesaic::compose
