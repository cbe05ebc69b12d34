#include <gmock/gmock.h>

#include <map>
#include <set>

#include "tests/data/fixtures.h"

namespace moesaic::data {
namespace {

using testing::DoubleEq;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::ThrowsMessage;

class MixtureTest : public FolderTest {
 protected:
  MixtureTest() {
    auto tokenizer = word_tokenizer();
    RenderOptions options;
    options.template_name = "none";
    renderer_ = std::make_shared<Renderer>(tokenizer, nullptr, options);
  }

  /// Rows with the prompt word w<first + i>, answer w0.
  DatasetConfig words(const std::string& name, int first, int rows) {
    std::string text;
    for (int i = 0; i < rows; ++i) text += fmt::format(R"({{"inputs":"w{}","targets":"w0"}})", first + i) + "\n";
    return dataset(name + ".jsonl", text);
  }

  std::unique_ptr<Mixture> mixture(std::vector<DatasetConfig> datasets, const std::string& rule = "proportional",
                                   uint64_t seed = 1) {
    return std::make_unique<Mixture>(std::move(datasets), renderer_, seed, rule);
  }

  std::vector<double> rates(std::vector<DatasetConfig> datasets, const std::string& rule) {
    std::vector<double> rates;
    for (const MixtureCount& count : mixture(std::move(datasets), rule)->counts()) rates.push_back(count.rate);
    return rates;
  }

