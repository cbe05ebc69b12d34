#include "moesaic/eval/task_file.h"

#include <fnmatch.h>

#include <algorithm>
#include <set>
#include <sstream>

#include "moesaic/base/row_template.h"
#include "moesaic/data/prompt_templates.h"
#include "moesaic/data/record_file.h"
#include "moesaic/eval/evaluate.h"
#include "moesaic/eval/rows.h"
#include "moesaic/eval/task_keys.h"

namespace moesaic::eval {
namespace fs = std::filesystem;
namespace {

/// A template of a task file. The row's fields are its variables.
class Jinja : public RowTemplate {
 public:
  Jinja(const std::string& source, const std::string& place) : RowTemplate(source, place, Undefined::kError) {}
  /// Throws DataError where the row does not fit.
  std::string of(const OrderedJson& row) const { return render(row, /*seed=*/0); }
};

/// An expression of Jinja, as JSON.
class Expression {
 public:
  Expression(const std::string& source, const std::string& place)
      : template_(fmt::format("{{{{ ({}) | tojson }}}}", source), place) {}
  OrderedJson of(const OrderedJson& row) const { return parse_ordered_json(template_.of(row), "expression"); }

 private:
  Jinja template_;
};

/// What stands between the braces of a template that is nothing but "{{ ... }}".
std::optional<std::string> single_expression(const std::string& source) {
  const std::string text = stripped(source);
  if (!text.starts_with("{{") || !text.ends_with("}}")) return std::nullopt;
  const std::string inside = text.substr(2, text.size() - 4);
  const bool more = inside.find("{{") != std::string::npos || inside.find("{%") != std::string::npos ||
                    inside.find("}}") != std::string::npos;
  return more ? std::nullopt : std::optional(inside);
}

/// What a key like doc_to_text makes of a row: the value of the column that it names, or else what its template gives,
/// which is a value where it is a single expression.
class Field {
 public:
  Field(const Keys& keys, const char* key) : key_(key), source_(keys.text(key)) {
    const std::string place = fmt::format("{}: {}", keys.find(key)->place, key);
    if (const auto inside = single_expression(source_)) {
      expression_.emplace(*inside, place);
    } else {
      template_.emplace(source_, place);
    }
  }

  bool names_column(const OrderedJson& row) const { return row.contains(source_); }

  OrderedJson of(const OrderedJson& row) const {
    if (names_column(row)) return row[source_];
    const bool name =
        std::all_of(source_.begin(), source_.end(), [](unsigned char c) { return std::isalnum(c) || c == '_'; });
    MOESAIC_CHECK(!name, DataError, "{}: the row has no '{}'", key_, source_);
    return expression_ ? expression_->of(row) : OrderedJson(template_->of(row));
  }
  std::string text_of(const OrderedJson& row) const {
    const OrderedJson value = of(row);
    MOESAIC_CHECK(value.is_string() || value.is_number(), DataError, "{}: got {}, expected a text", key_,
                  compact(value).substr(0, 80));
    return value.is_string() ? value.get<std::string>() : compact(value);
  }

 private:
  std::string key_, source_;
  std::optional<Jinja> template_;
  std::optional<Expression> expression_;
};

/// `process_docs`: which rows are asked, and fields that are computed from others.
class Preparation {
 public:
  explicit Preparation(const Keys& above) {
    const Keys keys = above.below("process_docs");
    keys.check({"select", "fields"});
    if (const Entry* entry = keys.find("select")) select_.emplace(keys.text("select"), entry->place + ": select");
    if (keys.find("fields") == nullptr) return;
    std::string list;
    const Keys fields = keys.below("fields");
    for (const auto& [name, value] : keys.find("fields")->value.items()) {
      const std::string expression = fields.text(name.c_str());
      Expression(expression, fmt::format("{}: {}", fields.place(), name));  // names the one that is broken
      list += fmt::format("{}({})", names_.empty() ? "" : ", ", expression);
      names_.push_back(name);
    }
    fields_.emplace("[" + list + "]", fields.place());
  }

