#include "moesaic/ranks/tree_sum.h"

#include "tests/ranks/threads.h"

namespace moesaic::ranks {
namespace {

using Tensors = std::vector<torch::Tensor>;

/// Part k: three tensors, of which the second is there in every third part only and the third never.
Tensors part(int64_t k) {
  const auto generator = at::detail::createCPUGenerator(static_cast<uint64_t>(k) + 7);
  Tensors tensors{torch::randn({5, 7}, generator), torch::Tensor(), torch::Tensor()};
  if (k % 3 == 1) tensors[1] = torch::randn({3}, generator);
  return tensors;
}
const Tensors kLike{torch::empty({5, 7}), torch::empty({3}), torch::empty({2})};

/// The sum over `parts` parts as each of `size` ranks has it.
std::vector<Tensors> sums(int64_t parts, int64_t size) {
  std::vector<Tensors> all(size);
  as_ranks(size, [&](const std::shared_ptr<Group>& group) {
    TreeSum sum(group);
    for (int again = 0; again < 2; ++again) {  // what it keeps of one step must not reach the next
      sum.begin(parts);
      const auto [first, last] = sum.own();
      for (int64_t k = first; k < last; ++k) sum.add(part(k));
      all[group->rank()] = sum.total(kLike);
      for (torch::Tensor& tensor : all[group->rank()]) {
        if (tensor.defined()) tensor = tensor.clone();
      }
    }
  });
  return all;
}

TEST(TreeSum, AddsInTheOrderOfTheTree) {
  const std::vector<Tensors> all = sums(7, 1);
  const auto p = [](int64_t k) { return part(k)[0]; };
  const torch::Tensor expected = ((p(0) + p(1)) + (p(2) + p(3))) + ((p(4) + p(5)) + p(6));
  EXPECT_TRUE(torch::equal(all[0][0], expected));
  EXPECT_FALSE(torch::equal(all[0][0], p(0) + p(1) + p(2) + p(3) + p(4) + p(5) + p(6))) << "the order makes the bytes";
  EXPECT_TRUE(torch::equal(all[0][1], part(1)[1] + part(4)[1]));
  EXPECT_FALSE(all[0][2].defined());
}

TEST(TreeSum, HasTheSameBytesForEveryNumberOfRanks) {
  for (const int64_t parts : {1, 3, 4, 6, 7}) {
    const Tensors alone = sums(parts, 1)[0];
    for (const int64_t size : {2, 3, 4}) {
      for (const Tensors& of_rank : sums(parts, size)) {
        EXPECT_TRUE(torch::equal(of_rank[0], alone[0])) << parts << " parts, " << size << " ranks";
        EXPECT_EQ(of_rank[1].defined(), alone[1].defined());
        if (alone[1].defined()) EXPECT_TRUE(torch::equal(of_rank[1], alone[1]));
        EXPECT_FALSE(of_rank[2].defined());
      }
    }
  }
}

TEST(TreeSum, OfMoreThanOneSlice) {
  const auto numbers = [](int64_t k) {
    return torch::randn({3'000'001}, at::detail::createCPUGenerator(static_cast<uint64_t>(k)));
  };
  const torch::Tensor expected = (numbers(0) + numbers(1)) + numbers(2);
  as_ranks(2, [&](const std::shared_ptr<Group>& group) {
    TreeSum sum(group);
    sum.begin(3);
    for (int64_t k = sum.own().first; k < sum.own().second; ++k) sum.add({numbers(k)});
    EXPECT_TRUE(torch::equal(sum.total({expected})[0], expected));
  });
}

}  // namespace
}  // namespace moesaic::ranks