  std::shared_ptr<const Renderer> renderer_;
};

/// The prompt word of an example [BOS, word, w0, EOS], as its number.
int64_t word(const Example& example) { return example.ids.at(1) - 10; }

TEST_F(MixtureTest, AnEpochHoldsEveryRowOnceInAnotherOrderEachTime) {
  auto stream = mixture({words("a", 0, 20)});
  EXPECT_EQ(stream->epoch_size(), 20);
  std::vector<std::vector<int64_t>> epochs(3);
  for (auto& epoch : epochs) {
    for (int i = 0; i < 20; ++i) epoch.push_back(word(*stream->next()));
    EXPECT_EQ(std::set<int64_t>(epoch.begin(), epoch.end()).size(), 20u);
    EXPECT_FALSE(std::is_sorted(epoch.begin(), epoch.end()));
  }
  EXPECT_NE(epochs[0], epochs[1]);
  EXPECT_NE(epochs[1], epochs[2]);
}

TEST_F(MixtureTest, TheNextOfADataSetIsTheFirstThatIsDrawnOfIt) {
  const std::vector<DatasetConfig> datasets{words("a", 0, 20), words("b", 20, 3)};
  auto drawn = mixture(datasets), asked = mixture(datasets);
  std::map<int64_t, std::vector<int64_t>> first;
  while (first[0].size() < 3 || first[1].size() < 3) {
    const Example example = *drawn->next();
    first[example.dataset].push_back(word(example));
  }
  for (const int64_t dataset : {1, 0}) {
    for (int i = 0; i < 3; ++i) {
      const Example example = asked->next_of(static_cast<size_t>(dataset));
      EXPECT_EQ(example.dataset, dataset);
      EXPECT_EQ(word(example), first[dataset][static_cast<size_t>(i)]);
    }
  }
}

TEST_F(MixtureTest, TheSeedDecidesTheOrder) {
  auto draw = [&](uint64_t seed) {
    auto stream = mixture({words("a", 0, 20), words("b", 20, 30)}, "proportional", seed);
    std::vector<int64_t> drawn;
    for (int i = 0; i < 40; ++i) drawn.push_back(word(*stream->next()));
    return drawn;
  };
  EXPECT_EQ(draw(1), draw(1));
  EXPECT_NE(draw(1), draw(2));
}

TEST_F(MixtureTest, EveryDataSetHasItsOwnOrder) {
  auto stream = mixture({words("a", 0, 20), words("b", 0, 20)}, "equal");
  std::vector<std::vector<int64_t>> orders(2);
  while (orders[0].size() < 20 || orders[1].size() < 20) {
    auto example = stream->next();
    auto& order = orders.at(example->dataset);
    if (order.size() < 20) order.push_back(word(*example));
  }
  EXPECT_NE(orders[0], orders[1]);
}

TEST_F(MixtureTest, ResumesExactly) {
  std::vector<DatasetConfig> datasets{words("a", 0, 7), words("b", 10, 30), words("c", 50, 3)};
  // Stops in the middle of epochs and at their ends.
  for (int before : {0, 1, 7, 40, 123}) {
    auto whole = mixture(datasets);
    for (int i = 0; i < before; ++i) whole->next();
    Json state = Json::parse(whole->state().dump());  // as it comes back from a file
    auto resumed = mixture(datasets);
    resumed->set_state(state);
    for (int i = 0; i < 100; ++i) {
      auto expected = whole->next(), got = resumed->next();
      ASSERT_EQ(got->ids, expected->ids) << "draw " << i << " after " << before;
      ASSERT_EQ(got->dataset, expected->dataset);
    }
    EXPECT_EQ(resumed->state(), whole->state());
  }
}

TEST_F(MixtureTest, RefusesTheStateOfAnotherRun) {
  Json state = mixture({words("a", 0, 7)})->state();
  EXPECT_THAT([&] { mixture({words("a", 0, 8)})->set_state(state); },
              ThrowsMessage<DataError>(HasSubstr("was a.jsonl with 7 rows, now a.jsonl with 8 rows")));
  EXPECT_THROW(mixture({words("a", 0, 7)}, "proportional", 2)->set_state(state), DataError);
  EXPECT_THROW(mixture({words("a", 0, 7), words("b", 0, 7)})->set_state(state), DataError);
  state["datasets"][0]["position"] = -1;
  EXPECT_THROW(mixture({words("a", 0, 7)})->set_state(state), DataError);
  EXPECT_THROW(mixture({words("a", 0, 7)})->set_state(Json::object()), ConfigError);
}

TEST_F(MixtureTest, Rates) {
  DatasetConfig a = words("a", 0, 10), b = words("b", 0, 30);
  EXPECT_THAT(rates({a, b}, "proportional"), ElementsAre(0.25, 0.75));
  EXPECT_THAT(rates({a, b}, "equal"), ElementsAre(0.5, 0.5));
  b.cap = 10;
  EXPECT_THAT(rates({a, b}, "proportional"), ElementsAre(0.5, 0.5));
  a.weight = 3;
  EXPECT_THAT([&] { rates({a, b}, "equal"); }, ThrowsMessage<UsageError>(HasSubstr("1 of 2 data sets have a weight")));
  b.weight = 1;
  EXPECT_THAT(rates({a, b}, "equal"), ElementsAre(0.75, 0.25));
  EXPECT_THAT([&] { rates({a}, "t5"); }, ThrowsMessage<UsageError>(HasSubstr("mixture_rule is 't5'")));
}

TEST_F(MixtureTest, TheT0RuleCapsTheRateNotTheRows) {
  // 600,000 rows count as 500,000 shared by their 4 templates; 20 rows count as 20 whatever their templates.
  std::string text;
  for (int i = 0; i < 600000; ++i) text += "{\"text\":\"w1\"}\n";
  DatasetConfig large = dataset("large.jsonl", text), small = words("small", 0, 20);
  EXPECT_THAT(rates({large, small}, "t0"), ElementsAre(DoubleEq(500000.0 / 500020), DoubleEq(20.0 / 500020)));
  large.templates = small.templates = 4;
  EXPECT_THAT(rates({large, small}, "t0"), ElementsAre(DoubleEq(125000.0 / 125020), DoubleEq(20.0 / 125020)));
  EXPECT_EQ(mixture({large, small}, "t0")->epoch_size(), 600020);
}

TEST_F(MixtureTest, DrawsAtTheRatesAndReportsIt) {
  DatasetConfig a = words("a", 0, 10), b = words("b", 10, 30);
  a.weight = 3;
  b.weight = 1;
  auto stream = mixture({a, b});
  for (int i = 0; i < 4000; ++i) {
    auto example = stream->next();
    ASSERT_EQ(example->dataset, word(*example) >= 10 ? 1 : 0);
  }
  auto counts = stream->counts();
  EXPECT_EQ(counts[0].drawn + counts[1].drawn, 4000);
  EXPECT_NEAR(static_cast<double>(counts[0].drawn), 3000, 110);  // binomial: four standard deviations
  EXPECT_EQ(counts[0].rows, 10);
  EXPECT_EQ(counts[0].targets, 2 * counts[0].drawn);  // w0 and EOS
  EXPECT_EQ(counts[0].skipped, 0);
}

TEST_F(MixtureTest, SkipsEmptyAnswersAndCountsThem) {
  auto stream =
      mixture({dataset("a.jsonl", "{\"inputs\":\"w1\",\"targets\":\"\"}\n{\"inputs\":\"w2\",\"targets\":\"w0\"}\n")});
  for (int i = 0; i < 5; ++i) EXPECT_EQ(word(*stream->next()), 2);
  EXPECT_GE(stream->counts()[0].skipped, 4);
  auto empty = mixture({dataset("b.jsonl", "{\"inputs\":\"w1\",\"targets\":\" \"}\n")});
  EXPECT_THAT([&] { empty->next(); }, ThrowsMessage<DataError>(HasSubstr("none of 1 rows leaves anything")));
}

TEST_F(MixtureTest, TrainingNeverSeesTheValidationSplit) {
  auto [train, validation] = train_validation({words("a", 0, 50)}, 0.3, 9);
  auto stream = mixture(train);
  std::set<int64_t> seen;
  for (int i = 0; i < 200; ++i) seen.insert(word(*stream->next()));
  EXPECT_EQ(seen.size(), 35u);
  auto held_out = load_examples(validation, *renderer_);
  EXPECT_EQ(held_out.size(), 15u);
  for (const Example& example : held_out) EXPECT_FALSE(seen.contains(word(example)));
}

TEST_F(MixtureTest, LoadExamplesKeepsTheOrderAndTheLimit) {
  auto examples = load_examples({words("a", 0, 5), words("b", 10, 5)}, *renderer_, 2);
  ASSERT_EQ(examples.size(), 4u);
  EXPECT_EQ(word(examples[0]), 0);
  EXPECT_EQ(word(examples[3]), 11);
  EXPECT_EQ(examples[3].dataset, 1);
}

TEST_F(MixtureTest, ReadsTheSentenceColumn) {
  RenderOptions options;
  options.template_name = "none";
  options.sentence_column = "e";
  renderer_ = std::make_shared<Renderer>(word_tokenizer(), nullptr, options);
  auto stream = mixture({dataset("a.jsonl", R"({"inputs":"w1","targets":"w0","e":[1,2]})")});
  EXPECT_THAT(stream->next()->sentence, ElementsAre(1.0f, 2.0f));
}

}  // namespace
}  // namespace moesaic::data