  /// Whether the row is asked; adds its fields.
  bool prepare(OrderedJson& row) const {
    if (select_) {
      const OrderedJson chosen = select_->of(row);
      MOESAIC_CHECK(chosen.is_boolean(), DataError, "process_docs: select: got {}, expected true or false",
                    compact(chosen));
      if (!chosen.get<bool>()) return false;
    }
    if (!fields_) return true;
    const OrderedJson values = fields_->of(row);
    for (size_t i = 0; i < names_.size(); ++i) row[names_[i]] = values[i];
    return true;
  }

 private:
  std::optional<Expression> select_, fields_;
  std::vector<std::string> names_;
};

/// The data files of a task, by split.
class Data {
 public:
  Data(const Keys& keys, const fs::path& data_dir) : place_(keys.place()) {
    const std::string path = keys.text("dataset_path");
    const Keys kwargs = keys.below("dataset_kwargs");
    kwargs.check({"data_files", "delimiter", "column_names", "quoting"});
    const Entry* files = kwargs.find("data_files");
    MOESAIC_CHECK(files != nullptr, FormatError,
                  "{}: dataset_kwargs: the key 'data_files' is missing: data sets are "
                  "files, nothing is downloaded",
                  keys.place());
    const std::set<std::string> formats{"json", "csv", "parquet", "arrow"};
    folder_ = formats.contains(path) ? data_dir : data_dir / path;
    columns_ = kwargs.texts("column_names");
    if (!columns_.empty() || kwargs.find("delimiter") != nullptr || kwargs.find("quoting") != nullptr) {
      const bool plain = kwargs.text("delimiter", "") == "\t" && kwargs.number("quoting", 0) == 3 && !columns_.empty();
      MOESAIC_CHECK(plain, FormatError,
                    "{}: column_names, delimiter and quoting go together, as names, \"\\t\" and 3: columns between "
                    "tabs, without a header and without quotes",
                    kwargs.place());
    }
    auto add = [&](const std::string& split, const OrderedJson& value) {
      const OrderedJson list = value.is_array() ? value : OrderedJson::array({value});
      for (const OrderedJson& name : list) {
        if (!name.is_string()) files->refuse("data_files", "names of files");
        patterns_[split].push_back(name.get<std::string>());
      }
    };
    if (!files->value.is_object()) {
      add("train", files->value);
    } else {
      for (const auto& [split, value] : files->value.items()) add(split, value);
    }
  }

  /// Takes this file for every split.
  void replace(const fs::path& file) { given_ = file; }

  std::vector<fs::path> files(const std::string& split) const {
    if (!given_.empty()) return {given_};
    const auto found = patterns_.find(split);
    MOESAIC_CHECK(found != patterns_.end(), FormatError, "{}: data_files has no split '{}'", place_, split);
    std::vector<fs::path> all;
    for (const std::string& pattern : found->second) {
      const fs::path path = folder_ / pattern;
      std::vector<fs::path> matched;
      if (fs::is_regular_file(path)) {
        matched.push_back(path);
      } else if (pattern.find('*') != std::string::npos && fs::is_directory(path.parent_path())) {
        for (const fs::directory_entry& entry : fs::directory_iterator(path.parent_path())) {
          const bool fits = fnmatch(path.filename().c_str(), entry.path().filename().c_str(), 0) == 0;
          if (fits && entry.is_regular_file()) matched.push_back(entry.path());
        }
        std::sort(matched.begin(), matched.end());
      }
      MOESAIC_CHECK(!matched.empty(), UsageError, "{}: no data file {}. --data_dir names the folder where it lies.",
                    place_, path.lexically_normal().string());
      all.insert(all.end(), matched.begin(), matched.end());
    }
    return all;
  }

