// moesaic serve: a model and its adapters behind OpenAI's API.
#include <unistd.h>

#include <thread>

#include "cli/interrupt.h"
#include "cli/memory_limit.h"
#include "cli/options.h"
#include "moesaic/base/yaml.h"
#include "moesaic/serve/server.h"

namespace moesaic::cli {
namespace {

struct Options {
  ModelOptions model;
  serve::ServeOptions serve;
  std::string config;
  uint64_t kv_memory = 0;
  bool dry_run = false;
};

/// The values of a file's key as its flag takes them: a list gives several, a map NAME=VALUE each.
std::vector<std::string> flag_values(const OrderedJson& value, const std::string& where) {
  auto scalar = [&](const OrderedJson& each) {
    MOESAIC_CHECK(each.is_primitive() && !each.is_null(), UsageError,
                  "{}: got {}, expected a value, a list or names with values", where, each.dump());
    return each.is_string() ? each.get<std::string>() : each.dump();
  };
  std::vector<std::string> values;
  if (value.is_object()) {
    for (const auto& [name, of] : value.items()) {
      std::vector<std::string> parts;  // of a mixture: {adapter: scale}
      if (of.is_object()) {
        for (const auto& [adapter, scale] : of.items()) parts.push_back(adapter + ":" + scalar(scale));
      }
      values.push_back(name + "=" + (parts.empty() ? scalar(of) : fmt::format("{}", fmt::join(parts, ","))));
    }
  } else if (value.is_array()) {
    for (const OrderedJson& each : value) values.push_back(scalar(each));
  } else {
    values.push_back(scalar(value));
  }
  return values;
}

/// Gives `app` what `file` says where no flag says otherwise.
void read_config(CLI::App& app, const std::string& file) {
  std::vector<std::string> known;
  for (const CLI::Option* option : app.get_options()) {
    for (const std::string& name : option->get_lnames()) known.push_back(name);
  }
  const OrderedJson keys = read_yaml(file);
  for (const auto& [key, value] : keys.items()) {
    const std::string where = fmt::format("{}: {}", file, key);
    // Lists have the plural of their flag's name.
    const bool plural = key.ends_with('s') && std::find(known.begin(), known.end(), key) == known.end();
    CLI::Option* option = app.get_option_no_throw("--" + (plural ? key.substr(0, key.size() - 1) : key));
    if (option == nullptr || key == "config") {
      const std::string near = nearest_name(key, known);
      throw UsageError(fmt::format("{}: unknown key '{}'{}", file, key,
                                   near.empty() ? "" : fmt::format(", did you mean '{}'?", near)));
    }
    if (option->count() > 0) continue;
    try {
      for (const std::string& each : flag_values(value, where)) option->add_result(each);
      option->run_callback();
    } catch (const CLI::ParseError& error) {
      throw UsageError(fmt::format("{}: {}", where, error.what()));
    }
  }
}

int run_serve(CLI::App& app, Options& options, const CommonOptions& common) {
  if (!options.config.empty()) read_config(app, options.config);
  serve::validate(options.serve);
  run::ModelReference from = run::resolve_model(options.model.named, options.model.model, options.model.adapters);
  ModelOptions base = options.model;
  base.named.clear();
  base.adapters.clear();
  base.model = from.model;
  Loaded loaded = load(base, common);
  spdlog::info("computing in {}", loaded.computes_in());
  int64_t weights = 0;
  for (const torch::Tensor& weight : loaded.model->weights()) weights += static_cast<int64_t>(weight.nbytes());
  const int64_t left = static_cast<int64_t>(memory_of_machine()) - weights;
  options.serve.kv_memory =
      options.kv_memory > 0 ? static_cast<int64_t>(options.kv_memory) : std::max<int64_t>(left / 2, 1);
  MOESAIC_CHECK(options.serve.kv_memory < left, UsageError,
                "kv_memory: got {} MiB, expected less than the {} MiB that the weights leave",
                options.serve.kv_memory >> 20, std::max<int64_t>(left, 0) >> 20);
  serve::Server server(std::move(loaded), from.model, from.adapters, options.serve);
  for (const std::string& line : server.plan()) spdlog::info("{}", line);
  if (options.dry_run) return 0;

  CatchSignals signals({SIGINT, SIGTERM}, /*once=*/true);
  spdlog::info("listening on http://{}:{}", options.serve.host, server.port());
  while (!signals.caught()) std::this_thread::sleep_for(std::chrono::milliseconds(50));
  spdlog::info("finishing what runs, for {} s at most; once more ends at once", options.serve.drain_timeout);
  const int64_t cut = server.drain();
  if (cut > 0) spdlog::warn("{} requests were cut", cut);
  return 0;
}

}  // namespace

Runner add_serve(CLI::App& app, CommonOptions& common) {
  auto options = std::make_shared<Options>();
  serve::ServeOptions& serve = options->serve;
  add_model_options(app, options->model);
  app.add_option("--config", options->config, "YAML file with these flags as keys; a flag wins over it");
  app.add_flag("--dry_run", options->dry_run, "Load, say what memory it takes, and end");
  const char* group = "Server";
  auto add = [&](const char* name, auto& value, const char* help) {
    return app.add_option(name, value, help)->capture_default_str()->group(group);
  };
  add("--served_name", serve.served_name, "The base's name beside 'base'; empty = that of its file or folder");
  add("--host", serve.host, "Address to listen at");
  add("--port", serve.port, "Port; 0 takes a free one");
  repeated(add("--mixture", serve.mixtures,
               "Several adapters under one name: NAME=ADAPTER:SCALE[,ADAPTER:SCALE ...]; may be repeated"));
  add("--api_keys", serve.api_keys,
      "File of keys, a line each: NAME SHA256-OF-THE-KEY [admin]; empty = anyone may ask");
  app.add_flag("--allow_runtime_load", serve.allow_runtime_load,
               "Adapters may be loaded and unloaded by requests of admins")
      ->group(group);
  repeated(add("--adapter_root", serve.adapter_roots, "Folder below which such adapters lie; may be repeated"));
  repeated(add("--allowed_host", serve.allowed_hosts, "Name by which it may be called beside --host; may be repeated"));
  repeated(
      add("--cors_origin", serve.cors_origins, "Origin whose pages may ask, https://example.org; may be repeated"));
  app.add_flag("--insecure", serve.insecure, "Listen at other than loopback addresses without keys")->group(group);
  add("--request_log", serve.request_log, "File for a JSON line about each request, - = standard output");
  group = "Engine";
  add("--max_seqs", serve.max_seqs, "Answers in the making side by side");
  add("--max_queue", serve.max_queue, "Requests that wait; more are refused with 429");
  add("--max_model_len", serve.max_model_len, "Tokens of a prompt and its answer; 0 = the model's context");
  app.add_option("--kv_memory", options->kv_memory,
                 "Memory for keys and values: 4GiB; 0 = half of what the weights leave")
      ->capture_default_str()
      ->transform(CLI::AsSizeValue(/*kb_is_1000=*/false))
      ->group(group);
  add("--prefix_texts", serve.prefix_texts, "Texts kept in it for prompts that begin alike; 0 = none");
  add("--step_ms", serve.step_ms, "Milliseconds that a step may take: prompts are read in parts");
  app.add_flag("--deterministic,!--no-deterministic", serve.deterministic,
               "An answer has the same bits alone and in any company; default: it has")
      ->group(group);
  add("--max_request_time", serve.max_request_time, "Seconds that a request may take");
  add("--queue_timeout", serve.queue_timeout, "Seconds that a request may wait");
  add("--drain_timeout", serve.drain_timeout, "Seconds that running requests have after SIGTERM");
  return [&app, options, &common] { return run_serve(app, *options, common); };
}

}  // namespace moesaic::cli
