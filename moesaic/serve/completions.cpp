#include "moesaic/serve/completions.h"

#include <algorithm>
#include <random>

#include "moesaic/base/check.h"
#include "moesaic/serve/fields.h"

namespace moesaic::serve {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int64_t kMostAnswers = 16, kMostPrompts = 256, kMostTop = 20, kDefaultTokens = 16;
constexpr size_t kMostStops = 64, kMostStopBytes = 1024, kMostBias = 1024;

double seconds_since(Clock::time_point then) { return std::chrono::duration<double>(Clock::now() - then).count(); }

uint64_t random_number() {
  static thread_local std::random_device device;
  return (static_cast<uint64_t>(device()) << 32 | device()) >> 11;  // 53 bits: JSON's readers keep them
}

std::string unique_name(const char* prefix) {
  return fmt::format("{}-{:013x}{:013x}", prefix, random_number(), random_number());
}

/// Token ids: [1, 2, 3].
std::vector<int64_t> read_ids(Fields& fields, const OrderedJson& json, const std::string& name, int64_t vocab_size) {
  std::vector<int64_t> ids;
  for (const OrderedJson& id : json) {
    if (!id.is_number_integer() || id.get<int64_t>() < 0 || id.get<int64_t>() >= vocab_size) {
      fields.refuse(name, fmt::format("token ids from 0 to {}", vocab_size - 1));
    }
    ids.push_back(id.get<int64_t>());
  }
  return ids;
}

/// A text, texts, ids, or lists of ids.
void read_prompts(Fields& fields, const Surroundings& around, Completion& asked) {
  const char* expected = "a text, a list of texts, token ids or a list of them";
  const OrderedJson* prompt = fields.find("prompt");
  if (prompt == nullptr || (prompt->is_array() && prompt->empty())) fields.refuse("prompt", expected);
  const bool one = prompt->is_string() || (prompt->is_array() && prompt->front().is_number());
  const OrderedJson list = one ? OrderedJson::array({*prompt}) : *prompt;
  if (!list.is_array() || std::ssize(list) > kMostPrompts) {
    fields.refuse("prompt", fmt::format("{}, {} prompts at most", expected, kMostPrompts));
  }
  for (const OrderedJson& each : list) {
    if (each.is_string()) {
      asked.texts.push_back(each.get<std::string>());
      asked.prompts.push_back(around.tokenizer.encode_start(asked.texts.back()).ids);
    } else if (each.is_array()) {
      asked.prompts.push_back(read_ids(fields, each, "prompt", around.vocab_size));
      asked.texts.push_back(asked.echo ? around.tokenizer.decode(asked.prompts.back(), false) : "");
    } else {
      fields.refuse("prompt", expected);
    }
    if (asked.prompts.back().empty()) fields.refuse("prompt", "at least one token in each prompt");
  }
}

void read_sampling(Fields& fields, const Surroundings& around, Completion& asked) {
  generate::SamplingOptions& sampling = asked.sampling;
  sampling.temperature = fields.number("temperature", 1.0, 0, 100);
  sampling.top_p = fields.number("top_p", 1.0, 0, 1);
  if (sampling.top_p <= 0) fields.refuse("top_p", "a number above 0, up to 1");
  sampling.top_k = std::max<int64_t>(fields.integer("top_k", 0, -1), 0);
  sampling.min_p = fields.number("min_p", 0.0, 0, 1);
  sampling.repetition_penalty = fields.number("repetition_penalty", 1.0, 1e-3, 100);
  sampling.frequency_penalty = fields.number("frequency_penalty", 0.0, -2, 2);
  sampling.presence_penalty = fields.number("presence_penalty", 0.0, -2, 2);
  sampling.num_return_sequences = fields.integer("n", 1, 1, kMostAnswers);
  if (sampling.num_return_sequences > 1 && sampling.temperature == 0) {
    fields.refuse("n", "1 at temperature 0: all answers would be the same");
  }
  asked.seed_given = fields.has("seed");
  sampling.seed = static_cast<uint64_t>(fields.integer("seed", 0, std::numeric_limits<int64_t>::min()));
  if (!asked.seed_given) sampling.seed = random_number();
  sampling.stop = fields.texts("stop", kMostStops, kMostStopBytes);
  std::erase(sampling.stop, "");
  sampling.include_stop = fields.flag("include_stop_str_in_output", false);
  if (!fields.flag("ignore_eos", false)) sampling.eos_ids = around.eos_ids;
  if (const OrderedJson* ids = fields.find("stop_token_ids")) {
    if (!ids->is_array()) fields.refuse("stop_token_ids", "a list of token ids");
    for (const int64_t id : read_ids(fields, *ids, "stop_token_ids", around.vocab_size)) sampling.eos_ids.push_back(id);
  }
  if (const OrderedJson* bias = fields.find("logit_bias")) {
    if (!bias->is_object() || bias->size() > kMostBias) {
      fields.refuse("logit_bias",
                    fmt::format("an object of up to {} token ids with numbers from -100 to 100", kMostBias));
    }
    for (const auto& [text, value] : bias->items()) {
      size_t used = 0;
      int64_t id = -1;
      try {
        id = std::stoll(text, &used);
      } catch (const std::exception&) {
      }
      const bool fits = used == text.size() && id >= 0 && id < around.vocab_size && value.is_number() &&
                        std::abs(value.get<double>()) <= 100;
      if (!fits) fields.refuse("logit_bias", "token ids with numbers from -100 to 100");
      const double number = value.get<double>();
      sampling.logit_bias.emplace_back(id, number <= -100 ? -std::numeric_limits<double>::infinity() : number);
    }
  }
}

/// How long answers may be, against what the context leaves.
void read_lengths(Fields& fields, const Surroundings& around, Completion& asked) {
  const bool newer = fields.has("max_completion_tokens");
  const char* name = newer ? "max_completion_tokens" : "max_tokens";
  const int64_t least = asked.echo ? 0 : 1;
  fields.ignore("max_tokens");
  int64_t left = around.max_model_len;
  for (const std::vector<int64_t>& prompt : asked.prompts) {
    left = std::min<int64_t>(left, around.max_model_len - std::ssize(prompt));
    if (left < 1) {
      throw ApiError(400,
                     fmt::format("the prompt has {} tokens, expected {} at most: the model's context is {} tokens long",
                                 prompt.size(), around.max_model_len - 1, around.max_model_len),
                     asked.chat ? "messages" : "prompt");
    }
  }
  int64_t wanted = fields.integer(name, asked.chat ? left : std::min(kDefaultTokens, left), least);
  if (wanted > left) {
    throw ApiError(400,
                   fmt::format("{}: got {}, expected {} at most: that is what the prompt leaves of a context of {}",
                               name, wanted, left, around.max_model_len),
                   name);
  }
  asked.prompt_only = wanted == 0;
  asked.sampling.max_new_tokens = std::max<int64_t>(wanted, 1);
  asked.sampling.min_new_tokens = fields.integer("min_tokens", 0, 0, asked.sampling.max_new_tokens);
}

/// What peers take and this server does not: refused unless it changes nothing.
void refuse_foreign(Fields& fields, int64_t answers) {
  const std::string lacks = "this server has no such thing";
  for (const char* name : {"tools", "functions", "tool_choice", "function_call"}) {
    fields.only(name, {OrderedJson::array(), "none", "auto"}, "this server does not read tool calls yet");
  }
  fields.only("response_format", {OrderedJson::object({{"type", "text"}})},
              "this server does not constrain answers yet");
  for (const char* name : {"guided_json", "guided_regex", "guided_choice", "guided_grammar", "grammar", "json_schema",
                           "structured_outputs", "prompt_embeds", "audio"}) {
    fields.only(name, {}, lacks);
  }
  fields.only("suffix", {""}, lacks);
  fields.only("bad_words", {OrderedJson::array()}, "forbid tokens with logit_bias");
  fields.only("modalities", {OrderedJson::array({"text"})}, lacks);
  fields.only("best_of", {1, answers}, "it is `n` here");
  fields.only("use_beam_search", {false}, "`moesaic generate --num_beams` has it");
  fields.only("length_penalty", {1, 1.0, 0, 0.0}, lacks);
  fields.only("typical_p", {1, 1.0}, lacks);
  fields.only("top_n_sigma", {-1, -1.0}, lacks);
  for (const char* name : {"mirostat", "dry_multiplier", "xtc_probability", "tfs_z"})
    fields.only(name, {0, 0.0}, lacks);
  fields.only("continue_final_message", {false}, lacks);
  fields.only("store", {false}, "this server keeps nothing");
  for (const char* name :
       {"user", "metadata", "priority", "parallel_tool_calls", "service_tier", "reasoning_effort", "prompt_cache_key",
        "safety_identifier", "skip_special_tokens", "spaces_between_special_tokens", "cache_prompt"}) {
    fields.ignore(name);
  }
}

}  // namespace

