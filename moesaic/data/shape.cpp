#include "moesaic/data/shape.h"

#include <algorithm>
#include <cmath>

#include "moesaic/base/text.h"
#include "moesaic/data/order.h"

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
      "columns": {"messages": "messages", "completion": "", "system": "system", "tools": "tools", "sentence": ""},
      "tags": {"role_tag": "role", "content_tag": "content"}},
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
  if (value.is_binary()) return {value.get_binary().begin(), value.get_binary().end()};
  std::string text = value.dump(-1, ' ', false, OrderedJson::error_handler_t::replace);
  return std::string(value.type_name()) + " " + (text.size() > 60 ? text.substr(0, 60) + "…" : text);
}

/// record[name], or null when it is absent or not a number, as pandas writes what is missing, or `name` is empty.
const OrderedJson& value_of(const OrderedJson& record, const std::string& name) {
  static const OrderedJson kNull;
  auto found = name.empty() ? record.end() : record.find(name);
  if (found == record.end()) return kNull;
  return found->is_number_float() && !std::isfinite(found->get<double>()) ? kNull : *found;
}

/// A text; a number as it is written.
std::string text_of(const OrderedJson& record, const std::string& name, const std::string& where, bool required) {
  const OrderedJson& value = value_of(record, name);
  if (value.is_null() && !required) return "";
  MOESAIC_CHECK(!value.is_null(), DataError, "{}: '{}' is missing; got the keys {}", where, name, keys_of(record));
  if (value.is_number()) return value.dump();
  MOESAIC_CHECK(value.is_string(), DataError, "{}: '{}' is {}, expected a string", where, name, brief(value));
  return value.get<std::string>();
}

/// A list, also where a file type without lists holds it as JSON text; null when absent or blank.
OrderedJson list_of(const OrderedJson& record, const std::string& name, const std::string& where) {
  const OrderedJson& value = value_of(record, name);
  if (value.is_null() || (value.is_string() && stripped(value.get_ref<const std::string&>()).empty())) return nullptr;
  OrderedJson list =
      value.is_string() ? parse_ordered_json(value.get_ref<const std::string&>(), where + " '" + name + "'") : value;
  if (list.is_null()) return nullptr;
  MOESAIC_CHECK(list.is_array(), DataError, "{}: '{}' is {}, expected a list", where, name, brief(list));
  return list;
}

/// The tools of a conversation; null when there are none.
OrderedJson tools_of(const OrderedJson& record, const std::string& name, const std::string& where) {
  OrderedJson tools = list_of(record, name, where);
  return tools.empty() ? OrderedJson() : tools;
}

/// The names of roles that published data sets write, and what they mean.
constexpr std::pair<const char*, const char*> kRoles[] = {
    {"system", "system"},       {"developer", "developer"}, {"user", "user"},
    {"assistant", "assistant"}, {"tool", "tool"},           {"human", "user"},
    {"gpt", "assistant"},       {"chatgpt", "assistant"},   {"model", "assistant"},
};

