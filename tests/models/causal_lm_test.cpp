#include "moesaic/models/causal_lm.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "moesaic/base/check.h"
#include "moesaic/models/registry.h"
#include "moesaic/nn/linear.h"
#include "tests/models/tiny_models.h"
#include "tests/nn/gradcheck.h"

namespace moesaic::models {
namespace {

using test::logits_of;
using test::MemoryCheckpoint;
using test::random_model;
using test::relative_error;
using test::tiny_configs;
using testing::HasSubstr;

const std::vector<std::vector<int64_t>> kSequences{
    {3, 1, 4, 1, 5, 9, 2, 6}, {52}, {2, 7, 1, 8, 2, 8, 1, 8, 2, 8, 4, 0}};

/// The message of the Error that `f` throws.
template <class Type>
std::string message_of(const std::function<void()>& f) {
  try {
    f();
  } catch (const Type& error) {
    return error.what();
  }
  ADD_FAILURE() << "nothing was thrown";
  return "";
}

TEST(CausalLM, FloatEqualsDoubleWithEveryGradient) {
  // float32 runs the fused kernels, float64 the plain formulas. Two layers of sums over 24 to 37 values: 1e-5.
  for (const auto& [name, config] : tiny_configs()) {
    auto single = random_model(config), exact = random_model(config, torch::kFloat64);
    torch::manual_seed(1);
    const torch::Tensor direction = torch::randn({21, 53});
    for (auto& model : {single, exact}) {
      for (auto& p : model->parameters()) p.requires_grad_(true);
      (logits_of(*model, kSequences) * direction).sum().backward();
    }
    torch::NoGradGuard no_grad;
    EXPECT_LT(relative_error(logits_of(*single, kSequences), logits_of(*exact, kSequences)), 1e-5) << name;
    const auto expected = exact->named_parameters();
    for (const auto& item : single->named_parameters()) {
      ASSERT_TRUE(item.value().grad().defined()) << name << " " << item.key();
      const torch::Tensor& grad = expected[item.key()].grad();
      EXPECT_LT(relative_error(item.value().grad(), grad), 2e-5) << name << " " << item.key();
    }
  }
}

TEST(CausalLM, GradientCheckAlongARandomDirection) {
  for (const auto& [name, config] : tiny_configs()) {
    auto model = random_model(config, torch::kFloat64);
    auto loss = [&] {
      nn::Pass pass;
      const auto hidden = model->hidden({nn::RaggedBatch::from_sequences(kSequences)}, pass);
      return at::linear(hidden, model->head().weight()).square().mean();
    };
    SCOPED_TRACE(name);
    test::expect_slope_matches(loss, model->parameters());
  }
}

TEST(CausalLM, RaggedEqualsOneByOne) {
  torch::NoGradGuard no_grad;
  for (const auto& [name, config] : tiny_configs()) {
    auto model = random_model(config);
    const auto together = logits_of(*model, kSequences);
    int64_t row = 0;
    for (const auto& sequence : kSequences) {
      const int64_t length = static_cast<int64_t>(sequence.size());
      EXPECT_LT(relative_error(together.narrow(0, row, length), logits_of(*model, {sequence})), 1e-5) << name;
      row += length;
    }
  }
}

TEST(CausalLM, LaterTokensDoNotChangeEarlierLogits) {
  torch::NoGradGuard no_grad;
  for (const auto& [name, config] : tiny_configs()) {
    auto model = random_model(config);
    const auto before = logits_of(*model, {{1, 2, 3, 4, 5, 6}}), after = logits_of(*model, {{1, 2, 3, 4, 50, 51}});
    EXPECT_LT(relative_error(after.narrow(0, 0, 4), before.narrow(0, 0, 4)), 1e-6) << name;
    EXPECT_GT(relative_error(after.narrow(0, 4, 2), before.narrow(0, 4, 2)), 1e-2) << name;
  }
}

TEST(CausalLM, CachedEqualsFullForTokensChunksAndBatches) {
  torch::NoGradGuard no_grad;
  const std::vector<std::vector<int64_t>> sequences{{3, 1, 4, 1, 5, 9, 2, 6}, {2, 7, 1, 8, 2, 8, 1, 8}};
  for (const auto& [name, config] : tiny_configs()) {
    auto model = random_model(config);
    const auto full = logits_of(*model, sequences).view({2, 8, -1});
    for (const std::vector<int64_t>& chunks :
         std::vector<std::vector<int64_t>>{{1, 1, 1, 1, 1, 1, 1, 1}, {5, 1, 2}, {3, 4, 1}}) {
      const auto memory = model->memory(2);
      int64_t done = 0;
      for (int64_t count : chunks) {
        std::vector<std::vector<int64_t>> step;
        for (const auto& s : sequences) step.emplace_back(s.begin() + done, s.begin() + done + count);
        const auto got = logits_of(*model, step, memory.get()).view({2, count, -1});
        EXPECT_LT(relative_error(got, full.narrow(1, done, count)), 1e-5) << name << " at " << done;
        done += count;
      }
      EXPECT_EQ(memory->length(1), 8);
    }
  }
}

TEST(CausalLM, FrozenModelRecordsNoGraph) {
  auto model = random_model(tiny_configs().front().second);
  for (const auto& p : model->parameters()) EXPECT_FALSE(p.requires_grad());
  EXPECT_FALSE(logits_of(*model, kSequences).requires_grad());
}

TEST(CausalLM, LayersCanBeRunOneByOne) {
  torch::NoGradGuard no_grad;
  auto model = random_model(tiny_configs().front().second);
  const auto batch = nn::RaggedBatch::from_sequences(kSequences);
  nn::Pass pass;
  model->prepare(batch, pass);
  torch::Tensor h = model->embed(batch.tokens);
  for (int64_t i = 0; i < model->config().num_layers; ++i) h = model->run_blocks(h, i, i + 1, pass);
  EXPECT_TRUE(torch::equal(model->head().logits(model->finish(h, {})), logits_of(*model, kSequences)));
}

TEST(CausalLM, PositionsContinueBehindTheCache) {
  torch::NoGradGuard no_grad;
  auto model = random_model(tiny_configs().front().second);
  const auto memory = model->memory(2);
  logits_of(*model, {{1, 2, 3}, {4}}, memory.get());
  nn::Pass pass;
  pass.cache = &static_cast<CacheMemory&>(*memory).cache;
  model->prepare(nn::RaggedBatch::from_sequences({{5, 6}, {7}}), pass);
  EXPECT_TRUE(torch::equal(pass.positions, torch::tensor({3, 4, 1}, torch::kInt64)));
  EXPECT_TRUE(torch::equal(pass.segments, torch::tensor({0, 0, 1}, torch::kInt64)));
}

TEST(CausalLM, RefusesForeignTokensAndCaches) {
  auto model = random_model(tiny_configs().front().second);
  EXPECT_THAT(message_of<DataError>([&] { logits_of(*model, {{1, 53}}); }), HasSubstr("got 53, expected 0 to 52"));
  EXPECT_THROW(logits_of(*model, {{-1}}), DataError);
  const auto memory = model->memory(2);
  EXPECT_THROW(logits_of(*model, {{1}}, memory.get()), ShapeError);
}

TEST(CausalLM, SitesCarryModulePathsAndShapes) {
  const auto configs = tiny_configs();
  auto llama = random_model(configs[0].second);
  const nn::Sites& sites = llama->sites();
  ASSERT_EQ(sites.linears.size(), 2u * 7);
  const auto parameters = llama->named_parameters();
  for (const nn::LinearSite& site : sites.linears) {
    const torch::Tensor* weight = parameters.find(site.name + ".weight");
    ASSERT_NE(weight, nullptr) << site.name;
    EXPECT_EQ(weight->sizes().vec(), (std::vector<int64_t>{site.out, site.in}));
    // The member is a view of its group's matrix.
    const auto identity = torch::eye(site.in);
    const auto product = site.group->matrix()->outputs(site.group->column(site.index), site.out)->product(identity, {});
    EXPECT_TRUE(product.equal(weight->t()));
  }
  EXPECT_FALSE(sites.has_qk_norm);
  EXPECT_EQ(sites.scales.size(), 2u * (7 + 7 + 1));  // inputs, outputs, the FFN branch
  auto qwen3 = random_model(configs[5].second);
  EXPECT_TRUE(qwen3->sites().has_qk_norm);
  EXPECT_EQ(qwen3->sites().scales.size(), 2u * (7 + 7 + 1 + 2));  // and the normed queries and keys
}

/// Multiplies by a constant.
struct Scaling : nn::ScaleAdapter {
  torch::Tensor forward(const torch::Tensor& y, nn::Pass&) override { return y * 3; }
  torch::Tensor forward_ffn(const torch::Tensor& act, const torch::Tensor& up, nn::Pass&) override {
    return act * 3 * up;
  }
  bool trains() const override { return false; }
  int64_t saved_per_row() const override { return 0; }
};

TEST(CausalLM, ScaleSitesActOnWhatTheirNameSaysCachedToo) {
  torch::NoGradGuard no_grad;
  for (const auto& [name, config] : tiny_configs()) {
    auto adapted = random_model(config);
    for (nn::ScaleSite& site : adapted->sites().scales) {
      if (site.kind != nn::ScaleKind::kOutput) continue;
      // Scaling a linear's output by 3 is scaling its weight and bias by 3.
      auto scaled = random_model(config);
      for (auto& item : scaled->named_parameters()) {
        if (item.key().starts_with(site.name + ".")) item.value().mul_(3);
      }
      site.slot->adapters = {std::make_shared<Scaling>()};
      EXPECT_LT(relative_error(logits_of(*adapted, kSequences), logits_of(*scaled, kSequences)), 1e-5)
          << name << " " << site.name;
      const auto memory = adapted->memory(1);
      logits_of(*adapted, {{1, 2, 3}}, memory.get());
      EXPECT_LT(
          relative_error(logits_of(*adapted, {{4}}, memory.get()), logits_of(*scaled, {{1, 2, 3, 4}}).narrow(0, 3, 1)),
          1e-5)
          << name << " " << site.name;
      site.slot->adapters.clear();
    }
  }
}

TEST(CausalLM, EveryWeightCanBeReplacedAndComesBack) {
  torch::NoGradGuard no_grad;
  for (const auto& [name, config] : tiny_configs()) {
    auto model = random_model(config);
    const torch::Tensor before = logits_of(*model, kSequences);
    for (const nn::WeightSite& site : model->sites().weights) {
      const torch::Tensor own = site.value().clone();
      ASSERT_EQ(own.sizes(), site.shape) << site.name;
      for (const double scale : {1.5, 0.5}) {  // the second replaces the first
        const torch::Tensor other = own * scale + 0.1;
        site.replace(other);
        EXPECT_TRUE(site.value().equal(other)) << name << " " << site.name;
        // Softmax ignores what all keys have in common.
        const bool shows = !site.name.ends_with("k_proj.bias");
        if (shows) EXPECT_FALSE(logits_of(*model, kSequences).equal(before)) << name << " " << site.name;
      }
      site.replace({});
      EXPECT_TRUE(logits_of(*model, kSequences).equal(before)) << name << " " << site.name;
    }
  }
}

TEST(CausalLM, MetaDeviceAllocatesNothing) {
  Json config = tiny_configs().front().second;
  config["hidden_size"] = 65'536;
  config["vocab_size"] = 1'000'000;
  const CausalLM model(parse_decoder_config(config, "config.json"), torch::kMeta);
  EXPECT_EQ(model.head().weight().sizes().vec(), (std::vector<int64_t>{1'000'000, 65'536}));
}

TEST(CausalLMLoad, EveryFamilyLoadsWhatItSaved) {
  torch::NoGradGuard no_grad;
  for (const auto& [name, config] : tiny_configs()) {
    auto model = random_model(config);
    auto loaded = CausalLM::load(MemoryCheckpoint(config, *model), {});
    EXPECT_TRUE(torch::equal(logits_of(*loaded, kSequences), logits_of(*model, kSequences))) << name;
    for (const auto& p : loaded->parameters()) EXPECT_FALSE(p.requires_grad());
  }
}

TEST(CausalLMLoad, ListsEverythingThatDoesNotFit) {
  const Json config = tiny_configs().front().second;
  MemoryCheckpoint checkpoint(config, *random_model(config));
  checkpoint.tensors.erase("model.norm.weight");
  checkpoint.tensors.erase("model.layers.1.mlp.up_proj.weight");
  checkpoint.tensors["model.layers.0.self_attn.k_proj.weight"] = torch::zeros({3, 24});
  checkpoint.tensors["model.layers.2.input_layernorm.weight"] = torch::zeros({24});
  const std::string message = message_of<DataError>([&] { CausalLM::load(checkpoint, {}); });
  EXPECT_THAT(message, HasSubstr("missing (2)"));
  EXPECT_THAT(message, HasSubstr("model.norm.weight"));
  EXPECT_THAT(message, HasSubstr("model.layers.1.mlp.up_proj.weight"));
  EXPECT_THAT(message, HasSubstr("unexpected (1):\n    model.layers.2.input_layernorm.weight"));
  EXPECT_THAT(message, HasSubstr("model.layers.0.self_attn.k_proj.weight: got [3, 24], expected [12, 24]"));
}

TEST(CausalLMLoad, ChecksShapesBeforeAllocating) {
  Json config = tiny_configs().front().second;
  MemoryCheckpoint checkpoint(config, *random_model(config));
  config["vocab_size"] = 16'000'000;
  config["hidden_size"] = 200'000;  // an embedding of 12 TB
  EXPECT_THROW(CausalLM::load(MemoryCheckpoint(config, checkpoint.tensors), {}), DataError);
}

TEST(CausalLMLoad, IgnoresStoredRotaryFrequencies) {
  const Json config = tiny_configs().front().second;
  MemoryCheckpoint checkpoint(config, *random_model(config));
  checkpoint.tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch::zeros({3});
  EXPECT_NO_THROW(CausalLM::load(checkpoint, {}));
}

TEST(CausalLMLoad, ATiedHeadThatDiffersIsAHeadOfItsOwn) {
  torch::NoGradGuard no_grad;
  const Json config = tiny_configs()[1].second;
  auto model = random_model(config);
  MemoryCheckpoint checkpoint(config, *model);
  const torch::Tensor embedding = checkpoint.tensors.at("model.embed_tokens.weight");
  checkpoint.tensors["lm_head.weight"] = embedding.clone();
  auto tied = CausalLM::load(checkpoint, {});
  EXPECT_TRUE(tied->config().tie_word_embeddings);
  EXPECT_TRUE(torch::equal(logits_of(*tied, kSequences), logits_of(*model, kSequences)));
  checkpoint.tensors["lm_head.weight"] = embedding * 2;
  EXPECT_LT(relative_error(logits_of(*CausalLM::load(checkpoint, {}), kSequences), logits_of(*model, kSequences) * 2),
            1e-6);
}

TEST(CausalLMLoad, Int8StaysNearFloat) {
  torch::NoGradGuard no_grad;
  for (const auto& [name, config] : tiny_configs()) {
    auto model = random_model(config);
    auto quantized = CausalLM::load(MemoryCheckpoint(config, *model), {.quantize_int8 = true});
    const auto expected = logits_of(*model, {{1, 2, 3, 4, 5, 6, 7}});
    const auto prefill = logits_of(*quantized, {{1, 2, 3, 4, 5, 6, 7}});
    // Rounding to 127 steps per row: 0.4 % of the largest weight, through 2 layers with random weights.
    EXPECT_LT((prefill - expected).norm().item<double>() / expected.norm().item<double>(), 0.05) << name;
    EXPECT_FALSE(torch::equal(prefill, expected)) << name;
    const auto memory = quantized->memory(1);
    logits_of(*quantized, {{1, 2, 3, 4, 5, 6}}, memory.get());
    EXPECT_LT(relative_error(logits_of(*quantized, {{7}}, memory.get()), prefill.narrow(0, 6, 1)), 1e-3) << name;
  }
}

TEST(CausalLMLoad, Bfloat16StaysNearFloat) {
  torch::NoGradGuard no_grad;
  for (auto [name, config] : tiny_configs()) {
    // All experts, for in half precision a router may choose another one.
    for (const char* count : {"num_experts", "num_local_experts"}) {
      if (config.contains(count)) config["num_experts_per_tok"] = config[count];
    }
    auto model = random_model(config);
    auto half = CausalLM::load(MemoryCheckpoint(config, *model), {.dtype = torch::kBFloat16});
    const auto expected = logits_of(*model, kSequences), got = logits_of(*half, kSequences);
    EXPECT_EQ(got.scalar_type(), torch::kFloat32);
    // bfloat16 keeps 8 bits: 0.4 % a rounding, a few dozen roundings in a row.
    EXPECT_LT((got - expected).norm().item<double>() / expected.norm().item<double>(), 0.1) << name;
  }
}

}  // namespace
}  // namespace moesaic::models
