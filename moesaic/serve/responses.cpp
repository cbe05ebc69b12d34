#include "moesaic/serve/responses.h"

#include "moesaic/serve/fields.h"

namespace moesaic::serve {
namespace {

std::string text_of(Fields& item, const std::string& name) {
  if (!item.has(name)) item.refuse(name, "a text or a list of parts");
  return item.joined_text(name, {"input_text", "output_text", "text"}, "a text or a list of parts", "images and files");
}

/// Appends what an item of the input says to `messages`: calls belong to the assistant's message before them.
void add_item(Fields& item, OrderedJson& messages) {
  const std::string type = item.text("type", "message");
  if (type == "message") {
    messages.push_back({{"role", item.text("role", "")}, {"content", text_of(item, "content")}});
  } else if (type == "function_call") {
    if (messages.empty() || messages.back()["role"] != "assistant") {
      messages.push_back({{"role", "assistant"}, {"content", ""}});
    }
    messages.back()["tool_calls"].push_back(
        {{"id", item.text("call_id", "")},
         {"type", "function"},
         {"function", {{"name", item.text("name", "")}, {"arguments", item.text("arguments", "")}}}});
  } else if (type == "function_call_output") {
    messages.push_back(
        {{"role", "tool"}, {"tool_call_id", item.text("call_id", "")}, {"content", text_of(item, "output")}});
  } else if (type != "reasoning") {  // thoughts of an earlier turn are not shown again
    item.refuse("type", "message, function_call, function_call_output or reasoning");
  }
}

OrderedJson tools_of(Fields& fields) {
  OrderedJson tools = OrderedJson::array();
  for (Fields& tool : fields.objects("tools", "a list of tools")) {
    if (tool.text("type", "") != "function") tool.refuse("type", "function: OpenAI's own tools are not here");
    OrderedJson function = OrderedJson::object();
    for (const char* name : {"name", "description", "parameters"}) {
      if (tool.has(name)) function[name] = *tool.find(name);
    }
    tools.push_back({{"type", "function"}, {"function", std::move(function)}});
  }
  return tools;
}

OrderedJson format_of(Fields& fields) {
  Fields text(*fields.find("text"), "text");
  const OrderedJson* format = text.find("format");
  if (format == nullptr) return nullptr;
  Fields of_format(*format, "text.format");
  const std::string type = of_format.text("type", "");
  if (type == "text") return nullptr;
  if (type == "json_object") return *format;
  const OrderedJson* schema = of_format.find("schema");
  if (type != "json_schema") of_format.refuse("type", "text, json_object or json_schema");
  if (schema == nullptr) of_format.refuse("schema", "a JSON schema");
  return {{"type", "json_schema"}, {"json_schema", {{"schema", *schema}}}};
}

OrderedJson usage_of(const OrderedJson& usage) {
  return {{"input_tokens", usage["prompt_tokens"]},
          {"input_tokens_details", {{"cached_tokens", usage["prompt_tokens_details"]["cached_tokens"]}}},
          {"output_tokens", usage["completion_tokens"]},
          {"output_tokens_details", {{"reasoning_tokens", 0}}},
          {"total_tokens", usage["total_tokens"]}};
}

std::string suffix_of(const OrderedJson& answer) {
  const std::string id = answer["id"];
  return id.substr(id.find('-') + 1);
}

OrderedJson part_of(const std::string& text) {
  return {{"type", "output_text"},
          {"text", text},
          {"annotations", OrderedJson::array()},
          {"logprobs", OrderedJson::array()}};
}

OrderedJson message_of(const OrderedJson& answer) {
  return {{"type", "message"},
          {"id", "msg_" + suffix_of(answer)},
          {"status", "in_progress"},
          {"role", "assistant"},
          {"content", OrderedJson::array()}};
}

OrderedJson with_text(OrderedJson message, const std::string& text, const OrderedJson& finish) {
  message["content"].push_back(part_of(text));
  message["status"] = finish == "length" ? "incomplete" : "completed";
  return message;
}

OrderedJson call_of(const OrderedJson& call) {
  return {{"type", "function_call"},          {"id", "fc_" + call["id"].get<std::string>()}, {"call_id", call["id"]},
          {"name", call["function"]["name"]}, {"arguments", call["function"]["arguments"]},  {"status", "completed"}};
}

}  // namespace

OrderedJson chat_of_response(const OrderedJson& body) {
  Fields fields(body);
  OrderedJson messages = OrderedJson::array();
  if (fields.has("instructions")) {
    messages.push_back({{"role", "system"}, {"content", fields.text("instructions", "")}});
  }
  const OrderedJson* input = fields.find("input");
  if (input != nullptr && input->is_string()) {
    messages.push_back({{"role", "user"}, {"content", *input}});
  } else {
    if (input == nullptr || !input->is_array() || input->empty()) fields.refuse("input", "a text or a list of items");
    for (Fields& item : fields.objects("input", "a text or a list of items")) add_item(item, messages);
  }
  fields.only("store", {false}, "this server keeps nothing");
  for (const char* name : {"previous_response_id", "conversation"}) {
    fields.only(name, {}, "this server keeps nothing: send the whole conversation as \"input\"");
  }
  fields.only("background", {false}, "this server keeps nothing");
  fields.only("truncation", {"disabled"}, "this server leaves nothing out");
  for (const char* name : {"prompt", "max_tool_calls", "context_management", "moderation"}) {
    fields.only(name, {}, "this server has no such thing");
  }
  fields.only("include", {OrderedJson::array(), OrderedJson::array({"reasoning.encrypted_content"})},
              "this server has no such thing");
  fields.only("top_logprobs", {0}, "ask /v1/chat/completions");
  for (const char* name : {"messages", "n", "logprobs", "response_format", "max_tokens", "max_completion_tokens"}) {
    fields.only(name, {}, "it is /v1/chat/completions'");
  }
  OrderedJson chat = body;
  for (const char* name : {"input", "instructions", "store", "background", "truncation", "include", "top_logprobs",
                           "stream_options", "reasoning", "text", "max_output_tokens", "tool_choice"}) {
    chat.erase(name);
  }
  chat["messages"] = std::move(messages);
  if (fields.has("max_output_tokens")) chat["max_completion_tokens"] = *fields.find("max_output_tokens");
  if (fields.has("tools")) chat["tools"] = tools_of(fields);
  if (const OrderedJson* choice = fields.find("tool_choice")) {
    chat["tool_choice"] = *choice;
    if (choice->is_object() && choice->contains("name")) {
      chat["tool_choice"] = {{"type", choice->value("type", "")}, {"function", {{"name", (*choice)["name"]}}}};
    }
  }
  if (fields.has("text")) {
    if (OrderedJson format = format_of(fields); !format.is_null()) chat["response_format"] = std::move(format);
  }
  fields.unknown();  // a letter away from one of these; the rest is the chat's
  return chat;
}

ResponsesDialect::ResponsesDialect(const OrderedJson& body) {
  const OrderedJson fallback = {{"instructions", nullptr},
                                {"max_output_tokens", nullptr},
                                {"parallel_tool_calls", true},
                                {"temperature", 1.0},
                                {"top_p", 1.0},
                                {"text", {{"format", {{"type", "text"}}}}},
                                {"tool_choice", "auto"},
                                {"tools", OrderedJson::array()},
                                {"metadata", OrderedJson::object()}};
  for (const auto& [name, value] : fallback.items()) {
    const auto given = body.find(name);
    told_[name] = given == body.end() || given->is_null() ? value : *given;
  }
}

/// An answer that has only begun.
OrderedJson ResponsesDialect::response(const OrderedJson& answer) const {
  OrderedJson response = {{"id", "resp_" + suffix_of(answer)},
                          {"object", "response"},
                          {"created_at", answer["created"]},
                          {"status", "in_progress"},
                          {"error", nullptr},
                          {"incomplete_details", nullptr},
                          {"model", answer["model"]},
                          {"output", OrderedJson::array()},
                          {"previous_response_id", nullptr},
                          {"store", false},
                          {"truncation", "disabled"},
                          {"usage", nullptr}};
  response.update(told_);
  return response;
}

OrderedJson ResponsesDialect::ended(OrderedJson response, OrderedJson output, const OrderedJson& finish,
                                    const OrderedJson& usage) const {
  const bool cut = finish == "length";
  response["status"] = cut ? "incomplete" : "completed";
  if (cut) response["incomplete_details"] = {{"reason", "max_output_tokens"}};
  response["output"] = std::move(output);
  response["usage"] = usage_of(usage);
  return response;
}

OrderedJson ResponsesDialect::whole(OrderedJson answer) {
  const OrderedJson &choice = answer["choices"][0], &said = choice["message"];
  OrderedJson output = OrderedJson::array();
  if (said["content"].is_string() && said["content"] != "") {
    output.push_back(with_text(message_of(answer), said["content"], choice["finish_reason"]));
  }
  for (const OrderedJson& call : said.value("tool_calls", OrderedJson::array())) output.push_back(call_of(call));
  return ended(response(answer), std::move(output), choice["finish_reason"], answer["usage"]);
}

std::string ResponsesDialect::event(const char* type, OrderedJson json) {
  OrderedJson all = {{"type", type}, {"sequence_number", number_++}};
  all.update(json);
  return fmt::format("event: {}\ndata: {}\n\n", type, json_text(all));
}

std::string ResponsesDialect::item_event(const char* type, const OrderedJson& item, OrderedJson json) {
  OrderedJson all = {{"item_id", item["id"]}, {"output_index", output_.size()}};
  if (item["type"] == "message") all["content_index"] = 0;
  all.update(json);
  return event(type, std::move(all));
}

std::string ResponsesDialect::close(const OrderedJson& finish) {
  if (item_.is_null()) return "";
  const OrderedJson item = with_text(std::exchange(item_, nullptr), text_, finish);
  const std::string told =
      item_event("response.output_text.done", item, {{"text", text_}, {"logprobs", OrderedJson::array()}}) +
      item_event("response.content_part.done", item, {{"part", part_of(text_)}}) +
      event("response.output_item.done", {{"output_index", output_.size()}, {"item", item}});
  output_.push_back(item);
  return told;
}

std::string ResponsesDialect::first(const OrderedJson& answer, const OrderedJson& usage) {
  response_ = response(answer);
  const std::string created = event("response.created", {{"response", response_}});
  return created + event("response.in_progress", {{"response", response_}});
}

std::string ResponsesDialect::events(const OrderedJson& chunk) {
  std::string told;
  const OrderedJson &choice = chunk["choices"][0], &delta = choice["delta"];
  if (const std::string text = delta.value("content", ""); !text.empty()) {
    if (item_.is_null()) {
      item_ = message_of(chunk);
      told += event("response.output_item.added", {{"output_index", output_.size()}, {"item", item_}});
      told += item_event("response.content_part.added", item_, {{"part", part_of("")}});
    }
    text_ += text;
    told += item_event("response.output_text.delta", item_, {{"delta", text}, {"logprobs", OrderedJson::array()}});
  }
  for (const OrderedJson& call : delta.value("tool_calls", OrderedJson::array())) {
    told += close("tool_calls");
    const OrderedJson item = call_of(call), arguments = item["arguments"];
    OrderedJson begun = item;
    begun["arguments"] = "";
    begun["status"] = "in_progress";
    told += event("response.output_item.added", {{"output_index", output_.size()}, {"item", begun}});
    told += item_event("response.function_call_arguments.delta", item, {{"delta", arguments}});
    told +=
        item_event("response.function_call_arguments.done", item, {{"name", item["name"]}, {"arguments", arguments}});
    told += event("response.output_item.done", {{"output_index", output_.size()}, {"item", item}});
    output_.push_back(item);
  }
  if (!choice["finish_reason"].is_null()) {
    finish_ = choice["finish_reason"];
    told += close(finish_);
  }
  return told;
}

std::string ResponsesDialect::last(const OrderedJson& usage) {
  return event(finish_ == "length" ? "response.incomplete" : "response.completed",
               {{"response", ended(response_, output_, finish_, usage)}});
}

std::string ResponsesDialect::broken(const ApiError& error) {
  OrderedJson told = error.json()["error"];
  told.erase("type");
  return event("error", std::move(told));
}

}  // namespace moesaic::serve
