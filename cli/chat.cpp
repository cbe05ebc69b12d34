// moesaic chat: a conversation in the terminal. Keys and values of earlier turns are kept.
#include <unistd.h>

#include <iostream>

#include "cli/interrupt.h"
#include "cli/options.h"

namespace moesaic::cli {
namespace {

struct Options {
  ModelOptions model;
  generate::SamplingOptions sampling;
  std::string system;
};

OrderedJson opening(const Options& options) {
  OrderedJson messages = OrderedJson::array();
  if (!options.system.empty()) messages.push_back({{"role", "system"}, {"content", options.system}});
  return messages;
}

int run_chat(Options options, const CommonOptions& common) {
  const Loaded loaded = load(options.model, common);
  spdlog::info("computing in {}", loaded.computes_in());
  MOESAIC_CHECK(loaded.chat_template, UsageError,
                "{}: this model has no chat template, so it can't chat. `moesaic generate` continues a text.",
                loaded.from.model);
  options.sampling.eos_ids = loaded.eos_ids();
  options.sampling.seed = common.seed;
  const bool terminal = isatty(STDIN_FILENO) && isatty(STDOUT_FILENO);
  if (terminal) say("Type a message. /reset forgets the conversation, /exit leaves, Ctrl-C stops an answer.\n");

  generate::Session session(*loaded.model, *loaded.tokenizer);
  OrderedJson messages = opening(options);
  while (true) {
    if (terminal) say("\n> ");
    std::fflush(stdout);
    std::string line;
    if (!std::getline(std::cin, line) || line == "/exit") return 0;
    if (line.find_first_not_of(" \t\r") == std::string::npos) continue;
    if (line == "/reset") {
      messages = opening(options);
      continue;
    }
    if (line[0] == '/') {
      say("Unknown command {}. Known: /reset, /exit.\n", line);
      continue;
    }
    messages.push_back({{"role", "user"}, {"content", line}});
    const std::vector<int64_t> prompt = loaded.tokenizer->encode(loaded.chat_template->render(messages, true), false);
    const CatchSignals signals({SIGINT}, /*once=*/false);  // Ctrl-C stops the answer
    auto show = [&](int64_t, const std::string& piece) {
      say(piece);
      std::fflush(stdout);
      return !signals.caught();
    };
    const auto start = std::chrono::steady_clock::now();
    const generate::Generation answer = session.answer({prompt}, options.sampling, show);
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    say("\n");
    std::fflush(stdout);
    spdlog::debug("{} prompt tokens ({} kept from before), {} new in {:.2f} s", prompt.size(), session.reused(),
                  answer.ids.size(), seconds);
    messages.push_back({{"role", "assistant"}, {"content", answer.text}});
    ++options.sampling.first;
  }
}

}  // namespace

Runner add_chat(CLI::App& app, CommonOptions& common) {
  auto options = std::make_shared<Options>();
  add_model_options(app, options->model);
  app.add_option("--system", options->system, "System message");
  add_sampling_options(app, options->sampling);
  return [options, &common] { return run_chat(*options, common); };
}

}  // namespace moesaic::cli