  /// Calls use(row, where) for every row of the files until it returns false.
  template <class Use>
  void each(const std::vector<fs::path>& files, RowErrors& errors, Use&& use) const {
    for (const fs::path& file : files) {
      auto where = [&](const std::string& place) { return files.size() == 1 ? place : file.string() + " " + place; };
      if (!columns_.empty()) {
        each_line(file, [&](const std::string& line, int64_t number) {
          std::vector<std::string> values;
          std::istringstream stream(line.ends_with('\r') ? line.substr(0, line.size() - 1) : line);
          for (std::string value; std::getline(stream, value, '\t');) values.push_back(value);
          const std::string place = where(fmt::format("line {}", number));
          if (values.size() != columns_.size()) {
            return errors.add(fmt::format("{}: {} columns between tabs, expected {}: {}", place, values.size(),
                                          columns_.size(), fmt::join(columns_, ", ")));
          }
          OrderedJson row = OrderedJson::object();
          for (size_t i = 0; i < values.size(); ++i) row[columns_[i]] = values[i];
          use(std::move(row), place);
        });
        continue;
      }
      const std::unique_ptr<data::RecordFile> records = data::RecordFile::open(file);
      for (int64_t i = 0; records->has(i); ++i) {
        std::string place = records->where(i);  // "file:line" or "file row n"
        if (place.starts_with(file.string())) place = place.substr(file.string().size());
        if (place.starts_with(':')) place = "line " + place.substr(1);
        use(records->read(i), where(stripped(place)));
      }
    }
  }

 private:
  std::string place_;
  fs::path folder_, given_;
  std::map<std::string, std::vector<std::string>> patterns_;
  std::vector<std::string> columns_;
};

/// The keys of a task; what is called as in lm-evaluation-harness means the same.
const std::vector<std::string> kTaskKeys{
    "task",          "tag",         "metadata",         "dataset_path",      "dataset_kwargs", "test_split",
    "process_docs",  "output_type", "validation_split", "description",       "doc_to_text",    "doc_to_target",
    "doc_to_choice", "use_prompt",  "prompt_filter",    "target_delimiter",  "num_fewshot",    "fewshot_split",
    "metric_list",   "score_eos",   "fewshot_config",   "fewshot_delimiter", "program",        "generation_kwargs"};

/// Metrics of answers that are numbers: their references must be some.
bool asks_for_number(const std::string& metric) { return metric == "number" || metric == "flexible-extract"; }

/// One task of a file.
class TaskFile {
 public:
  TaskFile(const Keys& keys, const TaskOptions& options)
      : keys_(keys), options_(options), data_(keys, options.data_dir), preparation_(keys) {
    keys_.check(kTaskKeys);
    const std::string kind = keys_.text("output_type");
    if (kind != "generate_until" && kind != "multiple_choice") {
      keys_.find("output_type")->refuse("output_type", "generate_until or multiple_choice");
    }
    ranked_ = kind == "multiple_choice";
    if (const Entry* entry = keys_.find("description")) {
      description_.emplace(keys_.text("description"), entry->place + ": description");
    }
    if (keys_.find("use_prompt")) {
      read_prompts();
      return;
    }
    if (ranked_ != (keys_.find("doc_to_choice") != nullptr)) {
      throw FormatError(fmt::format("{}: doc_to_choice {} output_type {}", keys_.place(),
                                    ranked_ ? "is missing for" : "does not go with", kind));
    }
    text_.emplace(keys_, "doc_to_text");
    read_target();
    if (const Entry* choices = keys_.find("doc_to_choice")) {
      if (choices->value.is_array()) {
        fixed_choices_ = keys_.texts("doc_to_choice");
      } else {
        choices_.emplace(keys_, "doc_to_choice");
      }
    }
    const Keys program = keys_.below("program");
    program.check({"before", "tests"});
    if (keys_.find("program")) {
      before_.emplace(program.text("before", ""), program.place() + ": before");
      tests_.emplace(program.text("tests"), program.place() + ": tests");
    }
  }

  Data& data() { return data_; }

