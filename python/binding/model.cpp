#include "python/binding/model.h"

#include "moesaic/base/device.h"
#include "moesaic/base/output_folder.h"
#include "moesaic/eval/task_file.h"
#include "moesaic/generate/generate.h"
#include "moesaic/moe/router.h"
#include "moesaic/run/config.h"
#include "moesaic/run/subject.h"
#include "python/binding/guarded.h"

namespace moesaic::python {
namespace {

run::Opened opened_of(const run::ModelReference& from, const std::string& device, const std::string& dtype, bool int8) {
  const c10::InferenceMode off(false);
  const torch::Device place = parse_device(device);
  return run::open(from.model, {}, {place, number_format(dtype, place).dtype, int8, /*needs_tokenizer=*/false});
}

std::vector<int64_t> numbers_of(const torch::Tensor& tensor, const char* what) {
  MOESAIC_CHECK(tensor.dim() == 1 && tensor.scalar_type() == torch::kInt64, ShapeError,
                "{}: got {} of shape {}, expected int64 of one dimension", what, dtype_name(tensor.scalar_type()),
                fmt::join(tensor.sizes(), " x "));
  const torch::Tensor here = tensor.to(torch::kCPU).contiguous();
  return {here.data_ptr<int64_t>(), here.data_ptr<int64_t>() + here.numel()};
}

std::string text_of(const OrderedJson& json) {
  return json.dump(-1, ' ', false, OrderedJson::error_handler_t::replace);
}

generate::SamplingOptions sampling_of(const Json& json) {
  generate::SamplingOptions options;
  const std::string where = "generate";
  auto take = [&](const char* key, auto& field) { field = get_or(json, key, field, where); };
  take("max_new_tokens", options.max_new_tokens);
  take("temperature", options.temperature);
  take("top_k", options.top_k);
  take("top_p", options.top_p);
  take("min_p", options.min_p);
  take("repetition_penalty", options.repetition_penalty);
  take("stop", options.stop);
  take("num_beams", options.num_beams);
  take("length_penalty", options.length_penalty);
  take("early_stopping", options.early_stopping);
  take("num_return_sequences", options.num_return_sequences);
  take("seed", options.seed);
  return options;
}

struct Questions {
  eval::Suite suite;
  eval::TaskOptions task;
  run::AskOptions ask;
  eval::EvalOptions options;
};

/// The keys that evaluate and routes have in common, and those of evaluate.
Questions questions_of(const Json& json) {
  Questions made;
  const std::string where = "options";
  auto take = [&](const char* key, auto& field) { field = get_or(json, key, field, where); };
  take("limit", made.task.limit);
  take("generate", made.task.generate);
  made.task.data_dir = get_or<std::string>(json, "data_dir", ".", where);
  if (json.contains("num_fewshot")) made.task.num_fewshot = get<int64_t>(json, "num_fewshot", where);
  if (json.contains("apply_chat_template"))
    made.ask.apply_chat_template = get<bool>(json, "apply_chat_template", where);
  if (json.contains("target_delimiter")) made.ask.target_delimiter = get<std::string>(json, "target_delimiter", where);
  take("batch_size", made.options.batch_size);
  take("score_eos", made.options.score_eos);
  take("metrics", made.options.metrics);
  take("confirm_run_unsafe_code", made.options.run_code);
  made.options.generation.max_new_tokens = get_or<int64_t>(json, "max_gen_toks", 0, where);
  made.options.generation.stop = get_or<std::vector<std::string>>(json, "until", {}, where);
  const auto tasks = get_or<std::vector<std::string>>(json, "tasks", {}, where);
  if (!tasks.empty()) made.suite.tasks = eval::load_tasks(tasks, made.task);
  return made;
}

/// Tells how far it is, and stops where it is told to.
run::TaskProgress told_to(Job& job) {
  return [&job](const eval::Task& task, int64_t done) {
    if (job.stopping()) throw Stopped();
    job.tell(text_of({{"task", task.name}, {"done", done}, {"of", std::ssize(task.items)}}));
  };
}

}  // namespace

Model::Model(const std::string& named, const std::string& device, const std::string& dtype, bool int8)
    : from_(run::resolve_model(named, "", {})),
      opened_(opened_of(from_, device, dtype, int8)),
      own_tokenizer_(opened_.tokenizer) {
  for (const run::AdapterReference& reference : std::exchange(from_.adapters, {})) {
    attach_folder(reference.name, reference.dir.string(), reference.scale);
  }
}

/// Throws where another thread, or a run, is at work with the model.
std::shared_ptr<void> Model::use() {
  MOESAIC_CHECK(!in_use_.exchange(true), UsageError,
                "the model is at work: got a second call, expected one at a time\nhint: load it once more for another "
                "thread");
  return {this, [](Model* model) { model->in_use_ = false; }};
}

adapters::Adapter& Model::adapter(const std::string& name) {
  opened_.model->column(name);
  return *adapters_.at(name);
}

const tokenizer::Tokenizer& Model::tokenizer() const {
  MOESAIC_CHECK(opened_.tokenizer, DataError, "{}: no tokenizer found, expected tokenizer.json", from_.model);
  return *opened_.tokenizer;
}

/// Prompts are rendered and tokenised as the adapters there are were trained.
void Model::adapt_tokenizer() {
  if (!own_tokenizer_) return;
  std::vector<run::AdapterReference> folders;  // a new adapter brings nothing
  std::copy_if(from_.adapters.begin(), from_.adapters.end(), std::back_inserter(folders),
               [](const run::AdapterReference& each) { return !each.dir.empty(); });
  const bool embeds =
      std::any_of(adapters_.begin(), adapters_.end(), [](const auto& each) { return each.second->embeds(); });
  opened_.tokenizer = own_tokenizer_;
  opened_.chat_template = nullptr;
  run::adapt_tokenizer(from_.model, folders, embeds && opened_.model->structure().is_null(), opened_);
}

/// `work` in a job that has the model and keeps it alive.
c10::intrusive_ptr<Job> Model::start(Job::Work work) {
  return c10::make_intrusive<Job>(
      [self = c10::intrusive_ptr<Model>::reclaim_copy(this), using_it = use(), work = std::move(work)](Job& job) {
        const torch::NoGradGuard no_grad;
        return work(job);
      });
}

std::string Model::facts() {
  return guarded([&] {
    const std::lock_guard lock(mutex_);
    const models::Facts& facts = opened_.model->facts();
    int64_t parameters = 0;
    for (const torch::Tensor& weight : opened_.model->weights()) parameters += weight.numel();
    OrderedJson sites = OrderedJson::array(), adapters = OrderedJson::array();
    for (const nn::LinearSite& site : opened_.model->parts().front().sites->linears) {
      sites.push_back({site.name, site.out, site.in});
    }
    for (const run::AdapterReference& each : from_.adapters) {
      const adapters::AdapterConfig& config = adapters_.at(each.name)->config();
      adapters.push_back({{"name", each.name},
                          {"method", config.method},
                          {"num_experts", config.num_experts},
                          {"folder", each.dir.string()},
                          {"scale", each.scale}});
    }
    return text_of({{"model", from_.model},
                    {"model_type", facts.model_type},
                    {"vocab_size", facts.vocab_size},
                    {"width", facts.width},
                    {"blocks", facts.blocks},
                    {"parameters", parameters},
                    {"device", facts.device.str()},
                    {"dtype", dtype_name(facts.dtype)},
                    {"eos_ids", opened_.eos_ids()},
                    {"adapters", std::move(adapters)},
                    {"structure", opened_.model->structure()},
                    {"chat_template", opened_.chat_template != nullptr},
                    {"prompts_apart", opened_.tokenizer && opened_.tokenizer->prompts_apart()},
                    {"sites", std::move(sites)}});
  });
}

void Model::attach_new(const std::string& name, const std::string& keys, int64_t seed) {
  guarded([&] {
    const auto held = use();
    const std::lock_guard lock(mutex_);
    const c10::InferenceMode off(false);  // what is made here outlives the caller's mode
    static const std::vector<std::string> kKeys{
        "finetuning_type", "num_experts", "lora_target",  "feedforward_modules", "layers_to_transform",
        "lora_rank",       "lora_alpha",  "lora_dropout", "use_rslora",          "rank_pattern",
        "alpha_pattern",   "k_site",      "router"};
    OrderedJson run = parse_ordered_json(keys, "attach");
    for (const auto& item : run.items()) {
      if (std::find(kKeys.begin(), kKeys.end(), item.key()) != kKeys.end()) continue;
      const std::string near = nearest_name(item.key(), kKeys);
      throw UsageError(fmt::format("attach: unknown key '{}'{}; an adapter has {}", item.key(),
                                   near.empty() ? "" : fmt::format(", did you mean '{}'?", near),
                                   fmt::join(kKeys, ", ")));
    }
    run["model_name_or_path"] = std::filesystem::absolute(from_.model).lexically_normal().string();
    run["dataset"] = OrderedJson::array();
    run["output_dir"] = "none";
    run["seed"] = seed;
    const run::RunConfig config = run::parse_run_config(run, "attach");
    MOESAIC_CHECK(run::subject_of(config.finetuning_type).method != nullptr, UsageError,
                  "attach: got {}, expected an adapter's method: {}", config.finetuning_type,
                  fmt::join(adapters::method_names(), ", "));
    const models::Facts& facts = opened_.model->facts();
    const auto adapter = run::begin_adapter(config, {facts.device, facts.dtype, /*dry=*/false, nullptr},
                                            *opened_.checkpoint, *opened_.model);
    try {
      opened_.model->attach(name, adapter);
    } catch (...) {
      adapter->detach();
      throw;
    }
    adapters_[name] = adapter;
    from_.adapters.push_back({name, "", 1.0});
  });
}

void Model::attach_folder(const std::string& name, const std::string& folder, double scale) {
  guarded([&] {
    const auto held = use();
    const std::lock_guard lock(mutex_);
    const c10::InferenceMode off(false);
    MOESAIC_CHECK(std::isfinite(scale), UsageError, "scale: got {}, expected a finite number", scale);
    const auto adapter =
        adapters::Adapter::open(folder, *opened_.model->parts().front().sites, opened_.model->facts().device,
                                opened_.checkpoint->fingerprint(), scale);
    try {
      opened_.read_sentences_for(folder, adapter->config());
      opened_.model->attach(name, adapter);
    } catch (...) {
      adapter->detach();
      throw;
    }
    adapters_[name] = adapter;
    from_.adapters.push_back({name, folder, scale});
    adapt_tokenizer();
  });
}

void Model::detach(const std::string& name) {
  guarded([&] {
    const auto held = use();
    const std::lock_guard lock(mutex_);
    const c10::InferenceMode off(false);
    opened_.model->detach(name);
    adapters_.erase(name);
    std::erase_if(from_.adapters, [&](const run::AdapterReference& each) { return each.name == name; });
    adapt_tokenizer();
  });
}

void Model::set_trainable(const std::string& name, bool on) {
  guarded([&] {
    const auto held = use();
    const std::lock_guard lock(mutex_);
    adapter(name).set_trainable(on);
  });
}

void Model::save(const std::string& name, const std::string& folder) {
  guarded([&] {
    const auto held = use();
    const std::lock_guard lock(mutex_);
    const auto found = std::find_if(from_.adapters.begin(), from_.adapters.end(),
                                    [&](const run::AdapterReference& each) { return each.name == name; });
    MOESAIC_CHECK(found == from_.adapters.end() || found->scale == 1.0, UsageError,
                  "save: got {}, attached with the scale {}, expected 1: the folder would hold it at full strength",
                  name, found->scale);
    check_new_folder(folder, {from_.model});
    adapter(name).save(folder);
    if (opened_.tokenizer) write_new_file(std::filesystem::path(folder) / "tokenizer.json", opened_.tokenizer->json());
  });
}

std::vector<std::tuple<std::string, torch::Tensor>> Model::parameters(const std::string& name) {
  return guarded([&] {
    const std::lock_guard lock(mutex_);
    std::vector<std::tuple<std::string, torch::Tensor>> all;
    for (const nn::Parameter& each : adapter(name).parameters()) all.emplace_back(each.name, each.tensor);
    return all;
  });
}

std::vector<torch::Tensor> Model::base_parameters() {
  return guarded([&] { return opened_.model->weights(); });
}

std::vector<int64_t> Model::text_ids(const std::string& text, bool start) {
  return guarded([&] {
    const std::lock_guard lock(mutex_);
    return start ? tokenizer().encode_start(text).ids : tokenizer().encode(text, true);
  });
}

std::vector<int64_t> Model::answer_ids(const std::string& text) {
  return guarded([&] {
    const std::lock_guard lock(mutex_);
    std::vector<int64_t> ids = tokenizer().encode_behind(text);
    MOESAIC_CHECK(!ids.empty(), UsageError, "answer: it has no tokens");
    return ids;
  });
}

std::vector<int64_t> Model::chat_ids(const std::string& messages, const std::string& tools) {
  return guarded([&] {
    const std::lock_guard lock(mutex_);
    MOESAIC_CHECK(opened_.chat_template, UsageError,
                  "messages: got a conversation, expected a text: this model has no chat template");
    return tokenizer().encode(opened_.chat_template->render(parse_ordered_json(messages, "messages"), true,
                                                            parse_ordered_json(tools, "tools")),
                              false);
  });
}

std::string Model::decode(const std::vector<int64_t>& ids, bool skip_special_tokens) {
  return guarded([&] {
    const std::lock_guard lock(mutex_);
    return tokenizer().decode(ids, skip_special_tokens);
  });
}

std::vector<torch::Tensor> Model::forward(const torch::Tensor& ids, const torch::Tensor& offsets,
                                          const std::vector<std::vector<int64_t>>& borders, const std::string& adapters,
                                          bool training, bool losses) {
  return guarded([&] {
    const auto held = use();
    models::LanguageModel& model = *opened_.model;
    models::Text text;
    numbers_of(ids, "ids");
    text.tokens.tokens = ids.to(model.facts().device);
    text.tokens.offsets = numbers_of(offsets, "offsets");
    const std::vector<int64_t>& ends = text.tokens.offsets;
    const bool rising = std::adjacent_find(ends.begin(), ends.end(), std::greater_equal<>()) == ends.end();
    MOESAIC_CHECK(ends.size() >= 2 && ends.front() == 0 && rising && ends.back() == ids.numel(), ShapeError,
                  "offsets: got {}, expected 0, then the end of each sequence, rising to {}, the number of ids",
                  fmt::join(ends, " "), ids.numel());
    MOESAIC_CHECK(borders.empty() || borders.size() + 1 == ends.size(), ShapeError,
                  "borders: got {} lists, expected one for each of {} sequences, or none", borders.size(),
                  ends.size() - 1);
    for (size_t b = 0; b < borders.size(); ++b) {
      const bool inside = borders[b].empty() || (borders[b].front() > 0 && borders[b].back() <= ends[b + 1] - ends[b]);
      MOESAIC_CHECK(inside && std::is_sorted(borders[b].begin(), borders[b].end()), ShapeError,
                    "borders[{}]: got {}, expected numbers of its {} tokens, rising", b, fmt::join(borders[b], " "),
                    ends[b + 1] - ends[b]);
    }
    text.borders = borders;
    if (!adapters.empty()) {
      const std::vector<double> row = run::mixture_row(model, parse_ordered_json(adapters, "adapters"), "forward");
      text.mixture =
          torch::tensor(row).to(torch::kFloat32).expand({std::ssize(ends) - 1, std::ssize(row)}).contiguous();
    }
    nn::Pass pass;
    pass.training = training;
    std::vector<nn::RoutingRecord> records;
    if (losses) pass.routing = &records;
    std::vector<torch::Tensor> made{model.head().logits(model.hidden(text, pass))};
    if (!losses) return made;
    std::erase_if(records, [](const nn::RoutingRecord& record) { return !record.trained; });
    MOESAIC_CHECK(!records.empty(), UsageError,
                  "losses: got a model without a router that is trained, expected one: mov or molora with several "
                  "experts");
    torch::Tensor balance, z;
    for (const nn::RoutingRecord& record : records) {
      balance = balance.defined() ? balance + moe::balance_loss(record) : moe::balance_loss(record);
      z = z.defined() ? z + moe::z_loss(record) : moe::z_loss(record);
    }
    const auto count = static_cast<double>(records.size());
    made.push_back(balance / count);
    made.push_back(z / count);
    return made;
  });
}

std::vector<std::vector<double>> Model::score(const std::vector<std::vector<int64_t>>& prompts,
                                              const std::vector<std::vector<int64_t>>& answers) {
  return guarded([&] {
    const auto held = use();
    const torch::NoGradGuard no_grad;
    std::vector<generate::Prompt> asked;
    for (const auto& ids : prompts) asked.push_back({ids});
    const auto scores =
        answers.empty() ? generate::score(*opened_.model, asked) : generate::score(*opened_.model, asked, answers);
    std::vector<std::vector<double>> made;
    for (const auto& each : scores) made.emplace_back(each.begin(), each.end());
    return made;
  });
}

c10::intrusive_ptr<Job> Model::generate(const std::vector<std::vector<int64_t>>& prompts, const std::string& options) {
  return guarded([&] {
    const Json json = parse_ordered_json(options, "generate");
    generate::SamplingOptions sampling = sampling_of(json);
    sampling.eos_ids = opened_.eos_ids();
    const auto batch_size = get_or<int64_t>(json, "batch_size", 8, "generate");
    MOESAIC_CHECK(batch_size > 0, UsageError, "batch_size: got {}, expected 1 or more", batch_size);
    std::vector<generate::Prompt> asked;
    const std::lock_guard lock(mutex_);
    for (const auto& ids : prompts) {
      asked.push_back({ids});
      if (json.contains("adapters")) {
        asked.back().mixture = run::mixture_row(*opened_.model, OrderedJson(json["adapters"]), "generate");
      }
    }
    tokenizer();
    return start([this, asked, sampling, batch_size](Job& job) mutable {
      OrderedJson answers = OrderedJson::array();
      for (size_t first = 0; first < asked.size(); first += batch_size) {
        if (job.stopping()) throw Stopped();
        const auto begin = asked.begin() + static_cast<int64_t>(first);
        const auto count = std::min<int64_t>(batch_size, asked.end() - begin);
        sampling.first = static_cast<int64_t>(first);
        generate::Hooks hooks;
        if (sampling.num_beams == 1) {
          hooks.stream = [&](int64_t sequence, const std::string& piece) {
            job.tell(text_of(
                {{"answer", static_cast<int64_t>(first) * sampling.num_return_sequences + sequence}, {"text", piece}}));
            return !job.stopping();
          };
        }
        for (const generate::Generation& each :
             generate::generate(*opened_.model, *opened_.tokenizer, {begin, begin + count}, sampling, hooks)) {
          answers.push_back(
              {{"text", each.text}, {"ids", each.ids}, {"finish_reason", each.finish_reason}, {"score", each.score}});
        }
      }
      if (job.stopping()) throw Stopped();
      return text_of(answers);
    });
  });
}

c10::intrusive_ptr<Job> Model::evaluate(const std::string& options) {
  return guarded([&] {
    const Json json = parse_ordered_json(options, "evaluate");
    Questions asked = questions_of(json);
    if (json.contains("suite")) asked.suite = eval::load_suite(get<std::string>(json, "suite", "evaluate"), asked.task);
    MOESAIC_CHECK(!asked.suite.tasks.empty(), UsageError, "evaluate: got no task, expected tasks or a suite");
    for (const eval::Task& task : asked.suite.tasks) eval::check_metrics(task, asked.options);
    asked.options.keep_samples = true;
    const auto seed = get_or<uint64_t>(json, "seed", 42, "evaluate");
    tokenizer();
    return start([this, asked = std::move(asked), seed](Job& job) {
      run::Evaluated made =
          run::evaluate({opened_, from_}, asked.suite, asked.ask, asked.options, asked.task.limit, seed, told_to(job));
      for (const eval::TaskResult& result : made.results) made.json["samples"][result.name] = result.samples;
      return text_of(made.json);
    });
  });
}

c10::intrusive_ptr<Job> Model::routes(const std::string& options) {
  return guarded([&] {
    const Json json = parse_ordered_json(options, "routes");
    const Questions asked = questions_of(json);
    const auto text = get_or<std::string>(json, "text", "", "routes");
    MOESAIC_CHECK(!asked.suite.tasks.empty() || !text.empty(), UsageError, "routes: expected a text, tasks, or both");
    tokenizer();
    return start([this, asked, text](Job& job) {
      return text_of(run::routes({opened_, from_}, asked.suite.tasks, text, asked.ask, asked.options, told_to(job)));
    });
  });
}

}  // namespace moesaic::python