OrderedJson read_messages(const OrderedJson& given) {
  const OrderedJson kNull = nullptr;
  if (!given.is_array() || given.empty()) throw ApiError(400, "messages: expected a list of at least one", "messages");
  OrderedJson messages = OrderedJson::array();
  for (size_t i = 0; i < given.size(); ++i) {
    const std::string path = fmt::format("messages[{}]", i);
    Fields fields(given[i], path);
    std::string role = fields.text("role", "");
    static const std::vector<std::string> kRoles{"system", "developer", "user", "assistant", "tool"};
    if (std::find(kRoles.begin(), kRoles.end(), role) == kRoles.end()) {
      fields.refuse("role", fmt::format("{}", fmt::join(kRoles, ", ")));
    }
    if (role == "developer") role = "system";
    OrderedJson message = given[i];
    message["role"] = role;
    const OrderedJson* content = fields.find("content");
    if (content != nullptr && content->is_array()) {
      std::string text;
      for (size_t part = 0; part < content->size(); ++part) {
        Fields of_part((*content)[part], fmt::format("{}.content[{}]", path, part));
        if (of_part.text("type", "") != "text") of_part.refuse("type", "text: images and sound are not read here");
        text += of_part.text("text", "");
      }
      message["content"] = text;
    } else if (content != nullptr && !content->is_string()) {
      fields.refuse("content", "a text or a list of parts of type text");
    } else if (content == nullptr && role != "assistant") {
      fields.refuse("content", "a text");
    } else if (content == nullptr) {
      message["content"] = "";
    }
    // Templates take one system message.
    if (role == "system" && !messages.empty() && messages.back()["role"] == "system") {
      messages.back()["content"] =
          messages.back()["content"].get<std::string>() + "\n\n" + message["content"].get<std::string>();
    } else {
      messages.push_back(std::move(message));
    }
  }
  return messages;
}

