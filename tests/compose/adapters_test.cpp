// Compositions whose models carry adapters, or random numbers.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "moesaic/models/registry.h"
#include "tests/compose/small_models.h"
#include "tests/nn/gradcheck.h"
#include "tests/temporary_folder.h"

namespace moesaic::compose {
namespace {

using ::testing::HasSubstr;
namespace fs = std::filesystem;

const std::vector<std::vector<int64_t>> kSequences{{40, 90, 91, 3, 55, 56, 57}, {17, 18, 200}};

class CarriedAdapters : public ::testing::Test {
 protected:
  CarriedAdapters() {
    test::write_small_model(path("anchor"), "gpt2", 20, 3, 1);
    test::write_small_model(path("aug"), "llama3", 14, 4, 2);
    write_adapter("anchor", "molora", {"q_proj", "down_proj"});
    write_adapter("aug", "lora", {"v_proj", "up_proj"});
  }
  fs::path path(const std::string& name) const { return root_.path() / name; }

  /// An adapter of a model, with numbers that show.
  void write_adapter(const std::string& model, const std::string& method, std::vector<std::string> targets) const {
    const Member member = open_member(models::open_checkpoint(path(model)), {});
    adapters::AdapterConfig config;
    config.method = method;
    config.num_experts = method == "molora" ? 3 : 1;
    config.lora_rank = 2;
    config.lora_dropout = 0.5;
    config.targets = std::move(targets);
    const auto adapter = adapters::Adapter::create(config, member.model->sites(), torch::kCPU, 3);
    torch::NoGradGuard no_grad;
    torch::manual_seed(11);
    for (const auto& parameter : adapter->parameters()) parameter.tensor.normal_(0.0, 0.3);
    adapter->save(path(model + "_adapter"));
  }
  Member open(const std::string& model, bool with_adapter) const {
    return open_member(models::open_checkpoint(path(model)), {},
                       {.adapter = with_adapter ? path(model + "_adapter") : fs::path()});
  }
  std::shared_ptr<Composition> composition(bool anchor_adapter, bool aug_adapter) const {
    auto made = std::make_shared<Composition>(test::config_of({{{{0, 1}, {2, 2}}}}), open("anchor", anchor_adapter),
                                              std::vector{open("aug", aug_adapter)}, 7);
    test::randomise(*made);
    return made;
  }

