#include "moesaic/adapters/mix.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "moesaic/base/check.h"
#include "tests/adapters/toy_sites.h"
#include "tests/temporary_folder.h"

namespace moesaic::adapters {
namespace {

using ::testing::HasSubstr;

const std::string kQuery = "model.layers.0.self_attn.q_proj", kDown = "model.layers.1.mlp.down_proj",
                  kOut = "model.layers.1.self_attn.o_proj";

/// Two LoRAs of a toy's sites that agree in nothing: ranks, alphas, patterns, targets.
class Mix : public testing::Test {
 protected:
  AdapterConfig first() const {
    AdapterConfig config;
    config.method = "lora";
    config.lora_rank = 2;
    config.lora_alpha = 6;
    config.targets = std::vector<std::string>{"q_proj", "o_proj"};
    config.alpha_pattern = {{"o_proj", 5}};
    config.base_model_name_or_path = "base";
    return config;
  }
  AdapterConfig second() const {
    AdapterConfig config = first();
    config.lora_rank = 3;
    config.use_rslora = true;
    config.targets = std::vector<std::string>{"q_proj", "down_proj"};
    config.rank_pattern = {{"down_proj", 5}};
    config.alpha_pattern = {};
    config.layers_to_transform = {1};
    return config;
  }

  /// A LoRA far from its start, in a folder of its own.
  std::filesystem::path save(const AdapterConfig& config, const std::string& name) {
    ToySites toy;
    const auto adapter = Adapter::create(config, toy.sites, torch::kCPU, 1);
    torch::NoGradGuard no_grad;
    torch::manual_seed(static_cast<int64_t>(name.size()) + name[0]);
    for (auto& parameter : adapter->parameters()) parameter.tensor.normal_(0, 0.3);
    adapter->save(folder_ / name);
    return folder_ / name;
  }

  std::vector<MixPart> two() {
    return {read_mix_part(save(first(), "first")), read_mix_part(save(second(), "second"))};
  }

  std::string refusal(const std::function<void()>& action) const {
    try {
      action();
    } catch (const Error& error) {
      return error.what();
    }
    return "nothing was thrown";
  }

