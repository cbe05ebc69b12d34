#include "moesaic/base/visible.h"

#include <gtest/gtest.h>

namespace moesaic {
namespace {

TEST(Visible, ControlCharactersAreWrittenAsJsonEscapesThem) {
  EXPECT_EQ(visible("a\x1b[31mb\x07\r\x7f"), "a\\u001b[31mb\\u0007\\u000d\\u007f");
  EXPECT_EQ(visible(std::string_view("a\0b", 3)), "a\\u0000b");
  EXPECT_EQ(visible("\xc2\x9b"
                    "2J \xc2\x85"),
            "\\u009b2J \\u0085");
  EXPECT_EQ(visible("file\xe2\x80\xaegnp.exe\xe2\x81\xa9"), "file\\u202egnp.exe\\u2069");
}

TEST(Visible, RangesEndWhereTheySay) {
  EXPECT_EQ(visible("\xe2\x80\xaa\xe2\x81\xa6"), "\\u202a\\u2066");
  const std::string beside = "\xe2\x80\xa9\xe2\x80\xaf\xe2\x81\xa5\xe2\x81\xaa\xc2\xa0 ~";
  EXPECT_EQ(visible(beside), beside);
  EXPECT_EQ(visible("\x1f\xc2\x9f"), "\\u001f\\u009f");
}

TEST(Visible, TextStaysAsItIs) {
  const std::string text =
      "line\n\ttab, gr\xc3\xbc\xc3\x9f, \xe6\xbc\xa2\xe5\xad\x97 \xf0\x9f\x99\x82 \xe2\x80\xa6 \xc2\xa0.";
  EXPECT_EQ(visible(text), text);
  EXPECT_EQ(visible_in_line("a\tb\nc"), "a\\u0009b\\u000ac");
}

TEST(Visible, BytesThatAreNoUtf8) {
  EXPECT_EQ(visible("\x9b"
                    "2J"),
            "\\x9b2J");
  EXPECT_EQ(visible("\xe2\x80"), "\xe2\\x80");  // cut short
  EXPECT_EQ(visible("\xc2"
                    "a\xff"),
            "\xc2"
            "a\xff");  // no control character for any terminal
}

}  // namespace
}  // namespace moesaic
