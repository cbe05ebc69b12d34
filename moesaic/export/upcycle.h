// Sparse mixture-of-experts models made out of dense ones, as Hugging Face folders.
#pragma once
#include <filesystem>
#include <string>

#include "moesaic/export/upcycling.h"
#include "moesaic/formats/checkpoint.h"

namespace moesaic::exporting {

/// What was made, for people.
struct Upcycled {
  std::string family;  // model_type
  int64_t layers = 0, experts = 0, experts_per_token = 0;
  int64_t expert_width = 0, shared_width = 0;     // shared_width: 0 without a shared expert
  int64_t parameters = 0, active_parameters = 0;  // active: of one token; embedding and head are counted
  size_t bytes = 0;
  std::string dtype;
  bool dequantised = false;  // the base's blocks were
  bool equals_dense = false;
  bool routers_learn = false;  // from the answers, whatever experts_per_token is
  std::string promise{};       // what equality to expect, and why
};

/// Writes the sparse model's folder, tensor by tensor: what is held is one matrix of the base and one of an expert
/// (and what makes the gates, where a model has to be run for them). Throws UsageError for bases that no sparse family
/// can hold.
Upcycled upcycle(const Upcycling& wanted, const std::filesystem::path& out);

/// The number format that `name` (Upcycling::dtype) asks for.
at::ScalarType output_dtype(const std::string& name, const formats::Checkpoint& base);

/// Largest |logit of sparse - logit of dense| over the largest |logit of dense|, on one text of 64 drawn tokens, in
/// float32. The models are loaded one after the other.
double logit_difference(const std::filesystem::path& dense, const std::filesystem::path& sparse, uint64_t seed);

}  // namespace moesaic::exporting
