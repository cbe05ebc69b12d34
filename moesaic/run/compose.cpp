#include "moesaic/run/compose.h"

#include "moesaic/base/check.h"
#include "moesaic/base/output_folder.h"
#include "moesaic/base/yaml.h"
#include "moesaic/compose/folder.h"
#include "moesaic/formats/finite.h"
#include "moesaic/models/registry.h"

namespace moesaic::run {
namespace {

namespace fs = std::filesystem;

const std::vector<std::string> kKeys{"anchor",         "augmenting",  "num_connections", "connections", "align",
                                     "mask",           "num_heads",   "cross_position",  "norm",        "output_scale",
                                     "attention_bias", "output_init", "output_dir",      "seed"};
const std::vector<std::string> kMemberKeys{"model", "adapter", "init", "seed"};
const std::vector<std::string> kEntryKeys{"model",           "adapter",     "init",  "seed",
                                          "num_connections", "connections", "align", "mask"};

/// A model as the keys give it.
struct MemberEntry {
  std::string model;
  compose::MemberOptions options;
};

/// One augmenting model: its own keys over those of all.
struct Entry {
  MemberEntry member;
  Json num_connections, connections;  // at most one is not null
  std::string align, mask;            // "": what the model takes
};

/// A folder, or keys and values.
Json member_keys(const Json& json, const std::vector<std::string>& known, const std::string& where) {
  Json own = json.is_string() ? Json{{"model", json}} : json;
  MOESAIC_CHECK(own.is_object(), UsageError, "{}: got {}, expected a folder or keys and values", where,
                json.dump().substr(0, 80));
  check_known_keys(own, known, where);
  return own;
}

MemberEntry parse_member(const Json& own, const Json& shared, uint64_t seed, const std::string& where) {
  MemberEntry entry{get<std::string>(own, "model", where), {}};
  const auto init = get_or<std::string>(own, "init", "pretrained", where);
  MOESAIC_CHECK(init == "pretrained" || init == "random", UsageError,
                "{}: init: got '{}', expected pretrained or random", where, init);
  const auto own_seed = get_or<uint64_t>(own, "seed", get_or<uint64_t>(shared, "seed", seed, where), where);
  if (init == "random") entry.options.random_seed = own_seed;
  entry.options.adapter = get_or<std::string>(own, "adapter", "", where);
  return entry;
}

Entry parse_entry(const Json& json, const Json& shared, uint64_t seed, const std::string& where) {
  const Json own = member_keys(json, kEntryKeys, where);
  Entry entry;
  entry.member = parse_member(own, shared, seed, where);
  const Json& joins = own.contains("num_connections") || own.contains("connections") ? own : shared;
  entry.num_connections = joins.value("num_connections", Json());
  entry.connections = joins.value("connections", Json());
  MOESAIC_CHECK(entry.num_connections.is_null() || entry.connections.is_null(), UsageError,
                "{}: got both num_connections and connections, expected one of them", where);
  entry.align = get_or<std::string>(own, "align", get_or<std::string>(shared, "align", "word", where), where);
  entry.mask = get_or<std::string>(own, "mask", get_or<std::string>(shared, "mask", "", where), where);
  return entry;
}

std::vector<compose::ConnectionPair> pairs_of(const Entry& entry, int64_t anchor_layers, int64_t aug_layers,
                                              const std::string& where) {
  if (entry.connections.is_null()) {
    // The paper takes every fourth block of the augmenting model.
    int64_t count = std::clamp<int64_t>(aug_layers / 4, 1, anchor_layers);
    if (!entry.num_connections.is_null()) {
      count = get<int64_t>(Json{{"num_connections", entry.num_connections}}, "num_connections", where);
    }
    try {
      return compose::evenly_spaced(count, anchor_layers, aug_layers);
    } catch (const ConfigError& error) {
      throw UsageError(fmt::format("{}: {}", where, error.what()));
    }
  }
  MOESAIC_CHECK(entry.connections.is_array(), UsageError,
                "{}: connections: got {}, expected a list of {{anchor: block, "
                "aug: block}}",
                where, entry.connections.dump().substr(0, 80));
  std::vector<compose::ConnectionPair> pairs;
  for (const Json& pair : entry.connections) pairs.push_back(compose::parse_pair(pair, where));
  return pairs;
}

std::string describe(const MemberEntry& entry, const models::SingleModel& model) {
  std::string text = fmt::format("{} ({}, {} blocks of width {}", entry.model, model.facts().model_type,
                                 model.reading_blocks(), model.reading_width());
  if (entry.options.random_seed) text += fmt::format(", random numbers of seed {}", *entry.options.random_seed);
  if (!entry.options.adapter.empty()) text += ", adapter " + entry.options.adapter.string();
  return text + ")";
}

/// The anchor and the augmenting models with their keys, before anything is opened.
struct Request {
  MemberEntry anchor;
  std::vector<Entry> augmenting;
  fs::path output_dir;
  uint64_t seed;
};

Request parse_request(const Json& json, const std::string& where, uint64_t seed) {
  Request request;
  request.seed = get_or<uint64_t>(json, "seed", seed, where);
  MOESAIC_CHECK(json.contains("augmenting"), UsageError, "{}: key 'augmenting' is missing", where);
  const Json& list = json["augmenting"];
  for (size_t m = 0; m < (list.is_array() ? list.size() : 1); ++m) {
    request.augmenting.push_back(
        parse_entry(list.is_array() ? list[m] : list, json, request.seed, fmt::format("{}: augmenting[{}]", where, m)));
  }
  request.output_dir = get<std::string>(json, "output_dir", where);
  MOESAIC_CHECK(json.contains("anchor"), UsageError, "{}: key 'anchor' is missing", where);
  const std::string anchor_where = where + ": anchor";
  request.anchor =
      parse_member(member_keys(json["anchor"], kMemberKeys, anchor_where), json, request.seed, anchor_where);
  std::vector<fs::path> inputs{request.anchor.model, request.anchor.options.adapter};
  for (const Entry& entry : request.augmenting) {
    inputs.insert(inputs.end(), {entry.member.model, entry.member.options.adapter});
  }
  check_new_folder(request.output_dir, inputs);
  return request;
}

compose::ConnectionConfig parse_connection(const Json& json, const compose::Anchor& anchor, const std::string& where) {
  compose::ConnectionConfig connection;
  connection.num_heads = get_or<int64_t>(json, "num_heads", compose::default_heads(anchor), where);
  connection.cross_position = get_or<std::string>(json, "cross_position", connection.cross_position, where);
  connection.norm = get_or<std::string>(json, "norm", connection.norm, where);
  connection.output_scale = get_or<double>(json, "output_scale", connection.output_scale, where);
  connection.attention_bias = get_or<bool>(json, "attention_bias", connection.attention_bias, where);
  connection.output_init = get_or<std::string>(json, "output_init", connection.output_init, where);
  return connection;
}

void check_member(const compose::Member& member) {
  formats::TensorMap weights;
  for (const auto& item : member.model->named_parameters()) weights[item.key()] = item.value();
  formats::check_finite(weights, std::nullopt, member.checkpoint->path().string());
}

Plan plan_of(const Request& request, const compose::Composition& composition) {
  Plan plan;
  const compose::Member& anchor = composition.anchor_member();
  plan.add("anchor", describe(request.anchor, *anchor.model));
  bool shows_future = false;
  for (size_t m = 0; m < request.augmenting.size(); ++m) {
    const Entry& entry = request.augmenting[m];
    const compose::Member& member = composition.augmenting()[m];
    const bool same =
        anchor.tokenizer && member.tokenizer && compose::same_tokenizer(*anchor.tokenizer, *member.tokenizer);
    plan.add("augmenting", fmt::format("{}, {}, mask {}", describe(entry.member, *member.model),
                                       same ? "the same tokenizer" : "another tokenizer, aligned by " + entry.align,
                                       composition.config().augmenting[m].mask));
    for (const compose::ConnectionPair& pair : composition.config().augmenting[m].connections) {
      auto name = [](int64_t place) {
        return place == compose::kFinal ? std::string("final state") : fmt::format("block {}", place);
      };
      plan.add("", fmt::format("{} -> anchor {}{}", name(pair.aug), name(pair.anchor),
                               pair.newest ? ", the newest alone" : ""));
    }
    shows_future = shows_future || composition.config().augmenting[m].mask == "full";
  }
  int64_t anchor_parameters = 0, trainable = 0;
  for (const auto& parameter : anchor.model->parameters()) anchor_parameters += parameter.numel();
  for (const auto& parameter : composition.parameters()) trainable += parameter.numel();
  plan.add("trainable", fmt::format("{} ({:.2f} % of the anchor's {})", trainable,
                                    100.0 * static_cast<double>(trainable) / static_cast<double>(anchor_parameters),
                                    anchor_parameters));
  plan.add("written",
           fmt::format("{0}; {1}", request.output_dir.string(),
                       shows_future ? "mask full shows the future: it can be neither trained nor generated with"
                                    : fmt::format("it is the anchor until it is trained:\n"
                                                  "  moesaic train run.yaml model_name_or_path={} finetuning_type=calm",
                                                  request.output_dir.string())));
  return plan;
}

}  // namespace

Plan compose_models(const Json& keys, const std::string& where, uint64_t seed, const models::LoadOptions& load) {
  MOESAIC_CHECK(keys.is_object(), UsageError, "{}: got {}, expected keys and values", where, keys.type_name());
  check_known_keys(keys, kKeys, where);
  Json json = keys;
  for (auto it = json.begin(); it != json.end();) it = it->is_null() ? json.erase(it) : std::next(it);
  try {
    const Request request = parse_request(json, where, seed);
    const auto anchor_checkpoint = models::open_checkpoint(request.anchor.model);
    const compose::Anchor anchor_config =
        compose::anchor_of(anchor_checkpoint->config(), anchor_checkpoint->path().string());
    const compose::Member anchor = compose::open_member(anchor_checkpoint, load, request.anchor.options);
    compose::CompositionConfig config;
    config.connection = parse_connection(json, anchor_config, where);
    std::vector<compose::Member> augmenting;
    std::vector<compose::Reader> readers;
    for (size_t m = 0; m < request.augmenting.size(); ++m) {
      const Entry& entry = request.augmenting[m];
      const auto checkpoint = models::open_checkpoint(entry.member.model);
      readers.push_back(compose::reader_of(checkpoint->config(), checkpoint->path().string()));
      const char* mask = readers[m].ahead ? "prefix" : "causal";
      config.augmenting.push_back(
          {pairs_of(entry, anchor_config.blocks, readers[m].blocks, fmt::format("{}: augmenting[{}]", where, m)),
           entry.align, entry.mask.empty() ? mask : entry.mask});
      compose::MemberOptions options = entry.member.options;
      options.num_blocks = compose::num_blocks(config.augmenting[m]);
      augmenting.push_back(compose::open_member(checkpoint, load, options));
    }
    compose::validate(config, anchor_config, readers, where);
    const compose::Composition composition(config, anchor, augmenting, request.seed);
    check_member(composition.anchor_member());
    for (const compose::Member& member : composition.augmenting()) check_member(member);
    compose::save_composition(composition, request.output_dir);
    return plan_of(request, composition);
  } catch (const ConfigError& error) {
    throw UsageError(error.what());  // the keys are the user's words
  }
}

}  // namespace moesaic::run
