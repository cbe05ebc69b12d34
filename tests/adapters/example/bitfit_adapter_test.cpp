#include "examples/bitfit_adapter.h"

#include <gtest/gtest.h>

#include "moesaic/base/check.h"
#include "tests/adapters/toy_sites.h"

namespace moesaic::adapters {
namespace {

std::shared_ptr<Adapter> make_bitfit(nn::Sites& sites) {
  AdapterConfig config;
  config.method = "bitfit";
  return Adapter::create(resolve_targets(config, "", sites), sites, torch::kCPU, 1);
}

TEST(BitFit, AddsItsBiasToEveryLinear) {
  ToySites toy;
  nn::Pass pass;
  const auto x = torch::randn({5, 12});
  const auto base = toy.groups[0].forward(x, pass);  // q, k, v side by side
  const auto adapter = make_bitfit(toy.sites);
  torch::NoGradGuard no_grad;
  std::map<std::string, torch::Tensor> biases;
  for (auto& parameter : adapter->parameters()) biases[parameter.name] = parameter.tensor.normal_();
  EXPECT_EQ(biases.size(), toy.sites.linears.size());
  std::vector<torch::Tensor> parts;
  for (const char* name : {"q_proj", "k_proj", "v_proj"}) {
    parts.push_back(biases.at(fmt::format("model.layers.0.self_attn.{}.bitfit_bias", name)));
  }
  EXPECT_TRUE(toy.groups[0].forward(x, pass).allclose(base + torch::cat(parts), 1e-5, 1e-5));
}

TEST(BitFit, ItsGradientIsTheSumOfTheOutputs) {
  ToySites toy;
  nn::Pass pass;
  const auto adapter = make_bitfit(toy.sites);
  const auto weight = torch::randn({5, 20});
  (toy.groups[0].forward(torch::randn({5, 12}), pass) * weight).sum().backward();
  const auto gradient = adapter->gradients().at("model.layers.0.self_attn.q_proj.bitfit_bias");
  EXPECT_TRUE(gradient.allclose(weight.sum(0).slice(0, 0, 12), 1e-5, 1e-5));
}

TEST(BitFit, FoldsIntoABiasThatIsThere) {
  ToySites toy;
  const auto adapter = make_bitfit(toy.sites);
  torch::NoGradGuard no_grad;
  for (auto& parameter : adapter->parameters()) parameter.tensor.fill_(0.5);
  formats::TensorMap model;
  for (const nn::LinearSite& site : toy.sites.linears) {
    model[site.name + ".weight"] = torch::ones({site.out, site.in});
    model[site.name + ".bias"] = torch::ones({site.out});
  }
  formats::TensorMap without = model;
  fold(adapter->folder(), "adapter", model);
  EXPECT_TRUE(model.at("model.layers.1.mlp.down_proj.bias").equal(torch::full({12}, 1.5)));
  EXPECT_TRUE(model.at("model.layers.1.mlp.down_proj.weight").equal(torch::ones({12, 20})));
  without.erase("model.layers.1.mlp.down_proj.bias");
  EXPECT_THROW(fold(adapter->folder(), "adapter", without), DataError);
}

}  // namespace
}  // namespace moesaic::adapters
