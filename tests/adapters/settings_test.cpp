// What a config's settings do to the adapter that is made of it.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <spdlog/sinks/ostream_sink.h>

#include "moesaic/adapters/adapter.h"
#include "moesaic/base/check.h"
#include "tests/adapters/toy_sites.h"
#include "tests/temporary_folder.h"

namespace moesaic::adapters {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;
using ::testing::ThrowsMessage;
using Names = std::vector<std::string>;

const std::string kO = "model.layers.0.self_attn.o_proj";  // alone in its group, the toy's second

/// Low-rank methods on o_proj alone, vectors where they always are.
AdapterConfig config_of(const std::string& method) {
  AdapterConfig config;
  config.method = method;
  config.lora_rank = 4;
  config.lora_alpha = 6;
  config.num_experts = method == "molora" || method == "mov" ? 3 : 1;
  config.targets = method == "mov" || method == "ia3" ? Names{"k_proj", "v_proj", "down_proj"} : Names{"o_proj"};
  if (method == "mov" || method == "ia3") config.feedforward = Names{"down_proj"};
  return config;
}

std::shared_ptr<Adapter> make(const AdapterConfig& config, ToySites& toy) {
  return Adapter::create(config, toy.sites, torch::kCPU, 1);
}

void randomise(Adapter& adapter) {
  torch::NoGradGuard no_grad;
  torch::manual_seed(9);
  for (auto& parameter : adapter.parameters()) parameter.tensor.normal_(0, 0.5);
}

/// (o_proj's output - the base's) / (x A^T B^T), which is the scale alpha / r in some form.
double scale_of(const AdapterConfig& config) {
  ToySites toy;
  auto adapter = make(config, toy);
  randomise(*adapter);
  const auto tensors = adapter->folder().tensors;
  torch::NoGradGuard no_grad;
  nn::Pass pass;
  const auto x = torch::ones({1, 12});
  const auto delta = toy.groups[1].forward(x, pass) - toy.groups[1].base(x, pass);
  const auto unscaled = x.mm(tensors.at(kO + ".lora_A.weight").t()).mm(tensors.at(kO + ".lora_B.weight").t());
  return (delta.norm() / unscaled.norm()).item<double>();
}

TEST(Settings, ScaleIsAlphaOverTheRankOrItsRoot) {
  AdapterConfig config = config_of("lora");
  EXPECT_NEAR(scale_of(config), 6.0 / 4, 1e-4);
  config.use_rslora = true;
  EXPECT_NEAR(scale_of(config), 6.0 / 2, 1e-4);
  config.alpha_pattern = {{"o_proj", 10.0}};
  EXPECT_NEAR(scale_of(config), 10.0 / 2, 1e-4);
}

TEST(Settings, StartsWithTheirOwnSpreadAndAreDrawnPerSite) {
  ToySites toy;
  AdapterConfig config = config_of("molora");
  config.targets = Names{"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"};
  config.router.init_std = 0.5;
  auto adapter = make(config, toy);
  std::vector<torch::Tensor> a, routers;
  for (const auto& [key, tensor] : adapter->folder().tensors) {
    if (key.ends_with("lora_A.weight")) a.push_back(tensor.flatten());
    if (key.ends_with("router.weight")) routers.push_back(tensor.flatten());
  }
  // 2112 and 528 numbers: standard errors of 1.5 % and 3.1 % of the deviation.
  EXPECT_NEAR(torch::cat(a).std().item<double>(), 0.02, 0.02 * 0.08);
  EXPECT_NEAR(torch::cat(routers).std().item<double>(), 0.5, 0.5 * 0.15);
  for (const auto& tensors : {a, routers}) {
    for (size_t i = 1; i < tensors.size(); ++i) EXPECT_FALSE(tensors[i].equal(tensors[0]));
  }
}

TEST(Settings, DropoutReachesTheSites) {
  ToySites toy;
  AdapterConfig config = config_of("lora");
  config.lora_dropout = 0.5;
  auto adapter = make(config, toy);
  randomise(*adapter);
  torch::NoGradGuard no_grad;
  nn::Pass pass;
  const auto x = torch::ones({4, 12});
  const auto whole = toy.groups[1].forward(x, pass);
  pass.training = true;
  EXPECT_FALSE(toy.groups[1].forward(x, pass).allclose(whole));
}

TEST(Settings, GradientsHaveTheFilesLayout) {
  ToySites toy;
  auto adapter = make(config_of("lora"), toy);
  randomise(*adapter);
  nn::Pass pass;
  const auto x = torch::randn({5, 12});
  toy.groups[1].forward(x, pass).sum().backward();
  // L = sum of y = ... + scale x A^T B^T: dL/dB[o, r] = scale sum_n (x A^T)[n, r], for every output o.
  const auto a = adapter->folder().tensors.at(kO + ".lora_A.weight");
  const auto expected = (6.0 / 4 * x.mm(a.t()).sum(0)).expand({12, 4});
  EXPECT_TRUE(adapter->gradients().at(kO + ".lora_B.weight").allclose(expected, 1e-4, 1e-5));
  const auto untouched = adapter->gradients().at("model.layers.1.self_attn.o_proj.lora_B.weight");
  EXPECT_TRUE(untouched.equal(torch::zeros({12, 4}))) << "what took no part has a gradient of zero";
}

TEST(Settings, ExcludedModulesAreLeftOut) {
  ToySites toy;
  AdapterConfig config = config_of("lora");
  config.targets = Names{"q_proj", "o_proj"};
  config.exclude = std::string(".*layers\\.1\\..*o_proj");
  const auto tensors = make(config, toy)->folder().tensors;
  EXPECT_TRUE(tensors.contains(kO + ".lora_A.weight"));
  EXPECT_TRUE(tensors.contains("model.layers.1.self_attn.q_proj.lora_A.weight"));
  EXPECT_FALSE(tensors.contains("model.layers.1.self_attn.o_proj.lora_A.weight"));
}

/// The routing of o_proj for x.
nn::RoutingRecord route(ToySites& toy, const torch::Tensor& x, bool training = false) {
  torch::NoGradGuard no_grad;
  std::vector<nn::RoutingRecord> records;
  nn::Pass pass;
  pass.routing = &records;
  pass.training = training;
  toy.groups[1].forward(x, pass);
  EXPECT_EQ(records.size(), 1u);
  return records.at(0);
}

TEST(Settings, TheRoutersTypeDecidesWhetherTopKCounts) {
  for (const char* type : {"soft", "top_k"}) {
    ToySites toy;
    AdapterConfig config = config_of("molora");
    config.router.type = type;
    config.router.top_k = 2;
    auto adapter = make(config, toy);
    const auto kept = (route(toy, torch::randn({5, 12})).weights > 0).sum(-1);
    EXPECT_TRUE(kept.eq(type == std::string("soft") ? 3 : 2).all().item<bool>()) << type;
  }
}

TEST(Settings, TemperatureAndJitterReachTheRouter) {
  ToySites toy;
  AdapterConfig config = config_of("molora");
  config.router.temperature = 2.0;
  config.router.jitter = 0.5;
  auto adapter = make(config, toy);
  randomise(*adapter);
  const auto x = torch::randn({5, 12});
  const auto expected = (x.mm(adapter->folder().tensors.at(kO + ".router.weight").t()) / 2.0).softmax(-1);
  EXPECT_TRUE(route(toy, x).probs.allclose(expected, 1e-5));
  EXPECT_FALSE(route(toy, x, /*training=*/true).probs.allclose(expected, 1e-5));
}

TEST(Settings, RoutersAreAsWideAsWhatTheyRead) {
  const std::string down = "model.layers.0.mlp.down_proj.router.weight";
  AdapterConfig config = config_of("mov");
  auto width = [&](const std::string& input, int64_t sentence_dim = 0) {
    ToySites toy;
    config.router.input = input;
    config.router.sentence_dim = sentence_dim;
    return make(config, toy)->folder().tensors.at(down).size(1);
  };
  EXPECT_EQ(width("token"), 20);
  EXPECT_EQ(width("layer_input"), 12);
  EXPECT_EQ(width("sentence"), 12);
  EXPECT_EQ(width("sentence", 7), 7);
}

TEST(Settings, WhatTheModelOrTheExpertsCannotDoIsRefused) {
  ToySites toy;
  AdapterConfig config = config_of("mov");
  config.k_site = "post_qk_norm";
  EXPECT_THAT([&] { make(config, toy); }, ThrowsMessage<UsageError>(HasSubstr("k_site")));
  config = config_of("ia3");
  config.targets = Names{"k_proj", "v_proj"};
  config.feedforward = Names{"o_proj"};  // no target
  EXPECT_THAT([&] { make(config, toy); }, ThrowsMessage<UsageError>(HasSubstr("o_proj")));
  config = config_of("molora");
  config.router.type = "top_k";
  config.router.top_k = 4;
  EXPECT_THAT([&] { validate(config, "test"); }, ThrowsMessage<ConfigError>(HasSubstr("router.top_k: got 4")));
}

class Loaded : public ::testing::Test {
 protected:
  const test::TemporaryFolder folder_;
  const std::filesystem::path path_ = folder_.path();
  ToySites toy_;
};

TEST_F(Loaded, AVectorsEffectIsItsDistanceFromOne) {
  {
    auto adapter = make(config_of("ia3"), toy_);
    torch::NoGradGuard no_grad;
    for (auto& parameter : adapter->parameters()) parameter.tensor.fill_(3.0);
    adapter->save(path_);
  }
  auto half = Adapter::open(path_, toy_.sites, torch::kCPU, "", 0.5);
  nn::Pass pass;
  const auto k = std::find_if(toy_.sites.scales.begin(), toy_.sites.scales.end(), [](const nn::ScaleSite& site) {
    return site.role == nn::Role::kKey && site.kind == nn::ScaleKind::kOutput;
  });
  const auto y = k->slot->adapters.at(0)->forward(torch::ones({2, 1, 4}), pass);
  EXPECT_TRUE(y.equal(torch::full({2, 1, 4}, 2.0)));  // 1 + 0.5 (3 - 1)
}

TEST_F(Loaded, OtherBaseWeightsAreWarnedOf) {
  AdapterConfig config = config_of("lora");
  config.base_fingerprint = "sha256:aaaa";
  make(config, toy_)->save(path_);
  const auto usual = spdlog::default_logger();
  std::ostringstream log;
  spdlog::set_default_logger(
      std::make_shared<spdlog::logger>("test", std::make_shared<spdlog::sinks::ostream_sink_mt>(log)));
  Adapter::open(path_, toy_.sites, torch::kCPU, "sha256:aaaa");
  EXPECT_THAT(log.str(), Not(HasSubstr("other base weights")));
  Adapter::open(path_, toy_.sites, torch::kCPU, "sha256:bbbb");
  EXPECT_THAT(log.str(), HasSubstr("other base weights"));
  spdlog::set_default_logger(usual);
}

}  // namespace
}  // namespace moesaic::adapters
