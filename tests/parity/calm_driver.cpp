// Runs compositions for the parity tests: one JSON job per line on stdin, one JSON answer per line on stdout; tensors
// go to the safetensors file a job names.
//
//   create      {anchor, augmenting: [{model, connections, align, mask}], num_heads, ...}: a new composition with
//   random
//               connections of `seed`, saved to the folder `composition`
//   composition, sequences, mask, borders, dtype
//               answers what each augmenting model reads; writes logits, loss and the gradient of every connection

#include "moesaic/compose/folder.h"
#include "moesaic/data/example.h"
#include "moesaic/formats/safetensors.h"
#include "moesaic/models/registry.h"
#include "tests/parity/answer_lines.h"

namespace {

using moesaic::Json;
using namespace moesaic;

compose::Member open(const Json& path) {
  return compose::open_member(models::open_checkpoint(path.get<std::string>()), {});
}

void create(const Json& job) {
  const Json& spec = job["create"];
  compose::CompositionConfig config;
  config.connection = {.num_heads = spec["num_heads"],
                       .cross_position = spec.value("cross_position", "rope"),
                       .norm = spec.value("norm", "none"),
                       .output_scale = spec.value("output_scale", 0.0),
                       .attention_bias = spec.value("attention_bias", false)};
  std::vector<compose::Member> augmenting;
  for (const Json& entry : spec["augmenting"]) {
    compose::AugmentingConfig& how = config.augmenting.emplace_back();
    how.align = entry.value("align", "word");
    how.mask = entry.value("mask", "causal");
    for (const Json& pair : entry["connections"]) {
      Json keys{{"anchor", pair[0]}, {"aug", pair[1]}};
      if (pair.size() > 2) keys["reads"] = pair[2];
      how.connections.push_back(compose::parse_pair(keys, "connections"));
    }
    augmenting.push_back(open(entry["model"]));
  }
  compose::Composition composition(config, open(spec["anchor"]), augmenting, job["seed"]);
  torch::NoGradGuard no_grad;
  torch::manual_seed(job["seed"]);
  for (auto& parameter : composition.parameters()) {
    parameter.normal_(0.0, parameter.dim() == 2 ? 0.7 / std::sqrt(static_cast<double>(parameter.size(1))) : 0.3);
  }
  for (auto& buffer : composition.buffers()) buffer.uniform_(0.5, 2.0);
  compose::save_composition(composition, job["composition"].get<std::string>());
}

Json run(const Json& job) {
  if (job.contains("create")) {
    create(job);
    return {{"ok", true}};
  }
  models::LoadOptions options;
  if (job.value("dtype", "float32") == "bfloat16") options.dtype = torch::kBFloat16;
  const auto composition = compose::load_composition(job["composition"].get<std::string>(), options);
  std::vector<data::Example> examples;
  for (size_t b = 0; b < job["sequences"].size(); ++b) {
    data::Example& example = examples.emplace_back();
    example.ids = job["sequences"][b].get<std::vector<int64_t>>();
    example.mask = job["mask"][b].get<std::vector<uint8_t>>();
    example.end_prompts_by_mask();
  }
  const data::Batch batch = data::collate(examples, torch::kCPU);
  nn::Borders borders;
  if (job.contains("borders")) borders = job["borders"].get<nn::Borders>();
  const auto aligned = composition->align(batch.tokens, borders);
  nn::Pass pass;
  const torch::Tensor hidden = composition->hidden({batch.tokens, borders}, pass);
  const torch::Tensor loss = composition->head().loss(hidden.index_select(0, batch.label_rows), batch.labels,
                                                      torch::full({batch.num_targets()}, 1.0 / batch.num_targets()));
  loss.backward();
  formats::TensorMap result{{"logits", composition->head().logits(hidden.detach()).detach()}, {"loss", loss.detach()}};
  for (const auto& item : composition->named_parameters()) {
    result["grad:" + item.key()] = item.value().grad().contiguous();
  }
  formats::save_safetensors(job["output"].get<std::string>(), result);
  Json streams = Json::array();
  for (const auto& stream : aligned) {
    Json asides = Json::array();
    for (const auto& of_sequence : stream.asides) {
      Json tokens = Json::array();
      for (const compose::Aside& aside : of_sequence) {
        for (const int64_t id : aside.tokens) tokens.push_back(id);
      }
      asides.push_back(std::move(tokens));
    }
    streams.push_back({{"tokens", stream.tokens},
                       {"asides", std::move(asides)},
                       {"coordinates", stream.coordinates},
                       {"visible", stream.seen.visible},
                       {"aside", stream.seen.aside}});
  }
  return {{"ok", true}, {"streams", streams}};
}

}  // namespace

int main() { return moesaic::test::answer_lines(run); }
