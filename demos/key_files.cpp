#include "demos/key_files.h"

#include <fmt/format.h>

#include <random>
#include <set>

#include "demos/key_arithmetic.h"
#include "moesaic/base/output_folder.h"
#include "moesaic/base/seed.h"
#include "moesaic/data/order.h"

namespace moesaic::demos {
namespace {

constexpr int64_t kKeys = 500, kHeldIn = 100, kSmallest = 10, kNumbers = 90;  // values are 10 .. 99
constexpr int64_t kSubstitutionRows = 40000, kMathRows = 8000;
constexpr uint64_t kSplitSeed = 0x6b657973;  // of the tenth that is never trained; not the user's seed

struct Question {
  std::string keys;  // "vamo + kelu", "" for num_math
  std::string expression;
  int64_t result = 0;
  bool held_out() const { return data::hash_text(expression, kSplitSeed) % 10 == 0; }
};

enum class Split { kTrained, kHeldOut, kAny };

/// Questions of one kind, drawn until they fit.
class Questions {
 public:
  Questions(uint64_t seed, const std::string& name)
      : names_(draw_key_names(kKeys, seed)),
        values_(draw_key_values(kKeys, kNumbers, seed)),
        random_(derive_seed(seed, name)) {}

  /// With keys first .. last-1, or with numbers where last is 0.
  Question draw(int64_t first, int64_t last, Split split) {
    while (true) {
      const bool plus = below(2) == 0;
      const auto [left_key, left] = operand(first, last);
      const auto [right_key, right] = operand(first, last);
      const char* op = plus ? "+" : "-";
      Question question{last > 0 ? fmt::format("{} {} {}", left_key, op, right_key) : "",
                        fmt::format("{} {} {}", left, op, right), plus ? left + right : left - right};
      const bool fits = split == Split::kAny || question.held_out() == (split == Split::kHeldOut);
      if (question.result >= 0 && fits) return question;
    }
  }

 private:
  int64_t below(int64_t end) { return static_cast<int64_t>(random_() % static_cast<uint64_t>(end)); }
  std::pair<std::string, int64_t> operand(int64_t first, int64_t last) {
    if (last == 0) return {"", kSmallest + below(kNumbers)};
    const int64_t key = first + below(last - first);
    return {names_[key], kSmallest + values_[key]};
  }

  std::vector<std::string> names_;
  std::vector<int64_t> values_;
  std::mt19937_64 random_;
};

}  // namespace

void write_key_files(const std::filesystem::path& folder, int64_t test_rows, uint64_t seed) {
  for (const char* sub : {"test", "held_in"}) std::filesystem::create_directories(folder / sub);
  auto answers = [](const std::string& task, const Question& q) -> std::vector<std::string> {
    if (task == "kv_sub") return {q.expression};
    if (task == "num_math") return {std::to_string(q.result)};
    return {fmt::format("{} = {}", q.expression, q.result), std::to_string(q.result)};
  };
  auto prompt = [](const Question& q) { return (q.keys.empty() ? q.expression : q.keys) + " ="; };

  OrderedJson info = OrderedJson::object();
  auto write_training = [&](const std::string& task, int64_t last, Split split, int64_t rows) {
    Questions questions(seed, task);
    std::string text;
    for (int64_t i = 0; i < rows; ++i) {
      const Question q = questions.draw(0, last, split);
      text += OrderedJson{{"inputs", prompt(q)}, {"targets", " " + answers(task, q)[0]}}.dump() + "\n";
    }
    write_new_file(folder / (task + ".jsonl"), text);
    info[task] = {{"file_name", task + ".jsonl"}, {"formatting", "inputs_targets"}};
  };
  write_training("kv_sub", kKeys, Split::kAny, kSubstitutionRows);
  write_training("num_math", 0, Split::kTrained, kMathRows);
  write_training("kv_math", kHeldIn, Split::kTrained, kMathRows);
  write_new_file(folder / "dataset_info.json", info.dump(2) + "\n");

  auto write_test = [&](const std::string& name, int64_t first, int64_t last, Split split) {
    Questions questions(seed, name);
    const std::string task = name.substr(name.find('/') + 1);
    std::set<std::string> seen;
    std::string text;
    for (int64_t tries = 0; std::ssize(seen) < test_rows; ++tries) {
      // Fresh questions become rare only when nearly all have been drawn.
      MOESAIC_CHECK(tries < 200 + 100 * test_rows, UsageError,
                    "{}: there are only about {} different questions, asked for {}", name, seen.size(), test_rows);
      const Question q = questions.draw(first, last, split);
      if (!seen.insert(prompt(q)).second) continue;
      text +=
          OrderedJson{{"inputs", prompt(q)}, {"answer_choices", nullptr}, {"targets", answers(task, q)}}.dump() + "\n";
    }
    write_new_file(folder / (name + ".jsonl"), text);
  };
  write_test("test/kv_sub", kHeldIn, kKeys, Split::kAny);
  write_test("test/num_math", 0, 0, Split::kHeldOut);
  write_test("test/kv_math", kHeldIn, kKeys, Split::kHeldOut);
  write_test("held_in/kv_sub", 0, kHeldIn, Split::kAny);
  write_test("held_in/kv_math", 0, kHeldIn, Split::kHeldOut);
}

}  // namespace moesaic::demos
