#include "moesaic/serve/server.h"

#include <algorithm>
#include <fstream>
#include <set>
#include <sstream>

#include "moesaic/base/check.h"
#include "moesaic/base/device.h"
#include "moesaic/base/sha256.h"
#include "moesaic/base/version.h"
#include "moesaic/formats/adapter_folder.h"
#include "moesaic/formats/tokenizer_files.h"
#include "moesaic/nn/kernels.h"
#include "moesaic/nn/linear.h"
#include "moesaic/serve/anthropic.h"
#include "moesaic/serve/fields.h"
#include "moesaic/serve/pages.h"
#include "moesaic/serve/responses.h"
#include "moesaic/serve/texts.h"

namespace moesaic::serve {
namespace {

namespace fs = std::filesystem;

constexpr size_t kWorkers = 2, kMostRequests = 4096;  // that wait for a worker
constexpr double kStall = 30;                         // seconds without a step, while there is something to do

int64_t now_seconds() {
  return std::chrono::duration_cast<std::chrono::seconds>(std::chrono::system_clock::now().time_since_epoch()).count();
}

bool is_loopback(std::string_view host) {
  return host == "localhost" || host == "::1" || host == "[::1]" || host.starts_with("127.");
}

/// "example.org:8000", "[::1]:80" without the port.
std::string_view without_port(std::string_view host) {
  const size_t bracket = host.rfind(']'), colon = host.rfind(':');
  return colon != std::string_view::npos && (bracket == std::string_view::npos || colon > bracket)
             ? host.substr(0, colon)
             : host;
}

/// How long a text may be: what config.json says; T5's positions are relative.
int64_t context_of(const Json& config) {
  const Json& text =
      config.contains("text_config") && config["text_config"].is_object() ? config["text_config"] : config;
  return get_or<int64_t>(text, "max_position_embeddings", get_or<int64_t>(text, "n_positions", 2048, "config.json"),
                         "config.json");
}

std::string folder_name(const fs::path& path) {
  const fs::path plain = path.lexically_normal();
  const fs::path last = (plain.has_filename() ? plain : plain.parent_path()).filename();
  const std::string name = (last.extension() == ".gguf" ? last.stem() : last).string();
  std::string letters;
  for (const unsigned char c : name)
    letters += std::isalnum(c) != 0 || c == '.' || c == '_' || c == '-' ? static_cast<char>(c) : '-';
  return letters.substr(0, 128);
}

bool is_anthropic(std::string_view path) {
  return path.ends_with("/v1/messages") || path.ends_with("/v1/messages/count_tokens");
}

/// The files that make an adapter what it is.
std::string hash_of_adapter(fs::path dir) {
  if (!fs::exists(dir / "adapter_config.json")) dir /= "default";
  return sha256_hex(sha256_of_file(dir / "adapter_config.json") + sha256_of_file(dir / "adapter_model.safetensors"));
}

/// Whether this machine's library gives a row of a product of many the same bits whatever is beside it; tried at each
/// shape of the model's linears.
bool library_is_alike(models::LanguageModel& model) {
  torch::NoGradGuard no_grad;
  const nn::AlikeRows alike(nn::AlikeRows::Number::kMany);
  constexpr int64_t kRows[] = {1, 20, 37, 64, 130, 300};
  std::set<std::pair<int64_t, size_t>> tried;
  for (const nn::LinearSite& site : model.parts().front().sites->linears) {
    if (!tried.insert({site.in, site.group->outs().size()}).second) continue;
    const torch::Tensor x = torch::randn({kRows[5], site.in}).to(model.facts().device, model.facts().dtype);
    const torch::Tensor expected = site.group->matrix()->product(x, {});
    for (const int64_t rows : kRows) {
      const torch::Tensor y = site.group->matrix()->product(x.narrow(0, 0, rows), {});
      if (!torch::equal(y, expected.narrow(0, 0, rows))) return false;
    }
  }
  return true;
}

}  // namespace

void validate(const ServeOptions& options) {
  std::string wrong;
  auto expect = [&](bool ok, const char* name, double got, const char* expected) {
    if (!ok) wrong += fmt::format("\n  {}: got {}, expected {}", name, got, expected);
  };
  expect(options.max_seqs >= 1, "max_seqs", static_cast<double>(options.max_seqs), "1 or more");
  expect(options.max_queue >= 1, "max_queue", static_cast<double>(options.max_queue), "1 or more");
  expect(options.max_model_len >= 0, "max_model_len", static_cast<double>(options.max_model_len),
         "0 (the model's) or more");
  expect(options.kv_memory >= 1, "kv_memory", static_cast<double>(options.kv_memory), "some bytes");
  expect(options.prefix_texts >= 0, "prefix_texts", static_cast<double>(options.prefix_texts), "0 (none) or more");
  expect(options.step_ms > 0, "step_ms", options.step_ms, "above 0");
  expect(options.max_request_time > 0, "max_request_time", options.max_request_time, "above 0");
  expect(options.queue_timeout > 0, "queue_timeout", options.queue_timeout, "above 0");
  expect(options.drain_timeout >= 0, "drain_timeout", options.drain_timeout, "0 or more");
  MOESAIC_CHECK(wrong.empty(), UsageError, "settings of the server out of range:{}", wrong);
  MOESAIC_CHECK(is_loopback(options.host) || !options.api_keys.empty() || options.insecure, UsageError,
                "host: got {} without api_keys, expected a loopback address: anyone who reaches it could ask\nhint: "
                "--api_keys names a file of keys; --insecure goes without",
                options.host);
  MOESAIC_CHECK(!options.allow_runtime_load || !options.adapter_roots.empty(), UsageError,
                "allow_runtime_load: got no adapter_root, expected the folders below which adapters may be loaded");
}

Server::Server(run::Opened opened, const std::string& path, const std::vector<run::AdapterReference>& adapters,
               const ServeOptions& options)
    : opened_(std::move(opened)),
      options_(options),
      grammars_(opened_.tokenizer, opened_.eos_ids(), opened_.model->facts().vocab_size),
      around_{*opened_.tokenizer, catalog_, opened_.eos_ids(), opened_.model->facts().vocab_size, grammars_} {
  validate(options_);
  const std::string name = options_.served_name.empty() ? folder_name(path) : options_.served_name;
  check_name(name);
  const int64_t context = std::min(context_of(opened_.checkpoint->config()), opened_.model->exact_memory());
  MOESAIC_CHECK(options_.max_model_len <= context, UsageError,
                "max_model_len: got {}, expected {} at most, the model's", options_.max_model_len, context);
  around_.max_model_len = options_.max_model_len > 0 ? options_.max_model_len : context;
  around_.max_request_time = options_.max_request_time;
  const std::string dtype = dtype_name(opened_.model->facts().dtype), weights = opened_.checkpoint->fingerprint();
  around_.fingerprint = fmt::format("moesaic-{}-{}-{}", kVersion, weights.substr(weights.rfind(':') + 1, 12), dtype);
  catalog_.put({name,
                "",
                path,
                {},
                sha256_hex(around_.fingerprint),
                {{"method", "base"}, {"dtype", dtype}},
                now_seconds(),
                opened_.chat_template});
  if (!options_.api_keys.empty()) keys_ = read_keys(options_.api_keys);
  if (options_.deterministic && !library_is_alike(*opened_.model)) {
    spdlog::warn(
        "deterministic: this machine's matrix library rounds rows as suits their number: answers may differ in "
        "their last bits with the company they are in");
  }
  ServiceOptions wanted;
  wanted.engine.most_answers = options_.max_seqs;
  wanted.engine.memory_bytes = options_.kv_memory;
  wanted.engine.kept = options_.prefix_texts;
  wanted.engine.step_tokens = 2048;
  wanted.engine.step_seconds = options_.step_ms / 1000;
  wanted.engine.alike = options_.deterministic;
  wanted.max_queue = options_.max_queue;
  wanted.queue_timeout = options_.queue_timeout;
  service_ = std::make_unique<Service>(*opened_.model, *opened_.tokenizer, wanted);
  for (const run::AdapterReference& reference : adapters) {
    check_name(reference.name);
    MOESAIC_CHECK(!catalog_.holds(reference.name), UsageError,
                  "--adapter: two models have the name '{}'; name them apart: "
                  "NAME=DIR",
                  reference.name);
    service_->between_steps([&](generate::Engine& engine) { catalog_.put(open_adapter(reference, engine)); });
  }
  for (const std::string& mixture : options_.mixtures) add_mixture(mixture);
  if (options_.request_log == "-") {
    log_file_ = stdout;
  } else if (!options_.request_log.empty()) {
    log_file_ = std::fopen(options_.request_log.c_str(), "a");
    MOESAIC_CHECK(log_file_ != nullptr, UsageError, "request_log {}: can't write this file", options_.request_log);
  }
  for (size_t i = 0; i < kWorkers; ++i) workers_.emplace_back([this] { work(); });
  const std::lock_guard lock(mutex_);  // it may be asked before it is assigned
  http_ = std::make_unique<HttpServer>(options_.host, options_.port, HttpLimits{},
                                       HttpServer::Handler{[this](HttpRequest request) { take(std::move(request)); },
                                                           [this](uint64_t id) { gone(id); }});
}

Server::~Server() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  changed_.notify_all();
  for (std::thread& worker : workers_) worker.join();
  service_.reset();  // what runs hears of it while there is an HTTP server
  http_.reset();
  if (log_file_ != nullptr && log_file_ != stdout) std::fclose(log_file_);
}

