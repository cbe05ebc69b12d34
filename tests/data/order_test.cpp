#include "moesaic/data/order.h"

#include <gtest/gtest.h>

#include <cmath>
#include <set>
#include <vector>

namespace moesaic::data {
namespace {

TEST(Permutation, IsOneForEverySize) {
  for (int64_t n : {1, 2, 3, 4, 5, 16, 17, 1000}) {
    Permutation permutation(n, 7);
    std::set<int64_t> seen;
    for (int64_t i = 0; i < n; ++i) {
      int64_t value = permutation(i);
      ASSERT_GE(value, 0);
      ASSERT_LT(value, n);
      seen.insert(value);
    }
    EXPECT_EQ(static_cast<int64_t>(seen.size()), n);
  }
}

TEST(Permutation, MixesAndDependsOnTheKey) {
  // A random permutation of 1000 has one fixed point on average and a rank correlation with its input of 0 +- 0.032.
  const int64_t n = 1000;
  Permutation permutation(n, 1), other(n, 2);
  double correlation = 0;
  int64_t fixed = 0, equal = 0;
  for (int64_t i = 0; i < n; ++i) {
    double centre = (n - 1) / 2.0;
    correlation += (i - centre) * (permutation(i) - centre);
    fixed += permutation(i) == i;
    equal += permutation(i) == other(i);
  }
  correlation /= static_cast<double>(n) * (n * n - 1) / 12;
  EXPECT_LT(std::abs(correlation), 0.13);  // four standard deviations
  EXPECT_LT(fixed, 8);
  EXPECT_LT(equal, 8);
}

TEST(Permutation, StaysTheSame) {
  // Resumed runs rely on it; the values only have to stay what they are.
  Permutation permutation(10, 42);
  std::vector<int64_t> values;
  for (int64_t i = 0; i < 10; ++i) values.push_back(permutation(i));
  EXPECT_EQ(values, (std::vector<int64_t>{9, 1, 3, 2, 5, 4, 7, 6, 8, 0}));
}

std::vector<int64_t> rows_of(const RowSubset& subset) {
  std::vector<int64_t> rows;
  for (int64_t i = 0; i < subset.size(); ++i) rows.push_back(subset.at(i));
  return rows;
}

TEST(RowSubset, TrainAndValidationPartTheFile) {
  using Split = RowSubset::Split;
  for (int64_t rows : {1, 2, 10, 97}) {
    for (int64_t validation = 0; validation < rows; validation += 1 + rows / 7) {
      auto train = rows_of({rows, validation, Split::kTrain, 0, 5});
      auto held_out = rows_of({rows, validation, Split::kValidation, 0, 5});
      EXPECT_EQ(static_cast<int64_t>(held_out.size()), validation);
      EXPECT_TRUE(std::is_sorted(train.begin(), train.end()));
      std::vector<int64_t> all = train;
      all.insert(all.end(), held_out.begin(), held_out.end());
      std::sort(all.begin(), all.end());
      EXPECT_EQ(all, rows_of({rows, 0, Split::kAll, 0, 5})) << rows << " rows, " << validation << " for validation";
    }
  }
}

TEST(RowSubset, TheSeedChoosesTheRows) {
  using Split = RowSubset::Split;
  EXPECT_EQ(rows_of({1000, 50, Split::kValidation, 0, 1}), rows_of({1000, 50, Split::kValidation, 0, 1}));
  EXPECT_NE(rows_of({1000, 50, Split::kValidation, 0, 1}), rows_of({1000, 50, Split::kValidation, 0, 2}));
}

TEST(RowSubset, ACapSpreadsOverTheFile) {
  EXPECT_EQ(rows_of({10, 0, RowSubset::Split::kAll, 4, 0}), (std::vector<int64_t>{0, 2, 5, 7}));
  EXPECT_EQ(rows_of({3, 0, RowSubset::Split::kAll, 4, 0}), (std::vector<int64_t>{0, 1, 2}));
}

}  // namespace
}  // namespace moesaic::data
