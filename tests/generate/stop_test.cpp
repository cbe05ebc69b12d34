#include "moesaic/generate/stop.h"

#include <gtest/gtest.h>

namespace moesaic::generate {
namespace {

TEST(StopStrings, CutsAtTheFirstStop) {
  StopStrings stops({"END", "###"});
  EXPECT_EQ(stops.push("one ### two END"), "one ");
  EXPECT_TRUE(stops.found());
  EXPECT_EQ(stops.push("more"), "");
  EXPECT_EQ(stops.finish(), "");
}

TEST(StopStrings, FindsAStopAcrossPieces) {
  StopStrings stops({"</s>"});
  EXPECT_EQ(stops.push("hi <"), "hi ");  // "<" may begin the stop
  EXPECT_EQ(stops.push("/"), "");
  EXPECT_EQ(stops.push("s"), "");
  EXPECT_EQ(stops.push("> there"), "");
  EXPECT_TRUE(stops.found());
}

TEST(StopStrings, ReleasesWhatTurnsOutToBeText) {
  StopStrings stops({"</s>"});
  EXPECT_EQ(stops.push("a </"), "a ");
  EXPECT_EQ(stops.push("b"), "</b");
  EXPECT_EQ(stops.push("x <"), "x ");
  EXPECT_FALSE(stops.found());
  EXPECT_EQ(stops.finish(), "<");
}

TEST(StopStrings, AStopMayBeginInsideAFailedOne) {
  StopStrings stops({"aab"});
  EXPECT_EQ(stops.push("aa"), "");
  EXPECT_EQ(stops.push("ab"), "a");  // aaab = a + aab
  EXPECT_TRUE(stops.found());
}

TEST(StopStrings, HoldsTheLongestBeginningOfAnyStop) {
  StopStrings stops({"<x", "ab<y"});
  EXPECT_EQ(stops.push("ab<"), "");  // "<" alone may begin the first
  EXPECT_EQ(stops.push("y"), "");
  EXPECT_TRUE(stops.found());
}

TEST(StopStrings, NoStopsNothingHeld) {
  StopStrings stops({});
  EXPECT_EQ(stops.push("text"), "text");
  EXPECT_EQ(stops.finish(), "");
}

}  // namespace
}  // namespace moesaic::generate
