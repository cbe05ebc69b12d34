#include "moesaic/tokenizer/unicode.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace moesaic::tokenizer {
namespace {

TEST(Unicode, LowerCaseOfEveryScript) {
  EXPECT_EQ(lowercase("Ärger STRASSE"), "ärger strasse");
  EXPECT_EQ(lowercase("ΟΔΟΣ ΜΟΣΚΒΑ"), "οδος μοσκβα") << "a sigma at the end of a word has a form of its own";
  EXPECT_EQ(lowercase("МОСКВА"), "москва");
  EXPECT_EQ(lowercase("\u0130"), "i\u0307");
  EXPECT_EQ(lowercase(""), "");
}

TEST(Unicode, WordsBetweenWhiteSpaceOfEveryWidth) {
  using testing::ElementsAre;
  EXPECT_THAT(split_words(" a\tb\u00a0c\u3000d\u2009\u2028e\n"), ElementsAre("a", "b", "c", "d", "e"));
  EXPECT_THAT(split_words("x\u200by"), ElementsAre("x\u200by")) << "a space of no width is none";
  EXPECT_THAT(split_words("  "), ElementsAre());
}

}  // namespace
}  // namespace moesaic::tokenizer