int64_t Server::drain() {
  const int64_t left = service_->drain(options_.drain_timeout);
  http_->drain();
  return left;
}

std::vector<std::string> Server::plan() const {
  int64_t weights = 0;
  for (const torch::Tensor& weight : opened_.model->weights()) weights += static_cast<int64_t>(weight.nbytes());
  const int64_t token = opened_.model->memory(0)->token_bytes();
  std::vector<std::string> lines{fmt::format("weights {} MiB", weights >> 20),
                                 fmt::format("keys and values {} MiB at most: {} tokens of {} bytes",
                                             options_.kv_memory >> 20, options_.kv_memory / token, token),
                                 fmt::format("context {} tokens, {} answers side by side, {} requests in the queue",
                                             around_.max_model_len, options_.max_seqs, options_.max_queue)};
  for (const auto& entry : catalog_.all()) {
    lines.push_back(fmt::format("model {}: {}", entry->name, json_text(entry->facts)));
  }
  return lines;
}

/// NAME=ADAPTER:SCALE[,ADAPTER:SCALE ...].
void Server::add_mixture(const std::string& mixture) {
  const char* form = "NAME=ADAPTER:SCALE[,ADAPTER:SCALE ...]";
  const size_t equals = mixture.find('=');
  const std::string name = mixture.substr(0, equals);
  check_name(name);
  MOESAIC_CHECK(!catalog_.holds(name), UsageError, "--mixture {}: another model has this name", name);
  std::vector<std::pair<std::string, double>> parts;
  std::istringstream list(equals == std::string::npos ? "" : mixture.substr(equals + 1));
  for (std::string part; std::getline(list, part, ',');) {
    const size_t colon = part.rfind(':');
    const std::string adapter = part.substr(0, colon),
                      number = colon == std::string::npos ? "" : part.substr(colon + 1);
    size_t used = 0;
    double scale = 0;
    try {
      scale = std::stod(number, &used);
    } catch (const std::exception&) {
    }
    MOESAIC_CHECK(used > 0 && used == number.size() && std::isfinite(scale) && catalog_.holds(adapter), UsageError,
                  "--mixture {}: got '{}', expected the name of an adapter and its scale: {}", mixture, part, form);
    parts.emplace_back(adapter, scale);
  }
  MOESAIC_CHECK(!parts.empty(), UsageError, "--mixture {}: expected {}", mixture, form);
  catalog_.put(catalog_.mixed(name, parts));
}

