// moesaic score: the log-probability of every token of a text; how anyone checks this program against another one.

#include "cli/options.h"

namespace moesaic::cli {
namespace {

struct Options {
  ModelOptions model;
  std::string text, file, target;
  std::vector<int64_t> ids;
  bool score_eos = false, json = false;
};

int run_verb(const Options& options, const CommonOptions& common) {
  const int sources = !options.text.empty() + !options.file.empty() + !options.ids.empty();
  MOESAIC_CHECK(sources == 1, UsageError, "give exactly one of --text TEXT, --ids 1,2,3 and --file FILE; got {}",
                sources);
  MOESAIC_CHECK(options.target.empty() || options.ids.empty(), UsageError,
                "--target: got it with --ids, expected it with --text or --file: what stands before it");
  MOESAIC_CHECK(!options.score_eos || !options.target.empty(), UsageError,
                "--score_eos: got it without --target, behind which the EOS token stands");
  const std::string text = options.file.empty() ? options.text : read_file(options.file);
  const Loaded loaded = load(options.model, common, /*needs_tokenizer=*/options.ids.empty());
  std::vector<int64_t> ids = options.ids, prompt;
  std::vector<float> logprobs;
  if (options.target.empty()) {
    if (ids.empty()) ids = loaded.tokenizer->encode(text, true);
    MOESAIC_CHECK(ids.size() >= 2, UsageError,
                  "score: {} token, at least 2 are needed: the first has nothing before it", ids.size());
    logprobs = generate::score(*loaded.model, {{ids}})[0];
  } else {
    prompt = loaded.tokenizer->encode_start(text).ids;
    ids = loaded.tokenizer->encode_behind(options.target);
    if (options.score_eos) {
      MOESAIC_CHECK(loaded.tokenizer->eos_id().has_value(), UsageError,
                    "--score_eos: the tokenizer names no EOS token");
      ids.push_back(*loaded.tokenizer->eos_id());
    }
    MOESAIC_CHECK(!ids.empty(), UsageError, "--target: it has no tokens");
    logprobs = generate::score(*loaded.model, {{prompt}}, {ids})[0];
  }
  const double sum = std::accumulate(logprobs.begin(), logprobs.end(), 0.0);
  const double perplexity = std::exp(-sum / static_cast<double>(logprobs.size()));
  if (options.json) {
    OrderedJson json = {{"ids", ids},
                        {"logprobs", logprobs},
                        {"sum", sum},
                        {"perplexity", perplexity},
                        {"dtype", dtype_name(loaded.format.dtype)}};
    if (!prompt.empty()) json["prompt_ids"] = prompt;
    say("{}\n", json.dump());
    return 0;
  }
  say("{:>8}  {:>10}  token\n", "id", "logprob");
  const size_t unscored = ids.size() - logprobs.size();  // of a text without a prompt, its first token
  for (size_t i = 0; i < ids.size(); ++i) {
    std::optional<std::string> token = loaded.tokenizer ? loaded.tokenizer->id_to_token(ids[i]) : std::nullopt;
    const std::string logprob = i < unscored ? "" : fmt::format("{:.5f}", logprobs[i - unscored]);
    say("{:>8}  {:>10}  {}\n", ids[i], logprob, visible_in_line(token.value_or("")));
  }
  say("\n{} tokens scored, sum {:.5f}, perplexity {:.5f}\n", logprobs.size(), sum, perplexity);
  return 0;
}

}  // namespace

Runner add_score(CLI::App& app, CommonOptions& common) {
  auto options = std::make_shared<Options>();
  common.dtype = "float32";  // a score does not depend on the machine
  add_model_options(app, options->model);
  app.add_option("--text", options->text, "Text, tokenised with the tokenizer's special tokens (BOS and the like)");
  repeated(app.add_option("--ids", options->ids, "Token ids, comma-separated"))->delimiter(',');
  app.add_option("--file", options->file, "File of text");
  app.add_option("--target", options->target, "Score this text behind --text or --file, and not these themselves");
  app.add_flag("--score_eos", options->score_eos, "Score the EOS token behind --target too");
  app.add_flag("--json", options->json, "Print {\"ids\", \"logprobs\", \"sum\", \"perplexity\", \"dtype\"}");
  return [options, &common] { return run_verb(*options, common); };
}

}  // namespace moesaic::cli
