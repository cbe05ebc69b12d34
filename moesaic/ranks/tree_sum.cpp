#include "moesaic/ranks/tree_sum.h"

#include <algorithm>
#include <numeric>

#include "moesaic/base/check.h"

namespace moesaic::ranks {
namespace {

constexpr int64_t kSlice = 1 << 20;  // numbers that a rank adds up at once

/// The largest aligned blocks that [first, last) is made of: where they begin, and how many parts each has.
std::vector<std::pair<int64_t, int64_t>> blocks_of(std::pair<int64_t, int64_t> range) {
  std::vector<std::pair<int64_t, int64_t>> blocks;
  for (int64_t begin = range.first; begin < range.second;) {
    int64_t size = 1;
    while (begin % (2 * size) == 0 && begin + 2 * size <= range.second) size *= 2;
    blocks.emplace_back(begin, size);
    begin += size;
  }
  return blocks;
}

/// a becomes a + b.
void add_to(std::vector<torch::Tensor>& a, const std::vector<torch::Tensor>& b) {
  for (size_t i = 0; i < a.size(); ++i) {
    if (!a[i].defined()) {
      a[i] = b[i];
    } else if (b[i].defined()) {
      a[i].add_(b[i]);
    }
  }
}

torch::Tensor& at_least(torch::Tensor& kept, int64_t numbers) {
  if (!kept.defined() || kept.numel() < numbers) kept = torch::empty({numbers}, torch::kFloat32);
  return kept;
}

}  // namespace

void TreeSum::begin(int64_t parts) {
  parts_ = parts;
  blocks_.clear();
}

void TreeSum::push(std::vector<Block>& blocks, Block block) {
  while (!blocks.empty() && blocks.back().size == block.size && blocks.back().begin % (2 * block.size) == 0) {
    Block left = std::move(blocks.back());
    blocks.pop_back();
    add_to(left.sum, block.sum);
    left.size *= 2;
    block = std::move(left);
  }
  blocks.push_back(std::move(block));
}

std::vector<torch::Tensor> TreeSum::fold(std::vector<Block>& blocks) {
  while (blocks.size() > 1) {
    const Block last = std::move(blocks.back());
    blocks.pop_back();
    add_to(blocks.back().sum, last.sum);
  }
  return std::move(blocks.front().sum);
}

void TreeSum::add(std::vector<torch::Tensor> part) {
  const auto [first, last] = own();
  const int64_t number = blocks_.empty() ? first : blocks_.back().begin + blocks_.back().size;
  MOESAIC_CHECK(number < last, ShapeError, "sum of micro-batches: got part {}, expected those of [{}, {})", number,
                first, last);
  push(blocks_, {number, 1, std::move(part)});
}

std::vector<torch::Tensor> TreeSum::total(const std::vector<torch::Tensor>& like) {
  torch::NoGradGuard no_grad;
  return group_->size() == 1 ? fold(blocks_) : exchanged(like);
}

/// Numbers are cut into slices. Each rank gets one slice of all blocks of all ranks, adds it up, and gives it to all.
std::vector<torch::Tensor> TreeSum::exchanged(const std::vector<torch::Tensor>& like) {
  const int64_t ranks = group_->size(), tensors = std::ssize(like);
  int64_t length = tensors;  // behind the numbers, whether each tensor is there
  for (const torch::Tensor& tensor : like) length += tensor.numel();
  const auto held = std::ssize(blocks_);
  const torch::Tensor flat =
      at_least(flat_, std::max<int64_t>(1, held) * length).slice(0, 0, held * length).view({held, length});
  for (int64_t b = 0; b < held; ++b) {
    int64_t place = 0;
    float* there_is = flat[b].data_ptr<float>() + length - tensors;
    for (int64_t i = 0; i < tensors; ++i) {
      const torch::Tensor& tensor = blocks_[b].sum[i];
      MOESAIC_CHECK(!tensor.defined() || tensor.scalar_type() == torch::kFloat32, ShapeError,
                    "sum over ranks: got a gradient in {}, expected float32", c10::toString(tensor.scalar_type()));
      const torch::Tensor there = flat[b].slice(0, place, place += like[i].numel());
      // -0 + x is x, of all numbers it alone.
      if (tensor.defined()) {
        there.copy_(tensor.reshape({-1}));
      } else {
        there.fill_(-0.0F);
      }
      there_is[i] = tensor.defined() ? 1.0F : 0.0F;
    }
  }
  std::vector<std::vector<std::pair<int64_t, int64_t>>> blocks;
  for (int64_t rank = 0; rank < ranks; ++rank) blocks.push_back(blocks_of(group_->share(parts_, rank)));
  const int64_t all = std::accumulate(blocks.begin(), blocks.end(), int64_t{0},
                                      [](int64_t sum, const auto& of_rank) { return sum + std::ssize(of_rank); });

  const int64_t slice = std::min(kSlice, (length + ranks - 1) / ranks), chunk = slice * ranks;
  const int64_t chunks = (length + chunk - 1) / chunk;
  torch::Tensor total = at_least(total_, chunks * chunk);
  torch::Tensor sent = at_least(sent_, std::max<int64_t>(1, ranks * held * slice)).slice(0, 0, ranks * held * slice);
  torch::Tensor received = at_least(received_, all * slice).slice(0, 0, all * slice);
  std::vector<int64_t> sent_counts(ranks, held * slice), received_counts;
  for (const auto& of_rank : blocks) received_counts.push_back(std::ssize(of_rank) * slice);
  for (int64_t c = 0; c < chunks; ++c) {
    for (int64_t to = 0; to < ranks; ++to) {
      const int64_t begin = std::min(length, c * chunk + to * slice), end = std::min(length, begin + slice);
      for (int64_t b = 0; b < held && end > begin; ++b) {
        sent.slice(0, (to * held + b) * slice, (to * held + b) * slice + end - begin)
            .copy_(flat[b].slice(0, begin, end));
      }
    }
    group_->all_to_all(received, received_counts, sent, sent_counts);
    std::vector<Block> sums;
    int64_t place = 0;
    for (const auto& of_rank : blocks) {
      for (const auto& [begin, size] : of_rank) {
        push(sums, {begin, size, {received.slice(0, place, place + slice)}});
        place += slice;
      }
    }
    torch::Tensor gathered = total.slice(0, c * chunk, (c + 1) * chunk);
    group_->all_gather(gathered, fold(sums).front());
  }
  std::vector<torch::Tensor> result;
  int64_t place = 0;
  for (int64_t i = 0; i < tensors; ++i) {
    const torch::Tensor numbers = total.slice(0, place, place += like[i].numel());
    const bool defined = total.data_ptr<float>()[length - tensors + i] > 0;
    result.push_back(defined ? numbers.view(like[i].sizes()).to(like[i].device()) : torch::Tensor());
  }
  blocks_.clear();
  return result;
}

}  // namespace moesaic::ranks
