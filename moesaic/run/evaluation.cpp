#include "moesaic/run/evaluation.h"

#include "moesaic/base/check.h"
#include "moesaic/base/device.h"
#include "moesaic/base/version.h"
#include "moesaic/eval/routes.h"
#include "moesaic/eval/suite.h"

namespace moesaic::run {
namespace {

/// Settles how questions are put. Says so in the log, and returns it.
std::string settle_asking(const Examinee& subject, const AskOptions& said, eval::EvalOptions& options) {
  const bool adapted = !subject.from.adapters.empty();
  if (adapted) eval::ask_as_trained(subject.model(), options);
  if (said.apply_chat_template && *said.apply_chat_template != options.apply_chat_template) {
    options.apply_chat_template = *said.apply_chat_template;
    options.target_delimiter = eval::EvalOptions().target_delimiter;
  }
  if (said.target_delimiter) options.target_delimiter = *said.target_delimiter;
  options.delimiter_said = said.target_delimiter.has_value();
  const bool by_flag = said.apply_chat_template || (said.target_delimiter && !options.apply_chat_template);
  const std::string asked = fmt::format(
      "{}, {}",
      options.apply_chat_template
          ? "through the chat template"
          : fmt::format("in plain text with {} before the answer",
                        Json(options.target_delimiter).dump(-1, ' ', false, Json::error_handler_t::replace)),
      by_flag   ? "as the flags say"
      : adapted ? "as the adapter was trained"
                : "the default");
  spdlog::info("asking {}", asked);
  return asked;
}

/// A text as the model reads a user's message.
std::vector<int64_t> message_ids(const std::string& text, const eval::EvalModel& model, bool apply_chat_template) {
  eval::Item item;
  item.messages = OrderedJson::array();
  item.messages.push_back({{"role", "user"}, {"content", text}});
  const auto [prompt, special] = eval::prompt_text(model, item, apply_chat_template);
  return special ? model.tokenizer.encode_start(prompt).ids : model.tokenizer.encode(prompt, false);
}

eval::ProgressCallback of_task(const TaskProgress& progress, const eval::Task& task) {
  if (!progress) return nullptr;
  return [&progress, &task](int64_t done) { progress(task, done); };
}

}  // namespace

std::string Examinee::name() const {
  std::vector<std::string> names;
  for (const AdapterReference& adapter : from.adapters) {
    const std::filesystem::path dir =
        adapter.dir.empty() ? std::filesystem::path(adapter.name) : adapter.dir.lexically_normal();
    const std::string folder = (dir.has_filename() ? dir : dir.parent_path()).string();
    names.push_back(adapter.scale == 1.0 ? folder : fmt::format("{}:{}", folder, adapter.scale));
  }
  return names.empty() ? from.model : fmt::format("{}", fmt::join(names, "+"));
}

Evaluated evaluate(const Examinee& subject, const eval::Suite& suite, const AskOptions& ask, eval::EvalOptions options,
                   int64_t limit, uint64_t seed, const TaskProgress& progress) {
  const std::string asked = settle_asking(subject, ask, options);
  options.generation.eos_ids = subject.opened.eos_ids();
  options.generation.seed = seed;
  options.bootstrap_iters = 100000;  // the harness's default
  Evaluated made;
  eval::RunInfo& info = made.info;
  for (const eval::Task& task : suite.tasks) {
    made.results.push_back(eval::evaluate(subject.model(), task, options, of_task(progress, task)));
    info.seconds += made.results.back().seconds;
  }
  const models::Facts& facts = subject.opened.model->facts();
  info.version = kVersion;
  info.model = subject.name();
  info.model_args = {{"model", subject.from.model}, {"adapters", Json::array()}, {"dtype", dtype_name(facts.dtype)}};
  for (const AdapterReference& adapter : subject.from.adapters) {
    info.model_args["adapters"].push_back(
        {{"name", adapter.name}, {"path", adapter.dir.string()}, {"scale", adapter.scale}});
  }
  if (subject.opened.int8) info.model_args["quantize"] = "int8";
  info.batch_size = options.batch_size > 0 ? std::to_string(options.batch_size) : "auto";
  info.device = facts.device.str();
  info.limit = limit;
  info.seed = seed;
  info.asked = asked;
  if (options.apply_chat_template) info.chat_template = subject.opened.chat_template->source();
  made.json = eval::results_json(made.results, suite.tasks, options, info);
  if (suite.columns.empty()) return made;
  OrderedJson row = eval::suite_json(suite, made.results, options);
  made.json["groups"] = {
      {suite.name, {{"alias", suite.name}, {row["metric"].get<std::string>() + ",none", row["mean"]}}}};
  row["facts"] = {{"model", info.model}, {"asked", asked}, {"version", info.version}};
  made.json["suite"] = std::move(row);
  return made;
}

OrderedJson routes(const Examinee& subject, const std::vector<eval::Task>& tasks, const std::string& text,
                   const AskOptions& ask, eval::EvalOptions options, const TaskProgress& progress) {
  models::LanguageModel& model = *subject.opened.model;
  MOESAIC_CHECK(model.needs().routed || !model.structure().is_null(), UsageError,
                "routes: no router and no connection here: --adapter is missing or has one expert per site; expected a "
                "mov or molora of several experts, or a sparse model or a composition as --model");
  const std::string asked = settle_asking(subject, ask, options);
  std::vector<eval::TaskRoutes> results;
  for (const eval::Task& task : tasks) {
    results.push_back(eval::route_task(subject.model(), task, options, of_task(progress, task)));
  }
  std::optional<eval::TextRoutes> of_text;
  if (!text.empty()) {
    of_text = eval::route_text(subject.model(), message_ids(text, subject.model(), options.apply_chat_template));
  }
  OrderedJson json = eval::routes_json(subject.from.model, model, results, of_text ? &*of_text : nullptr);
  json["dtype"] = dtype_name(model.facts().dtype);
  json["asked"] = asked;
  return json;
}

}  // namespace moesaic::run
