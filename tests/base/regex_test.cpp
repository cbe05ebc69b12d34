#include "moesaic/base/regex.h"

#include <gtest/gtest.h>

#include "moesaic/base/check.h"

namespace moesaic {
namespace {

bool matches(const std::string& pattern, const std::string& text) { return Regex(pattern, "test").matches(text); }

TEST(Regex, MatchesTheWholeText) {
  EXPECT_TRUE(matches("a|ab", "ab"));
  EXPECT_FALSE(matches("a", "ab"));
  EXPECT_FALSE(matches("b", "ab"));
  EXPECT_TRUE(matches(R"(.*\.(q|v)_proj)", "model.layers.0.self_attn.q_proj"));
}

TEST(Regex, HasPythonsForms) {
  EXPECT_TRUE(matches(R"((?P<kind>q|k)_proj\.(?P=kind))", "q_proj.q"));
  EXPECT_FALSE(matches(R"((?P<kind>q|k)_proj\.(?P=kind))", "q_proj.k"));
  EXPECT_TRUE(matches(R"((?!lm_head).*(?<!gate)_proj)", "up_proj"));
  EXPECT_FALSE(matches(R"((?!lm_head).*(?<!gate)_proj)", "gate_proj"));
  EXPECT_TRUE(matches(R"((?i)Q_PROJ)", "q_proj"));
  EXPECT_TRUE(matches(R"(\d{1,2}\w+)", "12proj"));
}

TEST(Regex, WhatIsBrokenOrEndlessIsAUsageError) {
  EXPECT_THROW(matches("(", "x"), UsageError);
  EXPECT_THROW(matches(std::string(100'000, 'a'), "x"), UsageError);
  EXPECT_THROW(matches("((((a{1000}){1000}){1000}){1000})", "x"), UsageError);
  // Linear without look-around, bounded with it.
  EXPECT_FALSE(matches("(a+)+b", std::string(10'000, 'a')));
  EXPECT_THROW(matches("(?=a)(a+)+(?!x)b", std::string(10'000, 'a')), UsageError);
  EXPECT_THROW(matches(std::string(1000, '(') + "a" + std::string(1000, ')'), "b"), UsageError);
}

}  // namespace
}  // namespace moesaic
