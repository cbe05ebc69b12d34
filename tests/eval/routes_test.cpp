#include "moesaic/eval/routes.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "moesaic/adapters/adapter.h"
#include "tests/compose/small_models.h"

namespace moesaic::eval {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

EvalModel view(compose::Composition& composition) { return {composition, *composition.anchor_member().tokenizer}; }

TEST(RouteText, AddedIsTheShareOfWhatTheAnchorHad) {
  // One connection behind block 1: what it adds is the difference between that block's output and block 2's input.
  const auto composition = test::two_tokenizers({{{1, 1}}});
  const auto ids = composition->anchor_member().tokenizer->encode("The keeper wrote until tomorrow", false);
  const TextRoutes text = route_text(view(*composition), ids);
  torch::NoGradGuard no_grad;
  torch::Tensor own, h;
  nn::Pass pass;
  pass.run = [&](nn::Block& block, const torch::Tensor& input, nn::Pass& of_block) {
    const torch::Tensor output = block.forward(input, of_block);
    if (of_block.place == "anchor" && block.index() == 1) own = output;
    if (of_block.place == "anchor" && block.index() == 2) h = input;
    return output;
  };
  composition->hidden({nn::RaggedBatch::from_sequences({ids}), {{std::ssize(ids)}}}, pass);
  const auto expected = (h - own).norm(2, 1) / own.norm(2, 1);
  ASSERT_EQ(text.connections.size(), 1u);
  ASSERT_EQ(text.connections[0].added.size(), ids.size());
  for (size_t t = 0; t < ids.size(); ++t) {
    EXPECT_NEAR(text.connections[0].added[t], expected[static_cast<int64_t>(t)].item<float>(), 1e-4) << t;
  }
}

TEST(RouteText, WeightsAreOfWhatIsSeenAndTokensSpellTheText) {
  const auto composition = test::two_tokenizers();
  const std::string written = "The keeper 👍🏽 wrote until";
  const auto ids = composition->anchor_member().tokenizer->encode(written, false);
  const TextRoutes text = route_text(view(*composition), ids);
  EXPECT_EQ(fmt::format("{}", fmt::join(text.tokens, "")), written);
  ASSERT_EQ(text.streams.size(), 1u);
  // Everything is committed at the end; the augmenting model has its BOS in front.
  EXPECT_EQ(fmt::format("{}", fmt::join(text.streams[0].tokens, "")), "<s>" + written);
  EXPECT_EQ(text.streams[0].visible.back(), std::ssize(text.streams[0].tokens));
  ASSERT_EQ(text.connections.size(), 2u);
  for (const auto& connection : text.connections) {
    ASSERT_EQ(connection.weights.size(), 2u) << "heads";
    for (const auto& head : connection.weights) {
      for (size_t t = 0; t < ids.size(); ++t) {
        ASSERT_EQ(std::ssize(head[t]), text.streams[0].visible[t]);
        EXPECT_NEAR(std::accumulate(head[t].begin(), head[t].end(), 0.0), 1.0, 1e-5);
      }
    }
  }
}

TEST(RouteTask, MeansOverAllPositions) {
  const auto composition = test::two_tokenizers();
  Task task;
  task.name = "task";
  for (const auto& [prompt, answer] : {std::pair("The keeper wrote", "until dawn"), {"every name", "into a book"}}) {
    Item& item = task.items.emplace_back();
    item.messages = OrderedJson::array();
    item.messages.push_back({{"role", "user"}, {"content", prompt}});
    item.targets = {answer};
  }
  const TaskRoutes both = route_task(view(*composition), task, {});
  EXPECT_EQ(both.questions, 2);
  ASSERT_EQ(both.connections.size(), 2u);
  // The same from one question at a time: nothing depends on who shares the batch.
  ConnectionUse sum;
  int64_t tokens = 0;
  for (const Item& item : task.items) {
    Task single;
    single.items = {item};
    const TaskRoutes one = route_task(view(*composition), single, {});
    const ConnectionUse& use = one.connections[1];
    tokens += one.tokens;
    sum.rows += use.rows;
    sum.readers += use.readers;
    sum.added += use.added;
    sum.entropy += use.entropy;
    sum.spread += use.spread;
    sum.first += use.first;
  }
  const ConnectionUse& use = both.connections[1];
  EXPECT_EQ(both.tokens, tokens);
  EXPECT_EQ(use.rows, tokens);
  EXPECT_EQ(use.readers, sum.readers);
  EXPECT_NEAR(use.added, sum.added, 1e-3 * sum.added);
  EXPECT_NEAR(use.entropy, sum.entropy, 1e-3 * sum.entropy);
  EXPECT_NEAR(use.first, sum.first, 1e-3 * sum.first);
  EXPECT_NEAR(use.spread, sum.spread, 1e-3 * sum.spread);
  EXPECT_GT(use.spread, 0.0);
  EXPECT_LE(use.spread, static_cast<double>(use.choosers));

  const OrderedJson json = routes_json("calm", *composition, {both});
  EXPECT_NEAR(json["tasks"]["task"]["connections"][1]["added"].get<double>(), use.added / use.rows, 1e-4);
  EXPECT_NEAR(json["tasks"]["task"]["connections"][1]["first_share"].get<double>(), use.first / use.readers, 1e-4);
  EXPECT_TRUE(json["text"].is_null());
}

TEST(RouteTask, UniformAttentionHasTheLargestEntropy) {
  // W_Q = 0: every score is 0 and each of c(t) tokens gets 1 / c(t).
  const auto composition = test::two_tokenizers({{{1, 1}}, "token"});
  for (auto& item : composition->named_parameters()) {
    torch::NoGradGuard no_grad;
    if (item.key().find("q_proj") != std::string::npos) item.value().zero_();
  }
  Task task;
  Item& item = task.items.emplace_back();
  item.messages = OrderedJson::array();
  item.messages.push_back({{"role", "user"}, {"content", "The keeper wrote"}});
  item.targets = {"until dawn"};
  const ConnectionUse use = route_task(view(*composition), task, {}).connections.at(0);
  EXPECT_GT(use.choosers, 3);
  EXPECT_NEAR(use.spread, static_cast<double>(use.choosers), 1e-5);
}

/// A mixture of low-rank adapters with numbers that show.
std::shared_ptr<adapters::Adapter> mixture(nn::Sites& sites, int64_t experts) {
  adapters::AdapterConfig config;
  config.method = "molora";
  config.num_experts = experts;
  config.lora_rank = 2;
  config.targets = std::vector<std::string>{"q_proj", "v_proj"};
  const auto adapter = adapters::Adapter::create(config, sites, torch::kCPU, 5);
  torch::NoGradGuard no_grad;
  torch::manual_seed(experts);
  for (const auto& parameter : adapter->parameters()) parameter.tensor.normal_(0, 0.3);
  return adapter;
}

void attach(models::LanguageModel& model, const std::string& name, int64_t experts) {
  model.attach(name, mixture(*model.parts().front().sites, experts));
}

Task one_task() {
  Task task;
  task.name = "task";
  Item& item = task.items.emplace_back();
  item.messages = OrderedJson::array();
  item.messages.push_back({{"role", "user"}, {"content", "The keeper wrote"}});
  item.targets = {"until dawn"};
  return task;
}

TEST(RoutesJson, MixturesOfDifferentSizesAreKeptApart) {
  const auto member = test::member("gpt2", 20, 3, 1);
  attach(*member.model, "a4", 4);
  attach(*member.model, "a8", 8);
  const EvalModel model{*member.model, *member.tokenizer};
  const TaskRoutes routes = route_task(model, one_task(), {});
  const OrderedJson json = routes_json("base", *member.model, {routes, routes});
  EXPECT_EQ(json["adapters"], (OrderedJson{"a4", "a8"}));
  EXPECT_TRUE(json["structure"].is_null());
  const std::string site = "model.layers.0.self_attn.q_proj";
  EXPECT_EQ(json["routers"]["a4"][site]["experts"], 4);
  EXPECT_EQ(json["routers"]["a8"][site]["experts"], 8);
  for (const auto& [owner, sites] : json["tasks"]["task"]["routers"].items()) {
    for (const auto& [name, figures] : sites.items()) {
      const auto mean = figures["mean_prob"].get<std::vector<double>>();
      EXPECT_NEAR(std::accumulate(mean.begin(), mean.end(), 0.0), 1.0, 1e-5) << owner << name;
    }
  }
  EXPECT_NEAR(json["similarity"]["cosine"][0][1].get<double>(), 1.0, 1e-6);
}

TEST(RoutesJson, ACompositionHasBoth) {
  const auto composition = test::two_tokenizers();
  attach(*composition, "mixture", 3);
  const auto ids = composition->anchor_member().tokenizer->encode("The keeper wrote", false);
  const TextRoutes text = route_text(view(*composition), ids);
  const TaskRoutes task = route_task(view(*composition), one_task(), {});
  const OrderedJson json = routes_json("calm", *composition, {task}, &text);
  EXPECT_EQ(json["structure"]["connections"].size(), 2u);
  EXPECT_EQ(json["tasks"]["task"]["connections"].size(), 2u);
  EXPECT_EQ(json["text"]["routers"]["mixture"].size(), 6u);
  EXPECT_EQ(json["text"]["connections"].size(), 2u);
  EXPECT_NE(routes_table(json).find("mixture"), std::string::npos);
}

TEST(RoutesJson, ATextAloneHasItsRouters) {
  const auto member = test::member("gpt2", 20, 3, 1);
  attach(*member.model, "mixture", 3);
  const TextRoutes text = route_text({*member.model, *member.tokenizer}, member.tokenizer->encode("The keeper", false));
  const OrderedJson json = routes_json("base", *member.model, {}, &text);
  const std::string site = "model.layers.2.self_attn.v_proj";
  EXPECT_EQ(json["routers"]["mixture"][site], (OrderedJson{{"layer", 2}, {"experts", 3}}));
  EXPECT_EQ(json["text"]["routers"]["mixture"][site].size(), text.tokens.size());
  for (const OrderedJson& row : json["text"]["routers"]["mixture"][site]) {
    const auto probs = row.get<std::vector<double>>();
    EXPECT_NEAR(std::accumulate(probs.begin(), probs.end(), 0.0), 1.0, 1e-3);
  }
  EXPECT_TRUE(json["similarity"].is_null()) << "there are no tasks to compare";
  EXPECT_EQ(routes_table(json), "");
}

TEST(RoutesJson, RoutersOfAnAugmentingModelReadItsOwnTokens) {
  compose::Member augmenting = test::member("llama3", 14, 4, 2);
  augmenting.adapter = mixture(augmenting.model->sites(), 4);
  compose::Composition composition(test::config_of({{{{0, 1}, {2, 2}}}}), test::member("gpt2", 20, 3, 1),
                                   std::vector{augmenting}, 7);
  const auto ids = composition.anchor_member().tokenizer->encode("The keeper 👍🏽 wrote until", false);
  const TextRoutes text = route_text(view(composition), ids);
  ASSERT_NE(text.streams.at(0).tokens.size(), ids.size()) << "choose a text that the two tokenizers cut differently";
  const auto& routers = text.routers.at("augmenting.0");
  EXPECT_EQ(routers.size(), 6u) << "two sites of each block that is run";
  for (const auto& [site, router] : routers) EXPECT_EQ(router.probs.size(), text.streams[0].tokens.size()) << site;
  const TaskRoutes task = route_task(view(composition), one_task(), {});
  const OrderedJson json = routes_json("calm", composition, {task}, &text);
  EXPECT_TRUE(json["adapters"].empty()) << "it is carried, not attached";
  EXPECT_EQ(json["tasks"]["task"]["routers"]["augmenting.0"].size(), 6u);
}

TEST(RoutesPage, HoldsItsDataAndNothingFromOutside) {
  const auto composition = test::two_tokenizers();
  const auto ids = composition->anchor_member().tokenizer->encode("a </script> <!--<script> b", false);
  const TextRoutes text = route_text(view(*composition), ids);
  // Written as one token of a tokenizer that has it.
  TextRoutes whole = text;
  whole.tokens[0] = "</script><!-- <script>";
  const std::string page = routes_html(routes_json("</title>", *composition, {}, &whole));
  const size_t data = page.find("type=\"application/json\">") + 24, end = page.find("</script>", data);
  EXPECT_EQ(page.substr(data, end - data).find("<!--"), std::string::npos);
  const Json json = parse_json(page.substr(data, end - data), "page");
  EXPECT_EQ(json["text"]["tokens"].get<std::vector<std::string>>(), whole.tokens);
  EXPECT_EQ(json["structure"]["connections"][1], (Json{{"augmenting", 0}, {"aug", 2}, {"anchor", 2}}));
  EXPECT_EQ(page.find("http"), page.find("http://www.w3.org/2000/svg")) << "the namespace of SVG is no address";
  EXPECT_EQ(page.find("http", page.find("http://www.w3.org/2000/svg") + 1), std::string::npos);
  for (const char* outside : {"<link", " src=", "href=", "@import", "url("}) {
    EXPECT_EQ(page.find(outside), std::string::npos) << outside;
  }
}

}  // namespace
}  // namespace moesaic::eval