  Task read() const {
    Task task;
    task.name = keys_.text("task");
    read_scoring(task);
    const std::string split = keys_.text("test_split", keys_.text("validation_split", ""));
    MOESAIC_CHECK(!split.empty(), FormatError, "{}: test_split or validation_split is missing: a split of data_files",
                  keys_.place());
    const std::vector<fs::path> files = data_.files(split);
    task.path = files[0];
    task.num_fewshot = options_.num_fewshot.value_or(keys_.number("num_fewshot", 0));
    uint64_t number = 0;
    const std::string examples = solved_examples(task.num_fewshot, split);
    RowErrors errors;
    data_.each(files, errors, [&](OrderedJson row, const std::string& where) {
      try {
        ++number;
        if (!preparation_.prepare(row) || (++task.available > options_.limit && options_.limit > 0)) return;
        if (prompts_) return add_prompts(row, number, task);
        task.items.push_back(item(std::move(row), examples, task));
      } catch (const DataError& error) {
        errors.add(fmt::format("{}: {}", where, error.what()));
      }
    });
    errors.throw_if_any(task.path.string());
    if (prompts_) task.available = options_.limit > 0 ? task.available * std::ssize(chosen_) : std::ssize(task.items);
    MOESAIC_CHECK(!task.items.empty(), DataError, "{}: no row is a question of the task {}", task.path.string(),
                  keys_.text("task"));
    if (ranked_ && options_.generate) {
      for (Item& item : task.items) item.choices.clear();
      task.metrics = Task().metrics;
    }
    return task;
  }

 private:
  /// `use_prompt`: "<folder>:<template's name, or * for all>", of which `prompt_filter` takes some.
  void read_prompts() {
    for (const char* key :
         {"doc_to_text", "doc_to_target", "doc_to_choice", "program", "fewshot_config", "fewshot_split"}) {
      if (const Entry* entry = keys_.find(key)) entry->refuse(key, "none beside use_prompt");
    }
    const Entry& entry = *keys_.find("use_prompt");
    const std::string value = keys_.text("use_prompt");
    const size_t colon = value.rfind(':');
    if (colon == std::string::npos) entry.refuse("use_prompt", "a folder with a templates.yaml, ':' and a name or *");
    const fs::path path = options_.data_dir / value.substr(0, colon);
    MOESAIC_CHECK(fs::exists(path), UsageError,
                  "{}: use_prompt: no folder {}. --data_dir names the folder in which it "
                  "lies; docs/cli.md says where templates come from.",
                  entry.place, path.lexically_normal().string());
    prompts_ = data::PromptTemplates::load(path);
    const Keys filter = keys_.below("prompt_filter");
    filter.check({"original_task", "choices_in_prompt"});
    const std::string name = value.substr(colon + 1);
    for (size_t i = 0; i < prompts_->templates().size(); ++i) {
      const data::PromptTemplate& prompt = prompts_->templates()[i];
      auto fits = [&](const char* key, bool has) { return !filter.find(key) || filter.find(key)->value == has; };
      const bool asked = (name == "*" || name == prompt.name) && (!ranked_ || prompt.answer_choices);
      if (asked && fits("original_task", prompt.original_task) && fits("choices_in_prompt", prompt.choices_in_prompt)) {
        chosen_.push_back(i);
      }
    }
    if (chosen_.empty()) entry.refuse("use_prompt", "at least one template that the other keys let through");
  }

  /// An index, or as doc_to_text.
  void read_target() {
    const Entry* entry = keys_.find("doc_to_target");
    if (entry != nullptr && entry->value.is_number_integer()) {
      fixed_target_ = entry->value;
    } else {
      target_.emplace(keys_, "doc_to_target");
    }
  }

