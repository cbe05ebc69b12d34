// What a model is made of: blocks, and in them feed-forward networks.
#pragma once
#include <torch/torch.h>

#include <string>

#include "moesaic/nn/pass.h"
#include "moesaic/nn/site.h"

namespace moesaic::nn {

/// The feed-forward half of a block: one dense network, or several behind a router.
class Ffn : public torch::nn::Module {
 public:
  /// x: [N, d] -> [N, d].
  virtual torch::Tensor forward(const torch::Tensor& x, Pass& pass) = 0;
  /// Appends the sites; `path` is the module path, "model.layers.0.mlp".
  virtual void add_sites(const std::string& path, Sites& sites) = 0;
  virtual void quantize_int8() = 0;
  /// Numbers per row that the backward pass needs, adapters apart. whole: the weights are trained themselves.
  virtual int64_t saved_per_row(bool whole) const = 0;
  /// True when a weight of it that belongs to no site requires a gradient.
  virtual bool trains() const { return false; }
};

/// One layer of a model.
class Block {
 public:
  virtual ~Block() = default;
  /// h: [N, d] -> [N, d].
  virtual torch::Tensor forward(const torch::Tensor& h, Pass& pass) = 0;
  /// Its place in the model, from 0.
  virtual int64_t index() const = 0;
  /// True when a weight, or an adapter at one of its sites, requires a gradient.
  virtual bool trains() const = 0;
  /// Bytes that the backward pass of `rows` rows needs of it, adapters included.
  virtual int64_t saved_bytes(int64_t rows) const = 0;
  /// Numbers per row that its backward pass holds at its widest, beside what was saved.
  virtual int64_t scratch_per_row() const = 0;
};

}  // namespace moesaic::nn
