#include "moesaic/run/config.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "moesaic/base/yaml.h"
#include "moesaic/formats/adapter_folder.h"
#include "tests/temporary_folder.h"

namespace moesaic::run {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::Pair;

Json run_with(const Json& changes) {
  Json run = {{"model_name_or_path", "m"}, {"dataset", "d"}, {"output_dir", "o"}};
  run.merge_patch(changes);
  return run;
}

RunConfig parse(const Json& changes) { return parse_run_config(run_with(changes), "run"); }

std::string refusal(const Json& changes) {
  try {
    parse(changes);
  } catch (const UsageError& error) {
    return error.what();
  }
  return "nothing was thrown";
}

TEST(RunConfig, EveryDefaultIsTheStructsOwn) {
  const RunConfig run = parse(Json::object());
  const train::TrainConfig train;
  EXPECT_EQ(run.train.learning_rate, train.learning_rate);
  EXPECT_EQ(run.train.logging_steps, train.logging_steps);
  EXPECT_EQ(run.adapter.lora_rank, adapters::AdapterConfig{}.lora_rank);
  EXPECT_EQ(run.render.cutoff_len, data::RenderOptions{}.cutoff_len);
  EXPECT_EQ(run.adapter.num_experts, 10);
  EXPECT_FALSE(run.train.deterministic);
  EXPECT_TRUE(run.eval_tasks.empty());
  EXPECT_EQ(run.resolved["num_experts"], 10);
  EXPECT_EQ(run.resolved["router"]["dtype"], "float32");
}

TEST(RunConfig, KeysReachTheirFields) {
  const RunConfig run = parse({{"learning_rate", 0.5},
                               {"lora_rank", 3},
                               {"cutoff_len", 77},
                               {"template", "none"},
                               {"deterministic", true},
                               {"eval", {{"tasks", "rte.jsonl, cb"}, {"steps", 7}, {"limit", 9}}},
                               {"router", {{"top_k", 2}, {"dtype", "float32"}}}});
  EXPECT_EQ(run.train.learning_rate, 0.5);
  EXPECT_EQ(run.adapter.lora_rank, 3);
  EXPECT_EQ(run.render.cutoff_len, 77);
  EXPECT_EQ(run.render.template_name, "none");
  EXPECT_TRUE(run.train.deterministic);
  EXPECT_THAT(run.eval_tasks, ElementsAre("rte.jsonl", "cb"));
  EXPECT_EQ(run.train.task_eval_steps, 7);
  EXPECT_EQ(run.eval_limit, 9);
  EXPECT_EQ(run.adapter.router.type, "top_k");
}

TEST(RunConfig, ResolvedRunsAreRead) {
  const Json changes = {{"num_experts", {{"0-1", 2}, {"2", 4}}}, {"eval", {{"tasks", {"a.jsonl"}}, {"steps", 5}}}};
  const OrderedJson resolved = parse(changes).resolved;
  EXPECT_EQ(Json(parse_run_config(resolved, "run").resolved), Json(resolved));
}

TEST(RunConfig, PatternsAreTriedInTheFilesOrder) {
  const std::string text =
      "model_name_or_path: m\ndataset: d\noutput_dir: o\nfinetuning_type: lora\n"
      "rank_pattern: {v_proj: 3, \".*_proj\": 2, q_proj: 9}\n";
  OrderedJson keys = parse_yaml(text, "run.yaml");
  apply_overrides(keys, {"alpha_pattern={q_proj: 4, \"a.*\": 1, \".*\": 8}"});
  const RunConfig run = parse_run_config(keys, "run.yaml");
  const adapters::PatternValues<int64_t> ranks{{"v_proj", 3}, {".*_proj", 2}, {"q_proj", 9}};
  const adapters::PatternValues<double> alphas{{"q_proj", 4}, {"a.*", 1}, {".*", 8}};
  EXPECT_EQ(run.adapter.rank_pattern, ranks);
  EXPECT_EQ(run.adapter.alpha_pattern, alphas);
  EXPECT_EQ(run.adapter.rank_at("model.layers.0.self_attn.q_proj"), 2);
  // run.yaml of the output folder says the same.
  const RunConfig again = parse_run_config(parse_yaml(to_yaml(run.resolved), "again"), "again");
  EXPECT_EQ(again.adapter.rank_pattern, ranks);
  EXPECT_EQ(again.adapter.alpha_pattern, alphas);
}

TEST(RunConfig, EveryKeyStandsOnceAndIsDocumented) {
  std::set<std::string> names;
  const std::string markdown = run_keys_markdown();
  for (const RunKey& key : run_keys()) {
    EXPECT_TRUE(names.insert(key.name).second) << key.name << " stands twice";
    EXPECT_NE(std::string_view(key.info.help), "") << key.name;
    EXPECT_THAT(markdown, HasSubstr("| `" + key.name + "` |"));
  }
  const Json resolved = parse(Json::object()).resolved;
  for (const auto& [key, value] : resolved.items()) {
    EXPECT_TRUE(names.contains(key) || key == "router" || key == "eval") << key;
  }
}

TEST(RunConfig, ExpertsByLayer) {
  const RunConfig run = parse({{"num_experts", {{"0-2", 4}, {"3", 10}}}});
  EXPECT_EQ(run.adapter.num_experts, 10);
  EXPECT_THAT(run.adapter.layer_experts, ElementsAre(Pair(0, 4), Pair(1, 4), Pair(2, 4), Pair(3, 10)));
}

TEST(RunConfig, FeedforwardModules) {
  const Json targets = {"k_proj", "mlp.down_proj"};
  auto feedforward = [&](const Json& value) {
    return parse({{"finetuning_type", "mov"}, {"lora_target", targets}, {"feedforward_modules", value}})
        .adapter.feedforward;
  };
  using testing::VariantWith;
  using Names = std::vector<std::string>;
  EXPECT_THAT(feedforward(nullptr), VariantWith<Names>(ElementsAre("mlp.down_proj")));
  EXPECT_THAT(feedforward(Json::array()), VariantWith<Names>(ElementsAre()));
  EXPECT_THAT(feedforward({"k_proj"}), VariantWith<Names>(ElementsAre("k_proj")));
  EXPECT_THAT(feedforward(".*k_proj"), VariantWith<std::string>(".*k_proj"));
}

/// A folder of an adapter without tensors: what a run takes of it stands in its config.
class BegunAdapter : public testing::Test {
 protected:
  std::string write(const std::string& name, const Json& changes) const {
    adapters::AdapterConfig config;
    config.method = "molora";
    config.num_experts = 3;
    config.targets = std::vector<std::string>{"q_proj"};
    config.lora_rank = 2;
    config.lora_alpha = 6;
    config.use_rslora = true;
    config.router.type = "top_k";
    config.router.top_k = 2;
    config.router.temperature = 0.5;
    Json json = adapters::adapter_config_json(config);
    json.merge_patch(changes);
    formats::write_adapter_folder(folder_ / name, {OrderedJson(json), {}, ""});
    return (folder_ / name).string();
  }