  /// Metrics, stops and how choices are scored.
  void read_scoring(Task& task) const {
    const Keys generation = keys_.below("generation_kwargs");
    generation.check({"until", "max_gen_toks", "do_sample", "temperature"});
    generation.only("do_sample", false);
    const Entry* temperature = generation.find("temperature");
    if (temperature != nullptr && temperature->value != 0) temperature->refuse("temperature", "0");
    task.stop = generation.texts("until");
    task.max_new_tokens = generation.number("max_gen_toks", task.max_new_tokens);
    if (ranked_) task.metrics = {"acc", "acc_norm"};
    if (const Entry* list = keys_.find("metric_list")) {
      if (!list->value.is_array() || list->value.empty()) list->refuse("metric_list", "a list of metrics");
      const std::vector<std::string> known = ranked_ ? task.metrics : generated_metrics();
      task.metrics.clear();
      for (const OrderedJson& item : list->value) {
        if (!item.is_object()) list->refuse("metric_list", "a list of maps, each with `metric`");
        std::map<std::string, Entry> entries;
        for (const auto& [key, value] : item.items()) entries[key] = {value, list->place};
        const Keys metric(list->place + ": metric_list", entries);
        metric.check({"metric", "aggregation", "higher_is_better"});
        const std::string name = metric.text("metric");
        if (std::find(known.begin(), known.end(), name) == known.end()) {
          metric.find("metric")->refuse("metric", fmt::format("one of {}", fmt::join(known, ", ")));
        }
        metric.only("aggregation", name == "bleu" || name == "chrf" ? name : "mean");
        metric.only("higher_is_better", true);
        task.metrics.push_back(name);
      }
    }
    if (keys_.find("target_delimiter")) task.target_delimiter = keys_.text("target_delimiter");
    if (const Entry* eos = keys_.find("score_eos")) {
      if (!eos->value.is_boolean() || !ranked_) eos->refuse("score_eos", "true or false, and choices to rank");
      task.score_eos = eos->value.get<bool>();
    }
    const Keys metadata = keys_.below("metadata");
    if (const Entry* version = metadata.find("version")) task.version = version->value;
  }

  Item item(OrderedJson row, const std::string& examples, const Task& task) const {
    Item item;
    item.messages = user_turn((description_ ? description_->of(row) : "") + examples + text_->text_of(row));
    item.choices = choices_of(row);
    item.targets = targets_of(row, item.choices);
    const bool number = std::any_of(task.metrics.begin(), task.metrics.end(), asks_for_number);
    for (std::string& target : item.targets) {
      MOESAIC_CHECK(!number || (!target.empty() && last_number(target) == target), DataError,
                    "doc_to_target: got {}, expected a number, as the metrics want", compact(target));
      if (ranked_) target = stripped(target);
    }
    if (tests_) item.program = {before_->of(row), tests_->of(row)};
    item.sentence = sentence_of_row(row);
    item.doc = std::move(row);
    return item;
  }

  /// The row through each template that gives it something. `number` seeds their wording.
  void add_prompts(const OrderedJson& row, uint64_t number, Task& task) const {
    const std::string description = description_ ? description_->of(row) : "";
    for (const size_t i : chosen_) {
      std::optional<data::RenderedPrompt> prompt = prompts_->render(i, row, number);
      if (!prompt) continue;
      Item& item = task.items.emplace_back();
      item.variant = prompts_->templates()[i].name;
      item.messages = user_turn(description + prompt->input);
      item.targets = std::move(prompt->targets);
      for (std::string& target : item.targets) target = stripped(target);
      if (ranked_) item.choices = std::move(prompt->choices);
      const bool found = std::any_of(item.choices.begin(), item.choices.end(), [&](const std::string& choice) {
        return std::find(item.targets.begin(), item.targets.end(), stripped(choice)) != item.targets.end();
      });
      MOESAIC_CHECK(found || !ranked_, DataError, "template '{}': the answer {} is none of the choices {}",
                    item.variant, compact(item.targets), compact(item.choices).substr(0, 80));
      item.sentence = sentence_of_row(row);
      item.doc = row;
    }
  }

  static std::vector<float> sentence_of_row(const OrderedJson& row) {
    const auto found = row.find("sentence");  // may also be a text
    return found != row.end() && found->is_array() ? found->get<std::vector<float>>() : std::vector<float>();
  }

  std::vector<std::string> choices_of(const OrderedJson& row) const {
    if (!choices_) return fixed_choices_;
    const OrderedJson value = choices_->of(row);
    const bool texts = value.is_array() && !value.empty() &&
                       std::all_of(value.begin(), value.end(), [](const auto& v) { return v.is_string(); });
    MOESAIC_CHECK(texts, DataError, "doc_to_choice: got {}, expected a list of texts", compact(value).substr(0, 80));
    return value.get<std::vector<std::string>>();
  }

