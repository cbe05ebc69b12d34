#include "moesaic/train/memory.h"

#include <malloc.h>
#include <unistd.h>

#include <bit>
#include <fstream>
#include <set>

#include "moesaic/nn/kernels.h"
#include "moesaic/nn/loss.h"

namespace moesaic::train {
namespace {

constexpr int64_t kCompiledProducts = int64_t{56} << 20;

/// What this process holds now: code, libraries, and whatever was read before.
int64_t resident_bytes() {
  std::ifstream statm("/proc/self/statm");
  int64_t virtual_pages = 0, resident_pages = 0;
  statm >> virtual_pages >> resident_pages;
  return resident_pages * sysconf(_SC_PAGESIZE);
}

/// Bytes of `tensors`; those that share their numbers (tied weights) count once. On the meta device all numbers share
/// an address, so there each counts.
int64_t bytes_of(const std::vector<torch::Tensor>& tensors) {
  int64_t bytes = 0;
  std::set<const void*> seen;
  for (const torch::Tensor& tensor : tensors) {
    if (tensor.is_meta() || seen.insert(tensor.data_ptr()).second) bytes += static_cast<int64_t>(tensor.nbytes());
  }
  return bytes;
}

}  // namespace

int64_t MemoryEstimate::total() const {
  int64_t sum = 0;
  for (const auto& [name, bytes] : parts) sum += bytes;
  return sum;
}

MemoryEstimate estimate_memory(models::LanguageModel& model, nn::Learner& learner, const TrainConfig& config,
                               int64_t tokens, int64_t targets, torch::Device device) {
  const models::Facts& facts = model.facts();
  const int64_t element = static_cast<int64_t>(c10::elementSize(facts.dtype));
  MemoryEstimate estimate;
  auto add = [&](const std::string& name, int64_t bytes) { estimate.parts.emplace_back(name, bytes); };

  std::vector<torch::Tensor> trained_tensors;
  bool whole = false;
  for (const nn::Parameter& parameter : learner.parameters()) {
    trained_tensors.push_back(parameter.tensor);
    whole = whole || parameter.kind == nn::Parameter::Kind::kWeight;
  }
  const int64_t weights = bytes_of(model.weights()), trained = bytes_of(trained_tensors);
  // Where everything is loaded already, what the process holds includes it.
  const bool loaded = facts.device == device && device.is_cpu();
  const int64_t resident = resident_bytes();
  add("program", loaded ? std::max<int64_t>(0, resident - weights - (whole ? 0 : trained)) : resident);
  add(whole ? "weights" : "frozen weights", weights);
  if (!whole) add("trained tensors", trained);
  // Of micro-batches that wait to be added: one of each power of two.
  add("gradients", std::bit_width(static_cast<uint64_t>(config.micro_batches())) * trained);
  add("optimizer state", (config.optim == "adamw" ? 2 : 1) * trained);
  const int64_t activations = model.activation_bytes(tokens, config.gradient_checkpointing);
  add("activations", activations);
  // Between what is kept, temporaries that were freed: 5 to 15 % measured.
  if (device.is_cpu()) add("gaps in the heap", activations / 10);
  add("backward scratch", model.scratch_bytes(tokens));
  const int64_t logits = std::min(nn::cross_entropy_chunk_bytes(device), targets * facts.vocab_size * 4);
  // In half precision they stand in float32 beside themselves.
  add("loss", (element < 4 ? logits + logits / 2 : logits) + 3 * targets * facts.width * element);
  // What oneDNN compiles for bfloat16, of which the program keeps 96 products (cli/threads.cpp): measured. About as
  // much are the buffers of products in float32 stretches.
  if (device.is_cpu() && element < 4) add("compiled products", kCompiledProducts);
  return estimate;
}

void avoid_heap_holes(torch::ScalarType dtype, torch::Device device) {
#if defined(__GLIBC__)
  if (nn::multiplies_wide(torch::empty({0}, torch::dtype(dtype).device(device)))) mallopt(M_MMAP_THRESHOLD, 1 << 20);
#endif
}

}  // namespace moesaic::train
