#include "moesaic/run/open.h"
#include "moesaic/models/registry.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "moesaic/models/causal_lm.h"
#include "moesaic/run/compose.h"
#include "tests/compose/small_models.h"
#include "tests/temporary_folder.h"

namespace moesaic::run {
namespace {

namespace fs = std::filesystem;
using testing::AllOf;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::ThrowsMessage;

/// A model, an adapter of it and a composition with it as the anchor.
class OpenTest : public testing::Test {
 protected:
  void SetUp() override {
    test::write_small_model(path("model"), "gpt2", 20, 3, 1);
    test::write_small_model(path("aug"), "llama3", 14, 4, 2);
    adapters::AdapterConfig config;
    config.method = "lora";
    config.lora_rank = 2;
    config.targets = std::vector<std::string>{"q_proj"};
    const auto model = models::CausalLM::load(*models::open_checkpoint(path("model")), {});
    adapters::Adapter::create(config, model->sites(), torch::kCPU, 1)->save(path("lora"));
    fs::create_directory(path("a=b"));
  }
  std::string path(const std::string& name) const { return (folder_.path() / name).string(); }
  Plan compose() const {
    return compose_models({{"anchor", path("model")}, {"augmenting", path("aug")}, {"output_dir", path("calm")}},
                          "keys", 7, {});
  }

