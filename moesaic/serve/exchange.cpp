#include "moesaic/serve/exchange.h"

#include <algorithm>

#include "moesaic/serve/api_error.h"

namespace moesaic::serve {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point then) { return std::chrono::duration<double>(Clock::now() - then).count(); }

std::string unique_name(const char* prefix) {
  return fmt::format("{}-{:013x}{:013x}", prefix, random_number(), random_number());
}

/// Its id has nine letters and digits: Mistral's templates take no other.
OrderedJson call_json(const ToolCall& call) {
  return {{"id", fmt::format("{:013x}", random_number()).substr(0, 9)},
          {"type", "function"},
          {"function", {{"name", call.name}, {"arguments", call.arguments}}}};
}

}  // namespace

/// One answer to one prompt.
struct Exchange::Choice {
  std::string text, finish, stop;
  std::string whole;                 // with tools: all of the text
  size_t sent = 0;                   // of it as content
  std::vector<OrderedJson> content;  // of chat: a token each
  OrderedJson tokens = OrderedJson::array(), values = OrderedJson::array(), top = OrderedJson::array(),
              offsets = OrderedJson::array();  // of completions
  size_t offset = 0;                           // of the next token's text
  bool opened = false;                         // its first chunk was sent
  Clock::time_point last{};                    // token
  int64_t count = 0;
};

/// Hears of one prompt.
class Exchange::Prompt : public generate::Listener {
 public:
  Prompt(std::shared_ptr<Exchange> exchange, size_t number) : exchange_(std::move(exchange)), number_(number) {}
  void began(int64_t reused, std::vector<generate::TokenLogprob> prompt) override {
    exchange_->began(number_, reused, std::move(prompt));
  }
  bool more(int64_t answer, generate::Piece piece) override {
    return exchange_->more(number_, answer, std::move(piece));
  }
  void failed(std::exception_ptr error) override { exchange_->failed(error); }

 private:
  std::shared_ptr<Exchange> exchange_;
  size_t number_;
};

Exchange::Exchange(HttpServer& http, uint64_t id, Completion asked, const Surroundings& around, Metrics& metrics,
                   Headers headers, std::unique_ptr<Dialect> dialect, Done done)
    : http_(http),
      id_(id),
      asked_(std::move(asked)),
      around_(around),
      metrics_(metrics),
      headers_(std::move(headers)),
      dialect_(std::move(dialect)),
      done_(std::move(done)),
      name_(unique_name(asked_.chat ? "chatcmpl" : "cmpl")),
      created_(std::chrono::duration_cast<std::chrono::seconds>(std::chrono::system_clock::now().time_since_epoch())
                   .count()),
      start_(Clock::now()),
      choices_(asked_.prompts.size() * asked_.sampling.num_return_sequences) {
  for (const auto& prompt : asked_.prompts) outcome_.prompt_tokens += std::ssize(prompt);
}

Exchange::~Exchange() = default;

void Exchange::start(Service& service, const std::string& key) {
  service_ = &service;
  const auto deadline =
      start_ + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(asked_.timeout));
  for (size_t i = 0; i < asked_.prompts.size(); ++i) {
    generate::Request request{
        {asked_.prompts[i]}, asked_.sampling, asked_.logprobs, asked_.echo && asked_.logprobs >= 0, asked_.salt};
    request.sampling.first = static_cast<int64_t>(i);
    try {
      const int64_t number = service.submit(
          {std::move(request), asked_.entry->weights, std::make_shared<Prompt>(shared_from_this(), i), key, deadline});
      const std::lock_guard lock(mutex_);
      numbers_.push_back(number);
    } catch (const ApiError&) {
      std::unique_lock lock(mutex_);
      const bool first = !std::exchange(over_, true) && !begun_;
      const std::vector<int64_t> numbers = numbers_;
      lock.unlock();
      for (const int64_t number : numbers) service.cancel(number);
      if (first) throw;
      return;
    }
  }
}

void Exchange::gone() {
  std::unique_lock lock(mutex_);
  if (std::exchange(over_, true)) return;
  metrics_.count("moesaic:cancelled_total");
  const std::vector<int64_t> numbers = numbers_;
  Outcome outcome = outcome_;
  outcome.status = 499;
  lock.unlock();
  for (const int64_t number : numbers) service_->cancel(number);
  finish(std::move(outcome));
}

