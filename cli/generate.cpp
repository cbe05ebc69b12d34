// moesaic generate: answers to one prompt, streamed, or to a file of prompts, in batches.
#include <iostream>

#include "cli/load.h"
#include "moesaic/generate/generate.h"

namespace moesaic::cli {
namespace {

struct Options {
  ModelOptions model;
  generate::SamplingOptions sampling;
  std::vector<std::string> prompts;
  std::string file, system;
  bool raw = false, json = false;
  int64_t batch_size = 8;
};

struct Prompt {
  std::string text;      // what the user gave
  OrderedJson messages;  // a whole conversation, or null
  std::vector<float> sentence;
};

/// .jsonl: {"prompt": text} or {"messages": [...]}, with "sentence" a list of numbers if the router needs one; any
/// other file: a prompt a line.
std::vector<Prompt> read_prompts(const std::string& path) {
  std::ifstream file(path);
  MOESAIC_CHECK(file.good() && std::filesystem::is_regular_file(path), DataError, "--prompts {}: can't read this file.",
                path);
  const bool jsonl = path.size() > 6 && path.substr(path.size() - 6) == ".jsonl";
  std::vector<Prompt> prompts;
  int64_t number = 0;
  for (std::string line; std::getline(file, line);) {
    ++number;
    if (!line.empty() && line.back() == '\r') line.pop_back();
    if (line.find_first_not_of(" \t") == std::string::npos) continue;
    Prompt& prompt = prompts.emplace_back();
    if (!jsonl) {
      prompt.text = line;
      continue;
    }
    const std::string where = fmt::format("{}:{}", path, number);
    const OrderedJson row = parse_ordered_json(line, where);
    const bool has_prompt = row.is_object() && row.contains("prompt") && row["prompt"].is_string();
    const bool has_messages = row.is_object() && row.contains("messages") && row["messages"].is_array();
    MOESAIC_CHECK(has_prompt != has_messages, DataError,
                  "{}: expected an object with either \"prompt\" (text) or \"messages\" (a list), got {}", where,
                  line.substr(0, 80));
    if (has_prompt) prompt.text = row["prompt"].get<std::string>();
    if (has_messages) prompt.messages = row["messages"];
    if (row.contains("sentence")) {
      try {
        prompt.sentence = row["sentence"].get<std::vector<float>>();
      } catch (const OrderedJson::exception&) {
        throw DataError(fmt::format("{}: \"sentence\" is no list of numbers", where));
      }
    }
  }
  MOESAIC_CHECK(!prompts.empty(), DataError, "--prompts {}: the file holds no prompt.", path);
  return prompts;
}

/// The prompt's text as the model sees it, and its ids.
std::vector<int64_t> encode(const LoadedModel& loaded, const Options& options, const Prompt& prompt) {
  const bool chat = !options.raw && loaded.chat_template;
  if (!chat) {
    MOESAIC_CHECK(prompt.messages.is_null() && options.system.empty(), UsageError,
                  "{} need a chat template, and {}. Give the prompt as text.",
                  options.system.empty() ? "messages" : "--system and messages",
                  options.raw ? "--raw switches it off" : "this model has none");
    return loaded.tokenizer->encode(prompt.text, true);
  }
  OrderedJson messages = prompt.messages;
  if (messages.is_null()) {
    messages = OrderedJson::array();
    if (!options.system.empty()) messages.push_back({{"role", "system"}, {"content", options.system}});
    messages.push_back({{"role", "user"}, {"content", prompt.text}});
  }
  return loaded.tokenizer->encode(loaded.chat_template->render(messages, true), false);
}

/// Sentence vectors of a batch: the file's when it has them, else the frozen model's.
torch::Tensor sentence_of(const LoadedModel& loaded, const std::vector<std::vector<int64_t>>& ids,
                          std::span<const Prompt> prompts) {
  if (!loaded.routes_by_sentence() || prompts[0].sentence.empty()) return loaded.sentence_of(ids);
  std::vector<torch::Tensor> rows;
  for (const Prompt& prompt : prompts) {
    MOESAIC_CHECK(prompt.sentence.size() == prompts[0].sentence.size(), DataError,
                  "--prompts: sentence vectors of different lengths: {} and {}", prompts[0].sentence.size(),
                  prompt.sentence.size());
    rows.push_back(torch::tensor(prompt.sentence));
  }
  return torch::stack(rows).to(loaded.model->device());
}

int run(Options options, const CommonOptions& common) {
  MOESAIC_CHECK(options.prompts.empty() != options.file.empty(), UsageError,
                "give either -p TEXT or --prompts FILE, and not both");
  std::vector<Prompt> prompts;
  for (const std::string& text : options.prompts) prompts.push_back({text, nullptr, {}});
  if (!options.file.empty()) prompts = read_prompts(options.file);

  const LoadedModel loaded = load_model(options.model, common, {.composition = true});
  options.sampling.eos_ids = loaded.eos_ids();
  const bool streams = prompts.size() == 1 && !options.json;
  auto show = [](int64_t, const std::string& piece) {
    std::cout << piece << std::flush;
    return true;
  };

  const auto start = std::chrono::steady_clock::now();
  int64_t prompt_tokens = 0, new_tokens = 0;
  for (size_t first = 0; first < prompts.size(); first += options.batch_size) {
    const size_t last = std::min(prompts.size(), first + options.batch_size);
    std::vector<std::vector<int64_t>> ids;
    for (size_t i = first; i < last; ++i) ids.push_back(encode(loaded, options, prompts[i]));
    generate::SamplingOptions sampling = options.sampling;
    sampling.seed = common.seed + first;  // an answer's draw does not depend on the batch size
    const torch::Tensor sentence = sentence_of(loaded, ids, std::span(prompts).subspan(first, last - first));
    const generate::StreamCallback stream = streams ? show : generate::StreamCallback();
    const auto answers = loaded.composition
                             ? generate::generate(*loaded.composition, *loaded.tokenizer, ids, sampling, stream)
                             : generate::generate(*loaded.model, *loaded.tokenizer, ids, sampling, stream, sentence);
    for (size_t i = 0; i < answers.size(); ++i) {
      prompt_tokens += static_cast<int64_t>(ids[i].size());
      new_tokens += static_cast<int64_t>(answers[i].ids.size());
      const Prompt& prompt = prompts[first + i];
      if (options.json) {
        OrderedJson line = {{"index", first + i}};
        if (prompt.messages.is_null()) {
          line["prompt"] = prompt.text;
        } else {
          line["messages"] = prompt.messages;
        }
        line.update(OrderedJson{{"text", answers[i].text},
                                {"finish_reason", answers[i].finish_reason},
                                {"prompt_tokens", ids[i].size()},
                                {"ids", answers[i].ids}});
        std::cout << line.dump(-1, ' ', false, OrderedJson::error_handler_t::replace) << '\n';
      } else if (streams) {
        std::cout << '\n';
      } else {
        std::cout << fmt::format("[{}] {}\n{}\n\n", first + i, prompt.text, answers[i].text);
      }
      std::cout.flush();
    }
  }
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  spdlog::info("{} prompt tokens, {} new tokens in {:.2f} s: {:.1f} new tokens/s", prompt_tokens, new_tokens, seconds,
               static_cast<double>(new_tokens) / seconds);
  return 0;
}

}  // namespace

Runner add_generate(CLI::App& app, CommonOptions& common) {
  auto options = std::make_shared<Options>();
  add_model_options(app, options->model);
  app.add_option("-p,--prompt", options->prompts, "The prompt; may be repeated")
      ->expected(1)
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll);
  app.add_option("--prompts", options->file,
                 "File of prompts: .jsonl with \"prompt\" or \"messages\", or text, one a line");
  app.add_option("--system", options->system, "System message");
  app.add_flag("--raw", options->raw, "Give the model the bare text, without its chat template");
  app.add_flag("--json", options->json, "Print a JSON object per answer");
  app.add_option("--batch_size", options->batch_size, "Prompts answered side by side")
      ->capture_default_str()
      ->check(CLI::Range(1, 4096));
  add_sampling_options(app, options->sampling);
  return [options, &common] { return run(*options, common); };
}

}  // namespace moesaic::cli
