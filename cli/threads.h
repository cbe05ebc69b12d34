// How OpenMP's threads wait for each other: spinning while the cores are theirs, asleep while others need them. And
// what else of the libraries' ways the environment decides.
#pragma once
#include <thread>

namespace moesaic::cli {

/// Threads that spin at the end of every operator are fastest on a quiet machine, and many times slower than one thread
/// beside a busy process, whose time they burn. While a SpinWatch lives it reads how long threads of this process are
/// kept from running, and turns libgomp's spinning off and on by it. How many threads compute what stays as it is, so
/// results do too.
///
/// Does nothing where the user chose a policy (OMP_WAIT_POLICY, GOMP_SPINCOUNT), with one thread, with another OpenMP
/// runtime, and where the kernel does not say how long threads wait.
class SpinWatch {
 public:
  SpinWatch();

 private:
  std::jthread thread_;
};

/// Bounds what oneDNN and LibTorch keep of compiled bfloat16 products: one for every number of rows, which in training
/// differ from step to step, so that 12 steps of SmolLM2 kept 330 MiB. Before the first product; what the user set
/// (ONEDNN_PRIMITIVE_CACHE_CAPACITY, LRU_CACHE_CAPACITY) stays.
void bound_product_caches();

/// Large tensors in huge pages where the system gives them to those who ask (transparent_hugepage: madvise): a token's
/// way through all weights misses fewer address translations. Before the first tensor, and not for training, whose
/// activations would be rounded up to whole ones. THP_MEM_ALLOC_ENABLE=0 says no.
void ask_for_huge_pages();

}  // namespace moesaic::cli