std::string Exchange::text_of(int64_t id) const { return around_.tokenizer.decode({id}, false); }

OrderedJson Exchange::token_json(const generate::TokenLogprob& token) const {
  auto entry = [&](int64_t id, float logprob) {
    const std::string text = text_of(id);
    return OrderedJson{
        {"token", text}, {"logprob", logprob}, {"bytes", std::vector<uint8_t>(text.begin(), text.end())}};
  };
  OrderedJson json = entry(token.id, token.logprob);
  json["top_logprobs"] = OrderedJson::array();
  for (const auto& [id, logprob] : token.top) json["top_logprobs"].push_back(entry(id, logprob));
  return json;
}

/// Puts a token into the lists of a completion's logprobs; without `logprob`, the first of a prompt.
void Exchange::add_logprob(Choice& choice, const generate::TokenLogprob* logprob, int64_t id) const {
  const std::string text = text_of(id);
  choice.tokens.push_back(text);
  choice.offsets.push_back(choice.offset);
  choice.offset += text.size();
  choice.values.push_back(logprob == nullptr ? OrderedJson(nullptr) : OrderedJson(logprob->logprob));
  if (logprob == nullptr) {
    choice.top.push_back(nullptr);
    return;
  }
  OrderedJson top = OrderedJson::object();
  for (const auto& [other, value] : logprob->top) top.emplace(text_of(other), value);
  top[text] = logprob->logprob;
  choice.top.push_back(std::move(top));
}

OrderedJson Exchange::envelope() const {
  const char* object = asked_.chat ? (asked_.stream ? "chat.completion.chunk" : "chat.completion") : "text_completion";
  return {{"id", name_},
          {"object", object},
          {"created", created_},
          {"model", asked_.model.empty() ? asked_.entry->name : asked_.model}};
}

OrderedJson Exchange::chunk(size_t choice, OrderedJson delta, OrderedJson logprobs, bool last) const {
  OrderedJson json = envelope();
  OrderedJson one = {{"index", choice}};
  one[asked_.chat ? "delta" : "text"] = std::move(delta);
  one["logprobs"] = std::move(logprobs);
  one["finish_reason"] = last ? OrderedJson(choices_[choice].finish) : OrderedJson(nullptr);
  one["stop_reason"] = stop_reason(choices_[choice]);
  json["choices"] = OrderedJson::array({std::move(one)});
  return json;
}

/// As vLLM has it: the stop string that was found.
OrderedJson Exchange::stop_reason(const Choice& choice) {
  return choice.stop.empty() ? OrderedJson(nullptr) : OrderedJson(choice.stop);
}

OrderedJson Exchange::usage() const {
  return {{"prompt_tokens", outcome_.prompt_tokens},
          {"completion_tokens", outcome_.completion_tokens},
          {"total_tokens", outcome_.prompt_tokens + outcome_.completion_tokens},
          {"prompt_tokens_details", {{"cached_tokens", outcome_.cached_tokens}}}};
}

void Exchange::write(const OrderedJson& chunk) {
  const auto sent = http_.send(id_, dialect_->events(chunk));
  if (sent != HttpServer::Sent::kTooSlow) return;  // departures are told
  metrics_.count("moesaic:slow_readers_total");
  http_.abort(id_);
  over_ = true;
  outcome_.status = 499;
}

