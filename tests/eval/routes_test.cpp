#include "moesaic/eval/routes.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/compose/small_models.h"

namespace moesaic::eval {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

EvalModel view(compose::Composition& composition) {
  return {composition, *composition.anchor_member().tokenizer};
}

TEST(RouteText, AddedIsTheShareOfWhatTheAnchorHad) {
  // One connection behind the last block: what it adds is the difference to the anchor alone.
  const auto composition = test::two_tokenizers({{{2, 1}}});
  const auto ids = composition->anchor_member().tokenizer->encode("The keeper wrote until tomorrow", false);
  const TextRoutes text = route_text(view(*composition), ids);
  torch::NoGradGuard no_grad;
  const auto batch = nn::RaggedBatch::from_sequences({ids});
  nn::Pass alone;
  models::CausalLM& anchor = composition->anchor();
  anchor.prepare(batch, alone);
  const auto own = anchor.run_blocks(anchor.embed(batch.tokens), 0, 3, alone);
  // The final norm undoes the size: what it reads is taken where it is called.
  torch::Tensor h;
  {
    compose::Composition& composed = *composition;
    nn::Pass pass;
    std::vector<nn::ReadingRecord> readings;
    pass.readings = &readings;
    composed.hidden({batch, {{std::ssize(ids)}}}, pass);
    h = own + own.norm(2, 1, true) * readings[0].added.unsqueeze(1);  // as long as what is added
  }
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

TEST(RoutesPage, HoldsItsDataAndNothingFromOutside) {
  const auto composition = test::two_tokenizers();
  TextRoutes text =
      route_text(view(*composition), composition->anchor_member().tokenizer->encode("a </script> b", false));
  const std::string page = routes_html(routes_json("calm", *composition, {}, &text));
  const size_t data = page.find("type=\"application/json\">") + 24, end = page.find("</script>", data);
  const Json json = parse_json(page.substr(data, end - data), "page");
  EXPECT_EQ(json["text"]["tokens"].get<std::vector<std::string>>(), text.tokens);
  EXPECT_EQ(json["structure"]["connections"][1], (Json{{"augmenting", 0}, {"aug", 2}, {"anchor", 2}}));
  EXPECT_EQ(page.find("http"), page.find("http://www.w3.org/2000/svg")) << "the namespace of SVG is no address";
  EXPECT_EQ(page.find("http", page.find("http://www.w3.org/2000/svg") + 1), std::string::npos);
}

}  // namespace
}  // namespace moesaic::eval