  test::TemporaryFolder root_;
};

TEST_F(CarriedAdapters, EachChangesTheWhole) {
  const auto plain = test::logits_of(*composition(false, false), kSequences);
  for (const auto& [anchor, aug] : {std::pair{true, false}, {false, true}}) {
    EXPECT_GT(test::relative_error(test::logits_of(*composition(anchor, aug), kSequences), plain), 0.01);
  }
}

TEST_F(CarriedAdapters, TheAnchorsIsTheWholeWhereConnectionsAddNothing) {
  const Composition untrained(test::config_of({{{{0, 1}}}}), open("anchor", true), {open("aug", true)}, 7);
  auto& composed = const_cast<Composition&>(untrained);
  const Member alone = open("anchor", true);
  torch::NoGradGuard no_grad;
  const auto expected = test::logits_of(*alone.model, kSequences);
  EXPECT_TRUE(torch::equal(test::logits_of(composed, kSequences), expected));
}

TEST_F(CarriedAdapters, TokenByTokenIsTheFullPass) {
  const auto made = composition(true, true);
  const auto full = test::logits_of(*made, {kSequences[0]});
  const auto memory = made->memory(1);
  std::vector<torch::Tensor> rows;
  for (const int64_t id : kSequences[0]) rows.push_back(test::logits_of(*made, {{id}}, {}, memory.get()));
  EXPECT_LT(test::relative_error(torch::cat(rows), full), 1e-4);  // another order of the same float32 sums
}

TEST_F(CarriedAdapters, AreFrozenUntilAskedFor) {
  const auto made = composition(true, true);
  auto gradients = [&](bool train) {
    made->train_adapters(train);
    made->train(train);
    test::hidden_of(*made, kSequences).square().sum().backward();
    std::map<std::string, torch::Tensor> found;
    for (const auto& [place, adapter] : made->adapters()) {
      for (const auto& parameter : adapter->parameters()) {
        if (parameter.tensor.grad().defined()) found[place + "." + parameter.name] = parameter.tensor.grad();
      }
    }
    return found;
  };
  EXPECT_TRUE(gradients(false).empty());
  const auto trained = gradients(true);
  EXPECT_TRUE(trained.contains("anchor.model.layers.2.mlp.down_proj.lora_A"));
  EXPECT_TRUE(trained.contains("anchor.model.layers.0.self_attn.q_proj.lora_B")) << "at the lowest connection";
  EXPECT_TRUE(trained.contains("augmenting.0.model.layers.0.self_attn.v_proj.lora_B"));
  // The augmenting model's block 3 lies above its highest connection.
  EXPECT_FALSE(trained.contains("augmenting.0.model.layers.3.self_attn.v_proj.lora_B"));

  // The slope in the gradient's own direction is its norm: central differences of a float32 loss, which bends
  // within the step and is rounded: right to a few percent.
  auto loss = [&] {
    torch::NoGradGuard no_grad;
    return test::hidden_of(*made, kSequences).to(torch::kFloat64).square().sum().item<double>();
  };
  for (const auto& [place, adapter] : made->adapters()) {
    for (const auto& parameter : adapter->parameters()) {
      const torch::Tensor gradient = parameter.tensor.grad();
      if (!gradient.defined()) continue;
      const double norm = gradient.norm().item<double>();
      if (norm < 1.0) continue;  // too flat for differences of float32
      const torch::Tensor values = parameter.tensor.detach();
      const torch::Tensor step = gradient / norm * 1e-3;
      torch::NoGradGuard no_grad;
      values.add_(step);
      const double above = loss();
      values.sub_(2 * step);
      const double below = loss();
      values.add_(step);
      EXPECT_NEAR((above - below) / 2e-3 / norm, 1.0, 0.05) << place << " " << parameter.name;
    }
  }
}

TEST_F(CarriedAdapters, DropNothingWhileTheyAreFrozen) {
  const auto made = composition(true, true);
  auto pass = [&](bool training) {
    torch::NoGradGuard no_grad;
    nn::Pass pass;
    pass.training = training;
    return made->hidden({nn::RaggedBatch::from_sequences(kSequences)}, pass);
  };
  EXPECT_TRUE(torch::equal(pass(true), pass(false)));
  made->train_adapters(true);
  EXPECT_FALSE(torch::equal(pass(true), pass(false)));
}

TEST_F(CarriedAdapters, RoutersSayWhoseTheyAre) {
  write_adapter("aug", "molora", {"v_proj", "up_proj"});
  const auto made = composition(true, true);
  EXPECT_TRUE(made->needs().routed);
  Connections learner(made, /*train_adapters=*/true);
  std::vector<nn::RoutingRecord> records;
  std::map<std::string, int64_t> calls;
  nn::Pass pass;
  pass.training = true;
  pass.routing = &records;
  pass.run = [&](nn::Block& block, const torch::Tensor& h, nn::Pass& own) {
    EXPECT_TRUE(own.training);
    ++calls[fmt::format("{} {}", own.place, block.index())];
    return block.forward(h, own);
  };
  made->hidden({nn::RaggedBatch::from_sequences(kSequences)}, pass);
  std::map<std::string, int64_t> owners;
  for (const auto& record : records) {
    EXPECT_TRUE(record.trained);
    ++owners[record.owner];
  }
  EXPECT_EQ(owners, (std::map<std::string, int64_t>{{"anchor", 3 * 2}, {"augmenting.0", 3 * 2}}));
  // The caller's hook runs every block once: of the augmenting model those up to the highest connection.
  EXPECT_EQ(calls, (std::map<std::string, int64_t>{{"anchor 0", 1},
                                                   {"anchor 1", 1},
                                                   {"anchor 2", 1},
                                                   {"augmenting.0 0", 1},
                                                   {"augmenting.0 1", 1},
                                                   {"augmenting.0 2", 1}}));
  // The balance loss reaches a router of the augmenting model.
  torch::Tensor loss = torch::zeros({});
  for (const auto& record : records) {
    if (record.owner == "augmenting.0") loss = loss + record.logits.logsumexp(-1).square().mean();
  }
  loss.backward();
  bool reached = false;
  for (const nn::Parameter& parameter : learner.parameters()) {
    reached = reached || (parameter.name.starts_with("augmenting.0.") &&
                          parameter.kind == nn::Parameter::Kind::kRouter && parameter.tensor.grad().defined());
  }
  EXPECT_TRUE(reached);
}

TEST_F(CarriedAdapters, AnAttachedOneMayRouteBySentence) {
  const auto made = composition(false, false);
  adapters::AdapterConfig config;
  config.method = "molora";
  config.num_experts = 3;
  config.lora_rank = 2;
  config.targets = std::vector<std::string>{"q_proj"};
  config.router.input = "sentence";
  const auto adapter = adapters::Adapter::create(config, *made->parts().front().sites, torch::kCPU, 3);
  {
    torch::NoGradGuard no_grad;
    torch::manual_seed(11);
    for (const auto& parameter : adapter->parameters()) parameter.tensor.normal_(0.0, 0.3);
  }
  made->attach("by_sentence", adapter);
  torch::Tensor plain;
  {
    nn::AdapterDisabled disabled;
    plain = test::logits_of(*made, kSequences);
  }
  const auto full = test::logits_of(*made, {kSequences[0]});
  // A prompt of four tokens, then one by one: the sentence stays that of the prompt.
  const std::vector<int64_t> prompt(kSequences[0].begin(), kSequences[0].begin() + 4);
  nn::Pass pass;
  models::Text whole{nn::RaggedBatch::from_sequences({kSequences[0]}), {{4}}};
  whole.prompts = {prompt};
  torch::NoGradGuard no_grad;
  const auto expected = made->head().logits(made->hidden(whole, pass));
  // The sentence is what the frozen anchor alone makes of the prompt.
  models::Text told{whole.tokens, {{4}}};
  {
    nn::AdapterDisabled disabled;
    nn::Pass of_anchor;
    told.sentence = made->anchor_member()
                        .model->hidden({nn::RaggedBatch::from_sequences({prompt})}, of_anchor)
                        .mean(0, /*keepdim=*/true);
  }
  EXPECT_TRUE(torch::equal(made->head().logits(made->hidden(told, pass)), expected));
  const auto memory = made->memory(1);
  std::vector<torch::Tensor> rows{test::logits_of(*made, {prompt}, {{4}}, memory.get())};
  for (size_t i = 4; i < kSequences[0].size(); ++i) {
    rows.push_back(test::logits_of(*made, {{kSequences[0][i]}}, {}, memory.get()));
  }
  EXPECT_LT(test::relative_error(torch::cat(rows), expected), 1e-4);
  EXPECT_GT(test::relative_error(full, plain.slice(0, 0, full.size(0))), 1e-3);
}

/// A request weighs the attached adapter; the carried ones keep the weight 1.
TEST_F(CarriedAdapters, AreBesideWhatARequestMixes) {
  const auto made = composition(true, true);
  const auto without = test::logits_of(*made, kSequences);
  adapters::AdapterConfig config;
  config.method = "lora";
  config.lora_rank = 2;
  config.targets = std::vector<std::string>{"v_proj"};
  const auto adapter = adapters::Adapter::create(config, *made->parts().front().sites, torch::kCPU, 3);
  {
    torch::NoGradGuard no_grad;
    torch::manual_seed(12);
    for (const auto& parameter : adapter->parameters()) parameter.tensor.normal_(0.0, 0.3);
  }
  EXPECT_THAT([&] { made->attach("anchor", adapter); },
              ::testing::ThrowsMessage<UsageError>(HasSubstr("a member of the composition")));
  made->attach("mine", adapter);
  const auto with = test::logits_of(*made, kSequences);
  torch::NoGradGuard no_grad;
  nn::Pass pass;
  models::Text text{nn::RaggedBatch::from_sequences(kSequences)};
  text.mixture = torch::tensor({{1.0f}, {0.0f}});
  const auto mixed = made->head().logits(made->hidden(text, pass));
  const int64_t first = std::ssize(kSequences[0]);
  // Weighing sums in another order than the fused form: 2e-6 with AVX2, below 1e-6 with AVX512.
  EXPECT_LT(test::relative_error(mixed.slice(0, 0, first), with.slice(0, 0, first)), 1e-5);
  EXPECT_LT(test::relative_error(mixed.slice(0, first), without.slice(0, first)), 1e-5);
  EXPECT_GT(test::relative_error(with.slice(0, first), without.slice(0, first)), 0.01);
}

TEST_F(CarriedAdapters, TravelWithTheFolder) {
  const auto made = composition(true, true);
  save_composition(*made, path("calm"));
  fs::remove_all(path("anchor_adapter"));
  fs::remove_all(path("aug_adapter"));
  const auto loaded = load_composition(path("calm"), {});
  EXPECT_TRUE(torch::equal(test::logits_of(*loaded, kSequences), test::logits_of(*made, kSequences)));

  // Trained, their numbers come back like the connections'.
  Connections learner(loaded, /*train_adapters=*/true);
  for (const auto& [place, adapter] : loaded->adapters()) {
    torch::NoGradGuard no_grad;
    for (const auto& parameter : adapter->parameters()) parameter.tensor.zero_();
  }
  learner.load(path("calm"));
  loaded->eval();
  EXPECT_TRUE(torch::equal(test::logits_of(*loaded, kSequences), test::logits_of(*made, kSequences)));

  fs::remove_all(path("calm") / "adapters" / "anchor");
  EXPECT_THAT([&] { load_composition(path("calm"), {}); },
              ::testing::ThrowsMessage<DataError>(HasSubstr("anchor: its adapter")));
}

TEST_F(CarriedAdapters, ThatRouteBySentenceAreRefused) {
  Json config = read_json(path("anchor_adapter") / "adapter_config.json");
  config["moesaic"]["router"]["input"] = "sentence";
  write_file_atomically(path("anchor_adapter") / "adapter_config.json", config.dump());
  EXPECT_THAT([&] { open("anchor", true); },
              ::testing::ThrowsMessage<DataError>(::testing::AnyOf(HasSubstr("sentence"), HasSubstr("router"))));
}

TEST_F(CarriedAdapters, OfAnAugmentingModelKeepTheWholeModel) {
  auto layers = [&](const MemberOptions& options) {
    return open_member(models::open_checkpoint(path("aug")), {}, options).model->reading_blocks();
  };
  EXPECT_EQ(layers({.num_blocks = 2}), 2);
  EXPECT_EQ(layers({.adapter = path("aug_adapter"), .num_blocks = 2}), 4);
}

TEST_F(CarriedAdapters, BlocksAboveTheHighestConnectionAreNotHeld) {
  const auto made = composition(false, false);
  save_composition(*made, path("calm"));
  const auto loaded = load_composition(path("calm"), {});
  const auto names = loaded->augmenting()[0].model->named_parameters();
  EXPECT_TRUE(names.contains("model.layers.2.mlp.up_proj.weight"));
  EXPECT_FALSE(names.contains("model.layers.3.mlp.up_proj.weight"));
  EXPECT_FALSE(names.contains("lm_head.weight"));
  EXPECT_TRUE(torch::equal(test::logits_of(*loaded, kSequences), test::logits_of(*made, kSequences)));
}

TEST_F(CarriedAdapters, RandomNumbersComeFromTheirSeed) {
  auto with = [&](std::optional<uint64_t> seed) {
    const Member aug = open_member(models::open_checkpoint(path("aug")), {}, {.random_seed = seed});
    auto made =
        std::make_shared<Composition>(test::config_of({{{{0, 1}}}}), open("anchor", false), std::vector{aug}, 7);
    test::randomise(*made);
    return made;
  };
  const auto one = test::logits_of(*with(1), kSequences);
  EXPECT_TRUE(torch::equal(one, test::logits_of(*with(1), kSequences)));
  EXPECT_GT(test::relative_error(test::logits_of(*with(2), kSequences), one), 0.01);
  EXPECT_GT(test::relative_error(test::logits_of(*with({}), kSequences), one), 0.01);
  save_composition(*with(1), path("calm"));
  EXPECT_EQ(load_composition(path("calm"), {})->augmenting()[0].random_seed, 1u);
  EXPECT_TRUE(torch::equal(test::logits_of(*load_composition(path("calm"), {}), kSequences), one));
}

}  // namespace
}  // namespace moesaic::compose
