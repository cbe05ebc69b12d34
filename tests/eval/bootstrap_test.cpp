#include "moesaic/eval/bootstrap.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>

namespace moesaic::eval {
namespace {

TEST(Bootstrap, DrawsTheRowsThatPythonDraws) {
  // random.Random(0).choices(range(10), k=8), twice.
  std::vector<std::vector<size_t>> drawn;
  bootstrap_error(10, 2, [&](const std::vector<size_t>& rows) {
    drawn.push_back({rows.begin(), rows.begin() + 8});
    return 0.0;
  });
  EXPECT_THAT(drawn[0], testing::ElementsAre(8, 7, 4, 2, 5, 4, 7, 3));
}

TEST(Bootstrap, DeviationOverTheResamples) {
  double next = 0;
  // 1, 2, 3: deviation 1.
  EXPECT_DOUBLE_EQ(bootstrap_error(5, 3, [&](const auto&) { return ++next; }), 1.0);
  EXPECT_TRUE(std::isnan(bootstrap_error(1, 100, [](const auto&) { return 1.0; })));
}

}  // namespace
}  // namespace moesaic::eval
