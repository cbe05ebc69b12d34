#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include "moesaic/adapters/adapter.h"
#include "moesaic/adapters/mix.h"
#include "moesaic/export/merge.h"
#include "moesaic/export/peft.h"
#include "moesaic/models/causal_lm.h"
#include "moesaic/models/registry.h"
#include "tests/temporary_folder.h"

namespace moesaic::exporting {
namespace {

namespace fs = std::filesystem;
using testing::HasSubstr;

/// A folder with a tiny random model, and room for adapters and results.
class Export : public testing::Test {
 protected:
  Export() {
    config_ = {{"architectures", {"Qwen2ForCausalLM"}},
               {"model_type", "qwen2"},
               {"vocab_size", 29},
               {"hidden_size", 12},
               {"intermediate_size", 20},
               {"num_hidden_layers", 2},
               {"num_attention_heads", 3},
               {"num_key_value_heads", 1},
               {"max_position_embeddings", 64},
               {"rms_norm_eps", 1e-6},
               {"tie_word_embeddings", false},
               {"rope_theta", 10000.0},
               {"hidden_act", "silu"}};
    models::CausalLM model(models::parse_decoder_config(config_, "test"), torch::dtype(torch::kFloat32));
    torch::manual_seed(3);
    torch::NoGradGuard no_grad;
    formats::ModelFolder files;
    files.config = config_;
    for (auto& item : model.named_parameters()) {
      item.value().normal_(item.key().find("norm") != std::string::npos ? 1.0 : 0.0, 0.2);
      files.tensors[item.key()] = item.value().detach();
    }
    formats::write_model_folder(base(), files);
  }

  fs::path base() const { return folder_ / "base"; }

  /// A random adapter of `method` in a folder of its own.
  fs::path make_adapter(const std::string& method, int64_t experts, std::vector<std::string> targets,
                        std::vector<std::string> feedforward = {}) {
    adapters::AdapterConfig config;
    config.method = method;
    config.num_experts = experts;
    config.lora_rank = 2;
    config.lora_alpha = 6;
    if (method == "lora") config.rank_pattern = {{"o_proj", 3}};
    config.targets = std::move(targets);
    config.feedforward = std::move(feedforward);
    auto model = models::CausalLM::load(*models::open_checkpoint(base()), {});
    const auto adapter = adapters::Adapter::create(config, model->sites(), torch::kCPU, 5);
    torch::NoGradGuard no_grad;
    for (auto& parameter : adapter->parameters()) parameter.tensor.add_(torch::randn_like(parameter.tensor), 0.3);
    const fs::path dir = folder_ / (method + std::to_string(experts));
    adapter->save(dir);
    return dir;
  }

  torch::Tensor logits(const fs::path& model_dir, const fs::path& adapter_dir = {}) const {
    torch::NoGradGuard no_grad;
    auto model = models::CausalLM::load(*models::open_checkpoint(model_dir), {});
    std::shared_ptr<adapters::Adapter> adapter;
    if (!adapter_dir.empty()) adapter = adapters::Adapter::open(adapter_dir, model->sites(), torch::kCPU, "");
    nn::Pass pass;
    const auto batch = nn::RaggedBatch::from_sequences({{1, 5, 9, 2, 28, 7}, {3, 3}});
    return model->head().logits(model->hidden({batch}, pass));
  }

  void expect_merge_keeps_logits(const fs::path& adapter_dir) {
    auto folder = model_folder(*models::open_checkpoint(base()), torch::kFloat32);
    merge_adapter(folder, adapter_dir);
    const fs::path merged = folder_ / "merged";
    formats::write_model_folder(merged, folder);
    const auto expected = logits(base(), adapter_dir);
    EXPECT_LT((logits(merged) - expected).abs().max().item<double>(), 1e-4);
    EXPECT_GT((logits(base()) - expected).abs().max().item<double>(), 1e-2);  // the adapter does something
  }