void Exchange::began(size_t prompt, int64_t reused, std::vector<generate::TokenLogprob> scores) {
  const std::lock_guard lock(mutex_);
  if (over_) return;
  const std::vector<int64_t>& ids = asked_.prompts[prompt];
  outcome_.cached_tokens += reused;
  metrics_.count("vllm:prompt_tokens_total", static_cast<double>(ids.size()));
  metrics_.count("vllm:prompt_tokens_cached_total", static_cast<double>(reused));
  metrics_.count("vllm:prefix_cache_queries_total", static_cast<double>(ids.size()));
  metrics_.count("vllm:prefix_cache_hits_total", static_cast<double>(reused));
  metrics_.observe("vllm:request_prompt_tokens", static_cast<double>(ids.size()));
  if (outcome_.first_token_seconds == 0) {
    outcome_.first_token_seconds = seconds_since(start_);
    metrics_.observe("vllm:time_to_first_token_seconds", outcome_.first_token_seconds);
  }
  if (asked_.stream && !begun_) {
    begun_ = true;
    Headers headers = headers_;
    headers.insert(headers.end(), {{"content-type", "text/event-stream; charset=utf-8"},
                                   {"cache-control", "no-cache"},
                                   {"x-accel-buffering", "no"}});
    http_.begin(id_, 200, headers);
    if (const std::string first = dialect_->first(envelope(), usage()); !first.empty()) http_.send(id_, first);
  }
  const int64_t answers = asked_.sampling.num_return_sequences;
  for (int64_t i = 0; asked_.echo && i < answers; ++i) {
    Choice& choice = choices_[prompt * answers + i];
    choice.text = asked_.texts[prompt];
    if (asked_.logprobs < 0) continue;
    add_logprob(choice, nullptr, ids[0]);
    for (const auto& score : scores) add_logprob(choice, &score, score.id);
  }
}

bool Exchange::more(size_t prompt, int64_t answer, generate::Piece piece) {
  std::unique_lock lock(mutex_);
  if (over_) return false;
  const size_t number = prompt * asked_.sampling.num_return_sequences + answer;
  Choice& choice = choices_[number];
  const auto now = Clock::now();
  if (choice.count++ > 0) {
    metrics_.observe("vllm:inter_token_latency_seconds", std::chrono::duration<double>(now - choice.last).count());
  }
  choice.last = now;
  OrderedJson logprobs = nullptr;
  if (!asked_.prompt_only) {
    ++outcome_.completion_tokens;
    choice.text += piece.text;
    if (asked_.tool_format) choice.whole += piece.text;
    if (piece.logprob && asked_.chat) {
      choice.content.push_back(token_json(*piece.logprob));
      if (asked_.stream) logprobs = {{"content", std::exchange(choice.content, {})}};
    } else if (piece.logprob) {
      add_logprob(choice, &*piece.logprob, piece.id);
    }
  }
  choice.finish = asked_.prompt_only ? "length" : piece.finish_reason;
  choice.stop = piece.stop;
  ToolAnswer taken;  // what ends, with tools
  if (asked_.tool_format && !choice.finish.empty()) {
    taken = read_tool_calls(*asked_.tool_format, choice.whole);
    if (!taken.calls.empty() && choice.finish == "stop") choice.finish = "tool_calls";
  }
  if (asked_.stream) {
    if (!choice.opened && asked_.chat) {
      write(chunk(number, {{"role", "assistant"}, {"content", ""}}, nullptr));
    }
    choice.opened = true;
    if (!asked_.chat && !choice.tokens.empty()) {
      logprobs = {{"tokens", std::exchange(choice.tokens, OrderedJson::array())},
                  {"token_logprobs", std::exchange(choice.values, OrderedJson::array())},
                  {"top_logprobs", std::exchange(choice.top, OrderedJson::array())},
                  {"text_offset", std::exchange(choice.offsets, OrderedJson::array())}};
    }
    std::string text = std::exchange(choice.text, "");
    if (asked_.tool_format) {
      const bool ended = !choice.finish.empty();
      const std::string& content = ended ? taken.content : choice.whole;
      const size_t end = ended ? content.size() : certain_content(*asked_.tool_format, content);
      text = end > choice.sent ? content.substr(choice.sent, end - choice.sent) : "";
      choice.sent += text.size();
    }
    const bool says = !text.empty() || !logprobs.is_null();
    if (asked_.chat) {
      if (says && !over_) write(chunk(number, {{"content", std::move(text)}}, std::move(logprobs)));
      for (size_t i = 0; i < taken.calls.size() && !over_; ++i) {
        OrderedJson call = call_json(taken.calls[i]);
        call["index"] = i;
        write(chunk(number, {{"tool_calls", OrderedJson::array({std::move(call)})}}, nullptr));
      }
      if (!choice.finish.empty() && !over_) write(chunk(number, OrderedJson::object(), nullptr, /*last=*/true));
    } else if ((says || !choice.finish.empty()) && !over_) {
      write(chunk(number, std::move(text), std::move(logprobs), /*last=*/!choice.finish.empty()));
    }
  }
  if (over_) {
    Outcome outcome = outcome_;
    lock.unlock();
    finish(std::move(outcome));
    return false;
  }
  if (choice.finish.empty()) return true;
  metrics_.count("vllm:request_success_total", 1, fmt::format("finished_reason=\"{}\"", choice.finish));
  metrics_.observe("vllm:request_generation_tokens", static_cast<double>(choice.count));
  outcome_.finish = choice.finish;
  if (++ended_ < choices_.size()) return !asked_.prompt_only;
  over_ = true;
  end();
  Outcome outcome = outcome_;
  lock.unlock();
  finish(std::move(outcome));
  return !asked_.prompt_only;
}