/// Opens a folder as an adapter of the model, on the engine's thread.
Entry Server::open_adapter(const run::AdapterReference& reference, generate::Engine& engine) {
  const auto start = std::chrono::steady_clock::now();
  const auto adapter =
      adapters::Adapter::open(reference.dir, *opened_.model->parts().front().sites, opened_.model->facts().device,
                              opened_.checkpoint->fingerprint(), reference.scale);
  const nn::Needs needs = adapter->needs();
  if (needs.replaces || adapter->embeds()) {
    adapter->detach();
    throw UsageError(
        fmt::format("{}: it replaces weights of the model (DoRA, or weights held whole), expected an adapter "
                    "that stands beside others\nhint: `moesaic merge` makes a model of it, to be served itself",
                    reference.dir.string()));
  }
  // A name may be taken again while its old adapter still answers.
  const std::string own = fmt::format("{}#{}", reference.name, ++loaded_);
  try {
    opened_.read_sentences_for(reference.dir, adapter->config());
    engine.attach(own, adapter);
  } catch (...) {
    adapter->detach();
    throw;
  }
  attached_[reference.name] = own;
  int64_t bytes = 0;
  for (const auto& [name, tensor] : adapter->folder().tensors) bytes += static_cast<int64_t>(tensor.nbytes());
  formats::TokenizerFiles files{std::nullopt, opened_.tokenizer->config(), opened_.checkpoint->chat_templates()};
  formats::adapt(files, reference.dir);
  const std::shared_ptr<const Entry> base = catalog_.base();
  const adapters::AdapterConfig& config = adapter->config();
  Entry entry{reference.name, base->name,           reference.dir.string(), {{own, 1.0}}, "", {},
              now_seconds(),  opened_.chat_template};
  entry.hash = sha256_hex(fmt::format("{} {} {}", base->hash, hash_of_adapter(reference.dir), reference.scale));
  entry.facts = {{"method", config.method}, {"experts", config.num_experts}};
  if (adapters::method_of(config.method).low_rank) entry.facts["rank"] = config.lora_rank;
  entry.facts["bytes"] = bytes;
  entry.facts["sha256"] = entry.hash;
  const formats::ChatTemplates own_templates = opened_.checkpoint->chat_templates();
  if (files.chat_templates == formats::kNoTemplate || files.chat_templates.empty()) {
    entry.chat_template = nullptr;
  } else if (files.chat_templates != own_templates) {
    entry.chat_template = std::make_shared<tokenizer::ChatTemplate>(files.chat_templates, *opened_.tokenizer);
  }
  metrics_.observe("moesaic:adapter_load_seconds",
                   std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  return entry;
}

/// On the HTTP server's thread.
void Server::take(HttpRequest request) {
  const bool asks_health = request.path == "/health" && request.method == "GET";
  {
    const std::lock_guard lock(mutex_);
    if (!asks_health && requests_.size() < kMostRequests) {
      requests_.push_back(std::move(request));
      changed_.notify_one();
      return;
    }
  }
  // Whether the process lives is told without waiting for a worker.
  if (asks_health) {
    http_->respond(request.id, 200, headers_of(request), "");
  } else {
    refuse(request, ApiError(503, "too many requests wait to be read", "", 1));
  }
}

void Server::gone(uint64_t id) {
  std::shared_ptr<Exchange> exchange;
  {
    const std::lock_guard lock(mutex_);
    std::erase_if(requests_, [&](const HttpRequest& request) { return request.id == id; });
    const auto found = exchanges_.find(id);
    if (found == exchanges_.end()) return;
    exchange = found->second.lock();
    exchanges_.erase(found);
  }
  if (exchange) exchange->gone();
}

void Server::work() {
  torch::NoGradGuard no_grad;
  while (true) {
    HttpRequest request;
    {
      std::unique_lock lock(mutex_);
      changed_.wait(lock, [&] { return stopping_ || !requests_.empty(); });
      if (requests_.empty()) return;
      request = std::move(requests_.front());
      requests_.pop_front();
    }
    answer(request);
  }
}

Headers Server::headers_of(const HttpRequest& request) const {
  const std::string_view given = request.header("x-request-id");
  const bool printable = !given.empty() && given.size() <= 128 &&
                         std::all_of(given.begin(), given.end(), [](unsigned char c) { return c > 32 && c < 127; });
  Headers headers{
      {"x-request-id", printable ? std::string(given) : fmt::format("req-{:x}-{}", now_seconds(), request.id)}};
  const std::string origin(request.header("origin"));
  const auto& allowed = options_.cors_origins;
  if (!origin.empty() && std::find(allowed.begin(), allowed.end(), origin) != allowed.end()) {
    headers.emplace_back("access-control-allow-origin", origin);
    headers.emplace_back("access-control-allow-headers", "authorization, content-type");
    headers.emplace_back("vary", "Origin");
  }
  return headers;
}

void Server::reply(const HttpRequest& request, int status, const OrderedJson& json) {
  Headers headers = headers_of(request);
  headers.emplace_back("content-type", "application/json");
  http_->respond(request.id, status, headers, json_text(json));
}

void Server::refuse(const HttpRequest& request, const ApiError& error) {
  Headers headers = headers_of(request);
  headers.emplace_back("content-type", "application/json");
  if (error.retry_after > 0) headers.emplace_back("retry-after", std::to_string(error.retry_after));
  if (error.status == 429) metrics_.count("vllm:admission_rejections_total", 1, "reason=\"queue\"");
  http_->respond(request.id, error.status, headers,
                 json_text(is_anthropic(request.path) ? AnthropicDialect().error(error) : error.json()));
}

/// Pages of other origins, and names that lead here by a trick, may not ask.
void Server::check_origin(const HttpRequest& request) const {
  const std::string_view host = without_port(request.header("host")), origin = request.header("origin");
  const auto& hosts = options_.allowed_hosts;
  const bool known =
      is_loopback(host) || host == options_.host || std::find(hosts.begin(), hosts.end(), host) != hosts.end();
  if (!known && !host.empty() && keys_.empty()) {
    throw ApiError(421, fmt::format("host '{}': this server does not go by that name (allowed_host)", host));
  }
  if (origin.empty() || origin == "null") return;
  const size_t scheme = origin.find("://");
  const bool own = scheme != std::string_view::npos && origin.substr(scheme + 3) == request.header("host");
  const auto& allowed = options_.cors_origins;
  if (!own && std::find(allowed.begin(), allowed.end(), origin) == allowed.end()) {
    throw ApiError(403, fmt::format("origin '{}': pages from there may not ask (cors_origin)", origin));
  }
}

const ApiKey& Server::key_of(const HttpRequest& request) const {
  static const ApiKey anyone{"", "", true};
  if (keys_.empty()) return anyone;
  std::string_view given = request.header("authorization");
  if (given.starts_with("Bearer ")) given.remove_prefix(7);
  if (given.empty()) given = request.header("x-api-key");
  const ApiKey* found = matching(keys_, given);
  if (found == nullptr) throw ApiError(401, "the key is missing or wrong: expected \"Authorization: Bearer KEY\"");
  return *found;
}

OrderedJson Server::body_of(const HttpRequest& request) const {
  if (request.header("content-type").starts_with("multipart/")) {
    throw ApiError(415, "content-type: got a multipart body, expected JSON");
  }
  return parse_ordered_json(request.body, "the body");
}

void Server::answer(const HttpRequest& request) {
  try {
    check_origin(request);
    if (request.method == "OPTIONS") {
      http_->respond(request.id, 204, headers_of(request), "");
      return;
    }
    static const ApiKey nobody{"", "", false};
    const bool open = request.path == "/" || request.path == "/ready" || request.path == "/version";
    route(request, open ? nobody : key_of(request));
  } catch (...) {
    try {
      refuse(request, api_error_of(std::current_exception()));
    } catch (const std::exception& error) {
      spdlog::error("request {}: {}", request.id, error.what());
    }
  }
}

void Server::route(const HttpRequest& request, const ApiKey& key) {
  const bool get = request.method == "GET", post = request.method == "POST";
  std::string path = request.path, model;
  if (path.starts_with("/m/")) {
    const size_t end = path.find('/', 3);
    model = path.substr(3, end == std::string::npos ? end : end - 3);
    path = end == std::string::npos ? "" : path.substr(end);
    catalog_.find(model);
  }
  auto text = [&](const char* type, const std::string& body, int status = 200) {
    Headers headers = headers_of(request);
    headers.emplace_back("content-type", type);
    http_->respond(request.id, status, headers, body);
  };
  if (get && path == "/") {
    Headers headers = headers_of(request);
    headers.insert(headers.end(),
                   {{"content-type", "text/html; charset=utf-8"},
                    {"content-security-policy",
                     "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; "
                     "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"},
                    {"x-content-type-options", "nosniff"}});
    return http_->respond(request.id, 200, headers, page());
  }
  if (get && path == "/ready") {
    const Load load = service_->load();
    if (service_->draining()) throw ApiError(503, "draining", "", 1);
    if (load.seconds_since_step > kStall)
      throw ApiError(503, fmt::format("no step for {:.0f} s", load.seconds_since_step));
    return reply(request, 200, {{"status", "ready"}});
  }
  if (get && path == "/version") return reply(request, 200, {{"version", kVersion}});
  if (get && path == "/metrics") return text("text/plain; version=0.0.4; charset=utf-8", metrics());
  if (get && path == "/v1/models") return reply(request, 200, models());
  if (get && path.starts_with("/v1/models/")) return reply(request, 200, model_json(*catalog_.find(path.substr(11))));
  if (get && path == "/tokenizer_info") return reply(request, 200, tokenizer_info(around_));
  if (get && path == "/lora-adapters") {
    OrderedJson list = OrderedJson::array();
    for (const auto& entry : catalog_.all()) {
      if (!entry->path.empty() && !entry->parent.empty()) {
        list.push_back({{"id", entry->name}, {"path", entry->path}, {"scale", 0.0}});
      }
    }
    return reply(request, 200, list);
  }
  if (post && (path == "/v1/chat/completions" || path == "/v1/completions")) {
    const bool chat = path == "/v1/chat/completions";
    return complete(request, key, read_completion(body_of(request), chat, model, around_), std::make_unique<Dialect>());
  }
  auto translated = [&](const OrderedJson& chat, std::unique_ptr<Dialect> dialect) {
    complete(request, key, read_completion(chat, /*chat=*/true, model, around_), std::move(dialect));
  };
  if (post && path == "/v1/messages") {
    return translated(chat_of_messages(body_of(request), /*counts=*/false), std::make_unique<AnthropicDialect>());
  }
  if (post && path == "/v1/responses") {
    const OrderedJson body = body_of(request);
    return translated(chat_of_response(body), std::make_unique<ResponsesDialect>(body));
  }
  if (post && path == "/v1/messages/count_tokens") {
    const OrderedJson chat = chat_of_messages(body_of(request), /*counts=*/true);
    return reply(request, 200, {{"input_tokens", read_chat_prompt(chat, model, around_).size()}});
  }
  if (post && path == "/v1/embeddings")
    return reply(request, 200, embeddings(body_of(request), model, around_, *opened_.model, *service_));
  if (post && path == "/tokenize") return reply(request, 200, tokenize(body_of(request), around_));
  if (post && path == "/detokenize") return reply(request, 200, detokenize(body_of(request), around_));
  if (post && (path == "/v1/load_lora_adapter" || path == "/v1/unload_lora_adapter")) {
    if (!options_.allow_runtime_load)
      throw ApiError(403, "adapters are not loaded at run time here (allow_runtime_load)");
    if (!key.admin) throw ApiError(403, "expected an admin's key");
    const bool loads = path == "/v1/load_lora_adapter";
    const OrderedJson body = body_of(request);
    loads ? load_adapter(body) : unload_adapter(body);
    return text("text/plain", fmt::format("Success: LoRA adapter '{}' {} successfully.",
                                          body["lora_name"].get<std::string>(), loads ? "added" : "removed"));
  }
  if (post && path == "/lora-adapters") {
    throw ApiError(405,
                   "a scale for everyone would change the answers of others' requests that run; expected \"lora\": "
                   "[{\"name\", \"scale\"}] in the request itself");
  }
  throw ApiError(404, fmt::format("{} {}: there is no such route", request.method, request.path));
}

void Server::complete(const HttpRequest& request, const ApiKey& key, Completion asked,
                      std::unique_ptr<Dialect> dialect) {
  for (size_t i = 0; i < asked.unknown.size(); ++i) metrics_.count("moesaic:unknown_fields_total");
  if (!keys_.empty())
    asked.salt = key.name + "\n" + asked.salt;  // no one learns what others asked from the time it takes
  const std::shared_ptr<const Entry> entry = asked.entry;
  const std::string named = catalog_.holds(entry->name) ? entry->name : "mixed";
  metrics_.count("moesaic:mixture_requests_total", 1, fmt::format("model=\"{}\"", named));
  Headers headers = headers_of(request);
  headers.emplace_back("x-moesaic-mixture", entry->hash.substr(0, 16));
  auto done = [this, request, key, entry, named](const Outcome& outcome) {
    {
      const std::lock_guard lock(mutex_);
      exchanges_.erase(request.id);
    }
    log(request, key, named, entry.get(), outcome);
  };
  const auto exchange = std::make_shared<Exchange>(*http_, request.id, std::move(asked), around_, metrics_,
                                                   std::move(headers), std::move(dialect), done);
  {
    const std::lock_guard lock(mutex_);
    exchanges_[request.id] = exchange;
  }
  try {
    exchange->start(*service_, key.name);
  } catch (...) {
    const std::lock_guard lock(mutex_);
    exchanges_.erase(request.id);
    throw;
  }
}

void Server::log(const HttpRequest& request, const ApiKey& key, const std::string& model, const Entry* entry,
                 const Outcome& outcome) {
  if (log_file_ == nullptr) return;
  const OrderedJson line = {{"time", now_seconds()},
                            {"request_id", headers_of(request).front().second},
                            {"traceparent", std::string(request.header("traceparent"))},
                            {"key", key.name},
                            {"route", request.path},
                            {"model", model},
                            {"mixture", entry->hash.substr(0, 16)},
                            {"prompt_tokens", outcome.prompt_tokens},
                            {"cached_tokens", outcome.cached_tokens},
                            {"new_tokens", outcome.completion_tokens},
                            {"first_token_ms", std::round(outcome.first_token_seconds * 1e4) / 10},
                            {"total_ms", std::round(outcome.seconds * 1e4) / 10},
                            {"finish", outcome.finish},
                            {"status", outcome.status}};
  const std::lock_guard lock(log_mutex_);
  fmt::print(log_file_, "{}\n", json_text(line));
  std::fflush(log_file_);
}

OrderedJson Server::model_json(const Entry& entry) const {
  return {{"id", entry.name},
          {"object", "model"},
          {"created", entry.created},
          {"owned_by", "moesaic"},
          {"root", entry.path.empty() ? OrderedJson(nullptr) : OrderedJson(entry.path)},
          {"parent", entry.parent.empty() ? OrderedJson(nullptr) : OrderedJson(entry.parent)},
          {"max_model_len", around_.max_model_len},
          {"moesaic", entry.facts}};
}

OrderedJson Server::models() const {
  OrderedJson list = OrderedJson::array();
  for (const auto& entry : catalog_.all()) list.push_back(model_json(*entry));
  return {{"object", "list"}, {"data", std::move(list)}};
}

void Server::load_adapter(const OrderedJson& body) {
  Fields fields(body);
  const std::string name = fields.text("lora_name", ""), path = fields.text("lora_path", "");
  const bool in_place = fields.flag("load_inplace", false);
  fields.unknown();
  try {
    check_name(name);
  } catch (const UsageError& error) {
    throw ApiError(400, error.what(), "lora_name");
  }
  std::error_code error;
  const fs::path dir = fs::canonical(path, error);
  const bool inside =
      !error && std::any_of(options_.adapter_roots.begin(), options_.adapter_roots.end(), [&](const auto& root) {
        std::error_code ignored;
        const fs::path below = dir.lexically_relative(fs::canonical(root, ignored));
        return !below.empty() && *below.begin() != "..";
      });
  // What lies elsewhere is not told apart from what is not there.
  if (!inside || !fs::is_directory(dir)) {
    throw ApiError(404, fmt::format("lora_path: no adapter at '{}' below an adapter_root", path), "lora_path");
  }
  const std::lock_guard lock(loading_);
  const bool taken = catalog_.holds(name), reloads = in_place && attached_.contains(name);
  if (taken && !reloads) {
    throw ApiError(409, fmt::format("lora_name: '{}' is taken; \"load_inplace\": true loads it anew", name),
                   "lora_name");
  }
  const std::string before = reloads ? attached_[name] : "";
  try {
    service_->between_steps([&](generate::Engine& engine) { catalog_.put(open_adapter({name, dir, 1.0}, engine)); });
  } catch (const Error& failure) {
    throw ApiError(422, failure.what(), "lora_path");
  }
  if (!before.empty()) service_->detach(before);
}

void Server::unload_adapter(const OrderedJson& body) {
  Fields fields(body);
  const std::string name = fields.text("lora_name", "");
  fields.ignore("lora_int_id");
  fields.unknown();
  const std::lock_guard lock(loading_);
  const auto found = attached_.find(name);
  if (found == attached_.end())
    throw ApiError(404, fmt::format("lora_name: there is no adapter '{}'", name), "lora_name");
  for (const auto& entry : catalog_.all()) {
    const bool uses = std::any_of(entry->weights.begin(), entry->weights.end(),
                                  [&](const auto& part) { return part.first == found->second; });
    if (uses && entry->name != name) {
      throw ApiError(409, fmt::format("lora_name: the mixture '{}' is made of '{}'", entry->name, name), "lora_name");
    }
  }
  catalog_.remove(name);
  service_->detach(found->second);
  attached_.erase(found);
}

std::string Server::metrics() const {
  const Load load = service_->load();
  return metrics_.text({
      {"vllm:num_requests_running", "Requests whose answers are in the making", static_cast<double>(load.running)},
      {"vllm:num_requests_waiting", "Requests in the queue", static_cast<double>(load.waiting)},
      {"vllm:kv_cache_usage_perc", "Share of the memory for keys and values that is reserved or kept",
       load.memory_share},
      {"moesaic:adapters_resident", "Adapters beside the base", static_cast<double>(catalog_.all().size() - 1)},
      {"moesaic:connections", "Open connections", static_cast<double>(http_->connections())},
  });
}

std::string Server::page() const { return std::string(kServeHtml); }

}  // namespace moesaic::serve