  const test::TemporaryFolder folder_;
  Json config_;
};

const std::vector<std::string> kAllLinear{"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"};
const std::vector<std::string> kScaled{"k_proj", "v_proj", "down_proj"};

TEST_F(Export, MergedLoraHasTheSameLogits) { expect_merge_keeps_logits(make_adapter("lora", 1, kAllLinear)); }
TEST_F(Export, MergedIa3HasTheSameLogitsWithBiases) {
  expect_merge_keeps_logits(make_adapter("ia3", 1, kScaled, {"down_proj"}));
}
TEST_F(Export, OneExpertMergesLikeItsBaseline) {
  expect_merge_keeps_logits(make_adapter("molora", 1, kAllLinear));
  expect_merge_keeps_logits(make_adapter("mov", 1, kScaled, {"down_proj"}));
}

TEST_F(Export, AMixtureIsRefusedWithTheReason) {
  auto folder = model_folder(*models::open_checkpoint(base()), torch::kFloat32);
  try {
    merge_adapter(folder, make_adapter("molora", 3, kAllLinear));
    FAIL() << "expected a UsageError";
  } catch (const UsageError& error) {
    EXPECT_THAT(error.what(), HasSubstr("molora with 3 experts"));
    EXPECT_THAT(error.what(), HasSubstr("for every token"));
  }
}

TEST_F(Export, WrongBaseListsEveryOffender) {
  const auto adapter = make_adapter("lora", 1, kAllLinear);
  auto folder = model_folder(*models::open_checkpoint(base()), torch::kFloat32);
  folder.tensors.erase("model.layers.0.self_attn.q_proj.weight");
  folder.tensors["model.layers.1.mlp.up_proj.weight"] = torch::zeros({4, 4});
  try {
    merge_adapter(folder, adapter);
    FAIL() << "expected a DataError";
  } catch (const DataError& error) {
    EXPECT_THAT(error.what(), HasSubstr("model.layers.0.self_attn.q_proj.weight, a matrix of the model"));
    EXPECT_THAT(error.what(), HasSubstr("up_proj: got lora_A [2, 12] and lora_B [20, 2], expected [r, 4] and [4, r]"));
  }
}

TEST_F(Export, EveryExpertBecomesAnAdapterOfItsOwn) {
  for (const auto& [method, type, targets] :
       {std::tuple("molora", "LORA", kAllLinear), std::tuple("mov", "IA3", kScaled)}) {
    const bool scales = std::string(method) == "mov";
    const auto source =
        make_adapter(method, 3, targets, scales ? std::vector<std::string>{"down_proj"} : std::vector<std::string>{});
    const fs::path out = folder_ / (std::string("peft-") + method);
    const auto written = export_peft(source, out);
    ASSERT_EQ(written.size(), 3u);
    const auto original = formats::read_adapter_folder(source);
    const formats::SafetensorsFile routers(out / "router.safetensors");
    EXPECT_EQ(routers.names().size(), 2 * targets.size());
    for (int64_t e = 0; e < 3; ++e) {
      const auto expert = formats::read_adapter_folder(written[e]);
      EXPECT_EQ(expert.config["peft_type"], type);
      EXPECT_FALSE(expert.config.contains("moesaic"));
      const std::string down = "model.layers.1.mlp.down_proj.";
      if (scales) {
        EXPECT_EQ(expert.tensors.at(down + "ia3_l").sizes(), (std::vector<int64_t>{1, 20}));
        EXPECT_EQ(expert.tensors.at("model.layers.0.self_attn.v_proj.ia3_l").sizes(), (std::vector<int64_t>{4, 1}));
        EXPECT_TRUE(
            torch::equal(expert.tensors.at(down + "ia3_l").flatten(), original.tensors.at(down + "mov.weight")[e]));
      } else {
        EXPECT_TRUE(
            torch::equal(expert.tensors.at(down + "lora_B.weight"), original.tensors.at(down + "lora_B.weight")[e]));
      }
      // It loads as an ordinary adapter: every tensor claimed, every target served.
      EXPECT_GT((logits(base(), written[e]) - logits(base())).abs().max().item<double>(), 1e-3);
    }
  }
}

TEST_F(Export, AMixTakenApartIsWhatItWasMadeOf) {
  const std::vector<fs::path> parts{make_adapter("lora", 1, kAllLinear), folder_ / "other"};
  fs::rename(make_adapter("molora", 2, {"q_proj", "down_proj"}), folder_ / "two");
  fs::rename(export_peft(folder_ / "two", folder_ / "apart").front(), parts[1]);
  auto mix = adapters::mix({adapters::read_mix_part(parts[0]), adapters::read_mix_part(parts[1])}, {});
  mix.tensors.merge(adapters::arrow_routers(mix));
  formats::write_adapter_folder(folder_ / "mix", mix);
  const auto written = export_peft(folder_ / "mix", folder_ / "again");
  ASSERT_EQ(written.size(), 2u);
  for (size_t e = 0; e < 2; ++e) {
    EXPECT_TRUE(logits(base(), written[e]).allclose(logits(base(), parts[e]), 1e-4, 1e-5)) << e;
    EXPECT_FALSE(logits(base(), written[e]).allclose(logits(base(), parts[1 - e]), 1e-2, 1e-2)) << e;
  }
}

TEST_F(Export, FolderOfAModelIsTheModel) {
  const auto folder = model_folder(*models::open_checkpoint(base()), torch::kFloat32);
  formats::write_model_folder(folder_ / "copy", folder);
  EXPECT_TRUE(torch::equal(logits(folder_ / "copy"), logits(base())));
}

TEST_F(Export, KeepsTheNumberFormatOfTheBase) {
  for (const auto dtype : {torch::kFloat32, torch::kBFloat16, torch::kHalf}) {
    auto folder = model_folder(*models::open_checkpoint(base()), dtype);
    const fs::path dir = folder_ / c10::toString(dtype);
    formats::write_model_folder(dir, folder);
    EXPECT_EQ(stored_dtype(*models::open_checkpoint(dir)), dtype);
  }
}

TEST_F(Export, AHeadThatReplacesATiedOneIsMergedAsOneOfItsOwn) {
  auto tied = model_folder(*models::open_checkpoint(base()), torch::kFloat32);
  tied.tensors.erase("lm_head.weight");
  tied.config["tie_word_embeddings"] = true;
  formats::write_model_folder(folder_ / "tied", tied);
  auto adapter = formats::read_adapter_folder(make_adapter("lora", 1, {"q_proj"}));
  adapter.config["modules_to_save"] = {"embed_tokens"};
  adapter.tensors["model.embed_tokens.weight"] = torch::randn({29, 12});
  formats::write_adapter_folder(folder_ / "saved", adapter);
  auto merged = model_folder(*models::open_checkpoint(folder_ / "tied"), torch::kFloat32);
  merge_adapter(merged, folder_ / "saved");
  formats::write_model_folder(folder_ / "merged", merged);
  EXPECT_FALSE(merged.config["tie_word_embeddings"].get<bool>());
  const auto expected = logits(folder_ / "tied", folder_ / "saved");
  EXPECT_TRUE(logits(folder_ / "merged").allclose(expected, 1e-4, 1e-5));
  EXPECT_FALSE(logits(folder_ / "tied").allclose(expected, 1e-2, 1e-2));
}

}  // namespace
}  // namespace moesaic::exporting
