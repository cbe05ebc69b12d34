#include "moesaic/eval/task.h"

#include <algorithm>
#include <set>

#include "moesaic/data/dataset.h"
#include "moesaic/eval/rows.h"
#include "moesaic/eval/task_file.h"

namespace moesaic::eval {
namespace fs = std::filesystem;
namespace {

constexpr size_t kMostClosedLabels = 20;
constexpr size_t kInstancesPerLabel = 16;

/// row[key] as a string, or an error in `errors` and "".
std::string text_at(const OrderedJson& row, const char* key, const std::string& where, RowErrors& errors) {
  if (row.is_object() && row.contains(key) && row[key].is_string()) return row[key].get<std::string>();
  errors.add(fmt::format("{}: \"{}\" is missing or no text", where, key));
  return "";
}

/// A text, or a non-empty list of texts.
std::vector<std::string> texts_at(const OrderedJson& row, const char* key, const std::string& where,
                                  RowErrors& errors) {
  if (row.is_object() && row.contains(key)) {
    const OrderedJson& value = row[key];
    if (value.is_string()) return {value.get<std::string>()};
    const bool texts = value.is_array() && !value.empty() &&
                       std::all_of(value.begin(), value.end(), [](const auto& v) { return v.is_string(); });
    if (texts) return value.get<std::vector<std::string>>();
  }
  errors.add(fmt::format("{}: \"{}\" is missing, or neither a text nor a list of texts", where, key));
  return {};
}

std::vector<float> sentence_at(const OrderedJson& row, const std::string& where, RowErrors& errors) {
  if (!row.is_object() || !row.contains("sentence")) return {};
  const OrderedJson& value = row["sentence"];
  if (value.is_array() && std::all_of(value.begin(), value.end(), [](const auto& v) { return v.is_number(); })) {
    return value.get<std::vector<float>>();
  }
  errors.add(fmt::format("{}: \"sentence\" is no list of numbers", where));
  return {};
}

bool has_keys(const OrderedJson& row, std::initializer_list<const char*> keys) {
  return row.is_object() && std::all_of(keys.begin(), keys.end(), [&](const char* key) { return row.contains(key); });
}
bool is_p3(const OrderedJson& row) { return has_keys(row, {"inputs", "answer_choices"}); }
bool is_multiple_choice(const OrderedJson& row) { return has_keys(row, {"query", "choices", "gold"}); }

OrderedJson row_of(const std::string& line, const fs::path& path, int64_t number) {
  return parse_ordered_json(line, fmt::format("{}:{}", path.string(), number));
}

/// The first row of a .jsonl file; null when it has none.
OrderedJson first_row(const fs::path& path) {
  OrderedJson row;
  each_line(path, [&](const std::string& line, int64_t number) {
    if (row.is_null()) row = row_of(line, path, number);
  });
  return row;
}

Item p3_item(const OrderedJson& row, const std::string& where, RowErrors& errors) {
  Item item;
  item.messages = user_turn(text_at(row, "inputs", where, errors));
  item.targets = texts_at(row, row.contains("target") ? "target" : "targets", where, errors);
  for (std::string& target : item.targets) target = stripped(target);
  if (!row["answer_choices"].is_null()) {
    item.choices = texts_at(row, "answer_choices", where, errors);
    const bool found = std::any_of(item.choices.begin(), item.choices.end(), [&](const std::string& choice) {
      return std::find(item.targets.begin(), item.targets.end(), stripped(choice)) != item.targets.end();
    });
    if (!found) errors.add(fmt::format("{}: the target is none of the answer choices", where));
  }
  if (row.contains("template") && row["template"].is_string()) item.variant = row["template"].get<std::string>();
  return item;
}

Item multiple_choice_item(const OrderedJson& row, const std::string& where, RowErrors& errors) {
  Item item;
  item.messages = user_turn(text_at(row, "query", where, errors));
  item.choices = texts_at(row, "choices", where, errors);
  const OrderedJson& gold = row["gold"];
  if (gold.is_number_unsigned() && gold.get<uint64_t>() < item.choices.size()) {
    item.targets = {stripped(item.choices[gold.get<size_t>()])};
  } else {
    errors.add(fmt::format("{}: \"gold\" is no index of a choice", where));
  }
  return item;
}

/// Rows of answer choices, known by the keys of the first.
bool is_choice_row(const OrderedJson& row) { return is_p3(row) || is_multiple_choice(row); }

void read_choices(Task& task, const TaskOptions& options) {
  RowErrors errors;
  each_line(task.path, [&](const std::string& line, int64_t number) {
    if (++task.available > options.limit && options.limit > 0) return;
    const std::string where = fmt::format("line {}", number);
    OrderedJson row = row_of(line, task.path, number);
    if (!is_choice_row(row)) return errors.add(where + ": other keys than the first row");
    Item item = is_p3(row) ? p3_item(row, where, errors) : multiple_choice_item(row, where, errors);
    item.sentence = sentence_at(row, where, errors);
    item.doc = std::move(row);
    task.items.push_back(std::move(item));
  });
  errors.throw_if_any(task.path.string());
}

/// The built-in task that asks rows like this one; "" when there is none.
std::string asked_by(const OrderedJson& row) {
  if (has_keys(row, {"prompt", "test", "entry_point"})) return "humaneval";
  if (has_keys(row, {"task_id", "text", "code", "test_list"})) return "mbpp";
  const bool marked = has_keys(row, {"question", "answer"}) && row["answer"].is_string() &&
                      row["answer"].get_ref<const std::string&>().find("####") != std::string::npos;
  return marked ? "gsm8k" : "";
}

/// The built-in task that asks a .tsv file: MGSM in the language that the file's name ends in, else in English.
std::string mgsm_of(const fs::path& tsv) {
  const std::string name = tsv.stem().string();
  const std::string task = "mgsm_direct_" + name.substr(name.rfind('_') + 1);
  return is_built_in(task) ? task : "mgsm_direct_en";
}

std::vector<Item> superni_items(const OrderedJson& file, const std::string& path, const TaskOptions& options) {
  RowErrors errors;
  const std::vector<std::string> definition = texts_at(file, "Definition", "task", errors);
  const OrderedJson& instances = file["Instances"];
  if (!instances.is_array()) errors.add("\"Instances\" is no list");
  errors.throw_if_any(path);

  std::string head = definition[0] + "\n\n";
  if (const int64_t shown = options.num_fewshot.value_or(0); shown > 0) {
    const OrderedJson examples = file.value("Positive Examples", OrderedJson::array());
    MOESAIC_CHECK(static_cast<int64_t>(examples.size()) >= shown, DataError,
                  "{}: --num_fewshot {}, but the task has {} positive examples", path, shown, examples.size());
    for (int64_t i = 0; i < shown; ++i) {
      const std::string where = fmt::format("positive example {}", i);
      const std::vector<std::string> output = texts_at(examples[i], "output", where, errors);
      if (!output.empty()) head += text_at(examples[i], "input", where, errors) + "\n" + output[0] + "\n\n";
    }
  }
  std::vector<Item> items;
  std::set<std::string> labels;
  for (size_t i = 0; i < instances.size(); ++i) {
    const std::string where = fmt::format("instance {}", i);
    Item item;
    item.messages = user_turn(head + text_at(instances[i], "input", where, errors));
    item.targets = texts_at(instances[i], "output", where, errors);
    for (std::string& target : item.targets) labels.insert(target = stripped(target));
    item.doc = instances[i];
    items.push_back(std::move(item));
  }
  errors.throw_if_any(path);
  const size_t most = std::min(kMostClosedLabels, std::max<size_t>(2, items.size() / kInstancesPerLabel));
  if (!options.generate && labels.size() >= 2 && labels.size() <= most) {
    for (Item& item : items) item.choices.assign(labels.begin(), labels.end());
  }
  return items;
}

std::vector<Item> bbh_items(const OrderedJson& file, const std::string& path) {
  RowErrors errors;
  std::vector<Item> items;
  for (size_t i = 0; i < file["examples"].size(); ++i) {
    const OrderedJson& row = file["examples"][i];
    const std::string where = fmt::format("example {}", i);
    Item item;
    item.messages = user_turn(text_at(row, "input", where, errors));
    item.targets = texts_at(row, "target", where, errors);
    item.doc = row;
    items.push_back(std::move(item));
  }
  errors.throw_if_any(path);
  return items;
}

/// Any shape that training reads: the last answer is to be generated.
std::vector<Item> training_rows(const fs::path& path, int64_t& available, int64_t limit) {
  data::DatasetConfig config;
  config.name = path.string();
  config.path = path;
  const auto reader = data::RowReader::open(config);
  std::vector<Item> items;
  available = reader->count();
  while (limit == 0 || static_cast<int64_t>(items.size()) < limit) {
    std::optional<data::Row> row = reader->next();
    if (!row) break;
    Item item;
    if (row->messages.is_array() && !row->messages.empty()) {
      const OrderedJson answer = row->messages.back();
      MOESAIC_CHECK(
          answer.value("role", "") == "assistant" && answer.contains("content") && answer["content"].is_string(),
          DataError, "{}: the last message is no answer of the assistant, so there is nothing to compare with",
          row->where);
      item.targets = {stripped(answer["content"].get<std::string>())};
      item.doc = {{"messages", row->messages}};
      if (!row->tools.is_null()) item.doc["tools"] = row->tools;
      item.tools = row->tools;
      item.messages = row->messages;
      item.messages.erase(item.messages.size() - 1);
    } else {
      MOESAIC_CHECK(!row->prompt.empty(), DataError,
                    "{}: a row of plain text has no question. Expected a prompt and an answer, or messages.",
                    row->where);
      item.targets = {stripped(row->target)};
      item.doc = {{"prompt", row->prompt}, {"target", row->target}};
      item.messages = user_turn(row->prompt);
    }
    item.sentence = row->sentence;
    items.push_back(std::move(item));
  }
  return items;
}

Task load_task(const fs::path& path, const TaskOptions& options) {
  Task task;
  task.name = path.stem().string();
  task.path = path;
  task.num_fewshot = options.num_fewshot.value_or(0);
  if (path.extension() == ".tsv") return built_in_over(mgsm_of(path), path, options);
  if (path.extension() == ".jsonl") {
    const OrderedJson first = first_row(path);
    if (const std::string name = asked_by(first); !name.empty()) return built_in_over(name, path, options);
    if (is_choice_row(first)) read_choices(task, options);
    if (options.generate) {
      for (Item& item : task.items) item.choices.clear();
    }
  } else if (path.extension() == ".json") {
    const OrderedJson file = parse_ordered_json(read_file(path), path.string());
    if (file.is_object() && file.contains("Definition") && file.contains("Instances")) {
      task.items = superni_items(file, path.string(), options);
    } else if (file.is_object() && file.contains("examples") && file["examples"].is_array()) {
      task.items = bbh_items(file, path.string());
    }
    task.available = static_cast<int64_t>(task.items.size());
  }
  if (task.items.empty()) task.items = training_rows(path, task.available, options.limit);
  MOESAIC_CHECK(!task.items.empty(), DataError, "{}: the task has no questions", path.string());
  if (options.limit > 0 && static_cast<int64_t>(task.items.size()) > options.limit) task.items.resize(options.limit);
  for (const Item& item : task.items) {
    MOESAIC_CHECK(item.choices.empty() == task.items[0].choices.empty(), DataError,
                  "{}: some questions have answer choices and some have none. Split the file.", path.string());
  }
  return task;
}

}  // namespace

std::vector<Task> load_tasks(const std::vector<std::string>& names, const TaskOptions& options) {
  MOESAIC_CHECK(!names.empty(), UsageError, "--tasks: no task given");
  std::vector<Task> tasks;
  for (const std::string& given : names) {
    const fs::path path = given;
    if (!fs::exists(path) || is_task_file(path)) {
      for (Task& task : named_tasks(given, options)) tasks.push_back(std::move(task));
      continue;
    }
    if (!fs::is_directory(path)) {
      tasks.push_back(load_task(path, options));
      continue;
    }
    std::vector<fs::path> found;
    for (const fs::directory_entry& entry : fs::directory_iterator(given)) {
      const fs::path ending = entry.path().extension();
      const bool task = ending == ".json" || ending == ".jsonl" || ending == ".tsv";
      if (task && entry.path().filename() != "dataset_info.json") found.push_back(entry.path());
    }
    MOESAIC_CHECK(!found.empty(), UsageError, "--tasks {}: the folder holds no .json, .jsonl or .tsv file", given);
    std::sort(found.begin(), found.end());
    for (const fs::path& file : found) tasks.push_back(load_task(file, options));
  }
  std::set<std::string> taken;
  for (Task& task : tasks) {
    while (!taken.insert(task.name).second) task.name += "_";  // two folders may have a file of the same name
  }
  return tasks;
}

}  // namespace moesaic::eval