std::shared_ptr<const Entry> read_entry(Fields& fields, const std::string& path_model, const Catalog& catalog,
                                        std::string& model) {
  model = fields.text("model", "");
  if (!path_model.empty()) {
    if (!model.empty() && model != path_model)
      fields.refuse("model", fmt::format("'{}', as the path says, or none", path_model));
    model = path_model;
  }
  const OrderedJson* lora = fields.find("lora");
  const std::string adapter = fields.text("adapter_id", "");
  if (lora == nullptr) return catalog.find(adapter.empty() ? model : adapter);
  if (!lora->is_array()) fields.refuse("lora", "a list of {\"name\", \"scale\"}");
  std::vector<std::pair<std::string, double>> parts;
  for (size_t i = 0; i < lora->size(); ++i) {
    Fields part((*lora)[i], fmt::format("lora[{}]", i));
    const std::string name = part.text("name", "");
    if (name.empty() || !catalog.holds(name)) {
      if (name.empty()) part.refuse("name", "the name of an adapter");
      catalog.find(name);
    }
    if (!part.has("scale")) part.refuse("scale", "a number: how much of it the answer has");
    parts.emplace_back(name, part.number("scale", 0, -100, 100));
    for (const std::string& other : part.unknown()) part.refuse(other, "\"name\" and \"scale\" alone");
  }
  return std::make_shared<const Entry>(catalog.mixed("mixed", parts));
}

