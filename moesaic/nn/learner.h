// What a run changes, and where it is kept.
#pragma once
#include <torch/torch.h>

#include <filesystem>
#include <string>
#include <vector>

namespace moesaic::nn {

/// A trained tensor. What it is decides how it is updated: routers may have their own learning rate, and neither they
/// nor vectors have weight decay.
struct Parameter {
  enum class Kind {
    kWeight,  // a whole weight matrix of a model, whose second moment Adafactor may factor
    kMatrix,  // a small one: of a low-rank pair, of a connection
    kVector,
    kRouter,
  };
  std::string name;      // "model.layers.0.self_attn.q_proj.lora_A"
  torch::Tensor tensor;  // a leaf
  Kind kind;
};

/// An adapter, a composition's connections, or all weights of a model.
class Learner {
 public:
  virtual ~Learner() = default;
  /// In a fixed order; at least one.
  virtual std::vector<Parameter> parameters() = 0;
  /// Writes everything that load() and other programs need into the folder `dir`, which is made when it is absent.
  virtual void save(const std::filesystem::path& dir) const = 0;
  /// Takes the numbers that save() wrote. Throws DataError listing everything that does not fit.
  virtual void load(const std::filesystem::path& dir) = 0;
};

}  // namespace moesaic::nn