  test::TemporaryFolder folder_;
};

TEST_F(OpenTest, AdapterReferences) {
  const AdapterReference plain = parse_adapter_reference(path("lora"));
  EXPECT_EQ(plain.name, "lora");
  EXPECT_EQ(plain.dir, path("lora"));
  EXPECT_EQ(plain.scale, 1.0);
  const AdapterReference named = parse_adapter_reference("mine=" + path("lora") + "/:-0.5");
  EXPECT_EQ(named.name, "mine");
  EXPECT_EQ(named.scale, -0.5);
  EXPECT_EQ(parse_adapter_reference(path("lora") + "/").name, "lora");
  EXPECT_EQ(parse_adapter_reference(path("a=b")).name, "a=b");  // a path, no name
  for (const char* scale : {"much", "1x", "", "inf"}) {
    EXPECT_THAT([&] { parse_adapter_reference(path("lora") + ":" + scale); },
                ThrowsMessage<UsageError>(HasSubstr("is no number")))
        << scale;
  }
  EXPECT_THAT([&] { parse_adapter_reference(path("none")); }, ThrowsMessage<UsageError>(HasSubstr("is no folder")));
}

TEST_F(OpenTest, AnAdapterKnowsItsBase) {
  auto trained_on = [&](const std::string& dir, const std::string& base) {
    fs::create_directories(path(dir));
    write_file_atomically(path(dir) + "/adapter_config.json", Json{{"base_model_name_or_path", base}}.dump());
  };
  trained_on("whole", path("model"));
  EXPECT_EQ(base_of(path("whole")), path("model"));
  trained_on("beside", "../model");
  EXPECT_EQ(base_of(path("beside")), path("model"));
  // Of a run: from where it was started, its checkpoints, too; not when its folder was moved.
  trained_on("work/runs/mo/checkpoint-5", "m");
  trained_on("work/runs/mo", "m");
  fs::create_directory_symlink(path("model"), path("work/m"));
  write_file_atomically(path("work/runs/mo/run.yaml"), "output_dir: runs/mo/\n");
  EXPECT_EQ(base_of(path("work/runs/mo")), path("work/m"));
  EXPECT_EQ(base_of(path("work/runs/mo/checkpoint-5/")), path("work/m"));
  fs::rename(path("work/runs/mo"), path("work/runs/moved"));
  EXPECT_THAT([&] { base_of(path("work/runs/moved")); },
              ThrowsMessage<UsageError>(AllOf(HasSubstr("base model m is not there: looked for m, "),
                                              HasSubstr("work/runs/moved/m"), HasSubstr("--model"))));
  trained_on("nameless", "");
  EXPECT_THAT([&] { base_of(path("nameless")); },
              ThrowsMessage<UsageError>(HasSubstr("names no base_model_name_or_path")));
}

TEST_F(OpenTest, WhatAUserNames) {
  auto trained_on = [&](const std::string& dir, const std::string& base) {
    fs::create_directories(path(dir));
    write_file_atomically(path(dir) + "/adapter_config.json", Json{{"base_model_name_or_path", path(base)}}.dump());
    return path(dir);
  };
  const std::string a = trained_on("a", "model"), b = trained_on("b", "aug/../model"), c = trained_on("c", "aug");
  const ModelReference alone = resolve_model(a, "", {});
  EXPECT_EQ(alone.model, path("model"));
  ASSERT_EQ(alone.adapters.size(), 1u);
  EXPECT_EQ(alone.adapters[0].name, "a");
  EXPECT_EQ(resolve_model(a, path("aug"), {}).model, path("aug"));  // --model wins
  EXPECT_EQ(resolve_model("", "", {"x=" + a + ":0.5", b}).model, path("model"));
  EXPECT_EQ(resolve_model(a, "", {b}).adapters.size(), 2u);
  EXPECT_EQ(resolve_model(path("model"), "", {c}).model, path("model"));
  EXPECT_TRUE(resolve_model(path("model"), "", {}).adapters.empty());
  EXPECT_THAT([&] { resolve_model(a, "", {c}); }, ThrowsMessage<UsageError>(HasSubstr("adapters of different bases")));
  EXPECT_THAT([&] { resolve_model(path("model"), path("aug"), {}); },
              ThrowsMessage<UsageError>(HasSubstr("got two models")));
  EXPECT_THAT([&] { resolve_model("", "", {}); }, ThrowsMessage<UsageError>(HasSubstr("--model is required")));
}

TEST_F(OpenTest, AModelAndItsAdapters) {
  const Opened opened = open(path("model"), {parse_adapter_reference(path("lora"))});
  EXPECT_EQ(opened.model->facts().width, 20);
  EXPECT_TRUE(opened.model->structure().is_null());
  EXPECT_EQ(opened.model->column("lora"), 0);
  EXPECT_EQ(opened.chat_template, nullptr);
  ASSERT_TRUE(opened.tokenizer && opened.tokenizer->eos_id());
  EXPECT_THAT(opened.eos_ids(), testing::Contains(*opened.tokenizer->eos_id()));
  EXPECT_THAT([&] { open(path("none")); }, ThrowsMessage<UsageError>(HasSubstr("no such file or folder")));
  EXPECT_THAT([&] { open(path("model"), {{"x", path("lora")}, {"x", path("lora")}}); },
              ThrowsMessage<UsageError>(HasSubstr("'x'")));
}

TEST_F(OpenTest, ACompositionIsOpenedAlike) {
  compose();
  const Opened opened = open(path("calm"), {{"lora", path("lora")}});
  EXPECT_EQ(opened.model->facts().width, 20);
  EXPECT_FALSE(opened.model->structure().is_null());
  EXPECT_EQ(opened.checkpoint->path(), path("model"));
  EXPECT_EQ(opened.model->column("lora"), 0);
}

TEST_F(OpenTest, EndsOfAnswersAreAUnion) {
  const Opened opened = open(path("model"));
  const int64_t own = *opened.tokenizer->eos_id();  // 1; the config's is 2
  EXPECT_THAT(eos_ids(*opened.model, {{"eos_token_id", {3, 5, "seven"}}}, opened.tokenizer.get()),
              ElementsAre(own, 2, 3, 5));
  EXPECT_THAT(eos_ids(*opened.model, {{"eos_token_id", 4}}, nullptr), ElementsAre(2, 4));
}

TEST_F(OpenTest, EndsOfTurnsAreKnownByTheirText) {
  const Opened opened = open(path("model"));
  Json json = Json::parse(opened.tokenizer->json());
  auto with = [&](std::vector<const char*> texts) {
    Json changed = json;
    int64_t id = 1000;
    changed["added_tokens"] = Json::array();
    for (const char* text : texts) {
      changed["added_tokens"].push_back({{"id", id},
                                         {"content", text},
                                         {"single_word", false},
                                         {"lstrip", false},
                                         {"rstrip", false},
                                         {"normalized", false},
                                         {"special", true}});
      changed["model"]["vocab"][text] = id++;
    }
    return tokenizer::Tokenizer(changed.dump(), Json::object(), "test");
  };
  const tokenizer::Tokenizer llama = with({"<|eot_id|>", "<|other|>", "<|im_end|>", "<|bye|>"});
  EXPECT_THAT(eos_ids(*opened.model, Json::object(), &llama), ElementsAre(2, 1000, 1002));
  const tokenizer::ChatTemplate chat("{% for m in messages %}{{ m.content }}<|bye|>\n{% endfor %}", llama);
  EXPECT_THAT(eos_ids(*opened.model, Json::object(), &llama, &chat), ElementsAre(2, 1000, 1002, 1003));
  // In the harmony format <|end|> ends a message, not the answer.
  const tokenizer::Tokenizer harmony = with({"<|end|>", "<|return|>", "<|call|>"});
  EXPECT_THAT(eos_ids(*opened.model, Json::object(), &harmony), ElementsAre(2));
}

TEST_F(OpenTest, ARequestIsARowOfWeights) {
  const Opened opened = open(path("model"), {{"a", path("lora")}, {"b", path("lora")}, {"c", path("lora")}});
  auto row = [&](const std::string& json) { return mixture_row(*opened.model, OrderedJson::parse(json), "f:3"); };
  EXPECT_THAT(row(R"({"c": 0.25, "a": -1})"), ElementsAre(-1, 0, 0.25));
  EXPECT_THAT(row(R"(["b", "c"])"), ElementsAre(0, 1, 1));
  EXPECT_THAT(row("{}"), ElementsAre(0, 0, 0));
  auto refusal = [&](const std::string& json, const std::string& message) {
    EXPECT_THAT([&] { row(json); }, ThrowsMessage<UsageError>(testing::AllOf(HasSubstr("f:3: "), HasSubstr(message))));
  };
  refusal(R"({"d": 1})", "expected one of a, b, c");
  refusal(R"({"a": "1"})", "expected numbers");
  refusal(R"(["a", 1])", "expected names");
  refusal(R"("a")", "or a list of names");
  const OrderedJson infinite = {{"a", std::numeric_limits<double>::infinity()}};
  EXPECT_THAT([&] { mixture_row(*opened.model, infinite, "f:3"); }, ThrowsMessage<UsageError>(HasSubstr("not finite")));
}

TEST_F(OpenTest, WhatWasComposedIsSaid) {
  const std::string text = compose().text();
  EXPECT_THAT(text, HasSubstr("anchor     " + path("model") + " (llama, 3 blocks of width 20)"));
  EXPECT_THAT(text, HasSubstr("another tokenizer, aligned by word, mask causal"));
  EXPECT_THAT(text, HasSubstr("           block 3 -> anchor block 2\n"));  // a quarter of four blocks, at the end
  EXPECT_THAT(text, HasSubstr("model_name_or_path=" + path("calm")));
  auto refusal = [&](const Json& keys) {
    try {
      compose_models(keys, "keys", 7, {});
    } catch (const UsageError& error) {
      return std::string(error.what());
    }
    return std::string("nothing was thrown");
  };
  EXPECT_THAT(refusal({{"anchor", "a"}}), HasSubstr("keys: key 'augmenting' is missing"));
  EXPECT_THAT(refusal({{"augmenting", "a"}, {"output_dir", "o"}}), HasSubstr("keys: key 'anchor' is missing"));
  EXPECT_THAT(refusal({{"augmentin", "a"}}), HasSubstr("augmenting"));
  EXPECT_THAT(refusal("models"), HasSubstr("expected keys and values"));
}

}  // namespace
}  // namespace moesaic::run