Completion read_completion(const OrderedJson& body, bool chat, const std::string& path_model,
                           const Surroundings& around) {
  Completion asked;
  asked.chat = chat;
  Fields fields(body);
  asked.entry = read_entry(fields, path_model, around.catalog, asked.model);
  asked.stream = fields.flag("stream", false);
  if (const OrderedJson* options = fields.find("stream_options")) {
    Fields of_stream(*options, "stream_options");
    asked.include_usage = of_stream.flag("include_usage", false);
    of_stream.ignore("continuous_usage_stats");
  }
  asked.echo = !chat && fields.flag("echo", false);
  read_sampling(fields, around, asked);
  if (chat) {
    const int64_t top = fields.integer("top_logprobs", 0, 0, kMostTop);
    const bool wanted = fields.flag("logprobs", false);
    if (top > 0 && !wanted) fields.refuse("top_logprobs", "none without \"logprobs\": true");
    if (wanted) asked.logprobs = top;
    const OrderedJson* messages = fields.find("messages");
    if (messages == nullptr) fields.refuse("messages", "a list of messages");
    if (!asked.entry->chat_template) {
      throw ApiError(400, fmt::format("model '{}' has no chat template: ask /v1/completions", asked.entry->name),
                     "model");
    }
    const OrderedJson* extra = fields.find("chat_template_kwargs");
    if (extra != nullptr && !extra->is_object()) fields.refuse("chat_template_kwargs", "an object");
    const bool opens = fields.flag("add_generation_prompt", true);
    try {
      const std::string text = asked.entry->chat_template->render(read_messages(*messages), opens, nullptr,
                                                                  extra == nullptr ? OrderedJson::object() : *extra);
      asked.prompts.push_back(around.tokenizer.encode(text, false));
    } catch (const DataError& error) {  // the template's own words
      throw ApiError(400, error.what(), "messages");
    }
    if (asked.prompts[0].empty()) fields.refuse("messages", "at least one token");
  } else {
    asked.logprobs = fields.integer("logprobs", -1, 0, kMostTop);
    read_prompts(fields, around, asked);
  }
  read_lengths(fields, around, asked);
  asked.salt = fields.text("cache_salt", "", 1024);
  asked.timeout = fields.number("timeout", around.max_request_time, 1e-3, 1e9);
  asked.timeout = std::min(asked.timeout, around.max_request_time);
  refuse_foreign(fields, asked.sampling.num_return_sequences);
  asked.unknown = fields.unknown();
  return asked;
}

/// One answer to one prompt.
struct Exchange::Choice {
  std::string text, finish;
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
                   Headers headers, Done done)
    : http_(http),
      id_(id),
      asked_(std::move(asked)),
      around_(around),
      metrics_(metrics),
      headers_(std::move(headers)),
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

OrderedJson Exchange::chunk(size_t choice, OrderedJson delta, OrderedJson logprobs, const std::string& finish) const {
  OrderedJson json = envelope();
  OrderedJson one = {{"index", choice}};
  one[asked_.chat ? "delta" : "text"] = std::move(delta);
  one["logprobs"] = std::move(logprobs);
  one["finish_reason"] = finish.empty() ? OrderedJson(nullptr) : OrderedJson(finish);
  json["choices"] = OrderedJson::array({std::move(one)});
  return json;
}

