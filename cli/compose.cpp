// moesaic compose: an anchor and augmenting models become a composition folder, ready to be trained.
#include <iostream>

#include "cli/command.h"
#include "moesaic/base/device.h"
#include "moesaic/base/yaml.h"
#include "moesaic/compose/folder.h"

namespace moesaic::cli {
namespace {

namespace fs = std::filesystem;

struct ComposeOptions {
  std::string file;                    // config.yaml
  std::vector<std::string> overrides;  // key=value
};

const std::vector<std::string> kKeys{
    "anchor",         "augmenting", "num_connections", "connections", "align",      "mask", "num_heads",
    "cross_position", "norm",       "attention_bias",  "output_init", "output_dir", "seed"};
const std::vector<std::string> kMemberKeys{"model", "adapter", "init", "seed"};
const std::vector<std::string> kEntryKeys{"model",           "adapter",     "init",  "seed",
                                          "num_connections", "connections", "align", "mask"};

/// A model as the file gives it.
struct MemberEntry {
  std::string model;
  compose::MemberOptions options;
};

/// One augmenting model as the file gives it: its own keys over the file's.
struct Entry {
  MemberEntry member;
  Json num_connections, connections;  // at most one is not null
  std::string align, mask;
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
  entry.mask = get_or<std::string>(own, "mask", get_or<std::string>(shared, "mask", "causal", where), where);
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
  for (const Json& pair : entry.connections) {
    MOESAIC_CHECK(pair.is_object(), UsageError, "{}: connections: got {}, expected {{anchor: block, aug: block}}",
                  where, pair.dump().substr(0, 80));
    check_known_keys(pair, {"anchor", "aug"}, where + ": connections");
    pairs.push_back({get<int64_t>(pair, "anchor", where), get<int64_t>(pair, "aug", where)});
  }
  return pairs;
}

std::string describe(const MemberEntry& entry, const models::DecoderConfig& config) {
  std::string text = fmt::format("{} ({}, {} blocks of width {}", entry.model, config.model_type, config.num_layers,
                                 config.hidden_size);
  if (entry.options.random_seed) text += fmt::format(", random numbers of seed {}", *entry.options.random_seed);
  if (!entry.options.adapter.empty()) text += ", adapter " + entry.options.adapter.string();
  return text + ")";
}

int run(const ComposeOptions& options, const CommonOptions& common) {
  Json json = read_yaml(options.file);
  apply_overrides(json, options.overrides);
  const std::string& where = options.file;
  MOESAIC_CHECK(json.is_object(), UsageError, "{}: got {}, expected keys and values", where, json.type_name());
  check_known_keys(json, kKeys, where);
  for (auto it = json.begin(); it != json.end();) it = it->is_null() ? json.erase(it) : std::next(it);

  const c10::Device device = parse_device(common.device);
  const models::LoadOptions load{number_format(common.dtype, device).dtype, device, false};
  auto config_of = [](const formats::Checkpoint& checkpoint) {
    return models::parse_decoder_config(checkpoint.config(), checkpoint.path().string());
  };
  try {
    const auto seed = get_or<uint64_t>(json, "seed", common.seed, where);
    const Json& list = json.contains("augmenting") ? json["augmenting"] : Json();
    MOESAIC_CHECK(!list.is_null(), UsageError, "{}: key 'augmenting' is missing", where);
    std::vector<Entry> entries;
    for (size_t m = 0; m < (list.is_array() ? list.size() : 1); ++m) {
      entries.push_back(
          parse_entry(list.is_array() ? list[m] : list, json, seed, fmt::format("{}: augmenting[{}]", where, m)));
    }
    const fs::path output_dir = get<std::string>(json, "output_dir", where);
    MOESAIC_CHECK(!fs::exists(output_dir / "run.yaml"), UsageError,
                  "{}: output_dir {}: got the folder of a training run, expected another: its numbers would be lost",
                  where, output_dir.string());
    const std::string anchor_where = where + ": anchor";
    MOESAIC_CHECK(json.contains("anchor"), UsageError, "{}: key 'anchor' is missing", where);
    const MemberEntry anchor_entry =
        parse_member(member_keys(json["anchor"], kMemberKeys, anchor_where), json, seed, anchor_where);
    const compose::Member anchor =
        compose::open_member(formats::Checkpoint::open(anchor_entry.model), load, anchor_entry.options);
    const models::DecoderConfig& anchor_config = anchor.model->config();
    std::vector<compose::Member> augmenting;
    std::vector<models::DecoderConfig> aug_configs;
    compose::CompositionConfig config;
    for (size_t m = 0; m < entries.size(); ++m) {
      const auto checkpoint = formats::Checkpoint::open(entries[m].member.model);
      aug_configs.push_back(config_of(*checkpoint));
      config.augmenting.push_back({pairs_of(entries[m], anchor_config.num_layers, aug_configs[m].num_layers,
                                            fmt::format("{}: augmenting[{}]", where, m)),
                                   entries[m].align, entries[m].mask});
      compose::MemberOptions options = entries[m].member.options;
      options.num_blocks = compose::num_blocks(config.augmenting[m]);
      augmenting.push_back(compose::open_member(checkpoint, load, options));
    }
    compose::ConnectionConfig& connection = config.connection;
    connection.num_heads = get_or<int64_t>(json, "num_heads", compose::default_heads(anchor_config), where);
    connection.cross_position = get_or<std::string>(json, "cross_position", connection.cross_position, where);
    connection.norm = get_or<std::string>(json, "norm", connection.norm, where);
    connection.attention_bias = get_or<bool>(json, "attention_bias", connection.attention_bias, where);
    connection.output_init = get_or<std::string>(json, "output_init", connection.output_init, where);
    compose::validate(config, anchor_config, aug_configs, where);

    const compose::Composition composition(config, anchor, augmenting, seed);
    compose::save_composition(composition, output_dir);
    int64_t anchor_parameters = 0, trainable = 0;
    for (const auto& parameter : anchor.model->parameters()) anchor_parameters += parameter.numel();
    for (const auto& parameter : composition.parameters()) trainable += parameter.numel();
    fmt::print("anchor      {}\n", describe(anchor_entry, anchor_config));
    for (size_t m = 0; m < entries.size(); ++m) {
      const bool same = anchor.tokenizer && augmenting[m].tokenizer &&
                        compose::same_tokenizer(*anchor.tokenizer, *augmenting[m].tokenizer);
      fmt::print("augmenting  {}, {}, mask {}\n", describe(entries[m].member, aug_configs[m]),
                 same ? "the same tokenizer" : "another tokenizer, aligned by " + entries[m].align, entries[m].mask);
      for (const compose::ConnectionPair& pair : config.augmenting[m].connections) {
        fmt::print("            block {} -> anchor block {}\n", pair.aug, pair.anchor);
      }
    }
    fmt::print("trainable   {} ({:.2f} % of the anchor's {})\n", trainable,
               100.0 * static_cast<double>(trainable) / static_cast<double>(anchor_parameters), anchor_parameters);
    const bool shows_future = std::any_of(config.augmenting.begin(), config.augmenting.end(),
                                          [](const auto& entry) { return entry.mask == "full"; });
    fmt::print("written     {0}; {1}\n", output_dir.string(),
               shows_future ? "mask full shows the future: it can be neither trained nor generated with"
                            : fmt::format("it is the anchor until it is trained:\n"
                                          "  moesaic train run.yaml model_name_or_path={} finetuning_type=calm",
                                          output_dir.string()));
  } catch (const ConfigError& error) {
    throw UsageError(error.what());  // the keys are the user's words
  }
  return 0;
}

}  // namespace

Runner add_compose(CLI::App& app, CommonOptions& common) {
  auto options = std::make_shared<ComposeOptions>();
  app.add_option("config", options->file, "What to compose (YAML)")->required();
  app.add_option("overrides", options->overrides, "key=value: sets a key of the file");
  return [options, &common] { return run(*options, common); };
}

}  // namespace moesaic::cli
