#include "moesaic/data/validate.h"

#include <ATen/Parallel.h>

#include <atomic>
#include <future>

#include "moesaic/base/file_memory.h"
#include "moesaic/data/record_file.h"

namespace moesaic::data {
namespace {

constexpr int64_t kRowsOfAThread = 256;  // opening a file once more must pay

bool is_answered(const Row& row) {
  if (row.messages.is_null()) return !row.target.empty();
  return std::any_of(row.messages.begin(), row.messages.end(), [](const OrderedJson& message) {
    return message.at("role") == "assistant" && (message.contains("tool_calls") || message.at("content") != "");
  });
}

/// The rows first .. last-1.
Validation judge(const DatasetConfig& config, int64_t first, int64_t last, const ValidateOptions& options,
                 const std::function<void(int64_t)>& judged) {
  Validation result;
  const auto reader = RowReader::open(config);
  for (int64_t i = first; i < last; ++i) {
    reader->seek(i);
    try {
      const std::optional<Row> row = reader->next();
      result.unanswered += options.renderer ? !options.renderer->render(*row) : !is_answered(*row);
    } catch (const DataError& error) {
      if (result.problems.size() < options.max_problems) result.problems.emplace_back(error.what());
      ++result.damaged;
    }
    judged(1);
  }
  return result;
}

/// Everything but the files that a verdict follows from.
std::string question(const DatasetConfig& config, const ValidateOptions& options) {
  Json asked = {config.formatting, config.columns,    config.tags,          config.cap,    config.split,
                config.val_size,   config.split_seed, options.max_problems, config.label()};
  if (config.prompts) asked.push_back(config.prompts->source(config.prompt));
  if (options.renderer) asked.push_back(options.renderer->identity());
  return "rows " + asked.dump();
}

Validation judge_all(const DatasetConfig& config, const ValidateOptions& options) {
  Validation result;
  const auto reader = RowReader::open(config);
  result.name = config.label();
  result.formatting = reader->formatting();
  result.rows = reader->count();

  // The caller's thread judges the first part and reports for all.
  const int64_t parts = std::clamp<int64_t>(result.rows / kRowsOfAThread, 1, at::get_num_threads());
  std::atomic<int64_t> unreported{0};
  std::atomic<bool> given_up{false};  // progress threw
  auto count = [&](int64_t rows) {
    unreported += rows;
    if (given_up) throw std::runtime_error("given up");
  };
  auto report = [&](int64_t rows) {
    count(rows);
    try {
      if (options.progress) options.progress(unreported.exchange(0));
    } catch (...) {
      given_up = true;
      throw;
    }
  };
  std::vector<std::future<Validation>> others;
  for (int64_t part = 1; part < parts; ++part) {
    others.push_back(std::async(std::launch::async, [&, part] {
      return judge(config, result.rows * part / parts, result.rows * (part + 1) / parts, options, count);
    }));
  }
  auto add = [&](const Validation& part) {
    result.damaged += part.damaged;
    result.unanswered += part.unanswered;
    for (const std::string& problem : part.problems) {
      if (result.problems.size() < options.max_problems) result.problems.push_back(problem);
    }
  };
  add(judge(config, 0, result.rows / parts, options, report));
  for (auto& other : others) add(other.get());
  report(0);
  return result;
}

}  // namespace

Validation validate(const DatasetConfig& given, const ValidateOptions& options) {
  DatasetConfig config = given;
  if (options.renderer && !options.renderer->options().sentence_column.empty()) {
    config.columns["sentence"] = options.renderer->options().sentence_column;
  }
  std::error_code error;
  std::vector<std::filesystem::path> files{config.path};
  if (std::filesystem::is_directory(config.path, error)) files = data_files(config.path);
  files.emplace_back("/proc/self/exe");
  const std::string text = remembered(question(config, options), files, [&] {
    const Validation result = judge_all(config, options);
    return Json({{"name", result.name},
                 {"formatting", result.formatting},
                 {"rows", result.rows},
                 {"damaged", result.damaged},
                 {"unanswered", result.unanswered},
                 {"problems", result.problems}})
        .dump(-1, ' ', false, Json::error_handler_t::replace);
  });
  const std::string where = "what is remembered of " + config.path.string();
  const Json json = parse_json(text, where);
  return {.name = get<std::string>(json, "name", where),
          .formatting = get<std::string>(json, "formatting", where),
          .rows = get<int64_t>(json, "rows", where),
          .damaged = get<int64_t>(json, "damaged", where),
          .unanswered = get<int64_t>(json, "unanswered", where),
          .problems = get<std::vector<std::string>>(json, "problems", where)};
}

void settle_bad_rows(const std::vector<Validation>& judged, const RenderOptions& options) {
  int64_t rows = 0, damaged = 0, listed = 0;
  std::string lines;
  for (const Validation& validation : judged) {
    rows += validation.rows;
    damaged += validation.damaged;
    listed += std::ssize(validation.problems);
    for (const std::string& problem : validation.problems) lines += "\n  " + problem;
  }
  if (damaged > listed) lines += fmt::format("\n  and {} more", damaged - listed);
  if (damaged == 0) return;
  MOESAIC_CHECK(options.on_bad_row == "skip", DataError,
                "{} of {} rows can't be used:{}\nhint: mend them, or leave them out with on_bad_row: skip", damaged,
                rows, lines);
  spdlog::warn("{} of {} rows can't be used and are left out:{}", damaged, rows, lines);
}

}  // namespace moesaic::data
