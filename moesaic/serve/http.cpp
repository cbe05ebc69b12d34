#include "moesaic/serve/http.h"

#include "moesaic/base/bridge_text.h"
#include "moesaic/base/check.h"
#include "moesaic/base/json.h"
#include "moesaic/base/machine.h"

namespace moesaic::serve {
namespace {

BridgeView view(std::string_view text) { return {text.data(), text.size()}; }
std::string_view text(BridgeView bytes) { return {bytes.data, bytes.size}; }

std::string header_json(const Headers& headers) {
  Json list = Json::array();
  for (const auto& [name, value] : headers) list.push_back({name, value});
  return list.dump();
}

}  // namespace

std::string_view HttpRequest::header(std::string_view name) const {
  for (const auto& [key, value] : headers) {
    if (key == name) return value;
  }
  return "";
}

HttpServer::HttpServer(const std::string& host, uint16_t port, const HttpLimits& limits, Handler handler)
    : handler_(std::move(handler)) {
  outlive_closed_pipes();
  BridgeHttpHandler functions;
  functions.context = &handler_;
  functions.request = [](void* context, uint64_t id, BridgeView head, BridgeView body) {
    HttpRequest request;
    const Json json = Json::parse(text(head));
    request.id = id;
    request.method = json["method"];
    request.path = json["path"];
    request.headers = json["headers"].get<Headers>();
    request.body = text(body);
    static_cast<Handler*>(context)->request(std::move(request));
  };
  functions.gone = [](void* context, uint64_t id) { static_cast<Handler*>(context)->gone(id); };
  OwnedText error;
  http_ = bridge_http_start(host.data(), host.size(), port,
                            {limits.body_bytes, limits.header_bytes, limits.headers, limits.connections,
                             limits.queued_bytes, limits.queued_pieces, limits.header_seconds, limits.body_seconds},
                            functions, error.out());
  MOESAIC_CHECK(http_ != nullptr, UsageError, "can't listen there: {}", error.reason());
}

HttpServer::~HttpServer() { bridge_http_free(http_); }

uint16_t HttpServer::port() const { return bridge_http_port(http_); }

size_t HttpServer::connections() const { return bridge_http_connections(http_); }

void HttpServer::respond(uint64_t id, int status, const Headers& headers, std::string_view body) {
  OwnedText error;
  const bool ok = bridge_http_respond(http_, id, static_cast<uint16_t>(status), view(header_json(headers)), view(body),
                                      error.out());
  if (!ok) throw std::logic_error(error.reason());
}

void HttpServer::begin(uint64_t id, int status, const Headers& headers) {
  OwnedText error;
  const bool ok = bridge_http_begin(http_, id, static_cast<uint16_t>(status), view(header_json(headers)), error.out());
  if (!ok) throw std::logic_error(error.reason());
}

HttpServer::Sent HttpServer::send(uint64_t id, std::string_view piece) {
  const int32_t sent = bridge_http_send(http_, id, view(piece));
  return sent == 0 ? Sent::kOk : sent == 1 ? Sent::kGone : Sent::kTooSlow;
}

void HttpServer::end(uint64_t id) { bridge_http_end(http_, id, /*abort=*/false); }

void HttpServer::abort(uint64_t id) { bridge_http_end(http_, id, /*abort=*/true); }

void HttpServer::drain() { bridge_http_drain(http_); }

}  // namespace moesaic::serve
