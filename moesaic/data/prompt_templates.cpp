#include "moesaic/data/prompt_templates.h"

#include "moesaic/base/yaml.h"
#include "moesaic/data/order.h"
#include "moesaic/tokenizer/unicode.h"

namespace moesaic::data {
namespace {

namespace fs = std::filesystem;

constexpr std::string_view kSeparator = "|||";
// Stands for the separator where it comes from the data.
constexpr std::string_view kProtected = "3ed2dface8203c4c9dfb1a5dc58e41e0";
constexpr const char* kNoLabel = "<NO LABEL>";

std::string replaced(std::string text, std::string_view from, std::string_view to) {
  for (size_t at = text.find(from); at != std::string::npos; at = text.find(from, at + to.size())) {
    text.replace(at, from.size(), to);
  }
  return text;
}

/// str.strip()
std::string_view strip(std::string_view text) {
  while (const size_t bytes = tokenizer::leading_space(text)) text.remove_prefix(bytes);
  while (!text.empty()) {
    size_t last = text.size() - 1;
    while (last > 0 && (text[last] & 0xC0) == 0x80) --last;
    if (tokenizer::leading_space(text.substr(last)) == 0) break;
    text.remove_suffix(text.size() - last);
  }
  return text;
}

/// The parts between separators, stripped, with the data's own separators back in.
std::vector<std::string> parts_of(const std::string& text) {
  std::vector<std::string> parts;
  for (size_t begin = 0; begin != std::string::npos;) {
    const size_t end = text.find(kSeparator, begin);
    const std::string_view part = std::string_view(text).substr(begin, end == std::string::npos ? end : end - begin);
    parts.push_back(replaced(std::string(strip(part)), kProtected, kSeparator));
    begin = end == std::string::npos ? end : end + kSeparator.size();
  }
  return parts;
}

/// `jinja` with what every {{ }} prints cut, as promptsource writes it. A filter binds to the last operand only.
std::string with_cuts(std::string jinja) {
  constexpr std::string_view kCut = " | string | truncate(2048) ";
  for (size_t at = jinja.find("}}"); at != std::string::npos; at = jinja.find("}}", at)) {
    const size_t end = at > 0 && jinja[at - 1] == '-' ? at - 1 : at;
    jinja.insert(end, kCut);
    at += kCut.size() + 2;
  }
  return jinja;
}

/// Reads one entry. What is wrong with it is added to `problems`.
PromptTemplate read_entry(const std::string& id, const OrderedJson& entry, const std::string& where,
                          std::vector<std::string>& problems) {
  PromptTemplate result;
  result.id = id;
  if (!entry.is_object()) {
    problems.push_back(fmt::format("{}: template {} is {}, expected name and jinja", where, id, entry.type_name()));
    return result;
  }
  auto text = [&](const char* key, bool required) -> std::optional<std::string> {
    const auto found = entry.find(key);
    if (found == entry.end() || found->is_null()) {
      if (required) problems.push_back(fmt::format("{}: template {} has no {}", where, id, key));
      return std::nullopt;
    }
    if (found->is_string()) return found->get<std::string>();
    problems.push_back(fmt::format("{}: template {}: {} is {}, expected a text", where, id, key, found->dump()));
    return std::nullopt;
  };
  result.name = text("name", true).value_or("");
  result.jinja = text("jinja", true).value_or("");
  result.answer_choices = text("answer_choices", false);
  const auto metadata = entry.find("metadata");
  if (metadata == entry.end() || metadata->is_null()) return result;
  try {
    const Json values = *metadata;
    const std::string place = fmt::format("{}: template {}: metadata", where, id);
    result.original_task = get_or<bool>(values, "original_task", false, place);
    result.choices_in_prompt = get_or<bool>(values, "choices_in_prompt", false, place);
    result.metrics = get_or<std::vector<std::string>>(values, "metrics", {}, place);
  } catch (const ConfigError& error) {
    problems.emplace_back(error.what());
  }
  return result;
}

}  // namespace

PromptTemplates PromptTemplates::load(const fs::path& path) {
  std::error_code error;
  const fs::path file = fs::is_directory(path, error) ? path / "templates.yaml" : path;
  MOESAIC_CHECK(fs::is_regular_file(file, error), UsageError,
                "{}: no such file, expected a templates.yaml of promptsource, or a folder with one", file.string());
  return parse(read_file(file, size_t{16} << 20), file.string());
}

PromptTemplates PromptTemplates::parse(const std::string& text, const std::string& where) {
  YamlLines lines;
  const OrderedJson yaml = parse_yaml(text, where, &lines);
  const bool is_map = yaml.is_object() && yaml.contains("templates") && yaml["templates"].is_object();
  MOESAIC_CHECK(is_map && !yaml["templates"].empty(), FormatError,
                "{}: got no map `templates` with entries, which promptsource's files have", where);

  PromptTemplates result;
  std::vector<std::string> problems;
  for (const auto& [id, entry] : yaml["templates"].items()) {
    const std::string place = fmt::format("{}:{}", where, lines["/templates/" + id]);
    const size_t known = problems.size();
    PromptTemplate& made = result.templates_.emplace_back(read_entry(id, entry, place, problems));
    if (problems.size() > known) continue;
    const std::string name = fmt::format("{}: template '{}'", place, made.name);
    try {
      Compiled compiled{RowTemplate(with_cuts(made.jinja), name), std::nullopt};
      if (made.answer_choices) compiled.answer_choices.emplace(*made.answer_choices, name + ": answer_choices");
      result.compiled_.push_back(std::move(compiled));
    } catch (const FormatError& broken) {
      problems.emplace_back(broken.what());
    }
  }
  MOESAIC_CHECK(problems.empty(), FormatError, "{}", fmt::join(problems, "\n"));
  return result;
}

std::string PromptTemplates::source(size_t index) const {
  const PromptTemplate& of = templates_.at(index);
  return Json({of.jinja, of.answer_choices ? Json(*of.answer_choices) : Json()}).dump();
}

std::optional<RenderedPrompt> PromptTemplates::render(size_t index, const OrderedJson& row, uint64_t seed) const {
  const Compiled& compiled = compiled_.at(index);
  seed = hash_mix(seed, index);
  OrderedJson variables = OrderedJson::object();
  for (const auto& [key, value] : row.items()) {
    variables[replaced(key, "-", "_")] =
        value.is_string() ? OrderedJson(replaced(value.get<std::string>(), kSeparator, kProtected)) : value;
  }
  MOESAIC_CHECK(!variables.contains("answer_choices"), DataError,
                "got a field 'answer_choices', the name under which templates find their choices");
  RenderedPrompt result;
  if (compiled.answer_choices) result.choices = parts_of(compiled.answer_choices->render(variables, seed));
  variables["answer_choices"] = compiled.answer_choices ? OrderedJson(result.choices) : OrderedJson();
  std::vector<std::string> parts = parts_of(compiled.jinja.render(variables, hash_mix(seed, 1)));
  if (parts.size() != 2 || parts[0].empty()) return std::nullopt;
  result.input = std::move(parts[0]);
  result.targets.push_back(parts[1].empty() ? kNoLabel : std::move(parts[1]));
  return result;
}

}  // namespace moesaic::data
