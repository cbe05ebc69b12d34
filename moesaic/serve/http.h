// The HTTP server of the bridge (hyper) as C++ sees it.
#pragma once
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

struct BridgeHttp;

namespace moesaic::serve {

using Headers = std::vector<std::pair<std::string, std::string>>;

/// One request that wants one answer.
struct HttpRequest {
  uint64_t id = 0;
  std::string method, path;
  Headers headers;  // names in lower case
  std::string body;

  /// "" when it has none of this name.
  std::string_view header(std::string_view name) const;
};

struct HttpLimits {
  size_t body_bytes = size_t{8} << 20;
  size_t header_bytes = size_t{32} << 10;
  size_t headers = 100;
  size_t connections = 4096;
  size_t queued_bytes = size_t{4} << 20;  // of a streamed answer that its client has not taken
  size_t queued_pieces = 32768;           // likewise: some 4 MiB of single tokens
  double header_seconds = 75;             // for a request's head, counted from the connection's last answer
  double body_seconds = 30;
};

/// Listens from its construction on, on a thread of its own. Answers may be given from any thread; those to clients
/// that left go nowhere.
class HttpServer {
 public:
  /// Both are called on the server's thread; they must not block.
  struct Handler {
    std::function<void(HttpRequest)> request;
    std::function<void(uint64_t id)> gone;  // the client of an unfinished exchange left
  };
  enum class Sent { kOk, kGone, kTooSlow };

  /// port 0: a free one. Throws UsageError when it can't listen there.
  HttpServer(const std::string& host, uint16_t port, const HttpLimits& limits, Handler handler);
  ~HttpServer();
  HttpServer(const HttpServer&) = delete;
  HttpServer& operator=(const HttpServer&) = delete;

  uint16_t port() const;
  size_t connections() const;
  /// A whole answer.
  void respond(uint64_t id, int status, const Headers& headers, std::string_view body);
  /// The head of an answer that comes in pieces.
  void begin(uint64_t id, int status, const Headers& headers);
  Sent send(uint64_t id, std::string_view piece);
  void end(uint64_t id);
  /// Breaks the connection, so that the client sees that its answer is not whole.
  void abort(uint64_t id);
  /// Takes no new connections; those there are close behind their answers.
  void drain();

 private:
  Handler handler_;
  BridgeHttp* http_ = nullptr;
};

}  // namespace moesaic::serve
