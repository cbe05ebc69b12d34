#include "moesaic/data/shape.h"

#include <algorithm>
#include <array>
#include <cmath>

namespace moesaic::data {
namespace {

/// Names of the columns and tags of each formatting, as LLaMA-Factory's data/README.md gives them.
const Json& defaults() {
  static const Json kDefaults = Json::parse(R"({
    "alpaca": {
      "columns": {"prompt": "instruction", "query": "input", "response": "output", "history": "history",
                  "system": "system", "tools": "tools", "sentence": ""},
      "tags": {}},
    "sharegpt": {
      "columns": {"messages": "conversations", "system": "system", "tools": "tools", "sentence": ""},
      "tags": {"role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt",
               "observation_tag": "observation", "function_tag": "function_call", "system_tag": "system"}},
    "messages": {
      "columns": {"messages": "messages", "system": "system", "tools": "tools", "sentence": ""},
      "tags": {}},
    "inputs_targets": {"columns": {"prompt": "inputs", "response": "targets", "sentence": ""}, "tags": {}},
    "text": {"columns": {"prompt": "text", "sentence": ""}, "tags": {}},
    "superni": {"columns": {"prompt": "input", "response": "output", "sentence": ""}, "tags": {}}
  })");
  return kDefaults;
}

std::string keys_of(const OrderedJson& record) {
  std::vector<std::string> keys;
  for (const auto& item : record.items()) keys.push_back(item.key());
  return fmt::format("{}", fmt::join(keys, ", "));
}

std::string brief(const OrderedJson& value) {
  std::string text = value.dump(-1, ' ', false, OrderedJson::error_handler_t::replace);
  return std::string(value.type_name()) + " " + (text.size() > 60 ? text.substr(0, 60) + "…" : text);
}

/// record[name], or null when it is absent or `name` is empty.
const OrderedJson& value_of(const OrderedJson& record, const std::string& name) {
  static const OrderedJson kNull;
  auto found = name.empty() ? record.end() : record.find(name);
  return found == record.end() ? kNull : *found;
}

std::string text_of(const OrderedJson& record, const std::string& name, const std::string& where, bool required) {
  const OrderedJson& value = value_of(record, name);
  if (value.is_null() && !required) return "";
  MOESAIC_CHECK(!value.is_null(), DataError, "{}: '{}' is missing; got the keys {}", where, name, keys_of(record));
  MOESAIC_CHECK(value.is_string(), DataError, "{}: '{}' is {}, expected a string", where, name, brief(value));
  return value.get<std::string>();
}

/// A list, also where a file type without lists holds it as JSON text; null when absent.
OrderedJson list_of(const OrderedJson& record, const std::string& name, const std::string& where) {
  const OrderedJson& value = value_of(record, name);
  if (value.is_null() || (value.is_string() && value.get_ref<const std::string&>().empty())) return nullptr;
  OrderedJson list =
      value.is_string() ? parse_ordered_json(value.get_ref<const std::string&>(), where + " '" + name + "'") : value;
  MOESAIC_CHECK(list.is_array(), DataError, "{}: '{}' is {}, expected a list", where, name, brief(list));
  return list;
}

OrderedJson turn(const char* role, std::string content) { return {{"role", role}, {"content", std::move(content)}}; }

void check_answered(const Row& row, const std::string& where) {
  for (const OrderedJson& message : row.messages) {
    if (message.at("role") == "assistant") return;
  }
  throw DataError(fmt::format("{}: no turn of the assistant among {} turns", where, row.messages.size()));
}

std::string detect(const OrderedJson& header, const OrderedJson& record, Json& columns, const std::string& where) {
  auto has = [&](const char* key) { return record.contains(key); };
  if (!header.is_null()) return "superni";
  if (has("messages")) return "messages";
  if (has("conversations")) return "sharegpt";
  if (has("instruction")) return "alpaca";
  if (has("inputs") && (has("targets") || has("target"))) return "inputs_targets";
  for (const char* answer : {"response", "completion"}) {
    if (has("prompt") && has(answer)) {
      columns = {{"prompt", "prompt"}, {"response", answer}};
      return "inputs_targets";
    }
  }
  if (has("text")) return "text";
  throw DataError(fmt::format(
      "{}: got the keys {}, expected one of: messages; conversations; instruction, output; inputs, targets; prompt, "
      "response; text. Name them under `columns` in dataset_info.json",
      where, keys_of(record)));
}

}  // namespace

