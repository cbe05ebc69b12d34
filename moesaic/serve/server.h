// `moesaic serve`: routes, keys, adapters that come and go, and the life of the process.
#pragma once
#include <condition_variable>
#include <deque>
#include <filesystem>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "moesaic/run/open.h"
#include "moesaic/serve/api_error.h"
#include "moesaic/serve/exchange.h"
#include "moesaic/serve/keys.h"

namespace moesaic::serve {

/// Every setting of the server; docs/serve.md lists them with their flags.
struct ServeOptions {
  std::string served_name;  // the base's; "" = its file's or folder's
  std::string host = "127.0.0.1";
  uint16_t port = 8000;                    // 0 = a free one
  std::vector<std::string> mixtures;       // NAME=ADAPTER:SCALE[,ADAPTER:SCALE ...]
  int64_t max_seqs = 64;                   // answers in the making side by side
  int64_t max_queue = 256;                 // requests that wait
  int64_t max_model_len = 0;               // tokens of a prompt and its answer; 0 = the model's own
  int64_t kv_memory = int64_t{1} << 30;    // bytes of keys and values
  int64_t prefix_texts = 64;               // texts kept for prompts that begin alike; 0 = none
  double step_ms = 150;                    // how long a step may take where prompts are read in parts
  bool deterministic = true;               // an answer has the same bits in any company
  double max_request_time = 600;           // seconds
  double queue_timeout = 60;               // seconds
  double drain_timeout = 30;               // seconds
  std::string api_keys;                    // file: NAME SHA256 [user|admin] a line; "" = anyone may ask
  std::vector<std::string> adapter_roots;  // folders below which adapters may be loaded at run time
  bool allow_runtime_load = false;
  std::vector<std::string> allowed_hosts;  // names under which it may be called beside loopback's and `host`
  std::vector<std::string> cors_origins;   // pages of other origins that may ask
  bool insecure = false;                   // other hosts than loopback's without keys
  std::string request_log;                 // file, "-" = standard output: a JSON line a request
};

/// Throws UsageError naming everything that is out of range.
void validate(const ServeOptions& options);

/// A model that answers over HTTP from its construction on.
class Server {
 public:
  /// `opened` has no adapters attached; `adapters` are those to begin with. `path`: what was opened.
  Server(run::Opened opened, const std::string& path, const std::vector<run::AdapterReference>& adapters,
         const ServeOptions& options);
  /// What still runs fails.
  ~Server();

  uint16_t port() const { return http_->port(); }
  /// "16 MiB for 640 tokens", ...: what it holds and may hold.
  std::vector<std::string> plan() const;
  /// Takes nothing new, finishes what it can within drain_timeout; returns how many requests were cut.
  int64_t drain();

 private:
  void take(HttpRequest request);
  void gone(uint64_t id);
  void work();
  void answer(const HttpRequest& request);
  void route(const HttpRequest& request, const ApiKey& key);
  void complete(const HttpRequest& request, const ApiKey& key, Completion asked, std::unique_ptr<Dialect> dialect);
  void reply(const HttpRequest& request, int status, const OrderedJson& json);
  void refuse(const HttpRequest& request, const ApiError& error);
  Headers headers_of(const HttpRequest& request) const;
  void check_origin(const HttpRequest& request) const;
  const ApiKey& key_of(const HttpRequest& request) const;
  OrderedJson body_of(const HttpRequest& request) const;

  OrderedJson models() const;
  OrderedJson model_json(const Entry& entry) const;
  std::string metrics() const;
  std::string page() const;
  void add_mixture(const std::string& mixture);
  void load_adapter(const OrderedJson& body);
  void unload_adapter(const OrderedJson& body);
  Entry open_adapter(const run::AdapterReference& reference, generate::Engine& engine);
  void log(const HttpRequest& request, const ApiKey& key, const std::string& model, const Entry* entry,
           const Outcome& outcome);

  run::Opened opened_;
  const ServeOptions options_;
  tokenizer::Grammars grammars_;
  Surroundings around_;
  Catalog catalog_;
  Metrics metrics_;
  std::vector<ApiKey> keys_;
  std::map<std::string, std::string> attached_;  // adapter's name -> the name it is attached under
  std::mutex loading_;                           // one adapter comes or goes at a time
  int64_t loaded_ = 0;
  std::unique_ptr<Service> service_;

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<HttpRequest> requests_;  // that wait for a worker
  bool stopping_ = false;
  std::map<uint64_t, std::weak_ptr<Exchange>> exchanges_;
  std::mutex log_mutex_;
  std::FILE* log_file_ = nullptr;
  std::unique_ptr<HttpServer> http_;
  std::vector<std::thread> workers_;
};

}  // namespace moesaic::serve