/// The first turn of a conversation in record[name]; null when there is none.
OrderedJson first_turn(const OrderedJson& record, const char* name, const std::string& where) {
  const OrderedJson& value = value_of(record, name);
  if (!value.is_array() && !value.is_string()) return nullptr;
  const OrderedJson list = list_of(record, name, where);
  return list.empty() ? OrderedJson() : list[0];
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
  for (const char* name : {"messages", "conversations"}) {
    if (!has(name)) continue;
    columns["messages"] = name;
    // The keys of a turn tell ShareGPT's from OpenAI's, whatever the column is called.
    const OrderedJson first = first_turn(record, name, where);
    const bool openai = first.is_object() ? first.contains("role") : name == std::string_view("messages");
    return openai ? "messages" : "sharegpt";
  }
  if (has("instruction")) return "alpaca";
  if (has("inputs_pretokenized") && has("targets_pretokenized")) {  // P3's files: `inputs` and `targets` are T5's ids
    columns = {{"prompt", "inputs_pretokenized"}, {"response", "targets_pretokenized"}};
    return "inputs_targets";
  }
  if (has("inputs") && (has("targets") || has("target"))) return "inputs_targets";
  for (const char* answer : {"response", "completion"}) {
    if (has("prompt") && has(answer)) {
      if (record["prompt"].is_array()) {  // TRL's chats
        columns = {{"messages", "prompt"}, {"completion", answer}};
        return "messages";
      }
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
  if (config.prompts) {
    formatting_ = "prompts";
    columns_ = {{"sentence", config.columns.value("sentence", "")}};
    prompts_ = config.prompts;
    prompt_ = config.prompt;
    return;
  }
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
  if (formatting_ == "sharegpt") {
    const std::string turns = config.columns.value("messages", column("messages"));
    const OrderedJson turn = first_turn(first, turns.c_str(), where);
    if (turn.is_object() && turn.contains("role") && !turn.contains("from")) {
      tags_.update({{"role_tag", "role"}, {"content_tag", "content"}});
    }
  }
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
  } else if (formatting_ == "sharegpt" || formatting_ == "messages") {
    row = conversation(record, where);
  } else if (formatting_ == "superni") {
    row = superni(record, where);
  } else if (formatting_ == "prompts") {
    row = prompted(record, where);
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
  row.tools = tools_of(record, column("tools"), where);
  return row;
}

/// The role that `name` stands for: a tag of the data set's, or one of kRoles.
std::string Shape::role_of(const std::string& name, const std::string& where) const {
  constexpr std::pair<const char*, const char*> kTags[] = {{"user_tag", "user"},
                                                           {"assistant_tag", "assistant"},
                                                           {"observation_tag", "tool"},
                                                           {"function_tag", "function"},
                                                           {"system_tag", "system"}};
  std::vector<std::string> known;
  for (const auto& [key, role] : kTags) {
    if (tag(key).empty()) continue;
    if (tag(key) == name) return role;
    known.push_back(tag(key));
  }
  for (const auto& [other, role] : kRoles) {
    if (other == name) return role;
    if (std::find(known.begin(), known.end(), other) == known.end()) known.push_back(other);
  }
  throw DataError(fmt::format("{}: role '{}', expected one of {}", where, name, fmt::join(known, ", ")));
}

/// A turn with "role" and "content" in front and whatever else it says of itself behind; null says nothing.
OrderedJson Shape::turn_of(const OrderedJson& message, const std::string& where) const {
  MOESAIC_CHECK(message.is_object(), DataError, "{}: a turn is {}, expected an object", where, brief(message));
  const std::string role = role_of(text_of(message, tag("role_tag"), where, true), where);
  const OrderedJson& content = value_of(message, tag("content_tag"));
  std::string text;
  if (content.is_array()) {
    for (const OrderedJson& part : content) {
      MOESAIC_CHECK(part.is_object() && value_of(part, "type") == "text", DataError,
                    "{}: a turn holds {}, expected parts of type text", where, brief(part));
      text += text_of(part, "text", where, true);
    }
  } else {
    text = text_of(message, tag("content_tag"), where, value_of(message, "tool_calls").is_null());
  }
  OrderedJson result = turn(role.c_str(), std::move(text));
  if (role == "function") {
    // The call as the tool_calls that chat templates read; a list is several calls.
    OrderedJson calls = parse_ordered_json(result["content"].get_ref<const std::string&>(), where + " function call");
    if (!calls.is_array()) calls = OrderedJson::array({calls});
    result = turn("assistant", "");
    for (OrderedJson& call : calls)
      result["tool_calls"].push_back({{"type", "function"}, {"function", std::move(call)}});
  }
  for (const auto& [key, value] : message.items()) {
    const bool named = key == tag("role_tag") || key == tag("content_tag");
    if (!named && !value.is_null() && !result.contains(key)) result[key] = value;
  }
  return result;
}

Row Shape::conversation(const OrderedJson& record, const std::string& where) const {
  const OrderedJson list = list_of(record, column("messages"), where);
  MOESAIC_CHECK(!list.empty(), DataError, "{}: '{}' is missing or empty; got the keys {}", where, column("messages"),
                keys_of(record));
  Row row;
  row.messages = OrderedJson::array();
  if (std::string system = text_of(record, column("system"), where, false); !system.empty()) {
    row.messages.push_back(turn("system", std::move(system)));
  }
  for (const OrderedJson& message : list) row.messages.push_back(turn_of(message, where));
  if (!column("completion").empty()) {
    // What the prompt holds is no answer to learn.
    for (OrderedJson& message : row.messages) {
      if (message["role"] == "assistant") message["train"] = false;
    }
    const OrderedJson completion = list_of(record, column("completion"), where);
    MOESAIC_CHECK(!completion.empty(), DataError, "{}: '{}' is missing or empty; got the keys {}", where,
                  column("completion"), keys_of(record));
    for (const OrderedJson& message : completion) row.messages.push_back(turn_of(message, where));
  }
  row.tools = tools_of(record, column("tools"), where);
  check_answered(row, where);
  return row;
}

/// Without prompt and target where the template gives the record nothing. What a template draws at random follows from
/// the record, wherever it stands.
Row Shape::prompted(const OrderedJson& record, const std::string& where) const {
  const std::string text = record.dump(-1, ' ', false, OrderedJson::error_handler_t::replace);
  std::optional<RenderedPrompt> rendered;
  try {
    rendered = prompts_->render(prompt_, record, hash_text(text, 0));
  } catch (const DataError& error) {
    throw DataError(where + ": " + error.what());
  }
  Row row;
  if (!rendered) return row;
  row.prompt = std::move(rendered->input);
  row.target = std::move(rendered->targets.front());
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
