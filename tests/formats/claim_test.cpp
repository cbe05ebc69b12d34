#include "moesaic/formats/claim.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "moesaic/base/check.h"
#include "tests/formats/files.h"

namespace moesaic::formats {
namespace {

using testing::ElementsAre;
using testing::IsEmpty;

TEST(Claim, EverythingWrongIsSaidAtOnce) {
  const Declarations expected{{"a", {{2, 3}}}, {"b", {{4}}}, {"c", {{}}}, {"d", {{1}}}};
  const TensorMap present{{"b", at::ones({4, 1})}, {"c", at::ones({})}, {"d", at::ones({1})}, {"e", at::ones({5})}};
  const Misfits found = misfits(expected, declarations(present));
  EXPECT_FALSE(found.empty());
  EXPECT_EQ(found.text(),
            "\n  missing (1):\n    a"
            "\n  unexpected (1):\n    e"
            "\n  wrong (1):\n    b: got [4, 1], expected [4]");
  EXPECT_ERROR(check_fits(found, "m.safetensors", "config.json", "another base model?"), DataError,
               "m.safetensors: the tensors do not fit config.json:\n  missing (1):", "\nhint: another base model?");
}

TEST(Claim, WhatFitsIsNoError) {
  const TensorMap tensors{{"a", at::ones({2})}};
  const Misfits found = misfits({{"a", {{2}, at::kFloat}}}, declarations(tensors), Dtypes::kSame);
  EXPECT_TRUE(found.empty());
  EXPECT_EQ(found.text(), "");
  EXPECT_NO_THROW(check_fits(found, "f", "g", "h"));
  EXPECT_TRUE(misfits({}, {}).empty());
}

TEST(Claim, DtypesAsAsked) {
  const Declarations expected{{"a", {{2}, at::kFloat}}};
  const auto wrong = [&](at::ScalarType dtype, Dtypes dtypes) {
    return misfits(expected, {{"a", {{2}, dtype}}}, dtypes).wrong;
  };
  EXPECT_THAT(wrong(at::kLong, Dtypes::kAny), IsEmpty());
  EXPECT_THAT(wrong(at::kLong, Dtypes::kFloating), ElementsAre("a: got Long, expected numbers with a fraction"));
  EXPECT_THAT(wrong(at::kBFloat16, Dtypes::kFloating), IsEmpty());
  EXPECT_THAT(wrong(at::kBFloat16, Dtypes::kSame), ElementsAre("a: got BFloat16, expected Float"));
  EXPECT_THAT(wrong(at::kFloat, Dtypes::kSame), IsEmpty());
  // Both are said where both are wrong; a tensor declared without a dtype takes any.
  EXPECT_THAT(misfits(expected, {{"a", {{3}, at::kLong}}}, Dtypes::kSame).wrong,
              ElementsAre("a: got [3], expected [2]", "a: got Long, expected Float"));
  EXPECT_TRUE(misfits({{"a", {{2}}}}, {{"a", {{2}, at::kLong}}}, Dtypes::kSame).empty());
}

TEST(Claim, FindingsOfSeveralPartsAreOneMessage) {
  Misfits all = misfits({{"a", {{1}}}}, {{"b", {{1}}}});
  all.add(misfits({{"c", {{1}}}}, {{"c", {{2}}}}));
  all.wrong.push_back("d: other numbers");
  EXPECT_THAT(all.missing, ElementsAre("a"));
  EXPECT_THAT(all.unexpected, ElementsAre("b"));
  EXPECT_THAT(all.wrong, ElementsAre("c: got [2], expected [1]", "d: other numbers"));
}

TEST(Claim, LongListsAreCut) {
  Declarations expected;
  for (int i = 0; i < 23; ++i) expected[fmt::format("t{:02}", i)] = {{1}};
  const std::string text = misfits(expected, {}).text();
  EXPECT_THAT(text, testing::StartsWith("\n  missing (23):\n    t00\n"));
  EXPECT_THAT(text, testing::EndsWith("\n    t19\n    and 3 more"));
}

TEST(Claim, FilesSayWhatTheyHold) {
  const test::TemporaryFolder folder;
  save_safetensors(folder / "f.safetensors", {{"a", at::ones({2, 3}, at::kBFloat16)}, {"n", at::ones({1}, at::kLong)}});
  const Declarations file = declarations(SafetensorsFile(folder / "f.safetensors"));
  ASSERT_EQ(file.size(), 2u);
  EXPECT_THAT(file.at("a").shape, ElementsAre(2, 3));
  EXPECT_EQ(file.at("a").dtype, at::kBFloat16);
  EXPECT_EQ(file.at("n").dtype, at::kLong);
}

}  // namespace
}  // namespace moesaic::formats