  /// The accepted answers. Of choices, an index is also a text of digits that a template made.
  std::vector<std::string> targets_of(const OrderedJson& row, const std::vector<std::string>& choices) const {
    const OrderedJson value = target_ ? target_->of(row) : fixed_target_;
    const bool texts = value.is_array() && !value.empty() &&
                       std::all_of(value.begin(), value.end(), [](const auto& v) { return v.is_string(); });
    if (texts && !ranked_) return value.get<std::vector<std::string>>();
    std::string text = value.is_string() ? value.get<std::string>() : compact(value);
    if (value.is_boolean()) text = value.get<bool>() ? "1" : "0";
    if (!ranked_) {
      MOESAIC_CHECK(value.is_string() || value.is_number(), DataError,
                    "doc_to_target: got {}, expected a text or a list of texts", text.substr(0, 80));
      return {text};
    }
    const bool digits = !text.empty() && text.find_first_not_of("0123456789") == std::string::npos && text.size() < 9;
    const bool made = target_ && value.is_string() && !target_->names_column(row);
    if (digits && (made || !value.is_string())) {
      const size_t index = std::stoul(text);
      MOESAIC_CHECK(index < choices.size(), DataError, "doc_to_target: got {}, expected an index of {} choices", text,
                    choices.size());
      text = choices[index];
    }
    const bool found = std::any_of(choices.begin(), choices.end(),
                                   [&](const std::string& choice) { return stripped(choice) == stripped(text); });
    MOESAIC_CHECK(found, DataError, "doc_to_target: got {}, expected one of the choices {}", compact(text),
                  compact(choices).substr(0, 80));
    return {text};
  }

  /// The first `count` examples, before every question.
  std::string solved_examples(int64_t count, const std::string& asked_split) const {
    const Keys config = keys_.below("fewshot_config");
    config.check({"sampler", "samples", "split", "process_docs"});
    if (count == 0) return "";
    const std::string split = config.text("split", keys_.text("fewshot_split", ""));
    const Entry* samples = config.find("samples");
    MOESAIC_CHECK(samples != nullptr || !split.empty(), UsageError,
                  "--num_fewshot {}: {} has no solved examples to show (fewshot_config or fewshot_split)", count,
                  keys_.place());
    MOESAIC_CHECK(config.text("sampler", "default") == "first_n", FormatError,
                  "{}: sampler: got '{}', expected first_n: examples are not drawn", config.place(),
                  config.text("sampler", "default"));
    const Preparation preparation(config);
    MOESAIC_CHECK(samples != nullptr || split != asked_split || config.find("process_docs") != nullptr, FormatError,
                  "{}: the examples would be the questions themselves: give them another split, or a process_docs",
                  config.place());
    std::vector<OrderedJson> rows;
    auto add = [&](OrderedJson row) {
      if (std::ssize(rows) < count && preparation.prepare(row)) rows.push_back(std::move(row));
    };
    RowErrors errors;
    if (samples != nullptr) {
      if (!samples->value.is_array()) samples->refuse("samples", "a list of rows");
      for (const OrderedJson& row : samples->value) add(row);
    } else {
      data_.each(data_.files(split), errors, [&](OrderedJson row, const std::string&) { add(std::move(row)); });
    }
    MOESAIC_CHECK(std::ssize(rows) == count, UsageError, "--num_fewshot {}: {} has {} examples", count, keys_.place(),
                  rows.size());
    const std::string delimiter = keys_.text("target_delimiter", " ");
    const std::string between = keys_.text("fewshot_delimiter", "\n\n");
    std::string text;
    for (const OrderedJson& row : rows) {
      text += text_->text_of(row) + delimiter + targets_of(row, choices_of(row))[0] + between;
    }
    return text;
  }

