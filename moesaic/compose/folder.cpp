#include "moesaic/compose/folder.h"

#include "moesaic/base/check.h"
#include "moesaic/base/device.h"
#include "moesaic/base/file_errors.h"
#include "moesaic/base/sha256.h"
#include "moesaic/formats/claim.h"
#include "moesaic/models/registry.h"

namespace moesaic::compose {
namespace {

namespace fs = std::filesystem;
constexpr const char* kConfigName = "calm_config.json";
constexpr const char* kTensorsName = "calm_model.safetensors";
const std::string kAdaptersName = "adapters";
const std::vector<std::string> kReferenceKeys{"model", "fingerprint", "tokenizer", "dtype", "random_seed", "adapter"};

/// What calm_config.json says of one model.
struct Reference {
  fs::path path;
  std::string fingerprint, tokenizer;
  MemberOptions options;
};

struct FolderConfig {
  CompositionConfig composition;
  Reference anchor;
  std::vector<Reference> augmenting;
};

std::string tokenizer_hash(const formats::Checkpoint& checkpoint) {
  const auto json = checkpoint.tokenizer_json();
  return json ? "sha256:" + sha256_hex(*json) : "";
}

/// `model` as seen from `dir`. Links to either folder are followed, a link that is the model is not: its name says what
/// kind of file it is.
fs::path relative_to(const fs::path& dir, const fs::path& model) {
  fs::path path = fs::absolute(model);
  if (!path.has_filename()) path = path.parent_path();  // "models/a/"
  return fs::proximate(path.parent_path(), fs::absolute(dir)) / path.filename();
}

Json reference_json(const Member& member, const std::string& place, const fs::path& dir) {
  MOESAIC_CHECK(member.checkpoint, DataError, "{}: a model of the composition has no file to refer to", dir.string());
  const formats::Checkpoint& checkpoint = *member.checkpoint;
  Json json{{"model", relative_to(dir, checkpoint.path()).lexically_normal().string()},
            {"fingerprint", checkpoint.fingerprint()},
            {"tokenizer", tokenizer_hash(checkpoint)},
            {"dtype", dtype_name(member.model->dtype())}};
  if (member.random_seed) json["random_seed"] = *member.random_seed;
  if (member.adapter) json["adapter"] = kAdaptersName + ("/" + place);
  return json;
}

void refuse_unknown_keys(const Json& json, const std::vector<std::string>& known, const std::string& where) {
  std::vector<std::string> unknown;
  for (const auto& [key, value] : json.items()) {
    if (std::find(known.begin(), known.end(), key) == known.end()) unknown.push_back(key);
  }
  MOESAIC_CHECK(unknown.empty(), ConfigError, "{}: unknown keys {}; expected {}", where, fmt::join(unknown, ", "),
                fmt::join(known, ", "));
}

Reference parse_reference(const Json& json, const fs::path& dir, const std::string& where,
                          const std::vector<std::string>& more_keys) {
  MOESAIC_CHECK(json.is_object(), ConfigError, "{}: got {}, expected keys and values", where,
                json.dump().substr(0, 80));
  std::vector<std::string> keys = kReferenceKeys;
  keys.insert(keys.end(), more_keys.begin(), more_keys.end());
  refuse_unknown_keys(json, keys, where);
  Reference reference;
  reference.path = get<std::string>(json, "model", where);
  if (reference.path.is_relative()) reference.path = fs::canonical(dir) / reference.path;
  reference.path = reference.path.lexically_normal();
  reference.fingerprint = get<std::string>(json, "fingerprint", where);
  reference.tokenizer = get<std::string>(json, "tokenizer", where);
  if (json.contains("random_seed")) reference.options.random_seed = get<uint64_t>(json, "random_seed", where);
  if (json.contains("adapter")) reference.options.adapter = dir / get<std::string>(json, "adapter", where);
  return reference;
}

FolderConfig parse_folder_config(const Json& json, const fs::path& dir) {
  const std::string where = (dir / kConfigName).string();
  MOESAIC_CHECK(json.is_object() && json.value("type", Json()) == "calm" && json.value("version", Json()) == 1,
                ConfigError, "{}: got type {} and version {}, expected \"calm\" and 1", where,
                json.is_object() ? json.value("type", Json()).dump() : "none",
                json.is_object() ? json.value("version", Json()).dump() : "none");
  refuse_unknown_keys(json,
                      {"type", "version", "anchor", "augmenting", "num_heads", "cross_position", "norm", "output_scale",
                       "attention_bias"},
                      where);
  FolderConfig config;
  ConnectionConfig& connection = config.composition.connection;
  connection.num_heads = get<int64_t>(json, "num_heads", where);
  connection.cross_position = get<std::string>(json, "cross_position", where);
  connection.norm = get<std::string>(json, "norm", where);
  connection.output_scale = get_or<double>(json, "output_scale", 0.0, where);  // younger than the others
  connection.attention_bias = get<bool>(json, "attention_bias", where);
  config.anchor = parse_reference(get<Json>(json, "anchor", where), dir, where + ": anchor", {});
  const Json list = get<Json>(json, "augmenting", where);
  MOESAIC_CHECK(list.is_array(), ConfigError, "{}: key 'augmenting': got {}, expected a list", where,
                list.dump().substr(0, 80));
  for (size_t m = 0; m < list.size(); ++m) {
    const std::string entry_where = fmt::format("{}: augmenting[{}]", where, m);
    config.augmenting.push_back(parse_reference(list[m], dir, entry_where, {"connections", "align", "mask"}));
    AugmentingConfig entry;
    entry.align = get<std::string>(list[m], "align", entry_where);
    entry.mask = get<std::string>(list[m], "mask", entry_where);
    const Json pairs = get<Json>(list[m], "connections", entry_where);
    MOESAIC_CHECK(pairs.is_array(), ConfigError, "{}: connections: got {}, expected a list", entry_where,
                  pairs.dump().substr(0, 80));
    for (const Json& pair : pairs) entry.connections.push_back(parse_pair(pair, entry_where));
    config.augmenting.back().options.num_blocks = num_blocks(entry);
    config.composition.augmenting.push_back(std::move(entry));
  }
  return config;
}

/// The checkpoint of `reference`, or nullptr with what is wrong about it added to `problems`.
std::shared_ptr<formats::Checkpoint> open_reference(const Reference& reference, const std::string& role,
                                                    std::vector<std::string>& problems) {
  std::error_code ignored;
  if (!fs::exists(reference.path, ignored)) {
    problems.push_back(fmt::format("{}: {} does not exist; put the model back or correct its path in {}", role,
                                   reference.path.string(), kConfigName));
    return nullptr;
  }
  std::shared_ptr<formats::Checkpoint> checkpoint;
  try {
    checkpoint = models::open_checkpoint(reference.path);
  } catch (const DataError& error) {
    problems.push_back(fmt::format("{}: {}", role, error.what()));
    return nullptr;
  }
  auto compare = [&](const char* what, const std::string& got, const std::string& expected) {
    if (got == expected) return;
    problems.push_back(fmt::format(
        "{}: the {} of {} is not the one the connections were trained on: got {}, expected {}; put that model back, "
        "or compose and train anew",
        role, what, reference.path.string(), got.empty() ? "none" : got, expected.empty() ? "none" : expected));
  };
  if (const std::string fingerprint = checkpoint->fingerprint();
      !formats::may_be_same_weights(fingerprint, reference.fingerprint)) {
    compare("weights' hash", fingerprint, reference.fingerprint);
  }
  compare("tokenizer's hash", tokenizer_hash(*checkpoint), reference.tokenizer);
  const fs::path& adapter = reference.options.adapter;
  if (!adapter.empty() && !fs::exists(adapter / "adapter_config.json", ignored)) {
    problems.push_back(fmt::format("{}: its adapter {} does not exist; put the folder back", role, adapter.string()));
  }
  return checkpoint;
}

/// Adds to `problems` what of the connections' file does not fit.
void check_tensors(const formats::SafetensorsFile& file, const formats::Declarations& expected,
                   std::vector<std::string>& problems) {
  const formats::Misfits found = formats::misfits(expected, formats::declarations(file));
  if (!found.empty()) problems.push_back(std::string(kTensorsName) + ":" + found.text());
}

void throw_problems(const fs::path& dir, const std::vector<std::string>& problems) {
  MOESAIC_CHECK(problems.empty(), DataError, "{}: the composition does not fit:\n  {}", dir.string(),
                fmt::join(problems, "\n  "));
}

/// What a folder keeps of connections: what is trained of them, and what they know of their inputs.
formats::TensorMap tensors_of(const torch::nn::Module& connections) {
  formats::TensorMap tensors;
  for (const auto& item : connections.named_parameters()) tensors[item.key()] = item.value().detach();
  for (const auto& item : connections.named_buffers()) tensors[item.key()] = item.value();
  return tensors;
}

void copy_tensors(Composition& composition, const formats::SafetensorsFile& file) {
  torch::NoGradGuard no_grad;
  for (auto& [name, tensor] : tensors_of(composition)) tensor.copy_(file.tensor(name));
}

}  // namespace

bool is_composition(const fs::path& path) {
  std::error_code ignored;
  return fs::exists(path / kConfigName, ignored);
}

Member open_member(const std::shared_ptr<formats::Checkpoint>& checkpoint, const models::LoadOptions& load,
                   const MemberOptions& options) {
  Member member;
  member.checkpoint = checkpoint;
  member.random_seed = options.random_seed;
  if (checkpoint->tokenizer_json()) member.tokenizer = tokenizer::Tokenizer::open(*checkpoint);
  models::LoadOptions wanted = load;
  if (options.adapter.empty() && !options.random_seed) wanted.num_blocks = options.num_blocks;
  member.model = models::load_model(*checkpoint, wanted);
  member.model->eval();
  if (options.random_seed) member.model->initialize(*options.random_seed);
  if (options.adapter.empty()) return member;
  const int64_t vocabulary = member.model->facts().vocab_size;
  member.adapter =
      adapters::Adapter::open(options.adapter, member.model->sites(), load.device, checkpoint->fingerprint());
  MOESAIC_CHECK(member.model->facts().vocab_size == vocabulary, DataError,
                "{}: got a vocabulary of {}, expected {}: a composition reads the tokens of its models\nhint: `moesaic "
                "merge` the adapter into its base and compose that",
                options.adapter.string(), member.model->facts().vocab_size, vocabulary);
  MOESAIC_CHECK(member.adapter->config().router.input != "sentence", DataError,
                "{}: its router reads sentence embeddings, which the models of a composition are not given; expected "
                "an adapter that routes by token",
                options.adapter.string());
  return member;
}

void save_composition(const Composition& composition, const fs::path& dir) {
  std::error_code error;
  MOESAIC_CHECK(!fs::exists(dir / "config.json", error), UsageError,
                "{}: got a folder that holds a model, expected another for the composition", dir.string());
  fs::create_directories(dir, error);
  MOESAIC_CHECK(!error, DataError, "{}: the folder can't be made: {}", dir.string(), refusal(error.value()));
  const CompositionConfig& config = composition.config();
  Json json{{"type", "calm"},
            {"version", 1},
            {"anchor", reference_json(composition.anchor_member(), "anchor", dir)},
            {"augmenting", Json::array()},
            {"num_heads", config.connection.num_heads},
            {"cross_position", config.connection.cross_position},
            {"norm", config.connection.norm},
            {"output_scale", config.connection.output_scale},
            {"attention_bias", config.connection.attention_bias}};
  for (size_t m = 0; m < config.augmenting.size(); ++m) {
    Json entry = reference_json(composition.augmenting()[m], fmt::format("augmenting.{}", m), dir);
    entry["align"] = config.augmenting[m].align;
    entry["mask"] = config.augmenting[m].mask;
    entry["connections"] = Json::array();
    for (const ConnectionPair& pair : config.augmenting[m].connections) {
      entry["connections"].push_back(Json(pair_json(pair)));
    }
    json["augmenting"].push_back(std::move(entry));
  }
  formats::TensorMap tensors = tensors_of(composition);
  for (auto& [name, tensor] : tensors) tensor = tensor.to(torch::kCPU);
  formats::save_safetensors(dir / kTensorsName, tensors);
  for (const auto& [place, adapter] : composition.adapters()) adapter->save(dir / kAdaptersName / place);
  write_file_atomically(dir / kConfigName, json.dump(2) + "\n");
}

std::shared_ptr<Composition> load_composition(const fs::path& dir, const models::LoadOptions& options) {
  MOESAIC_CHECK(is_composition(dir), DataError, "{}: has no {}; expected a folder that `moesaic compose` made",
                dir.string(), kConfigName);
  const FolderConfig config = parse_folder_config(read_json(dir / kConfigName), dir);
  std::vector<std::string> problems;
  std::vector<std::shared_ptr<formats::Checkpoint>> checkpoints{open_reference(config.anchor, "anchor", problems)};
  for (size_t m = 0; m < config.augmenting.size(); ++m) {
    checkpoints.push_back(open_reference(config.augmenting[m], fmt::format("augmenting[{}]", m), problems));
  }
  // The shapes of the connections follow from the models' widths.
  if (std::find(checkpoints.begin(), checkpoints.end(), nullptr) != checkpoints.end()) throw_problems(dir, problems);
  const Anchor anchor = anchor_of(checkpoints[0]->config(), checkpoints[0]->path().string());
  std::vector<Reader> readers;
  for (size_t m = 0; m < config.augmenting.size(); ++m) {
    readers.push_back(reader_of(checkpoints[m + 1]->config(), checkpoints[m + 1]->path().string()));
  }
  try {
    validate(config.composition, anchor, readers, (dir / kConfigName).string());
  } catch (const ConfigError& error) {
    if (problems.empty()) throw;
    problems.push_back(error.what());  // of another model than the one that was replaced
    throw_problems(dir, problems);
  }
  formats::Declarations shapes;
  int64_t k = 0;
  for (size_t m = 0; m < config.augmenting.size(); ++m) {
    for (size_t c = 0; c < config.composition.augmenting[m].connections.size(); ++c, ++k) {
      const ConnectionImpl connection(config.composition.connection,
                                      config.composition.augmenting[m].connections[c].newest, readers[m].width,
                                      anchor.width, torch::TensorOptions(torch::kMeta).dtype(torch::kFloat32));
      for (const auto& [name, tensor] : tensors_of(connection)) {
        shapes[fmt::format("connections.{}.{}", k, name)] = {tensor.sizes().vec()};
      }
    }
  }
  if (!formats::is_there(dir / kTensorsName)) {
    problems.push_back(fmt::format("{} is missing; put it back, or compose and train anew", kTensorsName));
    throw_problems(dir, problems);
  }
  const formats::SafetensorsFile file(dir / kTensorsName);
  check_tensors(file, shapes, problems);
  throw_problems(dir, problems);

  std::vector<Member> members;
  members.push_back(open_member(checkpoints[0], options, config.anchor.options));
  for (size_t m = 0; m < config.augmenting.size(); ++m) {
    members.push_back(open_member(checkpoints[m + 1], options, config.augmenting[m].options));
  }
  auto composition = std::make_shared<Composition>(config.composition, members[0],
                                                   std::vector<Member>(members.begin() + 1, members.end()), /*seed=*/0);
  copy_tensors(*composition, file);
  return composition;
}

Connections::Connections(std::shared_ptr<Composition> composition, bool train_adapters)
    : composition_(std::move(composition)) {
  std::vector<std::string> wrong;
  for (size_t m = 0; m < composition_->augmenting().size(); ++m) {
    const AugmentingConfig& entry = composition_->config().augmenting[m];
    if (entry.mask == "full") {
      wrong.push_back("mask full shows every position the token it shall predict; expected causal or prefix");
    }
    if (train_adapters && composition_->augmenting()[m].adapter && entry.align == "text") {
      wrong.push_back(
          fmt::format("train_adapters: augmenting[{}] carries an adapter and has align text, which reads what "
                      "is spelt anew without a graph; expected word, token or mixed",
                      m));
    }
  }
  if (train_adapters && composition_->adapters().empty()) {
    wrong.push_back("train_adapters: none of its models carries an adapter");
  }
  for (const auto& [place, adapter] : composition_->adapters()) {
    if (train_adapters && adapter->config().use_dora) {
      wrong.push_back(fmt::format("train_adapters: {} carries a DoRA adapter, which is used, not trained", place));
    }
  }
  MOESAIC_CHECK(wrong.empty(), UsageError, "a composition can't be trained so: {}", fmt::join(wrong, "; "));
  composition_->train_adapters(train_adapters);
  composition_->train();
}

std::vector<nn::Parameter> Connections::parameters() {
  using Kind = nn::Parameter::Kind;
  std::vector<nn::Parameter> all;
  for (const auto& item : composition_->named_parameters()) {
    all.push_back({item.key(), item.value(), item.value().dim() == 2 ? Kind::kMatrix : Kind::kVector});
  }
  if (!composition_->trains_adapters()) return all;
  for (const auto& [place, adapter] : composition_->adapters()) {
    for (nn::Parameter& parameter : adapter->parameters()) {
      parameter.name = place + "." + parameter.name;
      all.push_back(std::move(parameter));
    }
  }
  return all;
}

void Connections::load(const fs::path& dir) {
  Composition& composition = *composition_;
  formats::Declarations shapes;
  for (const auto& [name, tensor] : tensors_of(composition)) shapes[name] = {tensor.sizes().vec()};
  std::vector<std::string> problems;
  const FolderConfig saved = parse_folder_config(read_json(dir / kConfigName), dir);
  auto compare = [&](const std::string& place, const Reference& reference, const Member& member) {
    const std::string fingerprint = member.checkpoint ? member.checkpoint->fingerprint() : "";
    if (!formats::may_be_same_weights(reference.fingerprint, fingerprint)) {
      problems.push_back(fmt::format("{}: got numbers trained on other weights ({}), expected {}", place,
                                     reference.fingerprint, fingerprint));
    }
  };
  compare("anchor", saved.anchor, composition.anchor_member());
  for (size_t m = 0; m < std::min(saved.augmenting.size(), composition.augmenting().size()); ++m) {
    compare(fmt::format("augmenting[{}]", m), saved.augmenting[m], composition.augmenting()[m]);
  }
  const formats::SafetensorsFile file(dir / kTensorsName);
  check_tensors(file, shapes, problems);
  throw_problems(dir, problems);
  copy_tensors(composition, file);
  if (!composition.trains_adapters()) return;
  for (const auto& [place, adapter] : composition.adapters()) {
    adapter->load_tensors(formats::read_adapter_folder(dir / kAdaptersName / place).tensors);
  }
}

}  // namespace moesaic::compose