Shape::Shape(const DatasetConfig& config, const OrderedJson& header, const OrderedJson& first,
             const std::string& where) {
  MOESAIC_CHECK(first.is_object(), DataError, "{}: got {}, expected an object", where, brief(first));
  formatting_ = config.formatting == "openai" ? "messages" : config.formatting;
  Json found = Json::object();
  if (formatting_ == "auto") formatting_ = detect(header, first, found, where);
  MOESAIC_CHECK(defaults().contains(formatting_), UsageError,
                "dataset {}: formatting is '{}', expected auto, alpaca, sharegpt, messages, inputs_targets, text or "
                "superni",
                config.name, formatting_);
  MOESAIC_CHECK((formatting_ == "superni") == !header.is_null(), DataError,
                "{}: formatting superni belongs to files with \"Definition\" and \"Instances\"", where);
  columns_ = defaults()[formatting_]["columns"];
  tags_ = defaults()[formatting_]["tags"];
  if (formatting_ == "inputs_targets" && !first.contains("targets") && first.contains("target")) {
    columns_["response"] = "target";
  }
  columns_.update(found);
  auto override_names = [&](Json& names, const Json& given, const char* what) {
    for (const auto& item : given.items()) {
      std::vector<std::string> known;
      for (const auto& name : names.items()) known.push_back(name.key());
      MOESAIC_CHECK(names.contains(item.key()), UsageError, "dataset {}: unknown {} '{}' for formatting {}; known: {}",
                    config.name, what, item.key(), formatting_, fmt::join(known, ", "));
      MOESAIC_CHECK(item.value().is_string(), UsageError, "dataset {}: {} '{}' must be a name", config.name, what,
                    item.key());
      names[item.key()] = item.value();
    }
  };
  override_names(columns_, config.columns, "column");
  override_names(tags_, config.tags, "tag");
  if (formatting_ == "superni") {
    const OrderedJson& definition = header.at("Definition");
    const OrderedJson& text = definition.is_array() && definition.size() == 1 ? definition[0] : definition;
    MOESAIC_CHECK(text.is_string(), DataError, "{}: \"Definition\" is {}, expected a string", where, brief(definition));
    definition_ = text.get<std::string>();
  }
}

Row Shape::row(const OrderedJson& record, const std::string& where) const {
  MOESAIC_CHECK(record.is_object(), DataError, "{}: got {}, expected an object", where, brief(record));
  Row row;
  if (formatting_ == "alpaca") {
    row = alpaca(record, where);
  } else if (formatting_ == "sharegpt") {
    row = sharegpt(record, where);
  } else if (formatting_ == "messages") {
    row = messages(record, where);
  } else if (formatting_ == "superni") {
    row = superni(record, where);
  } else if (formatting_ == "text") {
    row.target = text_of(record, column("prompt"), where, true);
  } else {
    row.prompt = text_of(record, column("prompt"), where, true);
    row.target = text_of(record, column("response"), where, true);
  }
  if (std::string name = column("sentence"); !name.empty()) {
    for (const OrderedJson& number : list_of(record, name, where)) {
      MOESAIC_CHECK(number.is_number() && std::isfinite(number.get<float>()), DataError,
                    "{}: '{}' holds {}, expected finite numbers", where, name, brief(number));
      row.sentence.push_back(number.get<float>());
    }
    MOESAIC_CHECK(!row.sentence.empty(), DataError, "{}: '{}' is missing or empty, expected a list of numbers", where,
                  name);
  }
  const OrderedJson& id = value_of(record, "id");
  if (!id.is_null()) row.id = id.is_string() ? id.get<std::string>() : id.dump();
  return row;
}

Row Shape::alpaca(const OrderedJson& record, const std::string& where) const {
  Row row;
  row.messages = OrderedJson::array();
  if (std::string system = text_of(record, column("system"), where, false); !system.empty()) {
    row.messages.push_back(turn("system", std::move(system)));
  }
  for (const OrderedJson& pair : list_of(record, column("history"), where)) {
    MOESAIC_CHECK(pair.is_array() && pair.size() == 2 && pair[0].is_string() && pair[1].is_string(), DataError,
                  "{}: '{}' holds {}, expected [question, answer]", where, column("history"), brief(pair));
    row.messages.push_back(turn("user", pair[0]));
    row.messages.push_back(turn("assistant", pair[1]));
  }
  std::string user = text_of(record, column("prompt"), where, true);
  if (std::string query = text_of(record, column("query"), where, false); !query.empty()) {
    user += user.empty() ? query : "\n" + query;
  }
  row.messages.push_back(turn("user", std::move(user)));
  row.messages.push_back(turn("assistant", text_of(record, column("response"), where, true)));
  row.tools = list_of(record, column("tools"), where);
  return row;
}

