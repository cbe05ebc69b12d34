// How OpenMP's threads wait for each other: spinning while the cores are theirs, asleep while others need them.
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

}  // namespace moesaic::cli
