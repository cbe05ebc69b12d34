#include "moesaic/data/validate.h"

#include <ATen/Parallel.h>
#include <gmock/gmock.h>

#include <set>

#include "tests/data/fixtures.h"

namespace moesaic::data {
namespace {

using testing::AllOf;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::ThrowsMessage;

class ValidateTest : public FolderTest {};

TEST_F(ValidateTest, ListsEveryDamagedRow) {
  DatasetConfig config =
      dataset("a.jsonl",
              "{\"inputs\":\"a\",\"targets\":\"b\"}\n{oops\n{\"inputs\":\"a\"}\n{\"inputs\":\"a\",\"targets\":\"\"}\n");
  Validation result = validate(config);
  EXPECT_EQ(result.formatting, "inputs_targets");
  EXPECT_EQ(result.rows, 4);
  EXPECT_EQ(result.damaged, 2);
  EXPECT_EQ(result.unanswered, 1);
  EXPECT_THAT(result.problems,
              ElementsAre(HasSubstr("a.jsonl line 2"), HasSubstr("a.jsonl line 3: 'targets' is missing")));
  EXPECT_EQ(validate(config, {.max_problems = 1}).problems.size(), 1u);
}

/// Rows of messages: every row whose number is in `bad` begins with an answer, which the template refuses.
class BadRows : public FolderTest {
 protected:
  std::shared_ptr<const Renderer> renderer(const std::string& on_bad_row) {
    auto tokenizer = word_tokenizer();
    auto chat = std::make_shared<tokenizer::ChatTemplate>(
        "{% for m in messages %}{% if loop.first and m.role != 'user' %}{{ raise_exception('user first') }}{% endif %}"
        "<|{{ 'user' if m.role == 'user' else 'bot' }}|> {{ m.content }} <|end|> {% endfor %}",
        *tokenizer);
    return std::make_shared<Renderer>(tokenizer, chat, RenderOptions{.on_bad_row = on_bad_row});
  }

  /// One line, as json.dump writes it.
  DatasetConfig rows(int64_t count, const std::set<int64_t>& bad) {
    OrderedJson list = OrderedJson::array();
    for (int64_t i = 1; i <= count; ++i) {
      OrderedJson turns = OrderedJson::array();
      if (!bad.contains(i)) turns.push_back({{"role", "user"}, {"content", fmt::format("w{}", i % 90)}});
      turns.push_back({{"role", "assistant"}, {"content", "w1"}});
      list.push_back({{"messages", turns}});
    }
    return dataset("rows.json", list.dump());
  }
};

TEST_F(BadRows, AreFoundByRenderingWithTheirNumbers) {
  const auto stop = renderer("stop");
  const DatasetConfig config = rows(900, {2, 500, 899});
  EXPECT_EQ(validate(config).damaged, 0);
  const int threads = at::get_num_threads();
  for (const int count : {1, 3}) {
    at::set_num_threads(count);
    int64_t reported = 0;
    const Validation result =
        validate(config, {.renderer = stop.get(), .progress = [&](int64_t judged) { reported += judged; }});
    EXPECT_EQ(reported, 900);
    EXPECT_EQ(result.damaged, 3);
    EXPECT_THAT(result.problems, ElementsAre(HasSubstr("rows.json row 2 (line 1): "), HasSubstr("row 500 (line 1)"),
                                             HasSubstr("row 899 (line 1)")));
  }
  at::set_num_threads(threads);
}

TEST_F(BadRows, StopTheRunOrAreSkipped) {
  const DatasetConfig config = rows(40, {3, 7});
  const auto stop = renderer("stop"), skip = renderer("skip");
  EXPECT_THAT([&] { load_examples({config}, *stop); },
              ThrowsMessage<DataError>(AllOf(HasSubstr("2 of 40 rows"), HasSubstr("row 3 "), HasSubstr("row 7 "),
                                             HasSubstr("on_bad_row: skip"))));
  EXPECT_EQ(load_examples({config}, *skip).size(), 38u);
  Mixture mixture({config}, skip, 1, "proportional");
  for (int i = 0; i < 80; ++i) EXPECT_TRUE(mixture.next().has_value());
  EXPECT_GE(mixture.counts()[0].skipped, 4);
}

}  // namespace
}  // namespace moesaic::data
