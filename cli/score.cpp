// moesaic score: the log-probability of every token of a text; how anyone checks this program against another one.

#include "cli/options.h"

namespace moesaic::cli {
namespace {

struct Options {
  ModelOptions model;
  std::string text, file;
  std::vector<int64_t> ids;
  bool json = false;
};

int run_verb(const Options& options, const CommonOptions& common) {
  const int sources = !options.text.empty() + !options.file.empty() + !options.ids.empty();
  MOESAIC_CHECK(sources == 1, UsageError, "give exactly one of --text TEXT, --ids 1,2,3 and --file FILE; got {}",
                sources);
  const std::string text = options.file.empty() ? options.text : read_file(options.file);
  const Loaded loaded = load(options.model, common, /*needs_tokenizer=*/options.ids.empty());
  const std::vector<int64_t> ids = options.ids.empty() ? loaded.tokenizer->encode(text, true) : options.ids;
  MOESAIC_CHECK(ids.size() >= 2, UsageError, "score: {} token, at least 2 are needed: the first has nothing before it",
                ids.size());
  const std::vector<float> logprobs = generate::score(*loaded.model, {{ids}})[0];
  const double sum = std::accumulate(logprobs.begin(), logprobs.end(), 0.0);
  const double perplexity = std::exp(-sum / static_cast<double>(logprobs.size()));
  if (options.json) {
    const OrderedJson json = {{"ids", ids},
                              {"logprobs", logprobs},
                              {"sum", sum},
                              {"perplexity", perplexity},
                              {"dtype", dtype_name(loaded.format.dtype)}};
    say("{}\n", json.dump());
    return 0;
  }
  say("{:>8}  {:>10}  token\n", "id", "logprob");
  for (size_t i = 0; i < ids.size(); ++i) {
    std::optional<std::string> token = loaded.tokenizer ? loaded.tokenizer->id_to_token(ids[i]) : std::nullopt;
    const std::string logprob = i == 0 ? "" : fmt::format("{:.5f}", logprobs[i - 1]);
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
  app.add_option("--ids", options->ids, "Token ids, comma-separated")->delimiter(',');
  app.add_option("--file", options->file, "File of text");
  app.add_flag("--json", options->json, "Print {\"ids\", \"logprobs\", \"sum\", \"perplexity\", \"dtype\"}");
  return [options, &common] { return run_verb(*options, common); };
}

}  // namespace moesaic::cli
