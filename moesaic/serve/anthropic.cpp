#include "moesaic/serve/anthropic.h"

#include "moesaic/serve/fields.h"

namespace moesaic::serve {
namespace {

std::string text_of(Fields& fields, const std::string& name) {
  return fields.joined_text(name, {"text"}, "a text or a list of blocks", "images and documents");
}

/// Appends what a message says to `messages`: results of tools are messages of their own, before its text.
void add_message(Fields& fields, OrderedJson& messages) {
  const std::string role = fields.text("role", "");
  if (role != "user" && role != "assistant") fields.refuse("role", "user or assistant");
  const OrderedJson* content = fields.find("content");
  if (content == nullptr || !(content->is_string() || (content->is_array() && !content->empty()))) {
    fields.refuse("content", "a text or a list of blocks");
  }
  if (content->is_string()) {
    messages.push_back({{"role", role}, {"content", *content}});
    return;
  }
  std::string text;
  OrderedJson calls = OrderedJson::array();
  for (Fields& block : fields.objects("content", "a list of blocks")) {
    const std::string type = block.text("type", "");
    if (type == "text") {
      text += block.text("text", "");
    } else if (type == "tool_result" && role == "user") {
      messages.push_back(
          {{"role", "tool"}, {"tool_call_id", block.text("tool_use_id", "")}, {"content", text_of(block, "content")}});
    } else if (type == "tool_use" && role == "assistant") {
      const OrderedJson* input = block.find("input");
      if (input == nullptr || !input->is_object()) block.refuse("input", "an object");
      calls.push_back({{"id", block.text("id", "")},
                       {"type", "function"},
                       {"function", {{"name", block.text("name", "")}, {"arguments", json_text(*input)}}}});
    } else if (!(type.ends_with("thinking") &&
                 role == "assistant")) {  // thoughts of an earlier turn are not shown again
      block.refuse("type", role == "user" ? "text or tool_result" : "text or tool_use");
    }
  }
  if (text.empty() && calls.empty()) return;
  OrderedJson message = {{"role", role}, {"content", text}};
  if (!calls.empty()) message["tool_calls"] = std::move(calls);
  messages.push_back(std::move(message));
}

OrderedJson tools_of(Fields& fields) {
  OrderedJson tools = OrderedJson::array();
  for (Fields& tool : fields.objects("tools", "a list of tools")) {
    if (tool.text("type", "custom") != "custom") tool.refuse("type", "custom: Anthropic's own tools are not here");
    const OrderedJson* schema = tool.find("input_schema");
    if (schema == nullptr) tool.refuse("input_schema", "a JSON schema");
    OrderedJson function = {{"name", tool.text("name", "")}};
    if (tool.has("description")) function["description"] = tool.text("description", "");
    function["parameters"] = *schema;
    tools.push_back({{"type", "function"}, {"function", std::move(function)}});
  }
  return tools;
}

/// Puts tool_choice and parallel_tool_calls into `chat`.
void choose_tools(Fields& fields, OrderedJson& chat) {
  Fields choice(*fields.find("tool_choice"), "tool_choice");
  const std::string type = choice.text("type", "");
  if (type == "tool") {
    chat["tool_choice"] = {{"type", "function"}, {"function", {{"name", choice.text("name", "")}}}};
  } else if (type == "auto" || type == "none" || type == "any") {
    chat["tool_choice"] = type == "any" ? "required" : type;
  } else {
    choice.refuse("type", "auto, any, tool or none");
  }
  if (choice.flag("disable_parallel_tool_use", false)) chat["parallel_tool_calls"] = false;
}

/// The format that an answer is held to; nullptr: none.
OrderedJson format_of(Fields& fields) {
  const OrderedJson* format = fields.find("output_format");
  std::string path = "output_format";
  if (const OrderedJson* config = fields.find("output_config")) {
    Fields of_config(*config, "output_config");
    if (const OrderedJson* found = of_config.find("format")) {
      format = found;
      path = "output_config.format";
    }
  }
  if (format == nullptr) return nullptr;
  Fields of_format(*format, path);
  const OrderedJson* schema = of_format.find("schema");
  if (of_format.text("type", "") != "json_schema" || schema == nullptr) {
    of_format.refuse("type", "json_schema, and \"schema\" beside it");
  }
  return {{"type", "json_schema"}, {"json_schema", {{"schema", *schema}}}};
}

std::string event(const char* type, OrderedJson json) {
  OrderedJson all = {{"type", type}};
  all.update(json);
  return fmt::format("event: {}\ndata: {}\n\n", type, json_text(all));
}

std::string id_of(const OrderedJson& answer) {
  const std::string id = answer["id"];
  return "msg_" + id.substr(id.find('-') + 1);
}

/// What was kept of a prompt that began alike is counted apart.
OrderedJson usage_of(const OrderedJson& usage) {
  const int64_t cached = usage["prompt_tokens_details"]["cached_tokens"];
  return {{"input_tokens", usage["prompt_tokens"].get<int64_t>() - cached},
          {"cache_creation_input_tokens", 0},
          {"cache_read_input_tokens", cached},
          {"output_tokens", usage["completion_tokens"]}};
}

const char* reason_of(const OrderedJson& choice) {
  if (choice["finish_reason"] == "tool_calls") return "tool_use";
  if (choice["finish_reason"] == "length") return "max_tokens";
  return choice["stop_reason"].is_null() ? "end_turn" : "stop_sequence";
}

OrderedJson message_of(const OrderedJson& answer, const OrderedJson& usage) {
  return {{"id", id_of(answer)},
          {"type", "message"},
          {"role", "assistant"},
          {"model", answer["model"]},
          {"content", OrderedJson::array()},
          {"stop_reason", nullptr},
          {"stop_sequence", nullptr},
          {"usage", usage_of(usage)}};
}

OrderedJson block_of(const OrderedJson& call, OrderedJson input) {
  return {{"type", "tool_use"}, {"id", call["id"]}, {"name", call["function"]["name"]}, {"input", std::move(input)}};
}

const char* type_of(int status) {
  switch (status) {
    case 401: return "authentication_error";
    case 403: return "permission_error";
    case 404: return "not_found_error";
    case 413: return "request_too_large";
    case 429: return "rate_limit_error";
    case 503: return "overloaded_error";
    case 504: return "timeout_error";
    default: return status < 500 ? "invalid_request_error" : "api_error";
  }
}

}  // namespace

OrderedJson chat_of_messages(const OrderedJson& body, bool counts) {
  Fields fields(body);
  if (!counts && !fields.has("max_tokens")) fields.refuse("max_tokens", "how many tokens the answer may have");
  OrderedJson messages = OrderedJson::array();
  if (const std::string system = text_of(fields, "system"); !system.empty()) {
    messages.push_back({{"role", "system"}, {"content", system}});
  }
  const OrderedJson* given = fields.find("messages");
  if (given == nullptr || !given->is_array() || given->empty()) fields.refuse("messages", "a list of messages");
  for (Fields& message : fields.objects("messages", "a list of messages")) add_message(message, messages);
  if (given->back().value("role", "") != "user") {
    throw ApiError(400, "messages: the last is the assistant's, expected a user's: answers are not begun for it here",
                   "messages");
  }
  fields.only("thinking", {OrderedJson{{"type", "disabled"}}, OrderedJson{{"type", "adaptive"}}},
              "this server has no such thing");
  for (const char* name : {"container", "mcp_servers"})
    fields.only(name, {OrderedJson::array()}, "this server has no such thing");
  for (const char* name : {"n", "logprobs", "top_logprobs", "stop", "stream_options", "response_format",
                           "max_completion_tokens", "parallel_tool_calls"}) {
    fields.only(name, {}, "it is OpenAI's: ask /v1/chat/completions");
  }
  OrderedJson chat = body;
  for (const char* name : {"system", "stop_sequences", "thinking", "container", "mcp_servers", "output_format",
                           "output_config", "cache_control", "tool_choice"}) {
    chat.erase(name);
  }
  chat["messages"] = std::move(messages);
  if (fields.has("stop_sequences")) chat["stop"] = *fields.find("stop_sequences");
  if (fields.has("tools")) chat["tools"] = tools_of(fields);
  if (fields.has("tool_choice")) choose_tools(fields, chat);
  if (OrderedJson format = format_of(fields); !format.is_null()) chat["response_format"] = std::move(format);
  fields.unknown();  // a letter away from one of these; the rest is the chat's
  return chat;
}

OrderedJson AnthropicDialect::whole(OrderedJson answer) {
  const OrderedJson& choice = answer["choices"][0];
  OrderedJson message = message_of(answer, answer["usage"]);
  const OrderedJson& said = choice["message"];
  if (said["content"].is_string() && said["content"] != "") {
    message["content"].push_back({{"type", "text"}, {"text", said["content"]}});
  }
  for (const OrderedJson& call : said.value("tool_calls", OrderedJson::array())) {
    const std::string arguments = call["function"]["arguments"];
    message["content"].push_back(block_of(call, parse_ordered_json(arguments, "a call")));
  }
  message["stop_reason"] = reason_of(choice);
  message["stop_sequence"] = choice["stop_reason"];
  return message;
}

std::string AnthropicDialect::close() {
  if (!std::exchange(open_, false)) return "";
  return event("content_block_stop", {{"index", block_++}});
}

std::string AnthropicDialect::first(const OrderedJson& answer, const OrderedJson& usage) {
  return event("message_start", {{"message", message_of(answer, usage)}});
}

std::string AnthropicDialect::events(const OrderedJson& chunk) {
  std::string told;
  const OrderedJson& choice = chunk["choices"][0];
  const OrderedJson& delta = choice["delta"];
  if (const std::string text = delta.value("content", ""); !text.empty()) {
    if (!std::exchange(open_, true)) {
      told += event("content_block_start", {{"index", block_}, {"content_block", {{"type", "text"}, {"text", ""}}}});
    }
    told += event("content_block_delta", {{"index", block_}, {"delta", {{"type", "text_delta"}, {"text", text}}}});
  }
  for (const OrderedJson& call : delta.value("tool_calls", OrderedJson::array())) {
    told += close();
    told += event("content_block_start", {{"index", block_}, {"content_block", block_of(call, OrderedJson::object())}});
    told += event("content_block_delta",
                  {{"index", block_},
                   {"delta", {{"type", "input_json_delta"}, {"partial_json", call["function"]["arguments"]}}}});
    open_ = true;
    told += close();
  }
  if (!choice["finish_reason"].is_null()) {
    told += close();
    reason_ = reason_of(choice);
    stop_ = choice["stop_reason"];
  }
  return told;
}

std::string AnthropicDialect::last(const OrderedJson& usage) {
  return event("message_delta",
               {{"delta", {{"stop_reason", reason_}, {"stop_sequence", stop_}}}, {"usage", usage_of(usage)}}) +
         event("message_stop", OrderedJson::object());
}

OrderedJson AnthropicDialect::error(const ApiError& error) {
  return {{"type", "error"}, {"error", {{"type", type_of(error.status)}, {"message", error.what()}}}};
}

std::string AnthropicDialect::broken(const ApiError& error) {
  return fmt::format("event: error\ndata: {}\n\n", json_text(this->error(error)));
}

}  // namespace moesaic::serve
