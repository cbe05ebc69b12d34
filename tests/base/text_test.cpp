#include "moesaic/base/text.h"

#include <gtest/gtest.h>
#include <torch/torch.h>

#include "moesaic/base/count_numbers.h"

namespace moesaic {
namespace {

TEST(Text, Shapes) {
  EXPECT_EQ(shape_text(std::vector<int64_t>{2, 3}), "[2, 3]");
  EXPECT_EQ(shape_text(std::vector<int64_t>{}), "[]");
  EXPECT_EQ(shape_text(torch::zeros({4, 1}).sizes()), "[4, 1]");
}

TEST(Text, Stripped) {
  EXPECT_EQ(stripped(" \t a b\r\n"), "a b");
  EXPECT_EQ(stripped("a"), "a");
  EXPECT_EQ(stripped(" \n"), "");
  EXPECT_EQ(stripped(""), "");
}

TEST(CountNumbers, OfTensorsAndOfWhatHoldsThem) {
  struct Holder {
    torch::Tensor tensor;
  };
  const std::vector<torch::Tensor> tensors{torch::zeros({2, 3}), torch::zeros({}), torch::zeros({0, 5})};
  EXPECT_EQ(count_numbers(tensors), 7);
  EXPECT_EQ(count_numbers(std::vector<Holder>{{tensors[0]}, {tensors[1]}}), 7);
  EXPECT_EQ(count_numbers(std::vector<torch::Tensor>{}), 0);
}

}  // namespace
}  // namespace moesaic
