#include "moesaic/run/open.h"

#include <future>
#include <ranges>
#include <set>

#include "moesaic/base/check.h"
#include "moesaic/base/yaml.h"
#include "moesaic/compose/folder.h"
#include "moesaic/formats/adapter_folder.h"
#include "moesaic/models/registry.h"

namespace moesaic::run {

namespace fs = std::filesystem;

AdapterReference parse_adapter_reference(const std::string& text) {
  AdapterReference adapter;
  std::string rest = text;
  const size_t equals = text.find('=');
  if (equals != std::string::npos && text.find('/') > equals) {
    adapter.name = text.substr(0, equals);
    rest = text.substr(equals + 1);
  }
  const size_t colon = rest.rfind(':');
  if (!fs::exists(rest) && colon != std::string::npos) {
    const std::string scale = rest.substr(colon + 1);
    size_t used = 0;
    try {
      adapter.scale = std::stod(scale, &used);
    } catch (const std::exception&) {
    }
    MOESAIC_CHECK(used > 0 && used == scale.size() && std::isfinite(adapter.scale), UsageError,
                  "--adapter {}: the scale behind ':' is no number: got '{}'. Expected [NAME=]DIR[:scale].", text,
                  scale);
    rest.resize(colon);
  }
  adapter.dir = rest;
  MOESAIC_CHECK(fs::is_directory(adapter.dir), UsageError,
                "--adapter {}: '{}' is no folder. Expected [NAME=]DIR[:scale], DIR holding adapter_config.json.", text,
                rest);
  if (adapter.name.empty()) {
    const fs::path dir = adapter.dir.lexically_normal();
    adapter.name = (dir.has_filename() ? dir : dir.parent_path()).filename().string();
  }
  return adapter;
}

namespace {

/// The folder in which the run was started that left `adapter` where its run.yaml says; "" when that isn't known.
fs::path started_in(const fs::path& adapter) {
  auto plain = [](const fs::path& path) {
    const fs::path normal = path.lexically_normal();
    return normal.has_filename() ? normal : normal.parent_path();
  };
  fs::path folder = plain(fs::absolute(adapter));
  if (!formats::is_there(folder / "run.yaml")) folder = folder.parent_path();  // of a checkpoint
  if (!formats::is_there(folder / "run.yaml")) return "";
  const OrderedJson keys = read_yaml(folder / "run.yaml");
  fs::path output = plain(get_or<std::string>(Json(keys), "output_dir", "", (folder / "run.yaml").string()));
  if (output.empty() || output.is_absolute()) return "";
  for (; !output.empty() && output != "."; output = output.parent_path()) {
    if (output.filename() != folder.filename()) return "";  // moved since
    folder = folder.parent_path();
  }
  return folder;
}

/// The model that all `adapters` were trained on.
std::string common_base(const std::vector<AdapterReference>& adapters) {
  const fs::path base = base_of(adapters[0].dir);
  for (const AdapterReference& adapter : adapters) {
    const fs::path other = base_of(adapter.dir);
    std::error_code error;
    MOESAIC_CHECK(fs::equivalent(base, other, error), UsageError,
                  "got adapters of different bases, expected one: that of {} is {}, that of {} is {}\nhint: --model "
                  "names the one to take",
                  adapters[0].dir.string(), base.string(), adapter.dir.string(), other.string());
  }
  return base.string();
}

/// Where `name` stands that an adapter's folder has: looked for where its run was started, then here, then beside it.
/// Throws UsageError where it is in none; `what` is it, `hint` what to do.
fs::path place_of(const fs::path& adapter, const std::string& name, const char* what, const char* hint) {
  std::vector<std::string> places{name};
  if (fs::path(name).is_relative()) {
    const fs::path start = started_in(adapter);
    std::error_code error;
    if (!start.empty() && !fs::equivalent(start, ".", error)) places.insert(places.begin(), (start / name).string());
    places.push_back((adapter / name).lexically_normal().string());
  }
  const auto place = std::find_if(places.begin(), places.end(), formats::is_there);
  MOESAIC_CHECK(place != places.end(), UsageError, "{}: its {} {} is not there: looked for {}\nhint: {}",
                adapter.string(), what, name, fmt::join(places, ", "), hint);
  return *place;
}

}  // namespace

fs::path base_of(const fs::path& adapter) {
  const auto name = get_or<std::string>(Json(formats::read_adapter_config(adapter)), "base_model_name_or_path", "",
                                        (adapter / "adapter_config.json").string());
  MOESAIC_CHECK(!name.empty(), UsageError,
                "{}: its adapter_config.json names no base_model_name_or_path, expected the model it was trained on\n"
                "hint: name it with --model",
                adapter.string());
  return place_of(adapter, name, "base model", "name it with --model");
}

ModelReference resolve_model(const std::string& named, const std::string& model,
                             const std::vector<std::string>& adapters) {
  ModelReference found{model, {}};
  if (!named.empty() && formats::is_adapter(named)) {
    found.adapters.push_back(parse_adapter_reference(named));
  } else if (!named.empty()) {
    MOESAIC_CHECK(model.empty(), UsageError, "got two models, {} and --model {}, expected one", named, model);
    found.model = named;
  }
  for (const std::string& adapter : adapters) found.adapters.push_back(parse_adapter_reference(adapter));
  MOESAIC_CHECK(!found.model.empty() || !found.adapters.empty(), UsageError,
                "--model is required, or an adapter's folder, which knows its base; got neither");
  if (found.model.empty()) found.model = common_base(found.adapters);
  return found;
}

namespace {

// Ends of turn that files forget to name.
constexpr const char* kEndsOfTurn[] = {"<|eot_id|>", "<|eom_id|>",    "<end_of_turn>", "<|im_end|>",
                                       "<|end|>",    "<|endoftext|>", "<EOT>"};

}  // namespace

std::vector<int64_t> eos_ids(const models::LanguageModel& model, const Json& generation_config,
                             const tokenizer::Tokenizer* tokenizer, const tokenizer::ChatTemplate* chat_template) {
  const std::vector<int64_t>& own = model.facts().eos_ids;
  std::set<int64_t> ids(own.begin(), own.end());
  if (auto it = generation_config.find("eos_token_id"); it != generation_config.end()) {
    for (const Json& id : it->is_array() ? *it : Json::array({*it})) {
      if (id.is_number_integer()) ids.insert(id.get<int64_t>());
    }
  }
  if (!tokenizer) return {ids.begin(), ids.end()};
  auto add = [&](const std::optional<std::string>& token) {
    if (const auto id = token ? tokenizer->token_to_id(*token) : std::nullopt) ids.insert(*id);
  };
  add(tokenizer->eos_token());
  for (const char* text : kEndsOfTurn) add(text);
  if (chat_template) add(chat_template->end_of_turn());
  // In OpenAI's harmony format <|end|> ends a message, and the answer goes on.
  const auto goes_on = tokenizer->token_to_id("<|end|>");
  if (goes_on && tokenizer->token_to_id("<|return|>") && tokenizer->token_to_id("<|call|>")) ids.erase(*goes_on);
  return {ids.begin(), ids.end()};
}

std::vector<int64_t> Opened::eos_ids() const {
  return run::eos_ids(*model, checkpoint->generation_config(), tokenizer.get(), chat_template.get());
}

namespace {

void open_composition(const std::string& path, const OpenOptions& options, Opened& opened) {
  const auto composition = compose::load_composition(path, {options.dtype, options.device, options.quantize_int8});
  const compose::Member& anchor = composition->anchor_member();
  MOESAIC_CHECK(anchor.tokenizer || !options.needs_tokenizer, DataError,
                "{}: no tokenizer found, expected tokenizer.json", anchor.checkpoint->path().string());
  opened.checkpoint = anchor.checkpoint;
  opened.tokenizer = anchor.tokenizer;
  opened.model = composition;
}

void open_single(const std::string& path, const OpenOptions& options, Opened& opened) {
  opened.checkpoint = models::open_checkpoint(path);
  // Building the tokenizer takes as long as reading the weights of a small model: side by side.
  auto tokenizer = std::async(std::launch::async, [&]() -> std::shared_ptr<const tokenizer::Tokenizer> {
    if (!options.needs_tokenizer && !opened.checkpoint->tokenizer_json()) return nullptr;
    return tokenizer::Tokenizer::open(*opened.checkpoint);
  });
  const auto model = models::load_model(*opened.checkpoint, {options.dtype, options.device, options.quantize_int8});
  model->eval();
  opened.model = model;
  opened.tokenizer = tokenizer.get();
}

}  // namespace

void adapt_tokenizer(const std::string& path, const std::vector<AdapterReference>& adapters, bool embeds,
                     Opened& opened) {
  formats::TokenizerFiles files{std::nullopt, opened.tokenizer->config(), opened.checkpoint->chat_templates()};
  if (fs::is_directory(path) && compose::is_composition(path)) formats::adapt(files, path);
  for (const AdapterReference& adapter : std::views::reverse(adapters)) {
    formats::adapt(files, adapter.dir, embeds);
  }
  if (files.json || files.config != opened.tokenizer->config()) {
    opened.tokenizer = std::make_shared<tokenizer::Tokenizer>(files.json ? *files.json : opened.tokenizer->json(),
                                                              files.config, path, opened.tokenizer->prompts_apart());
  }
  if (files.chat_templates.empty()) return;
  opened.chat_template = std::make_shared<tokenizer::ChatTemplate>(std::move(files.chat_templates), *opened.tokenizer);
}

void Opened::read_sentences_for(const fs::path& dir, const adapters::AdapterConfig& config) {
  const std::string name = config.sentence_encoder();
  if (name.empty()) return;
  const fs::path folder = place_of(dir, name, "sentence encoder",
                                   "put it back, or correct router.sentence_source in its adapter_config.json");
  const auto encoder = open_sentence_encoder(folder, tokenizer, model->facts().device);
  MOESAIC_CHECK(config.sentence_fingerprint.empty() || encoder->fingerprint() == config.sentence_fingerprint, DataError,
                "{}: its router was trained on the vectors of another sentence encoder than {}: got weights {}, "
                "expected {}",
                dir.string(), folder.string(), encoder->fingerprint(), config.sentence_fingerprint);
  MOESAIC_CHECK(!sentence_encoder || sentence_encoder->fingerprint() == encoder->fingerprint(), UsageError,
                "{}: its router reads another sentence encoder than another adapter's. Use them one at a time.",
                dir.string());
  if (sentence_encoder) return;
  sentence_encoder = encoder;
  model->read_sentences_with(encoder);
}

Opened open(const std::string& path, const std::vector<AdapterReference>& adapters, const OpenOptions& options) {
  MOESAIC_CHECK(
      fs::exists(path), UsageError,
      "--model {}: no such file or folder. Expected a folder with config.json and *.safetensors, a .gguf file, or the "
      "folder of a composition or of an adapter.",
      path);
  Opened opened;
  opened.int8 = options.quantize_int8;
  const bool composed = compose::is_composition(path);
  (composed ? open_composition : open_single)(path, options, opened);
  bool embeds = false;
  const int64_t vocabulary = opened.model->facts().vocab_size;
  for (const AdapterReference& reference : adapters) {
    const auto adapter = adapters::Adapter::open(reference.dir, *opened.model->parts().front().sites, options.device,
                                                 opened.checkpoint->fingerprint(), reference.scale);
    opened.read_sentences_for(reference.dir, adapter->config());
    opened.model->attach(reference.name, adapter);
    embeds = embeds || (!composed && adapter->embeds());
    MOESAIC_CHECK(!composed || opened.model->facts().vocab_size == vocabulary, DataError,
                  "{}: got a vocabulary of {}, expected {}: the composition reads the anchor's tokens\nhint: `moesaic "
                  "merge` the adapter into the anchor and compose that",
                  reference.dir.string(), opened.model->facts().vocab_size, vocabulary);
  }
  if (opened.tokenizer) adapt_tokenizer(path, adapters, embeds, opened);
  return opened;
}

std::vector<double> mixture_row(const models::LanguageModel& model, const OrderedJson& adapters,
                                const std::string& where) {
  MOESAIC_CHECK(adapters.is_array() || adapters.is_object(), UsageError,
                "{}: adapters: got {}, expected names with weights, {{\"name\": 1.0}}, or a list of names", where,
                adapters.type_name());
  std::vector<double> row(model.attachments().size(), 0.0);
  auto set = [&](const std::string& name, double weight) {
    MOESAIC_CHECK(std::isfinite(weight), UsageError, "{}: adapters: {}: the weight is not finite", where, name);
    try {
      row[model.column(name)] = weight;
    } catch (const UsageError& error) {
      throw UsageError(fmt::format("{}: {}", where, error.what()));
    }
  };
  for (const auto& [key, value] : adapters.items()) {
    const bool fits = adapters.is_array() ? value.is_string() : value.is_number();
    MOESAIC_CHECK(fits, UsageError, "{}: adapters: got {}, expected {}", where, value.dump(),
                  adapters.is_array() ? "names" : "numbers");
    if (adapters.is_array()) {
      set(value.get<std::string>(), 1.0);
    } else {
      set(key, value.get<double>());
    }
  }
  return row;
}

}  // namespace moesaic::run
