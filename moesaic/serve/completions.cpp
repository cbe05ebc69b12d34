#include "moesaic/serve/completions.h"

#include <algorithm>
#include <cstring>
#include <random>

#include "moesaic/base/check.h"
#include "moesaic/base/regex.h"
#include "moesaic/serve/fields.h"

namespace moesaic::serve {
namespace {

constexpr int64_t kMostAnswers = 16, kMostPrompts = 256, kMostTop = 20, kDefaultTokens = 16;
constexpr size_t kMostStops = 64, kMostStopBytes = 1024, kMostBias = 1024;

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
      asked.prompts.push_back(fields.token_ids("prompt", each, around.vocab_size));
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
    for (const int64_t id : fields.token_ids("stop_token_ids", *ids, around.vocab_size)) sampling.eos_ids.push_back(id);
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

/// A regular expression for these texts alone.
std::string regex_of(const std::vector<std::string>& texts) {
  std::string regex;
  for (const std::string& text : texts) {
    regex += regex.empty() ? "(" : "|";
    for (const char c : text) {
      if (std::strchr(R"(\.+*?()|[]{}^$#&-~/)", c) != nullptr) regex += '\\';
      regex += c;
    }
  }
  return regex + ")";
}

/// Answers are of this grammar; `name`: the field that says so.
void hold_to(const Surroundings& around, const std::string& kind, const std::string& source, const std::string& name,
             Completion& asked) {
  try {
    asked.sampling.grammar = around.grammars.compile(kind, source);
  } catch (const Error& error) {
    throw ApiError(400, fmt::format("{}: {}", name, error.what()), name);
  }
}

/// OpenAI's response_format, and vLLM's structured_outputs.
void read_grammar(Fields& fields, const Surroundings& around, Completion& asked) {
  std::string name, kind, source;
  if (const OrderedJson* format = fields.find("response_format")) {
    name = "response_format";
    Fields of_format(*format, name);
    const std::string type = of_format.text("type", "");
    if (type == "json_object") {
      kind = "json_schema";
      source = R"({"type": "object"})";
    } else if (type == "json_schema") {
      const OrderedJson* named = of_format.find("json_schema");
      if (named == nullptr) of_format.refuse("json_schema", "an object with \"schema\"");
      Fields of_schema(*named, "response_format.json_schema");
      const OrderedJson* schema = of_schema.find("schema");
      if (schema == nullptr) of_schema.refuse("schema", "a JSON schema");
      kind = "json_schema";
      source = schema->dump();
    } else if (type != "text") {
      of_format.refuse("type", "text, json_object or json_schema");
    }
  }
  if (const OrderedJson* outputs = fields.find("structured_outputs")) {
    if (!kind.empty()) fields.refuse("structured_outputs", "none beside response_format");
    name = "structured_outputs";
    Fields of_outputs(*outputs, name);
    auto take = [&](const char* of, std::string text) {
      if (!kind.empty()) of_outputs.refuse(of, "one of json, json_object, regex, choice and grammar");
      kind = of;
      source = std::move(text);
    };
    if (const OrderedJson* json = of_outputs.find("json")) {
      take("json_schema", json->is_string() ? json->get<std::string>() : json->dump());
    }
    if (of_outputs.flag("json_object", false)) take("json_schema", R"({"type": "object"})");
    if (of_outputs.has("regex")) take("regex", of_outputs.text("regex", ""));
    if (of_outputs.has("choice")) take("regex", regex_of(of_outputs.texts("choice", 1024, 1024)));
    if (of_outputs.has("grammar")) take("lark", of_outputs.text("grammar", ""));
    if (kind.empty()) of_outputs.refuse("json", "one of json, json_object, regex, choice and grammar");
    for (const std::string& other : of_outputs.unknown())
      of_outputs.refuse(other, "none: this server has no such thing");
  }
  if (kind.empty()) return;
  if (asked.sampling.grammar) fields.refuse(name, "none beside a tool_choice that asks for calls");
  hold_to(around, kind, source, name, asked);
}

/// The tools that a chat's template shows; null: none. Where tool_choice asks for calls, answers are held to them.
OrderedJson read_tools(Fields& fields, const Surroundings& around, Completion& asked) {
  static const Regex kName("[A-Za-z0-9_-]{1,64}", "tools");
  const OrderedJson *tools = fields.find("tools"), *choice = fields.find("tool_choice");
  const bool several = fields.flag("parallel_tool_calls", true);
  std::string wanted = "auto", named;
  if (choice != nullptr && choice->is_object()) {
    Fields of_choice(*choice, "tool_choice");
    const OrderedJson* function = of_choice.find("function");
    if (of_choice.text("type", "") != "function" || function == nullptr) {
      fields.refuse("tool_choice", "none, auto, required or {\"type\": \"function\", \"function\": {\"name\"}}");
    }
    named = Fields(*function, "tool_choice.function").text("name", "");
    wanted = "required";
  } else if (choice != nullptr) {
    wanted = choice->is_string() ? choice->get<std::string>() : "";
    if (wanted != "none" && wanted != "auto" && wanted != "required") {
      fields.refuse("tool_choice", "none, auto, required or {\"type\": \"function\", \"function\": {\"name\"}}");
    }
  }
  if (tools == nullptr || (tools->is_array() && tools->empty())) {
    if (wanted == "required") fields.refuse("tool_choice", "none or auto: there are no tools");
    return nullptr;
  }
  OrderedJson callable = OrderedJson::array();
  for (Fields& tool : fields.objects("tools", "a list of tools")) {
    const OrderedJson* function = tool.find("function");
    if (tool.text("type", "") != "function" || function == nullptr) tool.refuse("type", "function");
    Fields of_function(*function, tool.path_of("function"));
    const std::string name = of_function.text("name", "");
    if (!kName.matches(name)) of_function.refuse("name", "up to 64 letters, digits, _ and -");
    const OrderedJson* parameters = of_function.find("parameters");
    if (parameters != nullptr && !parameters->is_object()) of_function.refuse("parameters", "a JSON schema");
    if (named.empty() || named == name) callable.push_back(tool.json());
  }
  if (callable.empty()) fields.refuse("tool_choice", "the name of one of the tools");
  if (wanted == "none") return nullptr;
  asked.tool_format = tool_format(*asked.entry->chat_template);
  if (!asked.tool_format) {
    fields.refuse("tools", "none: the model's chat template takes none, or writes calls in a way that isn't read here");
  }
  if (wanted == "required") {
    hold_to(around, "lark", tool_grammar(*asked.tool_format, callable, several && named.empty()), "tools", asked);
  }
  return *tools;
}

/// A chat as its model's template writes it, as ids.
std::vector<int64_t> render(Fields& fields, const Surroundings& around, Completion& asked) {
  const OrderedJson* messages = fields.find("messages");
  if (messages == nullptr) fields.refuse("messages", "a list of messages");
  if (!asked.entry->chat_template) {
    throw ApiError(400, fmt::format("model '{}' has no chat template: ask /v1/completions", asked.entry->name),
                   "model");
  }
  const OrderedJson* extra = fields.find("chat_template_kwargs");
  if (extra != nullptr && !extra->is_object()) fields.refuse("chat_template_kwargs", "an object");
  const bool opens = fields.flag("add_generation_prompt", true);
  const OrderedJson tools = read_tools(fields, around, asked);
  std::vector<int64_t> ids;
  try {
    const std::string text = asked.entry->chat_template->render(read_messages(*messages), opens, tools,
                                                                extra == nullptr ? OrderedJson::object() : *extra);
    ids = around.tokenizer.encode(text, false);
  } catch (const DataError& error) {  // the template's own words
    throw ApiError(400, error.what(), "messages");
  }
  if (ids.empty()) fields.refuse("messages", "at least one token");
  return ids;
}

/// What peers take and this server does not: refused unless it changes nothing.
void refuse_foreign(Fields& fields, bool chat, int64_t answers) {
  const std::string lacks = "this server has no such thing";
  for (const char* name : {"functions", "function_call"}) {
    fields.only(name, {OrderedJson::array(), "none", "auto"}, "they are tools and tool_choice here");
  }
  for (const char* name : {"tools", "tool_choice"}) {  // chat has read them
    if (!chat) fields.only(name, {OrderedJson::array(), "none", "auto"}, "ask /v1/chat/completions");
  }
  for (const char* name :
       {"guided_json", "guided_regex", "guided_choice", "guided_grammar", "grammar", "json_schema"}) {
    fields.only(name, {}, "it is response_format or structured_outputs here");
  }
  for (const char* name : {"prompt_embeds", "audio"}) fields.only(name, {}, lacks);
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

uint64_t random_number() {
  static thread_local std::random_device device;
  return (static_cast<uint64_t>(device()) << 32 | device()) >> 11;  // 53 bits: JSON's readers keep them
}

OrderedJson read_messages(const OrderedJson& given) {
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
      message["content"] = fields.joined_text("content", {"text"}, "a list of parts", "images and sound");
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
  const std::string adapter = fields.text("adapter_id", "");
  if (!fields.has("lora")) return catalog.find(adapter.empty() ? model : adapter);
  std::vector<std::pair<std::string, double>> parts;
  for (Fields& part : fields.objects("lora", "a list of {\"name\", \"scale\"}")) {
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

std::vector<int64_t> read_chat_prompt(const OrderedJson& body, const std::string& path_model,
                                      const Surroundings& around) {
  Completion asked;
  asked.chat = true;
  Fields fields(body);
  asked.entry = read_entry(fields, path_model, around.catalog, asked.model);
  return render(fields, around, asked);
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
    asked.prompts.push_back(render(fields, around, asked));
  } else {
    asked.logprobs = fields.integer("logprobs", -1, 0, kMostTop);
    read_prompts(fields, around, asked);
  }
  read_lengths(fields, around, asked);
  asked.salt = fields.text("cache_salt", "", 1024);
  asked.timeout = fields.number("timeout", around.max_request_time, 1e-3, 1e9);
  asked.timeout = std::min(asked.timeout, around.max_request_time);
  read_grammar(fields, around, asked);
  refuse_foreign(fields, chat, asked.sampling.num_return_sequences);
  asked.unknown = fields.unknown();
  return asked;
}

}  // namespace moesaic::serve