OrderedJson Exchange::usage() const {
  return {{"prompt_tokens", outcome_.prompt_tokens},
          {"completion_tokens", outcome_.completion_tokens},
          {"total_tokens", outcome_.prompt_tokens + outcome_.completion_tokens},
          {"prompt_tokens_details", {{"cached_tokens", outcome_.cached_tokens}}}};
}

void Exchange::write(const OrderedJson& chunk) {
  const auto sent = http_.send(id_, fmt::format("data: {}\n\n", json_text(chunk)));
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
    if (piece.logprob && asked_.chat) {
      choice.content.push_back(token_json(*piece.logprob));
      if (asked_.stream) logprobs = {{"content", std::exchange(choice.content, {})}};
    } else if (piece.logprob) {
      add_logprob(choice, &*piece.logprob, piece.id);
    }
  }
  choice.finish = asked_.prompt_only ? "length" : piece.finish_reason;
  if (asked_.stream) {
    if (!choice.opened && asked_.chat) {
      write(chunk(number, {{"role", "assistant"}, {"content", ""}}, nullptr, ""));
    }
    choice.opened = true;
    if (!asked_.chat && !choice.tokens.empty()) {
      logprobs = {{"tokens", std::exchange(choice.tokens, OrderedJson::array())},
                  {"token_logprobs", std::exchange(choice.values, OrderedJson::array())},
                  {"top_logprobs", std::exchange(choice.top, OrderedJson::array())},
                  {"text_offset", std::exchange(choice.offsets, OrderedJson::array())}};
    }
    std::string text = std::exchange(choice.text, "");
    const bool says = !text.empty() || !logprobs.is_null();
    if (asked_.chat) {
      if (says && !over_) write(chunk(number, {{"content", std::move(text)}}, std::move(logprobs), ""));
      if (!choice.finish.empty() && !over_) write(chunk(number, OrderedJson::object(), nullptr, choice.finish));
    } else if ((says || !choice.finish.empty()) && !over_) {
      write(chunk(number, std::move(text), std::move(logprobs), choice.finish));
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

/// Everything was said.
void Exchange::end() {
  if (asked_.stream) {
    if (asked_.include_usage) {
      OrderedJson json = envelope();
      json["choices"] = OrderedJson::array();
      json["usage"] = usage();
      write(json);
    }
    http_.send(id_, "data: [DONE]\n\n");
    http_.end(id_);
    return;
  }
  OrderedJson json = envelope(), list = OrderedJson::array();
  for (size_t i = 0; i < choices_.size(); ++i) {
    Choice& choice = choices_[i];
    OrderedJson one = {{"index", i}}, logprobs = nullptr;
    if (asked_.chat) {
      one["message"] = {{"role", "assistant"}, {"content", choice.text}};
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
    list.push_back(std::move(one));
  }
  json["choices"] = std::move(list);
  json["usage"] = usage();
  json["system_fingerprint"] = around_.fingerprint;
  if (!asked_.seed_given && asked_.sampling.temperature > 0) json["moesaic"] = {{"seed", asked_.sampling.seed}};
  Headers headers = headers_;
  headers.emplace_back("content-type", "application/json");
  http_.respond(id_, 200, headers, json_text(json));
}

void Exchange::failed(const std::exception_ptr& error) {
  const ApiError told = api_error_of(error);
  std::unique_lock lock(mutex_);
  if (std::exchange(over_, true)) return;
  const std::vector<int64_t> numbers = numbers_;
  outcome_.status = told.status;
  if (begun_) {
    // A stream that ends cleanly passes for a whole answer: it breaks instead.
    http_.send(id_, fmt::format("data: {}\n\n", json_text(told.json())));
    http_.abort(id_);
  } else {
    Headers headers = headers_;
    headers.emplace_back("content-type", "application/json");
    if (told.retry_after > 0) headers.emplace_back("retry-after", std::to_string(told.retry_after));
    http_.respond(id_, told.status, headers, json_text(told.json()));
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
