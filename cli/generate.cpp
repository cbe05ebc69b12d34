// moesaic generate: answers to one prompt, streamed, or to a file of prompts, in batches.

#include "cli/options.h"

namespace moesaic::cli {
namespace {

struct Options {
  ModelOptions model;
  generate::SamplingOptions sampling;
  std::vector<std::string> prompts;
  std::string file, system;
  bool raw = false, raw_output = false, json = false;
  int64_t batch_size = 8;
};

struct Prompt {
  std::string text;      // what the user gave
  OrderedJson messages;  // a whole conversation, or null
  OrderedJson tools;     // that the answer may call, or null
  OrderedJson adapters;  // the request's adapters, or null
  std::vector<float> sentence;
  std::string where;  // its place in the file
};

/// .jsonl: {"prompt": text} or {"messages": [...]}, with "tools" [...] that may be called, "adapters" {name: weight}
/// where the request chooses them and "sentence" a list of numbers if the router needs one; any other file: a prompt a
/// line.
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
    static const std::vector<std::string> kKeys{"prompt", "messages", "tools", "adapters", "sentence", "id"};
    for (const auto& item : row.items()) {
      if (std::find(kKeys.begin(), kKeys.end(), item.key()) != kKeys.end()) continue;
      const std::string near = nearest_name(item.key(), kKeys);
      throw DataError(fmt::format("{}: unknown key '{}'{}; a prompt may have {}", where, item.key(),
                                  near.empty() ? "" : fmt::format(", did you mean '{}'?", near),
                                  fmt::join(kKeys, ", ")));
    }
    if (row.contains("tools") && !row["tools"].empty()) {
      MOESAIC_CHECK(row["tools"].is_array(), DataError, "{}: \"tools\" is {}, expected a list", where,
                    row["tools"].type_name());
      prompt.tools = row["tools"];
    }
    if (has_prompt) prompt.text = row["prompt"].get<std::string>();
    if (has_messages) prompt.messages = row["messages"];
    if (row.contains("adapters")) prompt.adapters = row["adapters"];
    prompt.where = where;
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
std::vector<int64_t> encode(const Loaded& loaded, const Options& options, const Prompt& prompt) {
  const bool chat = !options.raw && loaded.chat_template;
  if (!chat) {
    MOESAIC_CHECK(prompt.messages.is_null() && prompt.tools.is_null() && options.system.empty(), UsageError,
                  "{} need a chat template, and {}. Give the prompt as text.",
                  options.system.empty() ? "messages and tools" : "--system, messages and tools",
                  options.raw ? "--raw switches it off" : "this model has none");
    return loaded.tokenizer->encode_start(prompt.text).ids;
  }
  OrderedJson messages = prompt.messages;
  if (messages.is_null()) {
    messages = OrderedJson::array();
    if (!options.system.empty()) messages.push_back({{"role", "system"}, {"content", options.system}});
    messages.push_back({{"role", "user"}, {"content", prompt.text}});
  }
  return loaded.tokenizer->encode(loaded.chat_template->render(messages, true, prompt.tools), false);
}

/// How many answers, and how they are searched for; a conversation goes on from one.
void add_beam_options(CLI::App& app, generate::SamplingOptions& options) {
  const char* group = "Beam search";
  app.add_option("--num_beams", options.num_beams, "Answers searched for side by side; 1 = no beam search")
      ->capture_default_str()
      ->check(CLI::Range(1, 1024))
      ->group(group);
  app.add_option("--length_penalty", options.length_penalty,
                 "An answer's score is its log-probability / tokens^this: above 0 favours long ones")
      ->capture_default_str()
      ->group(group);
  app.add_option("--early_stopping", options.early_stopping,
                 "With num_beams answers: true ends at once, false when no better one is likely, never when none is "
                 "possible")
      ->capture_default_str()
      ->check(CLI::IsMember({"false", "true", "never"}))
      ->group(group);
  app.add_option("--num_return_sequences", options.num_return_sequences,
                 "Answers to each prompt: the best beams, or as many draws")
      ->capture_default_str()
      ->check(CLI::Range(1, 4096))
      ->group(group);
}

int run_generate(Options options, const CommonOptions& common) {
  MOESAIC_CHECK(options.prompts.empty() != options.file.empty(), UsageError,
                "give either -p TEXT or --prompts FILE, and not both");
  std::vector<Prompt> prompts;
  for (const std::string& text : options.prompts) prompts.push_back({text, nullptr, nullptr, nullptr, {}, ""});
  if (!options.file.empty()) prompts = read_prompts(options.file);

  const Loaded loaded = load(options.model, common);
  spdlog::info("computing in {}", loaded.computes_in());
  options.sampling.eos_ids = loaded.eos_ids();
  const int64_t answers_each = options.sampling.num_return_sequences;
  const bool alone = prompts.size() == 1 && answers_each == 1 && !options.json;
  const bool streams = alone && options.sampling.num_beams == 1;
  const auto print = options.raw_output ? &say_raw : static_cast<void (*)(std::string_view)>(&say);
  auto show = [print](int64_t, const std::string& piece) {
    print(piece);
    std::fflush(stdout);
    return true;
  };

  const auto start = std::chrono::steady_clock::now();
  int64_t prompt_tokens = 0, new_tokens = 0;
  for (size_t first = 0; first < prompts.size(); first += options.batch_size) {
    const size_t last = std::min(prompts.size(), first + options.batch_size);
    std::vector<generate::Prompt> batch;
    for (size_t i = first; i < last; ++i) {
      const Prompt& prompt = prompts[i];
      generate::Prompt& asked = batch.emplace_back(encode(loaded, options, prompt), prompt.sentence);
      if (!prompt.adapters.is_null()) asked.mixture = run::mixture_row(*loaded.model, prompt.adapters, prompt.where);
    }
    generate::SamplingOptions sampling = options.sampling;
    sampling.seed = common.seed;
    sampling.first = static_cast<int64_t>(first);  // an answer's draw does not depend on the batch size
    generate::Hooks hooks;
    if (streams) hooks.stream = show;
    const auto answers = generate::generate(*loaded.model, *loaded.tokenizer, batch, sampling, hooks);
    for (size_t i = 0; i < answers.size(); ++i) {
      const size_t of = i / answers_each, place = i % answers_each;
      if (place == 0) prompt_tokens += static_cast<int64_t>(batch[of].ids.size());
      new_tokens += static_cast<int64_t>(answers[i].ids.size());
      const Prompt& prompt = prompts[first + of];
      if (options.json) {
        OrderedJson line = {{"index", first + of}};
        if (answers_each > 1) line["sequence"] = place;
        if (prompt.messages.is_null()) {
          line["prompt"] = prompt.text;
        } else {
          line["messages"] = prompt.messages;
        }
        line.update(OrderedJson{{"text", answers[i].text},
                                {"finish_reason", answers[i].finish_reason},
                                {"prompt_tokens", batch[of].ids.size()},
                                {"ids", answers[i].ids},
                                {"dtype", dtype_name(loaded.format.dtype)}});
        if (options.sampling.num_beams > 1) line["score"] = answers[i].score;
        say("{}\n", line.dump(-1, ' ', false, OrderedJson::error_handler_t::replace));
      } else if (alone) {
        if (!streams) print(answers[i].text);
        say("\n");
      } else {
        if (place == 0) print(fmt::format("[{}] {}\n", first + of, prompt.text));
        const std::string number = answers_each > 1 ? fmt::format("({}) ", place) : "";
        print(fmt::format("{}{}\n\n", number, answers[i].text));
      }
      std::fflush(stdout);
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
  repeated(app.add_option("-p,--prompt", options->prompts, "The prompt; may be repeated"));
  app.add_option("--prompts", options->file,
                 "File of prompts: .jsonl with \"prompt\" or \"messages\" and, where they are wanted, \"tools\" and "
                 "\"adapters\": {name: weight}; or text, one a line");
  app.add_option("--system", options->system, "System message");
  app.add_flag("--raw", options->raw, "Give the model the bare text, without its chat template");
  app.add_flag("--json", options->json, "Print a JSON object per answer");
  app.add_flag("--raw_output", options->raw_output,
               "Print answers as they are; else control characters are made visible");
  app.add_option("--batch_size", options->batch_size, "Prompts answered side by side")
      ->capture_default_str()
      ->check(CLI::Range(1, 4096));
  add_sampling_options(app, options->sampling);
  add_beam_options(app, options->sampling);
  return [options, &common] { return run_generate(*options, common); };
}

}  // namespace moesaic::cli
