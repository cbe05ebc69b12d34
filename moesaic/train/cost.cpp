#include "moesaic/train/cost.h"

#include <fmt/ranges.h>

#include "moesaic/base/check.h"

namespace moesaic::train {

const Accelerator& accelerator(const std::string& name) {
  constexpr double kTera = 1e12, kGiga = 1e9;
  static const Accelerator known[] = {
      {"a100", 312 * kTera, 19.5 * kTera, 2039 * kGiga, 80 * kGiga},
      {"h100", 989 * kTera, 67 * kTera, 3350 * kGiga, 80 * kGiga},
      {"h200", 989 * kTera, 67 * kTera, 4800 * kGiga, 141 * kGiga},
      {"l4", 121 * kTera, 30.3 * kTera, 300 * kGiga, 24 * kGiga},
      {"l40s", 362 * kTera, 91.6 * kTera, 864 * kGiga, 48 * kGiga},
      {"rtx3090", 71 * kTera, 35.6 * kTera, 936 * kGiga, 24 * kGiga},
      {"rtx4090", 165 * kTera, 82.6 * kTera, 1008 * kGiga, 24 * kGiga},
  };
  std::vector<std::string> names;
  for (const Accelerator& each : known) {
    if (name == each.name) return each;
    names.emplace_back(each.name);
  }
  throw UsageError(fmt::format("--for: got '{}', expected one of {}", name, fmt::join(names, ", ")));
}

double Cost::seconds(const Accelerator& on, torch::ScalarType dtype) const {
  const double peak = dtype == torch::kBFloat16 ? on.bfloat16 : on.float32;
  return std::max(operations / (kUtilisation * peak), bytes / (kBandwidthShare * on.bandwidth));
}

Cost micro_batch_cost(models::LanguageModel& model, nn::Learner& learner, const MicroBatchShape& shape,
                      bool checkpointing) {
  std::map<std::string, double> shares;  // of the linears of sparse models' experts
  for (const models::Part& part : model.parts()) {
    for (const nn::LinearSite& site : part.sites->linears) {
      if (site.routed) shares[site.name] = site.share;
    }
  }
  double trained = 0;  // numbers, as many as act on a row
  bool whole = false;
  for (const nn::Parameter& parameter : learner.parameters()) {
    const auto share = shares.find(parameter.name.substr(0, parameter.name.rfind('.')));
    trained += static_cast<double>(parameter.tensor.numel()) * (share == shares.end() ? 1.0 : share->second);
    whole = whole || parameter.kind == nn::Parameter::Kind::kWeight;
  }
  const double all = shape.prompt_tokens + shape.answer_tokens;
  const double passes = 2 + (whole ? 1 : 0) + (checkpointing ? 1 : 0);
  Cost cost{0, 0};
  double linears = 0;
  for (const models::Part& part : model.parts()) {
    const bool halves = part.sites->task_type == "SEQ_2_SEQ_LM";
    for (const nn::LinearSite& site : part.sites->linears) {
      const bool encodes = halves && site.name.find("encoder.") != std::string::npos;
      const bool reads_source = halves && (site.name.find("EncDecAttention") != std::string::npos ||
                                           site.name.find("cross_attn") != std::string::npos);
      const bool of_source =
          encodes || (reads_source && (site.role == nn::Role::kKey || site.role == nn::Role::kValue));
      const double rows = !halves     ? all * site.share
                          : of_source ? shape.prompt_tokens
                                      : shape.answer_tokens + shape.examples;
      const double numbers = static_cast<double>(site.in) * static_cast<double>(site.out);
      cost.operations += 2 * rows * numbers * passes;
      linears += numbers;
      if (site.role != nn::Role::kQuery) continue;
      const double sees = (reads_source || encodes ? shape.prompt_tokens : rows / 2) / shape.examples;
      cost.operations += 4 * rows * sees * static_cast<double>(site.out) * (checkpointing ? 4 : 3);
    }
  }
  const models::Facts& facts = model.facts();
  const double head = static_cast<double>(facts.vocab_size) * static_cast<double>(facts.width);
  cost.operations += 2 * shape.targets * head * passes;
  if (!whole) cost.operations += 6 * all * trained;
  cost.bytes = (linears + head) * static_cast<double>(c10::elementSize(facts.dtype)) * passes;
  return cost;
}

}  // namespace moesaic::train