  test::TemporaryFolder folder_;
};

TEST_F(BegunAdapter, GivesTheRunItsSettings) {
  const RunConfig run = parse({{"adapter_name_or_path", write("a", Json::object())}, {"lora_dropout", 0.5}});
  EXPECT_EQ(run.finetuning_type, "molora");
  EXPECT_EQ(run.adapter.num_experts, 3);
  EXPECT_EQ(run.adapter.lora_rank, 2);
  EXPECT_EQ(run.adapter.lora_alpha, 6);
  EXPECT_TRUE(run.adapter.use_rslora);
  EXPECT_EQ(run.adapter.router.top_k, 2);
  EXPECT_EQ(run.adapter.router.temperature, 0.5);
  EXPECT_EQ(run.adapter.lora_dropout, 0.5);
  EXPECT_EQ(run.resolved["lora_alpha"], 6);
  EXPECT_EQ(run.resolved["lora_target"], Json::array({"q_proj"}));
}

TEST_F(BegunAdapter, ARunThatSaysOtherwiseIsRefused) {
  const std::string dir = write("a", {{"alpha_pattern", {{"q_proj", 1}}}});
  auto refused = [&](Json changes) {
    changes["adapter_name_or_path"] = dir;
    return refusal(changes);
  };
  const std::string message = refused({{"lora_alpha", 16},
                                       {"use_rslora", false},
                                       {"alpha_pattern", {{"q_proj", 2}}},
                                       {"router", {{"top_k", 1}, {"temperature", 0.5}}}});
  EXPECT_THAT(message, HasSubstr("lora_alpha: got 16, it has 6"));
  EXPECT_THAT(message, HasSubstr("use_rslora: got false, it has true"));
  EXPECT_THAT(message, HasSubstr("alpha_pattern"));
  EXPECT_THAT(message, HasSubstr("router.top_k: got 1, it has 2"));
  EXPECT_THAT(message, testing::Not(HasSubstr("temperature")));
  EXPECT_THAT(refused({{"finetuning_type", "lora"}}), HasSubstr("finetuning_type: got \"lora\", it has \"molora\""));
  EXPECT_EQ(refused({{"num_experts", 3}, {"lora_alpha", 6.0}, {"router", {{"top_k", 2}}}}), "nothing was thrown");
}

TEST_F(BegunAdapter, GivesItsPatternsInTheirOrder) {
  const adapters::PatternValues<double> alphas{{"q_proj", 4}, {"a.*", 1}, {".*", 8}};
  adapters::AdapterConfig config;
  config.method = "lora";
  config.targets = std::vector<std::string>{"q_proj"};
  config.alpha_pattern = alphas;
  formats::write_adapter_folder(folder_ / "b", {adapters::adapter_config_json(config), {}, ""});
  const Json begun{{"adapter_name_or_path", (folder_ / "b").string()}};
  const RunConfig run = parse(begun);
  EXPECT_EQ(run.adapter.alpha_pattern, alphas);
  EXPECT_EQ(parse_run_config(parse_yaml(to_yaml(run.resolved), "again"), "again").adapter.alpha_pattern, alphas);
  OrderedJson other = run_with(begun);
  other["alpha_pattern"] = OrderedJson::parse(R"({".*": 8, "a.*": 1, "q_proj": 4})");
  EXPECT_THROW(parse_run_config(other, "run"), UsageError);
}

TEST_F(BegunAdapter, ARunThatGoesOnKeepsItsOwnWordsAndTakesTheRest) {
  const std::string dir = write("checkpoint-4", Json::object());
  const RunConfig run = parse({{"resume_from_checkpoint", dir}, {"lora_alpha", 16}});
  EXPECT_EQ(run.adapter.lora_alpha, 16);
  EXPECT_EQ(run.adapter.lora_rank, 2);
  EXPECT_EQ(run.adapter.router.top_k, 2);
}

TEST(RunConfig, EverythingWrongIsSaidAtOnce) {
  const std::string message = refusal({{"lerning_rate", 1},
                                       {"lora_rank", "four"},
                                       {"router", {{"top_k", -1}, {"type", "top_k"}}},
                                       {"cutoff_len", 1},
                                       {"mixture_rule", "equals"},
                                       {"lr_scheduler_type", "cosin"},
                                       {"optim", "sgd"},
                                       {"neftune_noise_alpha", 5},
                                       {"save_strategy", "best"},
                                       {"max_samples", 0},
                                       {"model_name_or_path", nullptr}});
  for (const char* part :
       {"run: 10 things are wrong", "'lerning_rate' (did you mean 'learning_rate'?)", "'lora_rank' has the wrong type",
        "router.top_k: got -1", "cutoff_len is 1", "mixture_rule is 'equals'", "did you mean 'cosine'",
        "optim: got 'sgd'", "neftune_noise_alpha: got 5", "save_strategy: got 'best'", "max_samples: got 0",
        "'model_name_or_path' is missing"}) {
    EXPECT_THAT(message, HasSubstr(part));
  }
  EXPECT_THAT(refusal({{"lora_rank", "four"}}), testing::Not(HasSubstr("things are wrong")));
}

class RunFile : public testing::Test {
 protected:
  OrderedJson read(const std::string& text, const std::vector<std::string>& overrides) const {
    write_file_atomically(folder_ / "run.yaml", "model_name_or_path: m\ndataset: d\noutput_dir: o\n" + text);
    return read_run(folder_ / "run.yaml", overrides);
  }
  test::TemporaryFolder folder_;
};

TEST_F(RunFile, AnAliasGivenAsOverrideWins) {
  EXPECT_EQ(read("learning_rate: 1.0e-3", {"lr=1e-4"})["learning_rate"], 1e-4);
  EXPECT_EQ(read("lr: 1.0e-3", {"learning_rate=1e-4"})["learning_rate"], 1e-4);
  EXPECT_EQ(read("lr: 1.0e-3", {"lr=1e-4", "lr=1e-5"})["learning_rate"], 1e-5);
  const OrderedJson router = read("router: {renormalize: true, top_k: 2}", {"router.topk_mode=mask"})["router"];
  EXPECT_EQ(router, OrderedJson({{"top_k", 2}, {"topk_mode", "mask"}}));
  EXPECT_EQ(read("router: {topk_mode: mask}", {"router.renormalize=true"})["router"]["topk_mode"], "renorm");
  // Two names in one file say nothing of which is meant.
  EXPECT_THAT([&] { read("lr: 1.0e-3\nlearning_rate: 1.0e-4", {}); },
              testing::ThrowsMessage<UsageError>(HasSubstr("got both 'lr' and 'learning_rate'")));
}

TEST(RunConfig, MovKeepsItsScalesUnderTopK) {
  const Json top_k{{"top_k", 2}};
  auto mode = [&](const Json& changes) { return parse(changes).adapter.router.topk_mode; };
  EXPECT_EQ(mode({{"finetuning_type", "mov"}, {"router", top_k}}), "residual");
  EXPECT_EQ(mode({{"finetuning_type", "mov"}, {"router", {{"top_k", 2}, {"topk_mode", "mask"}}}}), "mask");
  EXPECT_EQ(mode({{"finetuning_type", "mov"}}), "mask");  // soft: nothing is left out
  EXPECT_EQ(mode({{"finetuning_type", "molora"}, {"router", top_k}}), "mask");
  EXPECT_EQ(parse({{"finetuning_type", "mov"}, {"router", top_k}}).resolved["router"]["topk_mode"], "residual");
}

TEST(RunConfig, StrategiesSetTheirSteps) {
  EXPECT_EQ(parse({{"eval_strategy", "steps"}, {"logging_steps", 7}}).train.eval_steps, 7);
  EXPECT_EQ(parse({{"evaluation_strategy", "steps"}, {"eval_steps", 3}}).train.eval_steps, 3);
  EXPECT_EQ(parse({{"eval_strategy", "no"}, {"eval_steps", 3}}).train.eval_steps, 0);
  EXPECT_EQ(parse({{"save_strategy", false}}).train.save_steps, 0);
  EXPECT_TRUE(parse({{"eval_strategy", "epoch"}, {"early_stopping_steps", 2}}).eval_each_epoch);
  EXPECT_THAT(refusal({{"save_strategy", "epoch"}, {"max_batch_tokens", 64}, {"max_steps", 3}}),
              HasSubstr("how many steps an epoch has"));
}

TEST(RunConfig, ServicesOfReportToArePassedOver) {
  EXPECT_THAT(parse({{"report_to", "wandb"}}).train.report_to, ElementsAre("jsonl"));
  EXPECT_THAT(parse({{"report_to", {"tensorboard", "wandb"}}}).train.report_to, ElementsAre("tensorboard"));
  EXPECT_THAT(parse({{"report_to", "none"}}).train.report_to, ElementsAre("none"));
  EXPECT_THAT(refusal({{"report_to", "wanbd"}}), HasSubstr("report_to: got 'wanbd'"));
}

struct Mistake {
  Json changes;
  std::string message;
};
void PrintTo(const Mistake& mistake, std::ostream* out) { *out << mistake.changes.dump(); }

class Mistakes : public testing::TestWithParam<Mistake> {};

TEST_P(Mistakes, AreUsageErrors) { EXPECT_THAT(refusal(GetParam().changes), HasSubstr(GetParam().message)); }

INSTANTIATE_TEST_SUITE_P(
    Runs, Mistakes,
    testing::Values(Mistake{{{"num_experts", {{"4-2", 3}}}}, "'4-2': 3"},
                    Mistake{{{"num_experts", {{"0-999999999", 3}}}}, "'0-999999999'"},
                    Mistake{{{"num_experts", {{"-1", 3}}}}, "'-1': 3"},
                    Mistake{{{"num_experts", {{"0", "four"}}}}, "'0': \"four\""},
                    Mistake{{{"num_experts", {{"0-3", 2}, {"2", 2}}}}, "layer 2 stands twice"},
                    Mistake{{{"num_experts", Json::array({4})}}, "num_experts"},
                    Mistake{{{"num_experts", {{"0", 5000}}}}, "num_experts: got 5000"},
                    Mistake{{{"finetuning_type", "lora"}, {"num_experts", {{"0", 2}}}}, "which has one expert"},
                    Mistake{{{"router", {{"dtype", "float16"}}}}, "routers compute in float32"},
                    Mistake{{{"router", {{"dtype", 32}}}}, "dtype"},
                    Mistake{{{"router", {{"head_wise", false}}}}, "only mov has vectors per head"},
                    Mistake{{{"on_bad_row", "drop"}}, "on_bad_row: got 'drop'"},
                    Mistake{{{"router", 3}}, "router: got 3"},
                    Mistake{{{"quantization_bit", 4}}, "quantization_bit: got 4"},
                    Mistake{{{"deterministic", 1.5}}, "deterministic"}, Mistake{{{"eval", "rte"}}, "eval: got \"rte\""},
                    Mistake{{{"eval", {{"tasks", {"a"}}, {"limit", -1}}}}, "limit -1"},
                    Mistake{{{"eval", {{"limit", 3}}}}, "got no tasks"},
                    Mistake{{{"finetuning_type", "molra"}}, "Did you mean 'molora'?"},
                    Mistake{{{"finetuning_type", "full"}, {"bf16", true}}, "weights must hold small updates"},
                    Mistake{{{"finetuning_type", "full"}, {"adapter_name_or_path", "a"}}, "begin there"},
                    Mistake{{{"stage", "dpo"}}, "stage: got 'dpo'"},
                    Mistake{{{"train_adapters", true}}, "expected finetuning_type calm"},
                    Mistake{{{"finetuning_type", "calm"}, {"init", "random"}}, "expected pretrained and none"},
                    Mistake{{{"feedforward_modules", {"down_proj"}}}, "expected it for ia3 and mov"},
                    Mistake{{{"finetuning_type", "ia3"}, {"feedforward_modules", {"o_proj"}}}, "with lora_target"}));

}  // namespace
}  // namespace moesaic::run
