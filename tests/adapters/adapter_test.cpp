#include "moesaic/adapters/adapter.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "moesaic/base/check.h"
#include "tests/adapters/toy_sites.h"
#include "tests/temporary_folder.h"

namespace moesaic::adapters {
namespace {

using test::TemporaryFolder;
using ::testing::HasSubstr;

AdapterConfig config_of(const std::string& method, const nn::Sites& sites) {
  AdapterConfig config;
  config.method = method;
  config.lora_rank = 2;
  config.num_experts = method_of(method).mixes ? 3 : 1;
  return resolve_targets(config, "", sites);
}

/// Moves every parameter away from its start state.
void disturb(Adapter& adapter) {
  torch::NoGradGuard no_grad;
  torch::manual_seed(9);
  for (auto& parameter : adapter.parameters()) parameter.tensor.add_(torch::randn_like(parameter.tensor) * 0.2);
}

std::string message_of(const std::function<void()>& action) {
  try {
    action();
  } catch (const Error& error) {
    return error.what();
  }
  return "nothing was thrown";
}

/// Something that a scale of `site` may read: [5, H, k] or [5, f].
torch::Tensor activation(const nn::ScaleSite& site) {
  return site.heads > 0 ? torch::randn({5, site.heads, site.width}) : torch::randn({5, site.width});
}

class EveryMethod : public ::testing::TestWithParam<std::string> {};

TEST_P(EveryMethod, SavedAndLoadedIsTheSameFunction) {
  ToySites toy;
  TemporaryFolder folder;
  const auto x = torch::randn({5, 12});
  nn::Pass pass;
  auto outputs = [&] {
    torch::NoGradGuard no_grad;
    std::vector<torch::Tensor> result;
    result.push_back(toy.groups[0].forward(x, pass));
    result.push_back(toy.groups[2].forward(x, pass));
    for (const nn::ScaleSite& site : toy.sites.scales) {
      if (site.slot->empty()) continue;
      torch::manual_seed(4);
      result.push_back(site.kind == nn::ScaleKind::kFfn
                           ? site.slot->adapters[0]->forward_ffn(torch::randn({5, 20}), torch::ones({5, 20}), pass)
                           : site.slot->adapters[0]->forward(activation(site), pass));
    }
    return result;
  };
  std::vector<torch::Tensor> trained;
  {
    auto adapter = Adapter::create(config_of(GetParam(), toy.sites), toy.sites, torch::kCPU, 1);
    disturb(*adapter);
    trained = outputs();
    adapter->save(folder.path());
  }
  auto loaded = Adapter::open(folder.path(), toy.sites, torch::kCPU, "");
  const auto again = outputs();
  ASSERT_EQ(again.size(), trained.size());
  // The same numbers at other addresses: GEMMs of so few rows round by alignment.
  for (size_t i = 0; i < again.size(); ++i) EXPECT_TRUE(again[i].allclose(trained[i], 1e-6, 1e-6)) << i;
  for (auto& parameter : loaded->parameters()) EXPECT_FALSE(parameter.tensor.requires_grad()) << parameter.name;
}

TEST_P(EveryMethod, StartsAsTheBase) {
  ToySites toy;
  const auto x = torch::randn({5, 12});
  nn::Pass pass;
  const auto base = toy.groups[0].forward(x, pass);
  auto adapter = Adapter::create(config_of(GetParam(), toy.sites), toy.sites, torch::kCPU, 1);
  EXPECT_TRUE(toy.groups[0].forward(x, pass).allclose(base, 1e-5, 1e-6));
  for (const nn::ScaleSite& site : toy.sites.scales) {
    if (site.slot->empty() || site.kind == nn::ScaleKind::kFfn) continue;
    const auto y = activation(site);
    EXPECT_TRUE(site.slot->adapters[0]->forward(y, pass).allclose(y, 1e-5, 1e-6));
  }
}

TEST_P(EveryMethod, DetachesWhenDestroyed) {
  ToySites toy;
  {
    auto adapter = Adapter::create(config_of(GetParam(), toy.sites), toy.sites, torch::kCPU, 1);
  }
  for (const auto& group : toy.groups) EXPECT_EQ(group.delta, nullptr);
  for (const auto& site : toy.sites.scales) EXPECT_TRUE(site.slot->empty());
}

TEST_P(EveryMethod, SeedAloneDecidesTheStart) {
  auto start = [&](uint64_t seed) {
    ToySites toy;
    return Adapter::create(config_of(GetParam(), toy.sites), toy.sites, torch::kCPU, seed)->folder().tensors;
  };
  const auto first = start(1), second = start(1), other = start(2);
  bool differs = false;
  for (const auto& [key, tensor] : first) {
    EXPECT_TRUE(tensor.equal(second.at(key))) << key;
    differs |= !tensor.equal(other.at(key));
  }
  const Method& method = method_of(GetParam());
  EXPECT_EQ(differs, method.mixes || method.low_rank) << "vectors alone have nothing random";
}

TEST_P(EveryMethod, EverythingWrongWithAFileIsListedAtOnce) {
  ToySites toy;
  auto adapter = Adapter::create(config_of(GetParam(), toy.sites), toy.sites, torch::kCPU, 1);
  auto tensors = adapter->folder().tensors;
  const std::string missing = tensors.begin()->first, misshaped = tensors.rbegin()->first;
  tensors["model.layers.7.self_attn.q_proj.lora_A.weight"] = torch::zeros({2, 12});
  tensors[misshaped] = torch::zeros({1, 2, 3, 4});
  tensors.erase(missing);
  const std::string message = message_of([&] { adapter->load_tensors(tensors); });
  EXPECT_THAT(message, HasSubstr("missing (1):\n    " + missing));
  EXPECT_THAT(message, HasSubstr("unexpected (1):\n    model.layers.7"));
  EXPECT_THAT(message, HasSubstr(misshaped + ": got [1, 2, 3, 4]"));
}

INSTANTIATE_TEST_SUITE_P(Adapters, EveryMethod, ::testing::ValuesIn(method_names()),
                         [](const auto& info) { return info.param; });

TEST(FileLayout, LoraIsPeftsAndMoLoraHasAnExpertAxis) {
  ToySites toy;
  const std::string q = "model.layers.1.self_attn.q_proj", k = "model.layers.1.self_attn.k_proj";
  auto lora = Adapter::create(config_of("lora", toy.sites), toy.sites, torch::kCPU, 1)->folder().tensors;
  EXPECT_EQ(lora.at(k + ".lora_A.weight").sizes(), (std::vector<int64_t>{2, 12}));
  EXPECT_EQ(lora.at(k + ".lora_B.weight").sizes(), (std::vector<int64_t>{4, 2}));
  auto molora = Adapter::create(config_of("molora", toy.sites), toy.sites, torch::kCPU, 1)->folder().tensors;
  EXPECT_EQ(molora.at(q + ".lora_A.weight").sizes(), (std::vector<int64_t>{3, 2, 12}));
  EXPECT_EQ(molora.at(k + ".lora_B.weight").sizes(), (std::vector<int64_t>{3, 4, 2}));
  EXPECT_EQ(molora.at(q + ".router.weight").sizes(), (std::vector<int64_t>{3, 12}));
}

TEST(FileLayout, Ia3IsPeftsAndMovIsPerHead) {
  ToySites toy;
  const std::string k = "model.layers.0.self_attn.k_proj", down = "model.layers.0.mlp.down_proj";
  auto ia3 = Adapter::create(config_of("ia3", toy.sites), toy.sites, torch::kCPU, 1)->folder().tensors;
  EXPECT_EQ(ia3.at(k + ".ia3_l").sizes(), (std::vector<int64_t>{4, 1}));
  EXPECT_EQ(ia3.at(down + ".ia3_l").sizes(), (std::vector<int64_t>{1, 20}));
  auto mov = Adapter::create(config_of("mov", toy.sites), toy.sites, torch::kCPU, 1)->folder().tensors;
  EXPECT_EQ(mov.at(k + ".mov.weight").sizes(), (std::vector<int64_t>{3, 1, 4}));
  EXPECT_EQ(mov.at(k + ".router.weight").sizes(), (std::vector<int64_t>{3, 4}));
  EXPECT_EQ(mov.at(down + ".mov.weight").sizes(), (std::vector<int64_t>{3, 20}));
  EXPECT_EQ(mov.at(down + ".router.weight").sizes(), (std::vector<int64_t>{3, 20}));
}

TEST(FileLayout, LoraBIsTransposedInMemoryOnly) {
  // delta = scale * B A with PEFT's B [out, r] and A [r, in].
  ToySites toy;
  AdapterConfig config = config_of("lora", toy.sites);
  config.targets = std::vector<std::string>{"o_proj"};
  auto adapter = Adapter::create(config, toy.sites, torch::kCPU, 1);
  disturb(*adapter);
  const auto tensors = adapter->folder().tensors;
  const auto a = tensors.at("model.layers.0.self_attn.o_proj.lora_A.weight");
  const auto b = tensors.at("model.layers.0.self_attn.o_proj.lora_B.weight");
  nn::Pass pass;
  torch::NoGradGuard no_grad;
  const auto x = torch::randn({4, 12});
  nn::LinearGroup& o = toy.groups[1];
  const auto expected = o.base(x, pass) + 16.0 / 2 * x.mm(a.t()).mm(b.t());
  EXPECT_TRUE(o.forward(x, pass).allclose(expected, 1e-5, 1e-5));
}

TEST(Targets, AnUnmatchedEntryIsAnErrorThatNamesTheNearest) {
  ToySites toy;
  AdapterConfig config = config_of("lora", toy.sites);
  config.targets = std::vector<std::string>{"q_proj", "kproj"};
  const std::string message = message_of([&] { Adapter::create(config, toy.sites, torch::kCPU, 1); });
  EXPECT_THAT(message, HasSubstr("kproj"));
  EXPECT_THAT(message, HasSubstr("q_proj=2"));
  EXPECT_THAT(message, HasSubstr("Did you mean 'k_proj'?"));
}

TEST(Targets, SuffixesAndWholeRegexes) {
  const TargetPattern names = std::vector<std::string>{"proj", "mlp.up_proj"};
  EXPECT_TRUE(matches_target(names, "model.layers.0.mlp.up_proj"));
  EXPECT_FALSE(matches_target(names, "model.layers.0.self_attn.q_proj")) << "a suffix starts at a dot";
  const TargetPattern regex = std::string(".*layers\\.[01]\\..*q_proj");
  EXPECT_TRUE(matches_target(regex, "model.layers.1.self_attn.q_proj"));
  EXPECT_FALSE(matches_target(regex, "model.layers.2.self_attn.q_proj"));
  EXPECT_FALSE(matches_target(regex, "model.layers.1.self_attn.q_proj.extra")) << "the whole path must match";
}

TEST(Targets, ReferencePresetLeavesUpProjOut) {
  ToySites toy;
  AdapterConfig config;
  config.method = "molora";
  const auto reference = std::get<std::vector<std::string>>(resolve_targets(config, "reference", toy.sites).targets);
  const auto all = std::get<std::vector<std::string>>(resolve_targets(config, "all-linear", toy.sites).targets);
  EXPECT_EQ(reference.size(), 6u);
  EXPECT_EQ(all.size(), 7u);
  EXPECT_EQ(std::count(reference.begin(), reference.end(), "up_proj"), 0);
}

TEST(Targets, RankAndAlphaPatternsAndLayers) {
  ToySites toy;
  AdapterConfig config = config_of("lora", toy.sites);
  config.rank_pattern = {{"q_proj", 5}};
  config.layers_to_transform = {1};
  const auto tensors = Adapter::create(config, toy.sites, torch::kCPU, 1)->folder().tensors;
  EXPECT_EQ(tensors.at("model.layers.1.self_attn.q_proj.lora_A.weight").size(0), 5);
  EXPECT_EQ(tensors.at("model.layers.1.self_attn.k_proj.lora_A.weight").size(0), 2);
  EXPECT_FALSE(tensors.contains("model.layers.0.self_attn.q_proj.lora_A.weight"));
}

TEST(ExpertsByLayer, EachLayerHasItsOwnNumber) {
  ToySites toy;
  AdapterConfig config = config_of("molora", toy.sites);
  parse_experts({{"0", 1}, {"1", 5}}, "test", config);
  EXPECT_EQ(config.num_experts, 5);
  const auto tensors = Adapter::create(config, toy.sites, torch::kCPU, 1)->folder().tensors;
  const std::string q0 = "model.layers.0.self_attn.q_proj", q1 = "model.layers.1.self_attn.q_proj";
  EXPECT_EQ(tensors.at(q0 + ".lora_A.weight").sizes(), (std::vector<int64_t>{1, 2, 12}));
  EXPECT_EQ(tensors.at(q1 + ".lora_A.weight").sizes(), (std::vector<int64_t>{5, 2, 12}));
  EXPECT_EQ(tensors.at(q1 + ".router.weight").sizes(), (std::vector<int64_t>{5, 12}));
  EXPECT_FALSE(tensors.contains(q0 + ".router.weight")) << "one expert has no router";
}

TEST(ExpertsByLayer, WhatTheMapLeavesOutIsListed) {
  ToySites toy;
  for (const char* method : {"molora", "mov"}) {
    AdapterConfig config = config_of(method, toy.sites);
    parse_experts({{"1-3", 2}}, "test", config);
    const std::string message = message_of([&] { Adapter::create(config, toy.sites, torch::kCPU, 1); });
    EXPECT_THAT(message, HasSubstr("no number for layers 0"));
    EXPECT_THAT(message, HasSubstr("the model has no layers 2, 3"));
  }
  AdapterConfig config = config_of("molora", toy.sites);
  config.layers_to_transform = {1};
  parse_experts({{"1", 2}}, "test", config);
  EXPECT_EQ(Adapter::create(config, toy.sites, torch::kCPU, 1)->matches().front().second, 2);
}

TEST(ExpertsByLayer, RangesAreWrittenAsShortAsRead) {
  AdapterConfig config;
  const Json json = {{"0-7", 4}, {"8", 10}, {"10-12", 10}};
  parse_experts(json, "test", config);
  EXPECT_EQ(experts_json(config), json);
  parse_experts(6, "test", config);
  EXPECT_EQ(experts_json(config), Json(6));
}

TEST(HeadWise, AcrossHeadsThereIsOneVectorAndOneRouter) {
  ToySites toy;
  AdapterConfig config = config_of("mov", toy.sites);
  config.targets = std::vector<std::string>{"q_proj"};
  config.feedforward = std::vector<std::string>{};
  config.router.head_wise = false;
  auto adapter = Adapter::create(config, toy.sites, torch::kCPU, 1);
  const auto tensors = adapter->folder().tensors;
  EXPECT_EQ(tensors.at("model.layers.0.self_attn.q_proj.mov.weight").sizes(), (std::vector<int64_t>{3, 12}));
  EXPECT_EQ(tensors.at("model.layers.0.self_attn.q_proj.router.weight").sizes(), (std::vector<int64_t>{3, 12}));
}

TEST(ScaledInputs, OfOneMemberOfAGroup) {
  // v reads x * l, its neighbours x; a linear that stands alone (o) likewise.
  ToySites toy;
  AdapterConfig config = config_of("ia3", toy.sites);
  config.targets = std::vector<std::string>{"v_proj", "o_proj"};
  config.feedforward = std::vector<std::string>{"v_proj", "o_proj"};
  const auto x = torch::randn({5, 12});
  nn::Pass pass;
  const auto base = toy.groups[0].base(x, pass);
  {
    auto adapter = Adapter::create(config, toy.sites, torch::kCPU, 1);
    disturb(*adapter);
    const auto tensors = adapter->folder().tensors;
    const auto l = tensors.at("model.layers.0.self_attn.v_proj.ia3_l");
    EXPECT_EQ(l.sizes(), (std::vector<int64_t>{1, 12}));
    const auto y = toy.groups[0].forward(x, pass);
    EXPECT_TRUE(y.narrow(1, 0, 16).equal(base.narrow(1, 0, 16)));
    EXPECT_TRUE(y.narrow(1, 16, 4).allclose(toy.groups[0].matrix()->product(x * l, {}).narrow(1, 16, 4), 1e-5, 1e-6));
    EXPECT_FALSE(y.narrow(1, 16, 4).allclose(base.narrow(1, 16, 4)));
    const auto o = tensors.at("model.layers.0.self_attn.o_proj.ia3_l");
    EXPECT_TRUE(toy.groups[1].forward(x, pass).allclose(toy.groups[1].matrix()->product(x * o, {}), 1e-5, 1e-6));
  }
  EXPECT_TRUE(toy.groups[0].forward(x, pass).equal(base));
  config.feedforward = std::vector<std::string>{"v_proj", "o_proj", "k_proj"};
  EXPECT_THAT(message_of([&] { Adapter::create(config, toy.sites, torch::kCPU, 1); }),
              HasSubstr("feedforward_modules: got 'k_proj'"));
}

TEST(KSite, MovScalesBehindTheHeadNormWhereThereIsOne) {
  ToySites toy(/*qk_norm=*/true);
  auto adapter = Adapter::create(config_of("mov", toy.sites), toy.sites, torch::kCPU, 1);
  EXPECT_EQ(adapter->config().k_site, "post_qk_norm");
  for (const nn::ScaleSite& site : toy.sites.scales) {
    if (!site.name.ends_with("k_proj")) continue;
    EXPECT_EQ(site.slot->empty(), site.kind != nn::ScaleKind::kPostHeadNorm);
  }
  ToySites plain;
  AdapterConfig config = config_of("mov", plain.sites);
  config.k_site = "post_qk_norm";
  EXPECT_THROW(Adapter::create(config, plain.sites, torch::kCPU, 1), UsageError);
}

TEST(AdapterConfigJson, RoundTrip) {
  ToySites toy;
  AdapterConfig config = config_of("molora", toy.sites);
  config.router.type = "top_k";
  config.router.top_k = 2;
  config.router.topk_mode = "renorm";
  config.router.input = "sentence";
  config.router.sentence_dim = 7;
  config.lora_alpha = 12;
  config.base_fingerprint = "sha256:00";
  const OrderedJson json = adapter_config_json(config);
  EXPECT_EQ(json["peft_type"], "MOLORA");
  EXPECT_EQ(adapter_config_json(parse_adapter_config(json, "test")), json);
}

TEST(AdapterConfigJson, WhatIsNotImplementedIsRefusedAllAtOnce) {
  const OrderedJson json = {{"peft_type", "LORA"},
                            {"target_modules", {"q_proj"}},
                            {"lora_bias", true},
                            {"init_lora_weights", "pissa_niter_4"},
                            {"alora_invocation_tokens", {3, 4}},
                            {"layers_pattern", "h"},
                            {"new_in_peft_9", 1}};
  const std::string message = message_of([&] { parse_adapter_config(json, "adapter_config.json"); });
  for (const auto& [key, value] : json.items()) {
    if (key == "peft_type" || key == "target_modules") continue;
    EXPECT_THAT(message, HasSubstr(key + " = " + value.dump()));
  }
  EXPECT_THAT(message, HasSubstr("path_initial_model_for_weight_conversion"));
  EXPECT_THROW(parse_adapter_config(OrderedJson({{"peft_type", "PROMPT_TUNING"}}), "x"), ConfigError);
  EXPECT_THROW(parse_adapter_config(OrderedJson({{"peft_type", "LORA"}, {"r", 0}}), "x"), ConfigError);
  EXPECT_THROW(parse_adapter_config(OrderedJson({{"peft_type", "LORA"}, {"r", "four"}}), "x"), ConfigError);
}

TEST(AdapterConfigJson, WhatChangesNothingPasses) {
  const OrderedJson json = {{"peft_type", "LORA"},
                            {"target_modules", {"q_proj"}},
                            {"bias", "none"},
                            {"init_lora_weights", "gaussian"},
                            {"layers_pattern", "layers"},
                            {"eva_config", {{"rho", 2.0}}},
                            {"fan_in_fan_out", true},
                            {"new_in_peft_9", nullptr},
                            {"also_new", false}};
  EXPECT_EQ(parse_adapter_config(json, "test").method, "lora");
}

TEST(AdapterConfigJson, OurOwnBlockIsAsStrict) {
  for (const char* block : {R"({"gate": 3})", R"({"router": {"gate": 3}})"}) {
    OrderedJson json = {{"peft_type", "MOV"}, {"target_modules", {"q_proj"}}};
    json["moesaic"] = OrderedJson::parse(block);
    EXPECT_THAT(message_of([&] { parse_adapter_config(json, "test"); }), HasSubstr("gate = 3"));
  }
}

TEST(AdapterConfigJson, PatternsKeepTheirOrder) {
  const auto json = OrderedJson::parse(
      R"({"peft_type": "LORA", "target_modules": ["q_proj"], "r": 2, "lora_alpha": 4,
          "rank_pattern": {"q_proj": 5, ".*": 3}, "alpha_pattern": {"layers.1.*": 9, "0.*": 7, ".*q_proj": 1}})");
  const AdapterConfig config = parse_adapter_config(json, "test");
  EXPECT_EQ(config.rank_at("model.layers.0.self_attn.q_proj"), 5);
  EXPECT_EQ(config.rank_at("model.layers.0.self_attn.k_proj"), 3);
  EXPECT_EQ(config.scale_at("model.layers.1.self_attn.q_proj"), 9.0 / 5);
  EXPECT_EQ(config.scale_at("model.layers.0.self_attn.q_proj"), 7.0 / 5);
  EXPECT_EQ(adapter_config_json(config)["rank_pattern"].dump(), json["rank_pattern"].dump());
}

TEST(MultiModalNames, BothSpellingsAreReadAndKept) {
  for (const char* spelling : {"model.language_model.", "language_model."}) {
    ToySites toy;
    TemporaryFolder folder;
    AdapterConfig config = config_of("lora", toy.sites);
    config.targets = ".*language_model.*\\.(q_proj|o_proj)";
    config.rank_pattern = {{".*language_model.*o_proj", 3}};
    config.spelling = spelling;
    auto adapter = Adapter::create(config, toy.sites, torch::kCPU, 1);
    disturb(*adapter);
    adapter->save(folder.path());
    const formats::SafetensorsFile file(folder / "adapter_model.safetensors");
    for (const std::string& name : file.names()) {
      EXPECT_THAT(name, testing::StartsWith("base_model.model." + std::string(spelling)));
    }
    const auto read = Adapter::open(folder.path(), toy.sites, torch::kCPU, "")->folder();
    const auto written = adapter->folder().tensors;
    EXPECT_EQ(written.at("model.layers.0.self_attn.o_proj.lora_A.weight").size(0), 3);
    ASSERT_EQ(read.tensors.size(), written.size());
    for (const auto& [name, tensor] : written) EXPECT_TRUE(read.tensors.at(name).equal(tensor)) << name;
  }
}

TEST(ScaledInputs, ByARegularExpression) {
  ToySites toy;
  AdapterConfig config = config_of("ia3", toy.sites);
  config.targets = ".*\\.(v_proj|down_proj)";
  config.feedforward = ".*\\.down_proj";
  const auto tensors = Adapter::create(config, toy.sites, torch::kCPU, 1)->folder().tensors;
  EXPECT_EQ(tensors.at("model.layers.0.mlp.down_proj.ia3_l").size(0), 1);
  EXPECT_EQ(tensors.at("model.layers.0.self_attn.v_proj.ia3_l").size(1), 1);
}

TEST_P(EveryMethod, LayersToTransformAreLoadedAgain) {
  ToySites toy;
  TemporaryFolder folder;
  AdapterConfig config = config_of(GetParam(), toy.sites);
  config.layers_to_transform = {1};
  auto adapter = Adapter::create(config, toy.sites, torch::kCPU, 1);
  adapter->save(folder.path());
  EXPECT_EQ(Adapter::open(folder.path(), toy.sites, torch::kCPU, "")->parameters().size(),
            adapter->parameters().size());
}

TEST(Effect, ScalesTheDelta) {
  ToySites toy;
  TemporaryFolder folder;
  const auto x = torch::randn({4, 12});
  nn::Pass pass;
  const auto base = toy.groups[0].forward(x, pass).detach();
  torch::Tensor full;
  {
    auto adapter = Adapter::create(config_of("molora", toy.sites), toy.sites, torch::kCPU, 1);
    disturb(*adapter);
    full = toy.groups[0].forward(x, pass).detach();
    adapter->save(folder.path());
  }
  auto half = Adapter::open(folder.path(), toy.sites, torch::kCPU, "", 0.5);
  EXPECT_TRUE(toy.groups[0].forward(x, pass).allclose(base + 0.5 * (full - base), 1e-4, 1e-5));
}

}  // namespace
}  // namespace moesaic::adapters
