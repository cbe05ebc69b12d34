// Trains a mixture of (IA)^3 vectors beside a frozen model, and asks it a question:
//
//   train_mov MODEL DATA.jsonl OUTPUT "a prompt"
#include <iostream>

#include "moesaic/base/check.h"
#include "moesaic/generate/generate.h"
#include "moesaic/run/open.h"
#include "moesaic/run/run.h"

using namespace moesaic;

int main(int argc, char** argv) {
  if (argc != 5) {
    std::cerr << "usage: train_mov MODEL DATA.jsonl OUTPUT PROMPT\n";
    return 2;
  }
  const std::string model = argv[1], data = argv[2], output = argv[3], prompt = argv[4];
  try {
    // The keys of a run file; docs/config.md lists them.
    run::Run run(run::parse_run_config({{"model_name_or_path", model},
                                        {"dataset", data},
                                        {"output_dir", output},
                                        {"finetuning_type", "mov"},
                                        {"num_experts", 4},
                                        {"learning_rate", 1e-2},
                                        {"max_steps", 20},
                                        {"save_steps", 0},
                                        {"bf16", false}},
                                       "train_mov"));
    std::cout << run.plan().text();
    train::TrainHooks hooks;
    hooks.on_log = [](const train::StepLog& log) {
      if (log.step % 5 == 0) std::cout << "step " << log.step << ": loss " << log.loss << '\n';
    };
    run.train(hooks);

    // What was trained, beside the model it was trained for.
    const run::Opened opened = run::open(model, {{"mine", output}});
    generate::SamplingOptions sampling;
    sampling.max_new_tokens = 16;
    sampling.eos_ids = opened.eos_ids();
    const auto answers =
        generate::generate(*opened.model, *opened.tokenizer, {{opened.tokenizer->encode(prompt, true)}}, sampling);
    std::cout << "answer: " << answers[0].text << '\n';
  } catch (const Error& error) {
    std::cerr << "error: " << error.what() << '\n';
    return static_cast<int>(error.exit_code());
  }
  return 0;
}