  Keys keys_;
  TaskOptions options_;
  Data data_;
  Preparation preparation_;
  bool ranked_ = false;
  std::optional<Field> text_, target_, choices_;
  OrderedJson fixed_target_;
  std::vector<std::string> fixed_choices_;
  std::optional<Jinja> description_, before_, tests_;
  std::optional<data::PromptTemplates> prompts_;
  std::vector<size_t> chosen_;
};

}  // namespace

bool is_built_in(const std::string& name) {
  return std::any_of(kBuiltIn.begin(), kBuiltIn.end(), [&](const BuiltIn& file) { return name == file.name; });
}

bool is_task_file(const fs::path& path) {
  return fs::is_regular_file(path) && (path.extension() == ".yaml" || path.extension() == ".yml");
}

std::vector<Task> named_tasks(const std::string& name, const TaskOptions& options) {
  std::vector<Document> files;
  std::vector<std::string> known;
  if (is_task_file(name)) {
    files.push_back(*open_task_file(name));
  } else {
    for (const BuiltIn& built_in : kBuiltIn) {
      Document file = *open_task_file(built_in.name);
      const std::vector<std::string> tags = file.keys().texts("tag");
      known.push_back(built_in.name);
      known.insert(known.end(), tags.begin(), tags.end());
      const bool tagged = std::find(tags.begin(), tags.end(), name) != tags.end();
      if (tagged || name == built_in.name) files.push_back(std::move(file));
    }
  }
  const std::string near = nearest_name(name, known);
  MOESAIC_CHECK(!files.empty(), UsageError, "--tasks {}: no such file or folder, and no built-in task{}", name,
                near.empty() ? "" : fmt::format(" (did you mean {}?)", near));
  std::vector<Task> tasks;
  for (const Document& file : files) {
    MOESAIC_CHECK(!file.json.contains("group"), UsageError, "--tasks {}: is a group of tasks, expected --suite {}",
                  name, name);
    tasks.push_back(TaskFile(file.keys(), options).read());
  }
  return tasks;
}

Suite load_suite(const std::string& name, const TaskOptions& options) {
  const std::optional<Document> file = open_task_file(name);
  MOESAIC_CHECK(file && file->json.contains("group"), UsageError,
                "--suite {}: expected a file (.yaml) of a group of tasks, or the built-in one: t0", name);
  Suite suite;
  /// The keys of the group at `pointer`, which hold for its tasks, and their number.
  auto group = [&](const std::string& pointer, const Keys* above) {
    Keys keys = file->keys(pointer);
    const Entry* tasks = keys.find("task");
    if (tasks == nullptr || !tasks->value.is_array() || tasks->value.empty()) {
      throw FormatError(fmt::format("{}: task: expected a list of tasks", tasks ? tasks->place : keys.place()));
    }
    const size_t count = tasks->value.size();
    const std::string called = keys.text("group");
    keys.erase("task");
    keys.erase("group");
    if (above != nullptr) keys.fill(*above);
    return std::tuple(called, keys, count);
  };
  auto add = [&](const std::string& pointer, const Keys& above) {
    Keys keys = file->keys(pointer);
    keys.fill(above);
    suite.tasks.push_back(TaskFile(keys, options).read());
  };
  const auto [called, shared, count] = group("", nullptr);
  suite.name = called;
  for (size_t i = 0; i < count; ++i) {
    const std::string pointer = fmt::format("/task/{}", i);
    const OrderedJson& item = file->json["task"][i];
    if (item.is_object() && item.contains("group")) {
      const auto [column, keys, inside] = group(pointer, &shared);
      for (size_t j = 0; j < inside; ++j) add(fmt::format("{}/task/{}", pointer, j), keys);
      suite.columns.push_back({column, inside});
    } else {
      add(pointer, shared);
      suite.columns.push_back({suite.tasks.back().name, 1});
    }
  }
  return suite;
}

Task built_in_over(const std::string& name, const fs::path& data, const TaskOptions& options) {
  TaskFile file(open_task_file(name)->keys(), options);
  file.data().replace(data);
  Task task = file.read();
  task.name = data.stem().string();
  return task;
}

}  // namespace moesaic::eval
