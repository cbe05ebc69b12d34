#include "moesaic/eval/task.h"

#include <algorithm>
#include <fstream>
#include <set>

#include "moesaic/data/dataset.h"

namespace moesaic::eval {
namespace fs = std::filesystem;
namespace {

constexpr size_t kMostClosedLabels = 20;
constexpr size_t kInstancesPerLabel = 16;

OrderedJson user_turn(const std::string& text) { return OrderedJson::array({{{"role", "user"}, {"content", text}}}); }

/// Collects what is wrong with a file's rows, so that one message says it all.
class RowErrors {
 public:
  void add(const std::string& what) {
    if (++count_ <= 10) text_ += "\n  " + what;
  }
  void throw_if_any(const std::string& path) const {
    MOESAIC_CHECK(count_ == 0, DataError, "{}: {} damaged rows:{}{}", path, count_, text_,
                  count_ > 10 ? fmt::format("\n  and {} more", count_ - 10) : "");
  }

 private:
  int64_t count_ = 0;
  std::string text_;
};

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

bool is_p3(const OrderedJson& row) {
  return row.is_object() && row.contains("inputs") && row.contains("answer_choices");
}
bool is_multiple_choice(const OrderedJson& row) {
  return row.is_object() && row.contains("query") && row.contains("choices") && row.contains("gold");
}

std::string strip(const std::string& text) {
  const size_t begin = text.find_first_not_of(" \t\r\n");
  if (begin == std::string::npos) return "";
  return text.substr(begin, text.find_last_not_of(" \t\r\n") - begin + 1);
}

Item p3_item(const OrderedJson& row, const std::string& where, RowErrors& errors) {
  Item item;
  item.messages = user_turn(text_at(row, "inputs", where, errors));
  item.targets = texts_at(row, row.contains("target") ? "target" : "targets", where, errors);
  for (std::string& target : item.targets) target = strip(target);
  if (!row["answer_choices"].is_null()) {
    item.choices = texts_at(row, "answer_choices", where, errors);
    const bool found = std::any_of(item.choices.begin(), item.choices.end(), [&](const std::string& choice) {
      return std::find(item.targets.begin(), item.targets.end(), strip(choice)) != item.targets.end();
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
    item.targets = {strip(item.choices[gold.get<size_t>()])};
  } else {
    errors.add(fmt::format("{}: \"gold\" is no index of a choice", where));
  }
  return item;
}

/// .jsonl rows of P3 or multiple-choice shape. Empty when the first row is neither.
std::vector<Item> choice_rows(const fs::path& path, int64_t& available, int64_t limit) {
  std::ifstream file(path);
  std::vector<Item> items;
  RowErrors errors;
  int64_t number = 0;
  for (std::string line; std::getline(file, line);) {
    ++number;
    if (line.find_first_not_of(" \t\r") == std::string::npos) continue;
    if (available > 0 && limit > 0 && available >= limit) {
      ++available;
      continue;
    }
    const std::string where = fmt::format("line {}", number);
    OrderedJson row = parse_ordered_json(line, fmt::format("{}:{}", path.string(), number));
    if (available == 0 && !is_p3(row) && !is_multiple_choice(row)) return {};
    ++available;
    if (!is_p3(row) && !is_multiple_choice(row)) {
      errors.add(where + ": other keys than the first row");
      continue;
    }
    Item item = is_p3(row) ? p3_item(row, where, errors) : multiple_choice_item(row, where, errors);
    item.sentence = sentence_at(row, where, errors);
    item.doc = std::move(row);
    items.push_back(std::move(item));
  }
  errors.throw_if_any(path.string());
  return items;
}

std::vector<Item> superni_items(const OrderedJson& file, const std::string& path, const TaskOptions& options) {
  RowErrors errors;
  const std::vector<std::string> definition = texts_at(file, "Definition", "task", errors);
  const OrderedJson& instances = file["Instances"];
  if (!instances.is_array()) errors.add("\"Instances\" is no list");
  errors.throw_if_any(path);

  std::string head = definition[0] + "\n\n";
  if (options.num_fewshot > 0) {
    const OrderedJson examples = file.value("Positive Examples", OrderedJson::array());
    MOESAIC_CHECK(static_cast<int64_t>(examples.size()) >= options.num_fewshot, DataError,
                  "{}: --num_fewshot {}, but the task has {} positive examples", path, options.num_fewshot,
                  examples.size());
    for (int64_t i = 0; i < options.num_fewshot; ++i) {
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
    for (std::string& target : item.targets) labels.insert(target = strip(target));
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
      item.targets = {strip(answer["content"].get<std::string>())};
      item.doc = {{"messages", row->messages}};
      item.messages = row->messages;
      item.messages.erase(item.messages.size() - 1);
    } else {
      MOESAIC_CHECK(!row->prompt.empty(), DataError,
                    "{}: a row of plain text has no question. Expected a prompt and an answer, or messages.",
                    row->where);
      item.targets = {strip(row->target)};
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
  if (path.extension() == ".jsonl") {
    task.items = choice_rows(path, task.available, options.limit);
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

std::vector<Task> load_tasks(const std::vector<std::string>& paths, const TaskOptions& options) {
  std::vector<fs::path> files;
  for (const std::string& given : paths) {
    MOESAIC_CHECK(fs::exists(given), UsageError, "--tasks {}: no such file or folder", given);
    if (!fs::is_directory(given)) {
      files.push_back(given);
      continue;
    }
    std::vector<fs::path> found;
    for (const fs::directory_entry& entry : fs::directory_iterator(given)) {
      const bool task = entry.path().extension() == ".json" || entry.path().extension() == ".jsonl";
      if (task && entry.path().filename() != "dataset_info.json") found.push_back(entry.path());
    }
    MOESAIC_CHECK(!found.empty(), UsageError, "--tasks {}: the folder holds no .json or .jsonl file", given);
    std::sort(found.begin(), found.end());
    files.insert(files.end(), found.begin(), found.end());
  }
  MOESAIC_CHECK(!files.empty(), UsageError, "--tasks: no task given");
  std::vector<Task> tasks;
  for (const fs::path& file : files) tasks.push_back(load_task(file, options));
  std::set<std::string> names;
  for (Task& task : tasks) {
    while (!names.insert(task.name).second) task.name += "_";  // two folders may have a file of the same name
  }
  return tasks;
}

}  // namespace moesaic::eval
