// Loading: every tensor of a file is claimed once and every parameter receives one, or everything wrong is listed.
#pragma once
#include <functional>

#include "moesaic/formats/safetensors.h"

namespace moesaic::adapters {

/// A parameter as it stands in a file.
struct FileTensor {
  std::string key;                                   // without "base_model.model."
  std::vector<int64_t> shape;                        // in the file
  std::function<void(const torch::Tensor&)> assign;  // takes the file's layout, float32
  std::function<torch::Tensor()> value;              // the parameter in the file's layout
  std::function<torch::Tensor()> gradient;           // its gradient in the file's layout
};

/// Throws DataError listing every missing, unexpected and mis-shaped tensor.
void claim_tensors(const std::vector<FileTensor>& expected, const formats::TensorMap& tensors);

/// `tensor`'s gradient, or zeros.
torch::Tensor gradient_or_zeros(const torch::Tensor& tensor);

}  // namespace moesaic::adapters
