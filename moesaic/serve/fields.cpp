#include "moesaic/serve/fields.h"

#include <algorithm>
#include <cmath>

namespace moesaic::serve {
namespace {

constexpr size_t kTypoLength = 5;  // shorter names are a letter away from too many words

/// One letter was added, left out or changed, or two were swapped.
bool one_edit(std::string_view a, std::string_view b) {
  if (a.size() > b.size()) std::swap(a, b);
  if (b.size() - a.size() > 1) return false;
  const size_t same = static_cast<size_t>(std::mismatch(a.begin(), a.end(), b.begin()).first - a.begin());
  const std::string_view rest_a = a.substr(same), rest_b = b.substr(same);
  if (a.size() < b.size()) return rest_a == rest_b.substr(1);
  if (rest_a.empty()) return false;
  if (rest_a.substr(1) == rest_b.substr(1)) return true;
  return rest_a.size() > 1 && rest_a[0] == rest_b[1] && rest_a[1] == rest_b[0] && rest_a.substr(2) == rest_b.substr(2);
}

std::string shown(const OrderedJson& value) { return json_text(value).substr(0, 80); }

}  // namespace

Fields::Fields(const OrderedJson& json, std::string path) : json_(json), path_(std::move(path)) {
  if (json.is_object()) return;
  throw ApiError(
      400, fmt::format("{}: got {}, expected a JSON object", path_.empty() ? "the body" : path_, shown(json)), path_);
}

const OrderedJson* Fields::find(const std::string& name) {
  read_.insert(name);
  const auto it = json_.find(name);
  return it == json_.end() || it->is_null() ? nullptr : &*it;
}

bool Fields::has(const std::string& name) { return find(name) != nullptr; }

void Fields::refuse(const std::string& name, const std::string& expected) {
  const OrderedJson* value = find(name);
  throw ApiError(400,
                 fmt::format("{}: got {}, expected {}", path_of(name), value ? shown(*value) : "nothing", expected),
                 path_of(name));
}

bool Fields::flag(const std::string& name, bool fallback) {
  const OrderedJson* value = find(name);
  if (value == nullptr) return fallback;
  if (!value->is_boolean()) refuse(name, "true or false");
  return value->get<bool>();
}

int64_t Fields::integer(const std::string& name, int64_t fallback, int64_t least, int64_t most) {
  const OrderedJson* value = find(name);
  if (value == nullptr) return fallback;
  const std::string expected = most == std::numeric_limits<int64_t>::max()
                                   ? fmt::format("a whole number, {} or more", least)
                                   : fmt::format("a whole number, {} to {}", least, most);
  const bool whole = value->is_number_integer() || (value->is_number_float() && std::abs(value->get<double>()) < 9e15 &&
                                                    value->get<double>() == std::floor(value->get<double>()));
  if (!whole || (value->is_number_unsigned() && value->get<uint64_t>() > INT64_MAX)) refuse(name, expected);
  const int64_t number = value->is_number_float() ? static_cast<int64_t>(value->get<double>()) : value->get<int64_t>();
  if (number < least || number > most) refuse(name, expected);
  return number;
}

double Fields::number(const std::string& name, double fallback, double least, double most) {
  const OrderedJson* value = find(name);
  if (value == nullptr) return fallback;
  if (!value->is_number() || !(value->get<double>() >= least && value->get<double>() <= most)) {
    refuse(name, fmt::format("a number, {} to {}", least, most));
  }
  return value->get<double>();
}

std::string Fields::text(const std::string& name, const std::string& fallback, size_t most_bytes) {
  const OrderedJson* value = find(name);
  if (value == nullptr) return fallback;
  if (!value->is_string() || value->get_ref<const std::string&>().size() > most_bytes) {
    refuse(name, fmt::format("a text of {} bytes at most", most_bytes));
  }
  return value->get<std::string>();
}

std::vector<std::string> Fields::texts(const std::string& name, size_t most, size_t most_bytes) {
  const OrderedJson* value = find(name);
  if (value == nullptr) return {};
  const OrderedJson list = value->is_string() ? OrderedJson::array({*value}) : *value;
  std::vector<std::string> result;
  for (const OrderedJson& each : list.is_array() ? list : OrderedJson::array({list})) {
    if (!each.is_string() || each.get_ref<const std::string&>().size() > most_bytes || result.size() == most) {
      refuse(name, fmt::format("a text or up to {} texts, of {} bytes at most", most, most_bytes));
    }
    result.push_back(each.get<std::string>());
  }
  return result;
}

std::vector<Fields> Fields::objects(const std::string& name, const std::string& expected) {
  const OrderedJson* value = find(name);
  if (value == nullptr) return {};
  if (!value->is_array()) refuse(name, expected);
  std::vector<Fields> all;
  for (size_t i = 0; i < value->size(); ++i) all.emplace_back((*value)[i], fmt::format("{}[{}]", path_of(name), i));
  return all;
}

std::string Fields::joined_text(const std::string& name, const std::vector<std::string>& types,
                                const std::string& expected, const std::string& unread) {
  const OrderedJson* value = find(name);
  if (value != nullptr && value->is_string()) return value->get<std::string>();
  std::string text;
  for (Fields& part : objects(name, expected)) {
    if (std::find(types.begin(), types.end(), part.text("type", "")) == types.end()) {
      part.refuse("type", fmt::format("{}: {} are not read here", fmt::join(types, " or "), unread));
    }
    text += part.text("text", "");
  }
  return text;
}

std::vector<int64_t> Fields::token_ids(const std::string& name, const OrderedJson& json, int64_t vocab_size) {
  std::vector<int64_t> ids;
  for (const OrderedJson& id : json) {
    if (!id.is_number_integer() || id.get<int64_t>() < 0 || id.get<int64_t>() >= vocab_size) {
      refuse(name, fmt::format("token ids from 0 to {}", vocab_size - 1));
    }
    ids.push_back(id.get<int64_t>());
  }
  return ids;
}

void Fields::only(const std::string& name, const std::vector<OrderedJson>& values, const std::string& why) {
  const OrderedJson* value = find(name);
  if (value == nullptr || std::find(values.begin(), values.end(), *value) != values.end()) return;
  std::vector<std::string> texts;
  for (const OrderedJson& each : values) texts.push_back(shown(each));
  refuse(name, texts.empty() ? "none: " + why : fmt::format("{} or none: {}", fmt::join(texts, ", "), why));
}

std::vector<std::string> Fields::unknown() const {
  std::vector<std::string> names;
  for (const auto& [name, value] : json_.items()) {
    if (read_.contains(name)) continue;
    for (const std::string& known : read_) {
      if (known.size() < kTypoLength || !one_edit(name, known)) continue;
      throw ApiError(400, fmt::format("unknown field '{}', did you mean '{}'?", path_of(name), known), path_of(name));
    }
    names.push_back(name);
  }
  return names;
}

}  // namespace moesaic::serve
