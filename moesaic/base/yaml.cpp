#include "moesaic/base/yaml.h"

#include <fmt/ranges.h>
#include <yaml-cpp/eventhandler.h>
#include <yaml-cpp/yaml.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <optional>
#include <regex>
#include <set>
#include <sstream>

namespace moesaic {
namespace {

constexpr int kMaxDepth = 100;
constexpr int64_t kMaxNodes = 100'000;
constexpr size_t kMostPointer = 500;

/// The types YAML 1.2's core schema (section 10.3.2) gives to a plain scalar.
OrderedJson typed_scalar(const std::string& text, const std::string& where) {
  static const std::regex kInteger("[-+]?[0-9]+");
  static const std::regex kFloat("[-+]?(\\.[0-9]+|[0-9]+(\\.[0-9]*)?)([eE][-+]?[0-9]+)?");
  static const std::regex kNotFinite("[-+]?\\.(inf|Inf|INF)|\\.(nan|NaN|NAN)");
  static const std::regex kOctalOrHex("0o[0-7]+|0x[0-9a-fA-F]+");
  if (text.empty() || text == "~" || text == "null" || text == "Null" || text == "NULL") return nullptr;
  if (text == "true" || text == "True" || text == "TRUE") return true;
  if (text == "false" || text == "False" || text == "FALSE") return false;
  if (text.size() > 64) return text;  // longer than any number; also keeps std::regex's recursion shallow
  const char* begin = text.data() + (text[0] == '+' ? 1 : 0);
  const char* end = text.data() + text.size();
  if (std::regex_match(text, kInteger)) {
    int64_t value = 0;
    auto [stop, error] = std::from_chars(begin, end, value);
    MOESAIC_CHECK(error == std::errc(), FormatError, "{}: integer {} does not fit 64 bits", where, text);
    return value;
  }
  if (std::regex_match(text, kOctalOrHex)) {
    int64_t value = 0;
    auto [stop, error] = std::from_chars(text.data() + 2, end, value, text[1] == 'x' ? 16 : 8);
    MOESAIC_CHECK(error == std::errc(), FormatError, "{}: integer {} does not fit 64 bits", where, text);
    return value;
  }
  if (std::regex_match(text, kFloat)) {
    double value = 0;
    auto [stop, error] = std::from_chars(begin, end, value);
    MOESAIC_CHECK(error == std::errc(), FormatError, "{}: number {} is out of range", where, text);
    return value;
  }
  MOESAIC_CHECK(!std::regex_match(text, kNotFinite), FormatError, "{}: {} is not a finite number", where, text);
  return text;
}

/// Turns a YAML tree into JSON and counts its nodes: aliases may make a small file a huge or endless tree.
class Converter {
 public:
  Converter(const std::string& where, YamlLines* lines) : where_(where), lines_(lines) {}

  OrderedJson convert(const YAML::Node& node, const std::string& pointer = "", int depth = 0) {
    std::string place = fmt::format("{}:{}", where_, node.Mark().line + 1);
    MOESAIC_CHECK(depth <= kMaxDepth, FormatError, "{}: YAML is nested deeper than {} levels", place, kMaxDepth);
    MOESAIC_CHECK(++nodes_ <= kMaxNodes, FormatError, "{}: YAML expands to more than {} nodes", place, kMaxNodes);
    switch (node.Type()) {
      case YAML::NodeType::Scalar: {
        // Quoted scalars carry the tag "!", plain ones "?".
        const std::string& tag = node.Tag();
        MOESAIC_CHECK(tag.empty() || tag == "?" || tag == "!", FormatError, "{}: YAML tag {} is not supported", place,
                      tag);
        return tag == "!" ? OrderedJson(node.Scalar()) : typed_scalar(node.Scalar(), place);
      }
      case YAML::NodeType::Sequence: {
        OrderedJson list = OrderedJson::array();
        for (const YAML::Node& item : node) {
          const std::string inside = below(pointer, std::to_string(list.size()), item.Mark());
          list.push_back(convert(item, inside, depth + 1));
        }
        return list;
      }
      case YAML::NodeType::Map: {
        OrderedJson map = OrderedJson::object();
        std::set<std::string> keys;
        for (const auto& item : node) {
          MOESAIC_CHECK(item.first.IsScalar(), FormatError, "{}: a key is a list or map, expected a name", place);
          const std::string& key = item.first.Scalar();
          MOESAIC_CHECK(keys.insert(key).second, FormatError, "{}:{}: key '{}' stands twice", where_,
                        item.first.Mark().line + 1, key);
          const std::string inside = below(pointer, key, item.first.Mark());
          map.get_ref<OrderedJson::object_t&>().emplace_back(key, convert(item.second, inside, depth + 1));
        }
        return map;
      }
      default: return nullptr;
    }
  }

 private:
  /// The pointer to what stands below `pointer`, whose line is noted. Endless pointers are given up.
  std::string below(const std::string& pointer, const std::string& key, const YAML::Mark& mark) {
    if (lines_ == nullptr || pointer.size() + key.size() > kMostPointer) return "";
    const std::string inside = pointer + "/" + key;
    (*lines_)[inside] = mark.line + 1;
    return inside;
  }

