#include "moesaic/serve/tools.h"

#include "moesaic/base/text.h"

namespace moesaic::serve {
namespace {

constexpr std::string_view kOpen = "<tool_call>", kClose = "</tool_call>";

const char* arguments_key(ToolFormat format) { return format == ToolFormat::kHermes ? "arguments" : "parameters"; }

std::optional<ToolCall> call_of(const std::string& text, ToolFormat format) {
  const OrderedJson json = OrderedJson::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!json.is_object()) return std::nullopt;
  const auto name = json.find("name"), arguments = json.find(arguments_key(format));
  if (name == json.end() || !name->is_string() || arguments == json.end() || !arguments->is_object()) {
    return std::nullopt;
  }
  return ToolCall{*name, arguments->dump()};
}

ToolAnswer read_hermes(const std::string& text) {
  ToolAnswer answer;
  size_t at = 0;
  while (at < text.size()) {
    const size_t open = text.find(kOpen, at), begin = open + kOpen.size();
    const size_t close = open == std::string::npos ? open : text.find(kClose, begin);
    std::optional<ToolCall> call;
    if (close != std::string::npos) call = call_of(text.substr(begin, close - begin), ToolFormat::kHermes);
    const size_t end = call ? open : open == std::string::npos ? text.size() : begin;
    answer.content += text.substr(at, end - at);
    if (call) answer.calls.push_back(*std::move(call));
    at = call ? close + kClose.size() : end;
  }
  // Of a content before calls what was sent as it came stays as it was.
  if (!answer.calls.empty()) answer.content.erase(answer.content.find_last_not_of(" \t\r\n") + 1);
  return answer;
}

ToolAnswer read_llama3(const std::string& text) {
  ToolAnswer answer;
  std::string rest = stripped(text);
  while (!rest.empty()) {
    // Several calls have ; between, which may stand in their texts, too.
    size_t end = rest.find(';');
    std::optional<ToolCall> call;
    for (; !call; end = rest.find(';', end + 1)) {
      call = call_of(rest.substr(0, end), ToolFormat::kLlama3);
      if (call || end == std::string::npos) break;
    }
    if (!call) return {text, {}};
    answer.calls.push_back(*std::move(call));
    rest = end == std::string::npos ? "" : stripped(rest.substr(end + 1));
  }
  return answer;
}

/// Puts `prefix` before the names that references of a schema have.
void rename_references(OrderedJson& schema, const std::string& prefix) {
  constexpr std::string_view kDefinitions = "#/$defs/";
  for (auto& [key, value] : schema.items()) {
    if (key == "$ref" && value.is_string() && value.get_ref<const std::string&>().starts_with(kDefinitions)) {
      value = value.get<std::string>().insert(kDefinitions.size(), prefix);
    } else if (value.is_structured()) {
      rename_references(value, prefix);
    }
  }
}

/// Moves a schema's definitions to those of the schema that it becomes a part of.
void hoist_definitions(OrderedJson& schema, const std::string& prefix, OrderedJson& definitions) {
  if (!schema.is_object()) return;
  rename_references(schema, prefix);
  const auto own = schema.find("$defs");
  if (own == schema.end()) return;
  for (auto& [name, definition] : own->items()) definitions[prefix + name] = definition;
  schema.erase("$defs");
}

}  // namespace

std::optional<ToolFormat> tool_format(const tokenizer::ChatTemplate& chat_template) {
  for (const auto& [_, source] : chat_template.sources()) {
    if (source.find("tools") == std::string::npos) continue;
    if (source.find(kOpen) != std::string::npos) return ToolFormat::kHermes;
    if (source.find("\"parameters\"") != std::string::npos) return ToolFormat::kLlama3;
  }
  return std::nullopt;
}

ToolAnswer read_tool_calls(ToolFormat format, const std::string& text) {
  return format == ToolFormat::kHermes ? read_hermes(text) : read_llama3(text);
}

size_t certain_content(ToolFormat format, const std::string& text) {
  const size_t first = text.find_first_not_of(" \t\r\n");
  if (format == ToolFormat::kLlama3) return first == std::string::npos || text[first] == '{' ? 0 : text.size();
  if (const size_t open = text.find(kOpen); open != std::string::npos) return open;
  for (size_t length = std::min(text.size(), kOpen.size() - 1); length > 0; --length) {
    if (text.ends_with(kOpen.substr(0, length))) return text.size() - length;
  }
  return text.size();
}

std::string tool_grammar(ToolFormat format, const OrderedJson& tools, bool several) {
  OrderedJson calls = OrderedJson::array(), definitions = OrderedJson::object();
  for (const OrderedJson& tool : tools) {
    const OrderedJson& function = tool.at("function");
    OrderedJson parameters = function.value("parameters", OrderedJson());
    if (parameters.is_null()) parameters = {{"type", "object"}};
    hoist_definitions(parameters, fmt::format("{}.", calls.size()), definitions);
    OrderedJson properties{{"name", {{"const", function.at("name")}}}};
    properties[arguments_key(format)] = std::move(parameters);
    calls.push_back({{"type", "object"},
                     {"properties", std::move(properties)},
                     {"required", {"name", arguments_key(format)}},
                     {"additionalProperties", false}});
  }
  const OrderedJson schema{
      {"anyOf", std::move(calls)},
      {"$defs", std::move(definitions)},
      {"x-guidance", {{"whitespace_flexible", false}, {"item_separator", ", "}, {"key_separator", ": "}}}};
  const bool hermes = format == ToolFormat::kHermes;
  const std::string call = hermes ? fmt::format("\"{}\\n\" json \"\\n{}\"", kOpen, kClose) : "json";
  const std::string more = several ? fmt::format(" (\"{}\" call)*", hermes ? "\\n" : "; ") : "";
  return fmt::format("start: call{}\ncall: {}\njson: %json {}\n", more, call, schema.dump());
}

}  // namespace moesaic::serve
