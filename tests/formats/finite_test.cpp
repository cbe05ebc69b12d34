#include "moesaic/formats/finite.h"

#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <limits>

#include "moesaic/base/check.h"
#include "tests/temporary_folder.h"

namespace moesaic::formats {
namespace {

using testing::AllOf;
using testing::HasSubstr;
using testing::ThrowsMessage;

constexpr float kNan = std::numeric_limits<float>::quiet_NaN(), kInfinite = std::numeric_limits<float>::infinity();

TEST(Finite, TheFirstPlaceIsNamed) {
  for (const float bad : {kNan, kInfinite, -kInfinite}) {
    TensorMap tensors{{"a", at::ones({4})}, {"b", at::ones({2, 3})}, {"ids", at::ones({2}, at::kLong)}};
    check_finite(tensors, std::nullopt, "here");
    tensors["b"][1][2] = bad;
    EXPECT_THAT([&] { check_finite(tensors, std::nullopt, "here"); },
                ThrowsMessage<DataError>(AllOf(HasSubstr("here: tensor 'b'"), HasSubstr("first at [1, 2]"))));
  }
}

// 65504 is the largest of float16.
TEST(Finite, ANumberMayBeTooLargeForItsFile) {
  const TensorMap tensors{{"a", at::full({2}, 1e5)}};
  check_finite(tensors, at::kFloat, "here");
  check_finite(tensors, at::kBFloat16, "here");
  EXPECT_THAT([&] { check_finite(tensors, at::kHalf, "here"); }, ThrowsMessage<DataError>(HasSubstr("'a'")));
}

TEST(Finite, NoFileIsWritten) {
  test::TemporaryFolder folder;
  EXPECT_THROW(save_safetensors(folder / "x.safetensors", {{"a", at::full({2}, kNan)}}), DataError);
  EXPECT_TRUE(std::filesystem::is_empty(folder.path()));
}

}  // namespace
}  // namespace moesaic::formats
