// Checkpoints of the paper's released code as compositions.
#pragma once
#include <filesystem>
#include <memory>

#include "moesaic/compose/composition.h"

namespace moesaic::compose {

/// What is to be known about a released checkpoint beside its folder.
struct ReleasedOptions {
  std::filesystem::path anchor, augmenting;  // the models; empty = the paths in its config.json
  std::string mask = "full";                 // full gives the released code's numbers; see AugmentingConfig
  models::LoadOptions load;                  // of both models
};

/// The composition that a folder of google-deepmind/calm holds: config.json (model_type "calm") and pytorch_model.bin
/// or model.safetensors, whole or in shards. Its attention has biases, no positions, and RMSNorm behind it:
///
///   in_proj [3 D_B, D_B] = W_Q, W_K, W_V on top of each other;  H_B,j <- H_B,j + norm(Y)
///
/// The checkpoint's own copies of the models are compared with those given, number by number. Throws ConfigError for a
/// config.json that is not one, FormatError for a damaged file, and DataError listing everything else that does not
/// fit. Source: google-deepmind/calm, model/{calm,layers,utils}.py.
std::shared_ptr<Composition> import_released(const std::filesystem::path& dir, const ReleasedOptions& options);

/// The pairs of blocks that the released code joins for `num_connections`: floor(linspace(0, N - 1, n)) of both models,
/// rounded as NumPy rounds it.
std::vector<ConnectionPair> released_pairs(int64_t num_connections, int64_t anchor_layers, int64_t aug_layers);

}  // namespace moesaic::compose
