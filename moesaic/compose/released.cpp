#include "moesaic/compose/released.h"

#include "moesaic/base/check.h"
#include "moesaic/compose/folder.h"
#include "moesaic/formats/claim.h"
#include "moesaic/formats/torch_file.h"
#include "moesaic/models/registry.h"

namespace moesaic::compose {
namespace {

namespace fs = std::filesystem;
using formats::TensorMap;
constexpr size_t kMaxListed = 20;
constexpr int64_t kMaxConnections = 10'000;

void throw_problems(const fs::path& dir, std::vector<std::string> problems) {
  if (problems.empty()) return;
  const size_t count = problems.size();
  if (count > kMaxListed) {
    problems.resize(kMaxListed);
    problems.push_back(fmt::format("... and {} more", count - kMaxListed));
  }
  throw DataError(fmt::format("{}: can't be converted:\n  {}", dir.string(), fmt::join(problems, "\n  ")));
}

void add_safetensors(const fs::path& path, TensorMap& tensors) {
  const formats::SafetensorsFile file(path);
  for (const std::string& name : file.names()) tensors.emplace(name, file.tensor(name));
}

/// The checkpoint's tensors, views of its mapped files.
TensorMap read_tensors(const fs::path& dir) {
  TensorMap tensors;
  for (const char* name : {"model.safetensors", "pytorch_model.bin"}) {
    const bool pickle = std::string_view(name).ends_with(".bin");
    if (formats::is_there(dir / name)) {
      pickle ? void(tensors = formats::read_torch_file(dir / name)) : add_safetensors(dir / name, tensors);
      return tensors;
    }
    const fs::path index = dir / (std::string(name) + ".index.json");
    if (!formats::is_there(index)) continue;
    const Json map = get<Json>(read_json(index), "weight_map", index.string());
    std::set<std::string> shards;
    for (const Json& shard : map) {
      const std::string file = shard.is_string() ? shard.get<std::string>() : "";
      MOESAIC_CHECK(!file.empty() && fs::path(file).filename() == file && formats::is_there(dir / file), FormatError,
                    "{}: names the shard {}, expected a file of the same folder", index.string(),
                    shard.dump().substr(0, 120));
      shards.insert(file);
    }
    for (const std::string& shard : shards) {
      pickle ? tensors.merge(formats::read_torch_file(dir / shard)) : add_safetensors(dir / shard, tensors);
    }
    return tensors;
  }
  throw DataError(
      fmt::format("{}: has no pytorch_model.bin and no model.safetensors, whole or in shards", dir.string()));
}

/// Where one of the models is: the path given, or that of the config when it is one of this machine.
fs::path find_base(const fs::path& given, const Json& config, const char* key, const char* flag, const fs::path& dir,
                   std::vector<std::string>& problems) {
  if (!given.empty()) return given;
  // transformers leaves a value out that equals the class's default.
  const fs::path named = get_or<std::string>(config, key, "google/gemma-2b", (dir / "config.json").string());
  if (fs::is_directory(named)) return named;
  problems.push_back(
      fmt::format("{}: '{}' is no folder of this machine; give the model with {}", key, named.string(), flag));
  return {};
}

std::vector<ConnectionPair> read_pairs(const Json& config, const std::string& where, int64_t anchor_layers,
                                       int64_t aug_layers) {
  const Json list = get_or<Json>(config, "connections", Json(), where);
  if (list.is_null()) {
    const auto count = get<int64_t>(config, "num_connections", where);
    MOESAIC_CHECK(count > 0 && count <= kMaxConnections, ConfigError, "{}: num_connections: got {}, expected 1 to {}",
                  where, count, kMaxConnections);
    return released_pairs(count, anchor_layers, aug_layers);
  }
  std::vector<ConnectionPair> pairs;
  MOESAIC_CHECK(list.is_array(), ConfigError, "{}: connections: got {}, expected a list of [anchor block, aug block]",
                where, list.dump().substr(0, 80));
  for (const Json& pair : list) {
    const bool two =
        pair.is_array() && pair.size() == 2 && pair[0].is_number_unsigned() && pair[1].is_number_unsigned();
    MOESAIC_CHECK(two, ConfigError, "{}: connections: got {}, expected [anchor block, aug block]", where,
                  pair.dump().substr(0, 80));
    pairs.push_back({pair[0].get<int64_t>(), pair[1].get<int64_t>()});
  }
  return pairs;
}

/// Compares the checkpoint's copy of a model, the tensors behind `prefix`, with the model given for it; takes them out
/// of `tensors`.
void compare_base(TensorMap& tensors, const std::string& prefix, const formats::Checkpoint& base,
                  formats::Misfits& found) {
  auto computed = [](const std::string& name) { return name.ends_with("rotary_emb.inv_freq"); };  // not learned
  TensorMap copy;
  for (auto it = tensors.lower_bound(prefix); it != tensors.end() && it->first.starts_with(prefix);) {
    if (!computed(it->first)) copy.insert(*it);
    it = tensors.erase(it);
  }
  if (copy.empty()) return;
  std::map<std::string, std::string> sources;  // in `base`
  for (const std::string& name : base.names()) {
    if (!computed(name)) sources[prefix + name] = name;
  }
  const std::string head = prefix + "lm_head.weight";
  if (copy.contains(head)) sources.emplace(head, "model.embed_tokens.weight");  // a tied head is the embedding
  formats::Declarations expected;
  for (const auto& [name, source] : sources) expected[name] = {base.shape(source)};
  found.add(formats::misfits(expected, formats::declarations(copy), formats::Dtypes::kAny));
  for (const auto& [name, ours] : copy) {
    if (!sources.contains(name) || ours.sizes() != expected[name].shape) continue;
    if (torch::equal(base.tensor(sources[name]).to(ours.dtype()), ours)) continue;
    found.wrong.push_back(fmt::format("{}: other numbers than in {}", name, base.path().string()));
  }
}

/// A tensor of a released connection: ours, one above the other.
struct HookTensor {
  const char* name;
  std::vector<std::string> targets;
};
const std::vector<HookTensor> kHookTensors{
    {"proj.weight", {"proj.weight"}},
    {"proj.bias", {"proj.bias"}},
    {"cross_attention.in_proj_weight", {"q_proj.weight", "k_proj.weight", "v_proj.weight"}},
    {"cross_attention.in_proj_bias", {"q_proj.bias", "k_proj.bias", "v_proj.bias"}},
    {"cross_attention.out_proj.weight", {"o_proj.weight"}},
    {"cross_attention.out_proj.bias", {"o_proj.bias"}},
    {"post_attention_layernorm.weight", {"norm.weight"}}};

std::string hook_name(int64_t k, const HookTensor& tensor) {
  return fmt::format("cross_attention_hooks.{}.{}", k, tensor.name);
}

/// What the tensors of connection k must be.
void declare_connection(int64_t k, const torch::nn::Module& connection, formats::Declarations& expected) {
  const auto parameters = connection.named_parameters();
  for (const HookTensor& tensor : kHookTensors) {
    std::vector<int64_t> shape = parameters[tensor.targets[0]].sizes().vec();
    shape[0] *= std::ssize(tensor.targets);
    expected[hook_name(k, tensor)] = {shape};
  }
}

/// Copies the tensors of connection k, which fit.
void take_connection(const TensorMap& tensors, int64_t k, torch::nn::Module& connection) {
  torch::NoGradGuard no_grad;
  auto parameters = connection.named_parameters();
  for (const HookTensor& tensor : kHookTensors) {
    const auto parts = tensors.at(hook_name(k, tensor)).chunk(std::ssize(tensor.targets));
    for (size_t part = 0; part < parts.size(); ++part) parameters[tensor.targets[part]].copy_(parts[part]);
  }
}

}  // namespace

std::vector<ConnectionPair> released_pairs(int64_t num_connections, int64_t anchor_layers, int64_t aug_layers) {
  auto block = [&](int64_t m, int64_t layers) {
    if (num_connections == 1) return int64_t{0};
    if (m == num_connections - 1) return layers - 1;
    const double step = static_cast<double>(layers - 1) / static_cast<double>(num_connections - 1);
    return static_cast<int64_t>(std::floor(static_cast<double>(m) * step));
  };
  std::vector<ConnectionPair> pairs;
  for (int64_t m = 0; m < num_connections; ++m) pairs.push_back({block(m, anchor_layers), block(m, aug_layers)});
  return pairs;
}

std::shared_ptr<Composition> import_released(const fs::path& dir, const ReleasedOptions& options) {
  const std::string where = (dir / "config.json").string();
  MOESAIC_CHECK(formats::is_there(dir / "config.json"), DataError,
                "{}: has no config.json; expected a folder that save_pretrained of google-deepmind/calm wrote",
                dir.string());
  const Json config = read_json(dir / "config.json");
  MOESAIC_CHECK(config.is_object() && config.value("model_type", Json()) == "calm", ConfigError,
                "{}: model_type: got {}, expected \"calm\"", where,
                config.is_object() ? config.value("model_type", Json()).dump().substr(0, 80) : config.type_name());

  std::vector<std::string> problems;
  const fs::path anchor_path = find_base(options.anchor, config, "anchor_model", "--anchor", dir, problems);
  const fs::path aug_path = find_base(options.augmenting, config, "aug_model", "--augmenting", dir, problems);
  throw_problems(dir, problems);
  const Member anchor = open_member(models::open_checkpoint(anchor_path), options.load);
  const Member augmenting = open_member(models::open_checkpoint(aug_path), options.load);
  const bool both = anchor.tokenizer && augmenting.tokenizer;
  if (both ? !same_tokenizer(*anchor.tokenizer, *augmenting.tokenizer) : anchor.tokenizer != augmenting.tokenizer) {
    problems.push_back(
        fmt::format("the tokenizers of {} and {} differ, but the released code gives the anchor's ids to both models",
                    anchor_path.string(), aug_path.string()));
  }

  CompositionConfig shape;
  shape.connection = {.num_heads = get_or<int64_t>(config, "num_heads", 1, where),
                      .cross_position = "none",
                      .norm = "post",
                      .attention_bias = true};
  const Anchor anchor_config = anchor_of(*anchor.model);
  MOESAIC_CHECK(!anchor_config.has_encoder, ConfigError, "{}: is an encoder-decoder, expected a decoder",
                anchor_path.string());
  const Reader reader = reader_of(*augmenting.model);
  const auto pairs = read_pairs(config, where, anchor_config.blocks, reader.blocks);
  shape.augmenting = {{pairs, "word", options.mask}};
  validate(shape, anchor_config, {reader}, where);
  std::set<int64_t> blocks;
  for (const ConnectionPair& pair : pairs) {
    if (blocks.insert(pair.anchor).second) continue;
    problems.push_back(fmt::format(
        "several connections add to anchor block {}: in the released code the second one reads what the first has "
        "added, here all read the block's own output",
        pair.anchor));
  }

  TensorMap tensors = read_tensors(dir);
  formats::Misfits found;
  compare_base(tensors, "anchor_model.", *anchor.checkpoint, found);
  compare_base(tensors, "aug_model.", *augmenting.checkpoint, found);
  auto composition = std::make_shared<Composition>(shape, anchor, std::vector{augmenting}, /*seed=*/0);
  const auto children = composition->named_children()["connections"]->named_children();
  formats::Declarations expected;
  for (int64_t k = 0; k < std::ssize(pairs); ++k) declare_connection(k, *children[std::to_string(k)], expected);
  found.add(formats::misfits(expected, formats::declarations(tensors)));
  if (!found.empty()) problems.push_back("the tensors do not fit:" + found.text());
  throw_problems(dir, problems);
  for (int64_t k = 0; k < std::ssize(pairs); ++k) take_connection(tensors, k, *children[std::to_string(k)]);
  return composition;
}

}  // namespace moesaic::compose
