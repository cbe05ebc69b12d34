// Sums over the micro-batches of a step whose bytes do not depend on how many ranks made them.
#pragma once
#include <torch/torch.h>

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "moesaic/ranks/group.h"

namespace moesaic::ranks {

/// Sums lists of float32 tensors over the parts 0 .. M-1 of a step in one order, that of the aligned binary tree:
///
///   S(k, 0) = part k;   S(k, j+1) = S(2k, j) + S(2k+1, j);   what is left of M is folded from the right
///
/// A rank makes its Group::share of the parts and sends the largest S it can make of them. An undefined tensor
/// is nothing: the sum of undefined ones is undefined. Adding numbers is commutative but not associative, so the order
/// is what makes the bytes.
class TreeSum {
 public:
  explicit TreeSum(std::shared_ptr<Group> group) : group_(std::move(group)) {}

  /// A sum over `parts` parts begins.
  void begin(int64_t parts);
  /// The parts of this rank: [first, last).
  std::pair<int64_t, int64_t> own() const { return group_->share(parts_, group_->rank()); }
  /// The next of them. Takes the tensors: they become the sum.
  void add(std::vector<torch::Tensor> part);
  /// The sum, the same bytes at every rank, shaped as `like`, which every rank gives alike and which need not be
  /// defined at a rank without parts.
  std::vector<torch::Tensor> total(const std::vector<torch::Tensor>& like);

 private:
  /// S(begin / size, log2 size).
  struct Block {
    int64_t begin, size;
    std::vector<torch::Tensor> sum;
  };

  static void push(std::vector<Block>& blocks, Block block);
  static std::vector<torch::Tensor> fold(std::vector<Block>& blocks);
  std::vector<torch::Tensor> exchanged(const std::vector<torch::Tensor>& like);

  std::shared_ptr<Group> group_;
  int64_t parts_ = 0;
  std::vector<Block> blocks_;
  torch::Tensor flat_, sent_, received_, total_;  // kept: fresh memory costs more than sending
};

}  // namespace moesaic::ranks
