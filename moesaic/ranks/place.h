// Where a process stands among those that train one run, as launchers say it in the environment.
#pragma once
#include <cstdint>
#include <functional>
#include <optional>
#include <string>

namespace moesaic::ranks {

struct Place {
  int64_t rank = 0, size = 1;              // among all
  int64_t local_rank = 0, local_size = 1;  // among those of this machine
  std::string host;                        // where the ranks find each other
  int64_t port = 29500;
  bool hosted = false;  // the launcher keeps the store at host:port; else rank 0 does
  int64_t restart = 0;  // how often the launcher has started the group again
};

/// The first complete set of torchrun's (RANK, WORLD_SIZE), Open MPI's, PMI's (MPICH, Intel MPI) and of a step of
/// Slurm's variables; nullopt where there is none. `variable` is getenv. Throws UsageError for values that can't be,
/// and for ranks on several machines without MASTER_ADDR.
std::optional<Place> place_from(const std::function<const char*(const char*)>& variable);

}  // namespace moesaic::ranks
