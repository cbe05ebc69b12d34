// A block made of parts that have sites: what follows from these.
#pragma once
#include <torch/torch.h>

#include "moesaic/nn/block.h"

namespace moesaic::nn {

class SitedBlock : public Block {
 public:
  int64_t index() const override { return index_; }
  /// Keeps its matrices in int8 alone.
  virtual void quantize_int8() = 0;
  bool trains() const override;
  /// The gradients of gate and up, of the branch's product and of the block's input.
  int64_t scratch_per_row() const override;

 protected:
  explicit SitedBlock(int64_t index) : index_(index) {}
  /// Numbers per row that the backward pass of its scales needs.
  int64_t saved_by_scales() const;

  Sites sites_;  // its own, filled in by the derived constructor

 private:
  int64_t index_;
};

}  // namespace moesaic::nn