  const std::string& where_;
  YamlLines* lines_;
  int64_t nodes_ = 0;
};

void emit(YAML::Emitter& out, const OrderedJson& json) {
  switch (json.type()) {
    case Json::value_t::object:
      out << YAML::BeginMap;
      for (const auto& [key, value] : json.items()) {
        out << YAML::Key << key << YAML::Value;
        emit(out, value);
      }
      out << YAML::EndMap;
      break;
    case Json::value_t::array:
      out << YAML::Flow << YAML::BeginSeq;
      for (const OrderedJson& item : json) emit(out, item);
      out << YAML::EndSeq;
      break;
    case Json::value_t::string: {
      auto text = json.get<std::string>();
      bool looks_typed = text.size() > 64 || !typed_scalar(text, "").is_string();
      if (looks_typed) out << YAML::DoubleQuoted;
      out << text;
      break;
    }
    case Json::value_t::null: out << YAML::Null; break;
    default: out << json.dump();  // numbers in their shortest exact form, booleans
  }
}

/// Reads events for nothing.
struct Ignore : YAML::EventHandler {
  void OnDocumentStart(const YAML::Mark&) override {}
  void OnDocumentEnd() override {}
  void OnNull(const YAML::Mark&, YAML::anchor_t) override {}
  void OnAlias(const YAML::Mark&, YAML::anchor_t) override {}
  void OnScalar(const YAML::Mark&, const std::string&, YAML::anchor_t, const std::string&) override {}
  void OnSequenceStart(const YAML::Mark&, const std::string&, YAML::anchor_t, YAML::EmitterStyle::value) override {}
  void OnSequenceEnd() override {}
  void OnMapStart(const YAML::Mark&, const std::string&, YAML::anchor_t, YAML::EmitterStyle::value) override {}
  void OnMapEnd() override {}
};

/// YAML::LoadAll would read a stray comma as documents without end.
bool has_two_documents(const std::string& text) {
  std::istringstream stream(text);
  YAML::Parser parser(stream);
  Ignore ignore;
  return parser.HandleNextDocument(ignore) && parser.HandleNextDocument(ignore);
}

void collect_unknown(const Json& config, const std::vector<std::string>& known, const std::string& prefix,
                     std::vector<std::string>& problems) {
  auto has = [&](const std::string& name) { return std::find(known.begin(), known.end(), name) != known.end(); };
  for (const auto& [key, value] : config.items()) {
    std::string name = prefix + key;
    if (has(name + ".*")) continue;
    bool nested = std::any_of(known.begin(), known.end(), [&](auto& k) { return k.starts_with(name + "."); });
    if (nested && value.is_object()) {
      collect_unknown(value, known, name + ".", problems);
    } else if (!has(name)) {
      std::string near = nearest_name(name, known);
      if (nested) {
        problems.push_back(fmt::format("'{}' expects a map, got {}", name,
                                       value.dump(-1, ' ', false, Json::error_handler_t::replace).substr(0, 40)));
      } else {
        problems.push_back(fmt::format("'{}'{}", name, near.empty() ? "" : fmt::format(" (did you mean '{}'?)", near)));
      }
    }
  }
}

}  // namespace

OrderedJson parse_yaml(std::string_view text, const std::string& where, YamlLines* lines) {
  try {
    Json(text).dump();
  } catch (const Json::exception&) {
    throw FormatError(fmt::format("{}: not UTF-8 text", where));
  }
  const bool printable = std::all_of(text.begin(), text.end(), [](unsigned char c) {
    return c >= 0x20 ? c != 0x7F : c == '\t' || c == '\n' || c == '\r';  // YAML 1.2, section 5.1
  });
  MOESAIC_CHECK(printable, FormatError, "{}: a control character, which YAML does not allow", where);
  try {
    const std::string copy(text);
    MOESAIC_CHECK(!has_two_documents(copy), FormatError, "{}: more than one YAML document, expected one", where);
    return Converter(where, lines).convert(YAML::Load(copy));
  } catch (const YAML::Exception& error) {
    throw FormatError(fmt::format("{}: not valid YAML: {}", where, error.what()));
  }
}

OrderedJson read_yaml(const std::filesystem::path& path) {
  return parse_yaml(read_file(path, size_t{16} << 20), path.string());
}

std::string to_yaml(const OrderedJson& json) {
  YAML::Emitter out;
  emit(out, json);
  return std::string(out.c_str()) + "\n";
}

void apply_overrides(OrderedJson& config, const std::vector<std::string>& overrides) {
  for (const std::string& text : overrides) {
    size_t equals = text.find('=');
    MOESAIC_CHECK(equals != std::string::npos && equals > 0, UsageError,
                  "'{}': expected key=value, for example learning_rate=1e-4", text);
    OrderedJson value;
    try {
      value = parse_yaml(std::string_view(text).substr(equals + 1), "override " + text.substr(0, equals));
    } catch (const FormatError& error) {
      throw UsageError(error.what());
    }
    OrderedJson* place = &config;
    std::string_view key = std::string_view(text).substr(0, equals);
    while (true) {
      size_t dot = key.find('.');
      std::string part(key.substr(0, dot));
      MOESAIC_CHECK(!part.empty(), UsageError, "'{}': the key has an empty part", text);
      MOESAIC_CHECK(place->is_object() || place->is_null(), UsageError, "'{}': '{}' is below a value that is not a map",
                    text, part);
      place = &(*place)[part];
      if (dot == std::string_view::npos) break;
      key.remove_prefix(dot + 1);
    }
    *place = std::move(value);
  }
}

void check_known_keys(const Json& config, const std::vector<std::string>& known, const std::string& where) {
  MOESAIC_CHECK(config.is_object(), UsageError, "{}: expected a map of keys", where);
  std::vector<std::string> problems;
  collect_unknown(config, known, "", problems);
  MOESAIC_CHECK(problems.empty(), UsageError, "{}: unknown key{}: {}", where, problems.size() > 1 ? "s" : "",
                fmt::join(problems, ", "));
}

}  // namespace moesaic