Row Shape::sharegpt(const OrderedJson& record, const std::string& where) const {
  OrderedJson list = list_of(record, column("messages"), where);
  MOESAIC_CHECK(!list.empty(), DataError, "{}: '{}' is missing or empty; got the keys {}", where, column("messages"),
                keys_of(record));
  const std::array<std::pair<const char*, const char*>, 5> roles{{{"user_tag", "user"},
                                                                  {"assistant_tag", "assistant"},
                                                                  {"observation_tag", "tool"},
                                                                  {"function_tag", "function"},
                                                                  {"system_tag", "system"}}};
  Row row;
  row.messages = OrderedJson::array();
  if (std::string system = text_of(record, column("system"), where, false); !system.empty()) {
    row.messages.push_back(turn("system", std::move(system)));
  }
  for (const OrderedJson& message : list) {
    MOESAIC_CHECK(message.is_object(), DataError, "{}: a turn is {}, expected an object", where, brief(message));
    std::string name = text_of(message, tag("role_tag"), where, true);
    std::string content = text_of(message, tag("content_tag"), where, true);
    auto role = std::find_if(roles.begin(), roles.end(), [&](const auto& entry) { return tag(entry.first) == name; });
    if (role == roles.end()) {
      std::vector<std::string> known;
      for (const auto& entry : roles) known.push_back(tag(entry.first));
      throw DataError(fmt::format("{}: role '{}', expected one of {}", where, name, fmt::join(known, ", ")));
    }
    if (std::string_view(role->second) == "function") {
      // The call as the tool_calls that chat templates read; a list is several calls.
      OrderedJson calls = parse_ordered_json(content, where + " function call");
      if (!calls.is_array()) calls = OrderedJson::array({calls});
      OrderedJson assistant = turn("assistant", "");
      for (const OrderedJson& call : calls)
        assistant["tool_calls"].push_back({{"type", "function"}, {"function", call}});
      row.messages.push_back(std::move(assistant));
    } else {
      row.messages.push_back(turn(role->second, std::move(content)));
    }
  }
  row.tools = list_of(record, column("tools"), where);
  check_answered(row, where);
  return row;
}

Row Shape::messages(const OrderedJson& record, const std::string& where) const {
  static const std::vector<std::string> kRoles{"system", "developer", "user", "assistant", "tool"};
  OrderedJson list = list_of(record, column("messages"), where);
  MOESAIC_CHECK(!list.empty(), DataError, "{}: '{}' is missing or empty; got the keys {}", where, column("messages"),
                keys_of(record));
  Row row;
  row.messages = OrderedJson::array();
  if (std::string system = text_of(record, column("system"), where, false); !system.empty()) {
    row.messages.push_back(turn("system", std::move(system)));
  }
  for (OrderedJson& message : list) {
    MOESAIC_CHECK(message.is_object(), DataError, "{}: a turn is {}, expected an object", where, brief(message));
    std::string role = text_of(message, "role", where, true);
    MOESAIC_CHECK(std::find(kRoles.begin(), kRoles.end(), role) != kRoles.end(), DataError,
                  "{}: role '{}', expected one of {}", where, role, fmt::join(kRoles, ", "));
    const OrderedJson& content = value_of(message, "content");
    if (content.is_array()) {
      std::string text;
      for (const OrderedJson& part : content) {
        MOESAIC_CHECK(part.is_object() && value_of(part, "type") == "text", DataError,
                      "{}: a turn holds {}, expected parts of type text", where, brief(part));
        text += text_of(part, "text", where, true);
      }
      message["content"] = std::move(text);
    } else if (content.is_null() && !value_of(message, "tool_calls").is_null()) {
      message["content"] = "";
    } else {
      text_of(message, "content", where, true);
    }
    row.messages.push_back(std::move(message));
  }
  row.tools = list_of(record, column("tools"), where);
  check_answered(row, where);
  return row;
}

Row Shape::superni(const OrderedJson& record, const std::string& where) const {
  const OrderedJson& output = value_of(record, column("response"));
  MOESAIC_CHECK(output.is_array() && !output.empty() && output[0].is_string(), DataError,
                "{}: '{}' is {}, expected a list of strings", where, column("response"), brief(output));
  Row row;
  std::string user = definition_ + "\n\n" + text_of(record, column("prompt"), where, true);
  row.messages = {turn("user", std::move(user)), turn("assistant", output[0])};
  return row;
}

}  // namespace moesaic::data
