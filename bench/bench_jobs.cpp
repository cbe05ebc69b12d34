// Our side of `make bench`: the protocol of peers.py. The first line on stdin is the job; every further line, an
// object of changes to it, runs it once.
#include <iostream>

#include "cli/products.h"
#include "cli/threads.h"
#include "moesaic/adapters/adapter.h"
#include "moesaic/compose/folder.h"
#include "moesaic/data/example.h"
#include "moesaic/eval/rank.h"
#include "moesaic/generate/generate.h"
#include "moesaic/models/causal_lm.h"
#include "moesaic/models/registry.h"
#include "moesaic/train/trainer.h"

namespace {

using namespace moesaic;

/// Bytes of one line of /proc/self/status.
int64_t status(const std::string& key) {
  std::ifstream file("/proc/self/status");
  for (std::string line; std::getline(file, line);) {
    if (line.starts_with(key + ":")) return std::stoll(line.substr(key.size() + 1)) * 1024;
  }
  throw DataError("/proc/self/status: no " + key);
}

/// Seconds of all threads of this process.
double cpu_seconds() {
  timespec time{};
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time);
  return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

struct Loaded {
  std::shared_ptr<models::SingleModel> model;
  std::shared_ptr<tokenizer::Tokenizer> tokenizer;
  std::shared_ptr<adapters::Adapter> adapter;
};

/// One run: `index` counts them, `job` holds the changes so far.
using Run = std::function<Json(int64_t index, const Json& job)>;

Loaded load(const Json& job, const std::string& method) {
  Loaded loaded;
  const auto checkpoint = models::open_checkpoint(job["model"].get<std::string>());
  models::LoadOptions options;
  options.quantize_int8 = job.value("quantize", false);
  options.dtype = job.value("bfloat16", false) ? torch::kBFloat16 : torch::kFloat32;
  loaded.model = models::load_model(*checkpoint, options);
  loaded.tokenizer = tokenizer::Tokenizer::open(*checkpoint);
  if (method.empty() || method == "frozen") return loaded;
  adapters::AdapterConfig config;
  config.method = method;
  config.num_experts = adapters::method_of(method).mixes ? job["experts"].get<int64_t>() : 1;
  config.lora_rank = job["rank"];
  config.lora_alpha = 16;
  config = adapters::resolve_targets(config, "all-linear", loaded.model->sites());
  loaded.adapter = adapters::Adapter::create(config, loaded.model->sites(), loaded.model->device(), /*seed=*/1);
  loaded.model->attach(method, loaded.adapter);
  return loaded;
}

std::vector<data::Batch> read_batches(const Json& job) {
  std::vector<data::Batch> batches;
  for (const Json& batch : job["batches"]) {
    std::vector<data::Example> examples;
    for (size_t row = 0; row < batch["ids"].size(); ++row) {
      data::Example example;
      example.ids = batch["ids"][row].get<std::vector<int64_t>>();
      example.mask = batch["mask"][row].get<std::vector<uint8_t>>();
      example.end_prompts_by_mask();
      examples.push_back(std::move(example));
    }
    batches.push_back(data::collate(examples, torch::kCPU));
  }
  return batches;
}

/// Mean cross entropy of the batch's targets; hidden: final-norm rows of its labels [M, d].
torch::Tensor batch_loss(const models::LanguageModel& model, const torch::Tensor& hidden, const data::Batch& batch) {
  const torch::Tensor weights = torch::full({batch.num_targets()}, 1.0 / static_cast<double>(batch.num_targets()));
  return model.head().loss(hidden, batch.labels, weights);
}

/// What the trainer gives a model of a batch.
models::Text text_of(const data::Batch& batch) {
  models::Text text{batch.tokens, batch.prompt_ends};
  text.rows = batch.label_rows;
  return text;
}

void step(train::Optimizer& optimizer, const std::vector<train::OptimizedTensor>& tensors) {
  optimizer.step(1.0);
  for (const train::OptimizedTensor& t : tensors) torch::Tensor(t.tensor).mutable_grad() = torch::Tensor();
}

/// Forward, backward and AdamW; `frozen`: forward and the gradient down to the embeddings' output.
Run training(const Json& job) {
  const std::string method = job["method"];
  auto loaded = std::make_shared<Loaded>(load(job, method));
  const std::vector<data::Batch> batches = read_batches(job);
  std::shared_ptr<train::Optimizer> optimizer;
  std::vector<train::OptimizedTensor> tensors;
  if (loaded->adapter) {
    train::TrainConfig config;
    config.learning_rate = 1e-4;
    tensors = train::optimized_tensors(*loaded->adapter, config);
    optimizer = train::make_adamw(tensors, {});
  }
  return [=](int64_t index, const Json&) -> Json {
    const data::Batch& batch = batches[index % batches.size()];
    nn::Pass pass;
    pass.training = true;
    torch::Tensor hidden;
    if (loaded->adapter) {
      hidden = loaded->model->hidden(text_of(batch), pass);
    } else {
      auto& model = dynamic_cast<models::CausalLM&>(*loaded->model);
      model.prepare(batch.tokens, pass);
      const torch::Tensor embedded = model.embed(batch.tokens.tokens).detach().set_requires_grad(true);
      hidden = model.finish(model.run_blocks(embedded, 0, model.config().num_layers, pass), batch.label_rows);
    }
    const torch::Tensor loss = batch_loss(*loaded->model, hidden, batch);
    loss.backward();
    if (optimizer) step(*optimizer, tensors);
    return {{"tokens", batch.tokens.num_tokens()}, {"loss", loss.item<double>()}};
  };
}

/// The pair that job["models"] names, joined at job["connections"]; with `released` as the released code joins them.
std::shared_ptr<compose::Composition> compose_pair(const Json& job, bool released) {
  compose::CompositionConfig config;
  config.connection.num_heads = job["heads"];
  if (released) {
    config.connection.cross_position = "none";
    config.connection.norm = "post";
    config.connection.attention_bias = true;
  }
  config.augmenting.emplace_back();
  for (const Json& pair : job["connections"]) config.augmenting[0].connections.push_back({pair[0], pair[1]});
  auto open = [](const std::string& path) { return compose::open_member(models::open_checkpoint(path), {}); };
  return std::make_shared<compose::Composition>(config, open(job["models"][0]), std::vector{open(job["models"][1])},
                                                /*seed=*/1);
}

/// Forward, backward and AdamW of a composition's connections; `cached`: frozen states are kept from run to run.
Run composed_training(const Json& job) {
  const auto composition = compose_pair(job, /*released=*/true);
  const std::vector<data::Batch> batches = read_batches(job);
  train::TrainConfig config;
  config.learning_rate = 1e-4;
  const auto connections = std::make_shared<compose::Connections>(composition, /*train_adapters=*/false);
  const auto tensors = train::optimized_tensors(*connections, config);
  const std::shared_ptr<train::Optimizer> optimizer = train::make_adamw(tensors, {});
  if (job.value("cached", false)) composition->keep_states(std::make_shared<compose::StateCache>(int64_t{8} << 30));
  return [=, kept = connections](int64_t index, const Json&) -> Json {
    const data::Batch& batch = batches[index % batches.size()];
    nn::Pass pass;
    pass.training = true;
    const torch::Tensor loss = batch_loss(*composition, composition->hidden(text_of(batch), pass), batch);
    loss.backward();
    step(*optimizer, tensors);
    return {{"tokens", batch.tokens.num_tokens()}, {"loss", loss.item<double>()}};
  };
}

/// Greedy decoding of one prompt by a composition.
Run composed_generation(const Json& job) {
  const auto composition = compose_pair(job, /*released=*/false);
  return [=](int64_t, const Json& now) -> Json {
    generate::SamplingOptions options;
    options.max_new_tokens = now["new_tokens"];
    const std::vector<int64_t> prompt = now["prompt"];
    const auto answers = generate::generate(*composition, *composition->anchor_member().tokenizer, {{prompt}}, options);
    return {{"tokens", answers[0].ids.size()}, {"ids", answers[0].ids}};
  };
}

/// Decoding of one prompt through the library's `generate`, greedy or with job["num_beams"], without an end-of-text
/// token.
Run generation(const Json& job) {
  auto loaded = std::make_shared<Loaded>(load(job, job.value("adapter", "")));
  if (loaded->adapter) loaded->adapter->set_trainable(false);
  return [=](int64_t, const Json& now) -> Json {
    generate::SamplingOptions options;
    options.max_new_tokens = now["new_tokens"];
    options.num_beams = now.value("num_beams", 1);
    const std::vector<int64_t> prompt = now["prompt"];
    const auto answers = generate::generate(*loaded->model, *loaded->tokenizer, {{prompt}}, options);
    return {{"tokens", answers[0].ids.size()}, {"ids", answers[0].ids}};
  };
}

/// The choices of questions ranked by an encoder-decoder, as many questions at once as `moesaic eval` takes.
Run scoring(const Json& job) {
  const std::shared_ptr<models::SingleModel> model =
      models::load_model(*models::open_checkpoint(job["model"].get<std::string>()), {});
  constexpr int64_t kBatchTokens = 4096;
  std::vector<std::vector<eval::RankQuestion>> batches;
  int64_t in_batch = kBatchTokens, scored = 0;
  for (const Json& given : job["questions"]) {
    eval::RankQuestion question;
    question.prompt.ids = given["prompt"].get<std::vector<int64_t>>();
    question.choices = given["choices"].get<std::vector<std::vector<int64_t>>>();
    question.first_scored.assign(question.choices.size(), 0);
    question.first_of_choice = question.first_scored;
    int64_t tokens = std::ssize(question.prompt.ids);
    for (const auto& choice : question.choices) {
      tokens += std::ssize(question.prompt.ids) + std::ssize(choice);
      scored += std::ssize(choice);
    }
    if (in_batch + tokens > kBatchTokens) {
      batches.emplace_back();
      in_batch = 0;
    }
    in_batch += tokens;
    batches.back().push_back(std::move(question));
  }
  return [=](int64_t, const Json&) -> Json {
    std::vector<double> scores;
    for (const auto& batch : batches) {
      for (const auto& question : eval::rank(*model, batch)) {
        for (const eval::ChoiceScore& score : question) scores.push_back(score.logprob);
      }
    }
    return {{"tokens", scored}, {"scores", scores}};
  };
}

}  // namespace

int main() {
  std::string line;
  std::getline(std::cin, line);
  Json job = Json::parse(line);
  at::set_num_threads(job["threads"]);
  if (job["kind"] == "generate" || job["kind"] == "calm_generate") cli::ask_for_huge_pages();  // as the program does
  const cli::SpinWatch watch;
  cli::choose_products();
  const std::map<std::string, Run (*)(const Json&)> kinds{{"training", training},
                                                          {"generate", generation},
                                                          {"score", scoring},
                                                          {"calm", composed_training},
                                                          {"calm_generate", composed_generation}};
  const Run run = kinds.at(job["kind"])(job);
  std::cout << Json{{"base_rss", status("VmRSS")}}.dump() << std::endl;
  for (int64_t index = 0; std::getline(std::cin, line); ++index) {
    job.update(Json::parse(line));
    std::ofstream("/proc/self/clear_refs") << 5;  // the peak starts again
    const double cpu = cpu_seconds();
    const auto start = std::chrono::steady_clock::now();
    Json answer = run(index, job);
    answer["seconds"] = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    answer["cpu_seconds"] = cpu_seconds() - cpu;
    answer["peak_rss"] = status("VmHWM");
    std::cout << answer.dump() << std::endl;
  }
  return 0;
}