/// The message of a whole answer.
OrderedJson Exchange::message_of(const Choice& choice) const {
  OrderedJson message{{"role", "assistant"}, {"content", choice.text}};
  if (!asked_.tool_format) return message;
  const ToolAnswer taken = read_tool_calls(*asked_.tool_format, choice.whole);
  if (taken.calls.empty()) return message;
  message["content"] = taken.content.empty() ? OrderedJson(nullptr) : OrderedJson(taken.content);
  for (const ToolCall& call : taken.calls) message["tool_calls"].push_back(call_json(call));
  return message;
}

/// Everything was said.
void Exchange::end() {
  if (asked_.stream) {
    if (asked_.include_usage) {
      OrderedJson json = envelope();
      json["choices"] = OrderedJson::array();
      json["usage"] = usage();
      write(json);
    }
    http_.send(id_, dialect_->last(usage()));
    http_.end(id_);
    return;
  }
  OrderedJson json = envelope(), list = OrderedJson::array();
  for (size_t i = 0; i < choices_.size(); ++i) {
    Choice& choice = choices_[i];
    OrderedJson one = {{"index", i}}, logprobs = nullptr;
    if (asked_.chat) {
      one["message"] = message_of(choice);
      if (asked_.logprobs >= 0) logprobs = {{"content", std::move(choice.content)}};
    } else {
      one["text"] = choice.text;
      if (asked_.logprobs >= 0) {
        logprobs = {{"tokens", std::move(choice.tokens)},
                    {"token_logprobs", std::move(choice.values)},
                    {"top_logprobs", std::move(choice.top)},
                    {"text_offset", std::move(choice.offsets)}};
      }
    }
    one["logprobs"] = std::move(logprobs);
    one["finish_reason"] = choice.finish;
    one["stop_reason"] = stop_reason(choice);
    list.push_back(std::move(one));
  }
  json["choices"] = std::move(list);
  json["usage"] = usage();
  json["system_fingerprint"] = around_.fingerprint;
  if (!asked_.seed_given && asked_.sampling.temperature > 0) json["moesaic"] = {{"seed", asked_.sampling.seed}};
  Headers headers = headers_;
  headers.emplace_back("content-type", "application/json");
  http_.respond(id_, 200, headers, json_text(dialect_->whole(std::move(json))));
}

void Exchange::failed(const std::exception_ptr& error) {
  const ApiError told = api_error_of(error);
  std::unique_lock lock(mutex_);
  if (std::exchange(over_, true)) return;
  const std::vector<int64_t> numbers = numbers_;
  outcome_.status = told.status;
  if (begun_) {
    // A stream that ends cleanly passes for a whole answer: it breaks instead.
    http_.send(id_, dialect_->broken(told));
    http_.abort(id_);
  } else {
    Headers headers = headers_;
    headers.emplace_back("content-type", "application/json");
    if (told.retry_after > 0) headers.emplace_back("retry-after", std::to_string(told.retry_after));
    http_.respond(id_, told.status, headers, json_text(dialect_->error(told)));
  }
  Outcome outcome = outcome_;
  lock.unlock();
  for (const int64_t number : numbers) service_->cancel(number);
  finish(std::move(outcome));
}

void Exchange::finish(Outcome outcome) {
  outcome.seconds = seconds_since(start_);
  metrics_.count("vllm:generation_tokens_total", static_cast<double>(outcome.completion_tokens));
  metrics_.observe("vllm:e2e_request_latency_seconds", outcome.seconds);
  done_(outcome);
}

}  // namespace moesaic::serve
