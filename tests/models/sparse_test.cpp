// Sparse models whose weights are formulas: their logits, and which experts they choose, as transformers has them.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "moesaic/formats/expert_names.h"
#include "moesaic/formats/model_folder.h"
#include "moesaic/models/registry.h"
#include "tests/temporary_folder.h"

namespace moesaic::models {
namespace {

struct Golden {
  Json changes;
  double sum, squares;       // of all logits and of their squares
  std::vector<double> last;  // the last row's first four
};

/// By name; transformers 4.57.1 and 5.24.0 agree on them.
std::map<std::string, Golden> goldens() {
  const Json granite{{"intermediate_size", 12},     {"num_local_experts", 8}, {"num_experts_per_tok", 3},
                     {"embedding_multiplier", 3.0}, {"logits_scaling", 2.0},  {"residual_multiplier", 0.5},
                     {"attention_multiplier", 0.25}};
  Json shared = granite;
  shared["shared_intermediate_size"] = 20;
  return {{"mixtral",
           {{{"intermediate_size", 24}, {"num_local_experts", 4}, {"num_experts_per_tok", 2}},
            2.04916,
            490.3031,
            {-0.205483, -0.790072, -1.271589, -1.587213}}},
          {"qwen2_moe",
           {{{"num_hidden_layers", 3},
             {"moe_intermediate_size", 12},
             {"shared_expert_intermediate_size", 28},
             {"intermediate_size", 20},
             {"num_experts", 6},
             {"num_experts_per_tok", 3},
             {"mlp_only_layers", {1}}},
            3.88447,
            639.6132,
            {-1.163393, -0.347448, 0.513826, 1.308065}}},
          {"qwen3_moe",
           {{{"head_dim", 8},
             {"moe_intermediate_size", 12},
             {"num_experts", 8},
             {"num_experts_per_tok", 3},
             {"norm_topk_prob", true}},
            0.93048,
            42.9157,
            {-0.435216, -0.355496, -0.229398, -0.073373}}},
          {"olmoe",
           {{{"intermediate_size", 12}, {"num_experts", 8}, {"num_experts_per_tok", 3}, {"clip_qkv", 0.5}},
            4.07775,
            104.5611,
            {0.251875, 0.186325, 0.096468, -0.005975}}},
          {"granitemoe", {granite, -2.49507, 238.7640, {-0.689928, -1.048587, -1.270447, -1.326565}}},
          {"granitemoeshared", {shared, 1.83583, 76.9725, {-0.823586, -0.862527, -0.788942, -0.612433}}}};
}

/// The t-th tensor of the file, by name: 0.3 sin(1 + 0.7 t + 0.37 j) at its j-th number, 1 + 0.1 of it in norms.
void write_golden(const std::filesystem::path& dir, const Json& config) {
  const auto blank = make_model(config, "golden", torch::dtype(torch::kFloat32));
  formats::TensorMap tensors;
  for (const auto& item : blank->named_parameters()) tensors[item.key()] = item.value();
  tensors = formats::stacked(config["model_type"], std::move(tensors));
  double t = 0;
  for (auto& [name, tensor] : tensors) {
    const torch::Tensor j = torch::arange(tensor.numel(), torch::kFloat64);
    const torch::Tensor v = (1 + 0.7 * t++ + 0.37 * j).sin().view(tensor.sizes());
    const bool norm = name.find("layernorm") != std::string::npos || name.ends_with("norm.weight");
    tensor = (norm ? 1 + 0.1 * v : 0.3 * v).to(torch::kFloat32);
  }
  formats::write_model_folder(dir, {.config = config, .tensors = tensors});
}

Json config_of(const std::string& family, const Golden& golden) {
  Json config{{"model_type", family},
              {"vocab_size", 32},
              {"hidden_size", 16},
              {"num_hidden_layers", 2},
              {"num_attention_heads", 4},
              {"num_key_value_heads", 2},
              {"tie_word_embeddings", false},
              {"max_position_embeddings", 64}};
  config.update(golden.changes);
  return config;
}

/// Logits of the golden text [9, 32], and what its routers decided.
std::pair<torch::Tensor, std::vector<nn::RoutingRecord>> run_golden(const std::string& family, const Golden& golden) {
  const test::TemporaryFolder folder;
  write_golden(folder.path(), config_of(family, golden));
  const auto model = load_model(*open_checkpoint(folder.path()));
  std::vector<int64_t> ids;
  for (int64_t i = 0; i < 9; ++i) ids.push_back((7 * i + 3) % 32);
  std::vector<nn::RoutingRecord> records;
  nn::Pass pass;
  pass.routing = &records;
  torch::NoGradGuard no_grad;
  Text text;
  text.tokens = nn::RaggedBatch::from_sequences({ids});
  return {model->head().logits(model->hidden(text, pass)), records};
}

std::set<int64_t> chosen(const nn::RoutingRecord& record, int64_t row) {
  std::set<int64_t> experts;
  for (int64_t e = 0; e < record.weights.size(1); ++e) {
    if (record.weights[row][e].item<float>() > 0) experts.insert(e);
  }
  return experts;
}

TEST(SparseModels, GoldenLogits) {
  for (const auto& [family, golden] : goldens()) {
    const torch::Tensor logits = run_golden(family, golden).first.to(torch::kFloat64);
    // The figures have six digits; sums of 288 float32 logits.
    EXPECT_NEAR(logits.sum().item<double>(), golden.sum, 2e-4) << family;
    EXPECT_NEAR(logits.square().sum().item<double>(), golden.squares, 2e-6 * golden.squares) << family;
    for (int64_t i = 0; i < 4; ++i) EXPECT_NEAR(logits[8][i].item<double>(), golden.last[i], 5e-6) << family;
  }
}

TEST(SparseModels, GoldenChoices) {
  using Sets = std::vector<std::set<int64_t>>;
  const auto all = goldens();
  auto first_two = [&](const std::string& family) {
    const auto records = run_golden(family, all.at(family)).second;
    return Sets{chosen(records.front(), 0), chosen(records.front(), 1)};
  };
  EXPECT_EQ(first_two("mixtral"), (Sets{{0, 1}, {2, 3}}));
  EXPECT_EQ(first_two("olmoe"), (Sets{{5, 6, 7}, {5, 6, 7}}));
  EXPECT_EQ(first_two("qwen2_moe"), (Sets{{3, 4, 5}, {0, 1, 2}}));

  const auto records = run_golden("qwen2_moe", all.at("qwen2_moe")).second;
  ASSERT_EQ(records.size(), 2u);  // the layer between is dense
  EXPECT_EQ(records[0].owner, "base");
  EXPECT_EQ(records[1].site, "model.layers.2.mlp.gate");
  std::vector<float> weights;
  for (int64_t e = 0; e < 6; ++e) {
    const auto weight = records[0].weights[0][e].item<float>();
    if (weight > 0) weights.push_back(weight);
  }
  std::sort(weights.rbegin(), weights.rend());
  EXPECT_THAT(weights, testing::Pointwise(testing::FloatNear(1e-5), {0.67825f, 0.22759f, 0.06551f}));
}

TEST(SparseModels, WindowsOfQwen2Moe) {
  auto sliding = [](int64_t max_window_layers) {
    Json config = config_of("qwen2_moe", goldens()["qwen2_moe"]);
    config.update({{"use_sliding_window", true}, {"sliding_window", 4}, {"max_window_layers", max_window_layers}});
    return parse_decoder_config(config, "here").layer_is_sliding;
  };
  EXPECT_EQ(sliding(28), (std::vector<uint8_t>{1, 0, 1}));
  EXPECT_EQ(sliding(1), (std::vector<uint8_t>{1, 0, 0}));
  EXPECT_TRUE(sliding(0).empty());
}

TEST(SparseModels, RefusedConfigs) {
  auto parse = [](const Json& changes) {
    Json config = config_of("mixtral", goldens()["mixtral"]);
    if (!changes.is_null()) config.update(changes);
    return parse_decoder_config(config, "here");
  };
  EXPECT_EQ(parse({}).sparse->experts, 4);
  for (const auto& [changes, message] :
       {std::pair{Json{{"num_experts_per_tok", 5}}, "got 5, expected at most num_local_experts 4"},
        {Json{{"num_local_experts", 0}}, "got 0, expected an integer from 1"},
        {Json{{"num_experts", 3}}, "got 4, expected num_experts' 3"}}) {
    try {
      parse(changes);
      ADD_FAILURE() << message;
    } catch (const ConfigError& error) {
      EXPECT_THAT(error.what(), testing::HasSubstr(message));
    }
  }
}

TEST(SparseModels, AnUnevenOrDoubledStackIsRefused) {
  const auto names = *formats::expert_names("mixtral");
  const std::string block = "model.layers.0.mlp.experts.";
  EXPECT_THROW(formats::unstacked(names, {{block + "gate_up_proj", {2, 5, 4}}}, "here"), FormatError);
  EXPECT_THROW(formats::unstacked(names, {{block + "down_proj", {2, 4, 3}}, {block + "1.w2.weight", {4, 3}}}, "here"),
               FormatError);
}

}  // namespace
}  // namespace moesaic::models