  const test::TemporaryFolder folder_;
};

/// What a part adds at a site: s B A [out, in]; zeros where it has nothing.
torch::Tensor delta(const MixPart& part, const std::string& site, const torch::Tensor& like) {
  if (!part.sites.contains(site)) return torch::zeros_like(like);
  const torch::Tensor product =
      at::mm(part.tensors.at(site + ".lora_B.weight"), part.tensors.at(site + ".lora_A.weight"));
  return product * part.config.scale_at(site);
}

TEST_F(Mix, EveryExpertIsItsPart) {
  const auto parts = two();
  const auto folder = mix(parts, {});
  const AdapterConfig config = parse_adapter_config(folder, "mix");
  EXPECT_EQ(config.method, "molora");
  EXPECT_EQ(config.num_experts, 2);
  EXPECT_EQ(config.base_model_name_or_path, "base");
  std::set<std::string> sites;
  for (const auto& [name, a] : folder.tensors) {
    if (!name.ends_with(".lora_A.weight")) continue;
    const std::string site = module_of(name);
    sites.insert(site);
    const torch::Tensor b = folder.tensors.at(site + ".lora_B.weight");
    EXPECT_EQ(config.scale_at(site), 1.0) << site;
    EXPECT_EQ(config.rank_at(site), a.size(1)) << site;
    for (int64_t e = 0; e < 2; ++e) {
      const torch::Tensor whole = at::mm(b[e], a[e]);
      EXPECT_TRUE(whole.allclose(delta(parts[e], site, whole), 1e-6, 1e-6)) << site << ", expert " << e;
    }
  }
  EXPECT_EQ(std::ssize(sites), 5);       // q and o of both layers, down of the second
  EXPECT_EQ(config.rank_at(kQuery), 3);  // the largest of all queries'
  EXPECT_EQ(config.rank_at(kOut), 2);
  EXPECT_EQ(config.rank_at(kDown), 5);
}

TEST_F(Mix, EvenRoutersGiveTheMeanOfTheParts) {
  const auto parts = two();
  auto folder = mix({parts[0], parts[1], parts[0]}, {});  // twice: two thirds of the weight
  folder.tensors.merge(even_routers(folder));
  formats::write_adapter_folder(folder_ / "mix", folder);
  ToySites toy;
  nn::Pass pass;
  const torch::Tensor x = torch::randn({6, 12}), base = toy.groups[4].forward(x, pass);  // q, k, v of layer 1
  const auto adapter = Adapter::open(folder_ / "mix", toy.sites, torch::kCPU, "");
  const torch::Tensor like = torch::empty({12, 12});
  const std::string site = "model.layers.1.self_attn.q_proj";
  const torch::Tensor mean = (2 * delta(parts[0], site, like) + delta(parts[1], site, like)) / 3;
  const torch::Tensor got = toy.groups[4].forward(x, pass) - base;
  EXPECT_TRUE(got.narrow(1, 0, 12).allclose(at::linear(x, mean), 1e-4, 1e-5));
  EXPECT_GT(got.abs().max().item<double>(), 0.1);
}

TEST_F(Mix, PartsOfTheSameTargetsKeepThem) {
  const auto folder = mix({read_mix_part(save(first(), "one")), read_mix_part(save(first(), "other"))}, {});
  const AdapterConfig config = parse_adapter_config(folder, "mix");
  EXPECT_EQ(config.targets, first().targets);
  EXPECT_TRUE(config.rank_pattern.items().empty());
}

TEST_F(Mix, ArrowsAreFirstRightSingularVectors) {
  auto parts = two();
  parts[1].tensors.at(kDown + ".lora_B.weight") = torch::zeros({12, 5});
  const auto folder = mix(parts, {});
  const auto routers = arrow_routers(folder);
  EXPECT_EQ(routers.size(), 5U);
  for (const auto& [name, router] : routers) {
    const std::string site = name.substr(0, name.size() - std::string(".router.weight").size());
    for (int64_t e = 0; e < 2; ++e) {
      const torch::Tensor whole =
          delta(parts[e], site, torch::empty({folder.tensors.at(site + ".lora_B.weight").size(1), router.size(1)}));
      if (whole.abs().max().item<double>() == 0) {
        EXPECT_EQ(router[e].abs().max().item<double>(), 0) << name << ", expert " << e;
        continue;
      }
      const torch::Tensor v = std::get<2>(at::linalg_svd(whole.to(torch::kFloat64), false))[0];
      EXPECT_NEAR(at::dot(v, router[e].to(torch::kFloat64)).abs().item<double>(), 1.0, 1e-6) << name << ", " << e;
      EXPECT_NEAR(router[e].norm().item<double>(), 1.0, 1e-6);
    }
  }
}

TEST_F(Mix, TellsWhatEachPartBrings) {
  const auto parts = two();
  const auto folder = mix(parts, {});
  EXPECT_THAT(describe(parts[0], folder),
              HasSubstr("first: 4 of 5 sites (nothing at the others), rank 2, scale 2.5, 3"));
  EXPECT_THAT(describe(parts[1], folder), HasSubstr("second: 2 of 5 sites"));
}

TEST_F(Mix, WhatIsNoExpertIsRefusedWithTheReason) {
  auto part = [&](const std::string& name) { return refusal([&] { read_mix_part(folder_ / name); }); };
  auto changed = [&](const std::string& name, const std::function<void(formats::AdapterFolder&)>& change) {
    auto folder = formats::read_adapter_folder(save(first(), "whole"));
    change(folder);
    formats::write_adapter_folder(folder_ / name, folder);
    return part(name);
  };
  EXPECT_THAT(changed("dora", [](auto& f) { f.config["use_dora"] = true; }), HasSubstr("use_dora"));
  EXPECT_THAT(changed("bias", [](auto& f) { f.tensors[kQuery + ".bias"] = torch::zeros({12}); }),
              HasSubstr("got an adapter with model.layers.0.self_attn.q_proj.bias, expected low-rank pairs"));
  EXPECT_THAT(changed("head", [](auto& f) { f.tensors["lm_head.weight"] = torch::zeros({7, 12}); }),
              HasSubstr("lm_head.weight"));
  EXPECT_THAT(changed("lost", [](auto& f) { f.tensors.erase(kQuery + ".lora_B.weight"); }), HasSubstr("missing (1)"));
  EXPECT_THAT(changed("rank", [](auto& f) { f.config["r"] = 3; }), HasSubstr("got [2, 12], expected [3, in]"));
  AdapterConfig molora = first();
  molora.method = "molora";
  molora.num_experts = 2;
  save(molora, "molora");
  EXPECT_THAT(part("molora"), HasSubstr("got an adapter of type MOLORA, expected LORA"));
  EXPECT_THAT(part("nothing"), HasSubstr("no such folder"));
}

TEST_F(Mix, PartsOfOtherBasesAreRefused) {
  auto parts = two();
  EXPECT_THAT(refusal([&] { mix({parts[0]}, {}); }), HasSubstr("got 1 adapter, expected two or more"));
  parts[0].config.base_fingerprint = "sha256-all:1";
  EXPECT_EQ(parse_adapter_config(mix(parts, {}), "mix").base_fingerprint, "sha256-all:1");
  parts[1].config.base_fingerprint = "sha256-all:2";
  EXPECT_THAT(refusal([&] { mix(parts, {}); }), HasSubstr("got adapters of different bases"));
  parts[1].config.base_fingerprint = "";
  parts[1].tensors.at("model.layers.1.self_attn.q_proj.lora_A.weight") = torch::zeros({3, 10});
  EXPECT_THAT(refusal([&] { mix(parts, {}); }), HasSubstr("got a linear of 10 inputs and 12 outputs in"));
}

TEST_F(Mix, OnlyItsRoutersAreTrained) {
  ToySites toy;
  AdapterConfig config = first();
  config.method = "molora";
  config.num_experts = 3;
  const std::shared_ptr<Adapter> adapter = Adapter::create(config, toy.sites, torch::kCPU, 1);
  const size_t all = adapter->parameters().size();
  {
    torch::NoGradGuard no_grad;
    for (auto& parameter : adapter->parameters()) parameter.tensor.normal_(0, 0.3);
  }
  Routers routers(adapter);
  EXPECT_EQ(3 * routers.parameters().size(), all);
  nn::Pass pass;
  const torch::Tensor x = torch::randn({6, 12}), direction = torch::randn({6, 20});
  auto gradients = [&] {
    (toy.groups[0].forward(x, pass) * direction).sum().backward();
    return adapter->gradients();
  };
  EXPECT_TRUE(toy.groups[0].delta->trains());
  const formats::TensorMap alone = gradients();
  for (auto& parameter : adapter->parameters()) torch::Tensor(parameter.tensor).mutable_grad() = torch::Tensor();
  adapter->set_trainable(true);
  const formats::TensorMap together = gradients();
  const std::string router = kQuery + ".router.weight", a = kQuery + ".lora_A.weight";
  EXPECT_TRUE(alone.at(router).allclose(together.at(router), 1e-5, 1e-6));
  EXPECT_GT(alone.at(router).abs().max().item<double>(), 0);
  EXPECT_EQ(alone.at(a).abs().max().item<double>(), 0);
  EXPECT_GT(together.at(a).abs().max().item<double>(), 0);
}

}  // namespace
}  // namespace moesaic::adapters
