#include "moesaic/data/superni.h"

#include <torch/torch.h>

#include "moesaic/base/check.h"
#include "moesaic/base/json.h"
#include "moesaic/base/output_folder.h"
#include "moesaic/base/seed.h"

namespace moesaic::data {
namespace {

namespace fs = std::filesystem;

struct Task {
  std::string name, category;
  OrderedJson file;
};

Task read_task(const fs::path& path) {
  Task task{path.stem().string(), {}, parse_ordered_json(read_file(path), path.string())};
  const OrderedJson& file = task.file;
  auto is_list = [&](const char* key) { return file.is_object() && file.contains(key) && file[key].is_array(); };
  MOESAIC_CHECK(is_list("Definition") && is_list("Instances") && is_list("Categories") && !file["Categories"].empty() &&
                    file["Categories"][0].is_string() && !file["Definition"].empty(),
                DataError,
                "{}: expected a task of Super-NaturalInstructions: an object with \"Categories\", \"Definition\" and "
                "\"Instances\"",
                path.string());
  task.category = file["Categories"][0];
  return task;
}

std::vector<Task> read_tasks(const fs::path& folder) {
  MOESAIC_CHECK(fs::is_directory(folder), UsageError, "{}: got no folder, expected the one with the task files",
                folder.string());
  std::vector<fs::path> files;
  for (const fs::directory_entry& entry : fs::directory_iterator(folder)) {
    if (entry.path().extension() == ".json") files.push_back(entry.path());
  }
  MOESAIC_CHECK(!files.empty(), UsageError, "{}: holds no task file (.json)", folder.string());
  std::sort(files.begin(), files.end());
  std::vector<Task> tasks;
  for (const fs::path& file : files) tasks.push_back(read_task(file));
  return tasks;
}

size_t length_of(const OrderedJson& text) { return text.is_string() ? text.get_ref<const std::string&>().size() : 0; }

/// The instances that are short enough.
OrderedJson short_instances(const Task& task, int64_t max_chars) {
  OrderedJson kept = OrderedJson::array();
  const size_t definition = length_of(task.file["Definition"][0]);
  for (const OrderedJson& instance : task.file["Instances"]) {
    const size_t length = definition + length_of(instance.value("input", OrderedJson()));
    if (max_chars == 0 || static_cast<int64_t>(length) <= max_chars) kept.push_back(instance);
  }
  return kept;
}

void write_task(const Task& task, OrderedJson instances, const fs::path& path) {
  OrderedJson file = task.file;
  file["Instances"] = std::move(instances);
  fs::create_directories(path.parent_path());
  write_new_file(path, file.dump(1) + "\n");
}

/// `instances` in two, the `count` that are drawn by task and seed behind.
std::pair<OrderedJson, OrderedJson> drawn_apart(const OrderedJson& instances, int64_t count, const Task& task,
                                                uint64_t seed) {
  at::Generator draws = make_generator(derive_seed(seed, task.name));
  const at::Tensor order = torch::randperm(std::ssize(instances), draws, torch::kLong);
  std::pair<OrderedJson, OrderedJson> parts{OrderedJson::array(), OrderedJson::array()};
  for (int64_t i = 0; i < std::ssize(instances); ++i) {
    (i < count ? parts.second : parts.first).push_back(instances[order[i].item<int64_t>()]);
  }
  return parts;
}

void check_categories(const std::vector<Task>& tasks, const std::vector<std::string>& held_out) {
  std::set<std::string> there;
  for (const Task& task : tasks) there.insert(task.category);
  if (held_out == SuperniOptions{}.held_out) return;  // whichever of them there are
  for (const std::string& category : held_out) {
    MOESAIC_CHECK(there.contains(category), UsageError, "--held_out: got '{}', expected categories of the tasks: {}",
                  category, fmt::join(there, ", "));
  }
}

}  // namespace

std::vector<SuperniCategory> split_superni(const fs::path& folder, const fs::path& out, const SuperniOptions& options) {
  check_not_an_input(out, {folder});
  const std::vector<Task> tasks = read_tasks(folder);
  check_categories(tasks, options.held_out);
  std::map<std::string, SuperniCategory> categories;
  for (const Task& task : tasks) {
    const bool held_out =
        std::find(options.held_out.begin(), options.held_out.end(), task.category) != options.held_out.end();
    const OrderedJson instances = short_instances(task, options.max_chars);
    const int64_t rows = std::ssize(instances), test_rows = held_out ? 0 : options.test_rows;
    if (rows <= test_rows) continue;
    SuperniCategory& category = categories.try_emplace(task.category, task.category, held_out).first->second;
    ++category.tasks;
    if (held_out) {
      const int64_t most = options.held_out_rows > 0 ? std::min(rows, options.held_out_rows) : rows;
      category.test_rows += most;
      write_task(task, drawn_apart(instances, most, task, options.seed).second,
                 out / "held_out" / (task.name + ".held_out.json"));
      continue;
    }
    const auto [train, test] = drawn_apart(instances, test_rows, task, options.seed);
    category.rows += std::ssize(train);
    category.test_rows += std::ssize(test);
    write_task(task, train, out / "train" / (task.name + ".json"));
    if (!test.empty()) write_task(task, test, out / "test" / (task.name + ".test.json"));
  }
  std::vector<SuperniCategory> all;
  for (auto& [_, category] : categories) all.push_back(category);
  std::stable_sort(all.begin(), all.end(), [](const auto& a, const auto& b) { return a.held_out < b.held_out; });
  return all;
}

}  // namespace moesaic::data
