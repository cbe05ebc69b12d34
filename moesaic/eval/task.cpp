#include "moesaic/eval/task.h"

#include <algorithm>
#include <fstream>
#include <set>

#include "moesaic/base/text.h"
#include "moesaic/data/dataset.h"
#include "moesaic/eval/metrics.h"

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

bool has_keys(const OrderedJson& row, std::initializer_list<const char*> keys) {
  return row.is_object() && std::all_of(keys.begin(), keys.end(), [&](const char* key) { return row.contains(key); });
}
bool is_p3(const OrderedJson& row) { return has_keys(row, {"inputs", "answer_choices"}); }
bool is_multiple_choice(const OrderedJson& row) { return has_keys(row, {"query", "choices", "gold"}); }

OrderedJson row_of(const std::string& line, const fs::path& path, int64_t number) {
  return parse_ordered_json(line, fmt::format("{}:{}", path.string(), number));
}

/// Calls use(line, number) for every line that is not blank; numbers from 1.
template <class Use>
void each_line(const fs::path& path, Use&& use) {
  std::ifstream file(path);
  int64_t number = 0;
  for (std::string line; std::getline(file, line);) {
    ++number;
    if (line.find_first_not_of(" \t\r") != std::string::npos) use(line, number);
  }
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

Item choice_item(const OrderedJson& row, const std::string& where, RowErrors& errors) {
  return is_p3(row) ? p3_item(row, where, errors) : multiple_choice_item(row, where, errors);
}

Item human_eval_item(const OrderedJson& row, const std::string& where, RowErrors& errors) {
  Item item;
  const std::string prompt = text_at(row, "prompt", where, errors);
  item.messages = user_turn(prompt);
  item.targets = {row.value("canonical_solution", "")};
  item.program = {prompt, fmt::format("\n{}\ncheck({})", text_at(row, "test", where, errors),
                                      text_at(row, "entry_point", where, errors))};
  return item;
}

Item gsm8k_item(const OrderedJson& row, const std::string& where, RowErrors& errors) {
  Item item;
  item.messages = user_turn(fmt::format("Question: {}\nAnswer:", text_at(row, "question", where, errors)));
  const std::string answer = text_at(row, "answer", where, errors);
  const size_t mark = answer.rfind("####");
  const std::string number = mark == std::string::npos ? "" : last_number(answer.substr(mark));
  if (number.empty()) errors.add(fmt::format("{}: \"answer\" has no number behind ####", where));
  item.targets = {number};
  return item;
}

/// A kind of .jsonl rows, known by the keys of the first.
struct RowShape {
  bool (*fits)(const OrderedJson& row);
  Item (*item)(const OrderedJson& row, const std::string& where, RowErrors& errors);
  std::vector<std::string> metrics{}, stop{};
  int64_t max_new_tokens = 0;
};

const RowShape kRowShapes[] = {
    {[](const OrderedJson& row) { return is_p3(row) || is_multiple_choice(row); }, choice_item},
    {[](const OrderedJson& row) { return has_keys(row, {"prompt", "test", "entry_point"}); },
     human_eval_item,
     {"pass@1"},
     {"\nclass", "\ndef", "\n#", "\nif", "\nprint"},
     1024},
    {[](const OrderedJson& row) {
       return has_keys(row, {"question", "answer"}) && row["answer"].is_string() &&
              row["answer"].get_ref<const std::string&>().find("####") != std::string::npos;
     },
     gsm8k_item,
     {"number"},
     {"Question:"},
     256},
};

void check_no_examples(const Task& task, const TaskOptions& options) {
  MOESAIC_CHECK(options.num_fewshot == 0, UsageError, "--num_fewshot {}: {} has no solved examples to show",
                options.num_fewshot, task.path.string());
}

/// Reads .jsonl rows of one of kRowShapes; leaves the task without items when the first row is of none.
void read_rows(Task& task, const OrderedJson& first, const TaskOptions& options) {
  const auto shape = std::find_if(std::begin(kRowShapes), std::end(kRowShapes),
                                  [&](const RowShape& candidate) { return candidate.fits(first); });
  if (shape == std::end(kRowShapes)) return;
  if (!shape->metrics.empty()) {
    check_no_examples(task, options);
    task.metrics = shape->metrics;
    task.stop = shape->stop;
    task.max_new_tokens = shape->max_new_tokens;
  }
  RowErrors errors;
  each_line(task.path, [&](const std::string& line, int64_t number) {
    if (++task.available > options.limit && options.limit > 0) return;
    const std::string where = fmt::format("line {}", number);
    OrderedJson row = row_of(line, task.path, number);
    if (!shape->fits(row)) return errors.add(where + ": other keys than the first row");
    Item item = shape->item(row, where, errors);
    item.sentence = sentence_at(row, where, errors);
    item.doc = std::move(row);
    task.items.push_back(std::move(item));
  });
  errors.throw_if_any(task.path.string());
}

bool is_mbpp(const OrderedJson& row) { return has_keys(row, {"task_id", "text", "code", "test_list"}); }

/// The official split: ids 1 to 10 are examples for prompts (of which 2, 3 and 4 are commonly taken), 11 to 510 test.
void read_mbpp(Task& task, const TaskOptions& options) {
  constexpr int64_t kFirstExample = 2, kLastExample = 4, kFirstTest = 11, kLastTest = 510;
  MOESAIC_CHECK(options.num_fewshot <= kLastExample - kFirstExample + 1, UsageError,
                "--num_fewshot {}: MBPP's examples are three, tasks {} to {}", options.num_fewshot, kFirstExample,
                kLastExample);
  task.metrics = {"pass@1"};
  task.stop = {"[DONE]"};
  task.max_new_tokens = 256;
  RowErrors errors;
  std::string examples;
  int64_t found = 0;
  each_line(task.path, [&](const std::string& line, int64_t number) {
    const std::string where = fmt::format("line {}", number);
    OrderedJson row = row_of(line, task.path, number);
    if (!is_mbpp(row)) return errors.add(where + ": other keys than the first row");
    if (!row["task_id"].is_number_integer()) return errors.add(where + ": \"task_id\" is no whole number");
    const int64_t id = row["task_id"].get<int64_t>();
    const bool example = id >= kFirstExample && id < kFirstExample + options.num_fewshot;
    const bool test = id >= kFirstTest && id <= kLastTest;
    if (!example && !test) return;
    const std::string tests = fmt::format("{}", fmt::join(texts_at(row, "test_list", where, errors), "\n"));
    const std::string prompt = fmt::format(
        "You are an expert Python programmer, and here is your task: {} Your code should pass these "
        "tests:\n\n{}\n[BEGIN]\n",
        text_at(row, "text", where, errors), tests);
    const std::string code = text_at(row, "code", where, errors);
    if (example) {
      examples += prompt + code + "\n[DONE]\n\n";
      ++found;
      return;
    }
    Item item;
    item.messages = user_turn(prompt);
    item.targets = {code};
    item.program = {"", fmt::format("\n{}\n{}", row.value("test_setup_code", ""), tests)};
    item.doc = std::move(row);
    task.items.push_back(std::move(item));
  });
  errors.throw_if_any(task.path.string());
  MOESAIC_CHECK(found == options.num_fewshot, DataError,
                "{}: --num_fewshot {}, but the file has {} of the tasks {} to {}", task.path.string(),
                options.num_fewshot, found, kFirstExample, kLastExample);
  MOESAIC_CHECK(!task.items.empty(), DataError, "{}: no task has an id from {} to {}, MBPP's test split",
                task.path.string(), kFirstTest, kLastTest);
  for (Item& item : task.items) item.messages = user_turn(examples + item.messages[0]["content"].get<std::string>());
  task.available = std::ssize(task.items);
}

/// The words for question and answer in MGSM's languages, as lm-evaluation-harness's mgsm_direct has them.
struct MgsmWords {
  const char *language, *question, *answer;
};
constexpr MgsmWords kMgsmWords[] = {
    {"en", "Question: ", "Answer:"},    {"bn", "প্রশ্ন: ", "Answer:"},        {"de", "Frage: ", "Antwort:"},
    {"es", "Pregunta: ", "Respuesta:"}, {"fr", "Question : ", "Réponse :"}, {"ja", "問題： ", "Answer:"},
    {"ru", "Задача: ", "Answer:"},      {"sw", "Swali: ", "Answer:"},       {"te", "ప్రశ్న: ", "Answer:"},
    {"th", "โจทย์: ", "Answer:"},        {"zh", "问题： ", "Answer:"},
};

void read_mgsm(Task& task, const TaskOptions& options) {
  check_no_examples(task, options);
  const MgsmWords* words = std::find_if(std::begin(kMgsmWords), std::end(kMgsmWords), [&](const MgsmWords& candidate) {
    return task.name.ends_with(fmt::format("_{}", candidate.language));
  });
  if (words == std::end(kMgsmWords)) words = kMgsmWords;
  task.metrics = {"number", "flexible-extract", "remove_whitespace"};
  task.stop = {stripped(words->question)};
  task.max_new_tokens = 256;
  RowErrors errors;
  each_line(task.path, [&](const std::string& line, int64_t number) {
    const size_t tab = line.find('\t');
    const std::string answer = tab == std::string::npos ? "" : stripped(line.substr(tab + 1));
    if (answer.empty() || answer.find_first_not_of("-.,0123456789") != std::string::npos) {
      return errors.add(fmt::format("line {}: expected a question, a tab and a number", number));
    }
    Item item;
    item.messages = user_turn(fmt::format("{}{}\n{}", words->question, line.substr(0, tab), words->answer));
    item.targets = {last_number(answer)};
    item.doc = {{"question", line.substr(0, tab)}, {"answer", answer}};
    task.items.push_back(std::move(item));
  });
  errors.throw_if_any(task.path.string());
  task.available = std::ssize(task.items);
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
  if (path.extension() == ".tsv") {
    read_mgsm(task, options);
  } else if (path.extension() == ".jsonl") {
    if (const OrderedJson first = first_row(path); is_mbpp(first)) {
      read_mbpp(task, options);
    } else {
      read_rows(task, first, options);
    }
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
      const fs::path ending = entry.path().extension();
      const bool task = ending == ".json" || ending == ".jsonl" || ending == ".tsv";
      if (task && entry.path().filename() != "dataset_info.json") found.push_back(entry.path());
    }
    MOESAIC_CHECK(!found.empty(), UsageError, "--tasks {}: the folder holds no .json, .jsonl or .tsv file", given);
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
