// Where the experts, routers and shared expert of a sparse model come from; one file per kind of source.
#pragma once
#include <ATen/core/Tensor.h>

#include <memory>
#include <string>

#include "moesaic/export/sparse_family.h"
#include "moesaic/export/upcycling.h"
#include "moesaic/formats/checkpoint.h"

namespace moesaic::exporting {

/// The matrices of a dense model's feed-forward networks, one at a time: the last one read is kept.
class DenseFfn {
 public:
  /// Throws DataError when a layer's matrices are not those of a gated network without biases.
  explicit DenseFfn(std::shared_ptr<const formats::Checkpoint> checkpoint);

  const formats::Checkpoint& checkpoint() const { return *checkpoint_; }
  int64_t layers() const { return layers_; }
  int64_t model_width() const { return width_[1]; }
  int64_t width() const { return width_[0]; }
  /// [f, d] of gate and up, [d, f] of down, in the checkpoint's number format. Not to be written to.
  const at::Tensor& matrix(int64_t layer, Part part);

 private:
  std::shared_ptr<const formats::Checkpoint> checkpoint_;
  int64_t layers_ = 0;
  std::array<int64_t, 2> width_{};  // f, d
  std::string name_;                // of last_
  at::Tensor last_;
};

/// What a sparse model has in the place of feed-forward networks. Asked layer by layer, in each matrix by matrix.
class Experts {
 public:
  virtual ~Experts() = default;

  virtual const SparseSizes& sizes() const = 0;
  /// [f', d] of gate and up, [d, f'] of down.
  virtual at::Tensor expert(int64_t layer, Part part, int64_t e) = 0;
  /// [E, d]
  virtual at::Tensor router(int64_t layer) = 0;
  /// Shapes as an expert's, of sizes().shared_width; asked where that is not 0.
  virtual at::Tensor shared(int64_t layer, Part part) = 0;
  /// [1, d]
  virtual at::Tensor shared_gate(int64_t layer) = 0;
  /// A tensor of the base that is no expert's, as the sparse model has it.
  virtual at::Tensor beside(const std::string& /*name*/, at::Tensor dense) { return dense; }
  /// Whether the sparse model gives the dense one's logits, and why or why not, for people.
  virtual bool equals_dense() const = 0;
  virtual std::string promise() const = 0;
};

/// copy, virtual_group, drop and residual: every expert is made of the base's own network.
///
///   copy           W, each; noise adds normal draws
///   virtual_group  expert c G + g has rows [g f/G, (g+1) f/G) of gate and up, and these columns of down times G;
///                  the router's rows of one copy are equal, so that its G parts are chosen together
///   drop           a permutation of the width, the same in all three matrices, and a share of it drawn anew from
///                  normal(mean, std) of what is replaced
///   residual       down is 0; the shared expert has the base's down times 2 behind a gate of 0, whose sigmoid is 1/2
///
/// The weights of the chosen experts sum to 1, so that copies give what one network gives. Families that always have a
/// shared expert (qwen2_moe) give one half through it: the base's network behind a gate of 0, and down times 1/2 in the
/// experts.
std::unique_ptr<Experts> make_copies(const Upcycling& wanted, const SparseFamily& family,
                                     std::shared_ptr<const formats::Checkpoint> base);
/// lora: W + s_e B_e A_e of every adapter e.
std::unique_ptr<Experts> make_lora_experts(const Upcycling& wanted, const SparseFamily& family,
                                           std::shared_ptr<const formats::Checkpoint> base);
/// mergekit: the networks of other models, with gates made of prompts.
std::unique_ptr<Experts> make_merged_experts(const Upcycling& wanted, const SparseFamily& family,
                                             std::shared_ptr<const formats::Checkpoint> base);

// What the kinds of source share.

/// [rows, d] from normal(0, std), seeded by `use` and the layer.
at::Tensor drawn_rows(const Upcycling& wanted, const char* use, int64_t layer, int64_t rows, int64_t model_width);
/// `matrix` with a normal draw of this standard deviation added, float32, seeded by layer, part and number.
at::Tensor with_noise(const at::Tensor& matrix, double std, uint64_t seed, int64_t layer, Part part, int64_t number);
/// A shared expert of width 1 that adds nothing, for families that always have one. [1, d] or [d, 1]
at::Tensor silent_shared(int64_t model_width, Part part);

}  // namespace moesaic::exporting
