#include "moesaic/train/schedules.h"

#include <gtest/gtest.h>

#include <cmath>

#include "moesaic/base/check.h"

namespace moesaic::train {
namespace {

TEST(ScheduleFactor, AllWarmUpLinearly) {
  for (const char* type : {"constant", "linear", "cosine", "inverse_sqrt"}) {
    EXPECT_DOUBLE_EQ(schedule_factor(type, 0, 4, 10), 0.0) << type;
    EXPECT_DOUBLE_EQ(schedule_factor(type, 3, 4, 10), 0.75) << type;
    EXPECT_DOUBLE_EQ(schedule_factor(type, 4, 4, 10), 1.0) << type;
    EXPECT_DOUBLE_EQ(schedule_factor(type, 0, 0, 10), 1.0) << type;
  }
}

TEST(ScheduleFactor, Values) {
  EXPECT_DOUBLE_EQ(schedule_factor("constant", 9, 4, 10), 1.0);
  EXPECT_DOUBLE_EQ(schedule_factor("linear", 7, 4, 10), 0.5);            // 3 of 6 steps left
  EXPECT_DOUBLE_EQ(schedule_factor("linear", 12, 4, 10), 0.0);           // beyond the end
  EXPECT_DOUBLE_EQ(schedule_factor("cosine", 7, 4, 10), 0.5);            // half-way
  EXPECT_NEAR(schedule_factor("cosine", 6, 4, 10), 0.75, 1e-12);         // (1 + cos(pi/3)) / 2
  EXPECT_DOUBLE_EQ(schedule_factor("inverse_sqrt", 16, 4, 99), 0.5);     // sqrt(4 / 16)
  EXPECT_DOUBLE_EQ(schedule_factor("inverse_sqrt", 30000, 0, 99), 0.5);  // sqrt(10000 / 40000)
}

TEST(ScheduleFactor, UnknownNameSaysTheNearest) {
  try {
    schedule_factor("cosin", 0, 0, 1);
    FAIL() << "expected a UsageError";
  } catch (const UsageError& error) {
    EXPECT_NE(std::string(error.what()).find("did you mean 'cosine'"), std::string::npos) << error.what();
  }
}

}  // namespace
}  // namespace moesaic::train
