#include "moesaic/run/open.h"

#include <future>
#include <set>

#include "moesaic/base/check.h"
#include "moesaic/compose/folder.h"
#include "moesaic/models/causal_lm.h"
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

std::vector<int64_t> eos_ids(const models::LanguageModel& model, const Json& generation_config,
                             const tokenizer::Tokenizer* tokenizer) {
  const std::vector<int64_t>& own = model.facts().eos_ids;
  std::set<int64_t> ids(own.begin(), own.end());
  if (auto it = generation_config.find("eos_token_id"); it != generation_config.end()) {
    for (const Json& id : it->is_array() ? *it : Json::array({*it})) {
      if (id.is_number_integer()) ids.insert(id.get<int64_t>());
    }
  }
  if (tokenizer && tokenizer->eos_id()) ids.insert(*tokenizer->eos_id());
  return {ids.begin(), ids.end()};
}

std::vector<int64_t> Opened::eos_ids() const {
  return run::eos_ids(*model, checkpoint->generation_config(), tokenizer.get());
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
  const auto model = models::CausalLM::load(*opened.checkpoint, {options.dtype, options.device, options.quantize_int8});
  model->eval();
  opened.model = model;
  opened.tokenizer = tokenizer.get();
}

}  // namespace

Opened open(const std::string& path, const std::vector<AdapterReference>& adapters, const OpenOptions& options) {
  MOESAIC_CHECK(
      fs::exists(path), UsageError,
      "--model {}: no such file or folder. Expected a folder with config.json and *.safetensors, or a .gguf file.",
      path);
  Opened opened;
  (compose::is_composition(path) ? open_composition : open_single)(path, options, opened);
  if (opened.tokenizer) opened.chat_template = tokenizer::ChatTemplate::open(*opened.checkpoint, *opened.tokenizer);
  for (const AdapterReference& adapter : adapters) {
    opened.model->attach(adapter.name,
                         adapters::Adapter::open(adapter.dir, *opened.model->parts().front().sites, options.device,
                                                 opened.checkpoint->fingerprint(), adapter.scale));
  }
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
