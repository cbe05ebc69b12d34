#include "moesaic/ranks/place.h"

#include <charconv>
#include <cstring>

#include "moesaic/base/check.h"

namespace moesaic::ranks {
namespace {

using Variable = std::function<const char*(const char*)>;

/// The names of one launcher.
struct Names {
  const char *rank, *size, *local_rank, *local_size;
};
constexpr Names kLaunchers[] = {
    {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"},
    {"OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"},
    {"PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"},
    // Of the step: a batch script has SLURM_PROCID and SLURM_NTASKS itself, and nobody beside it.
    {"SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"},
};

int64_t number(const Variable& variable, const char* name, int64_t least, int64_t most) {
  const char* text = variable(name);
  int64_t value = 0;
  const char* end = text + std::strlen(text);
  const auto [stop, error] = std::from_chars(text, end, value);
  MOESAIC_CHECK(error == std::errc() && stop == end && value >= least && value <= most, UsageError,
                "{}: got '{}' in the environment, expected {} to {}", name, text, least, most);
  return value;
}

/// The first host of "node[10,20-22],other3".
std::string first_host(const std::string& list) {
  const size_t end = list.find_first_of(",[");
  if (end == std::string::npos || list[end] == ',') return list.substr(0, end);
  const size_t stop = list.find_first_of(",-]", end);
  return list.substr(0, end) + list.substr(end + 1, stop == std::string::npos ? stop : stop - end - 1);
}

}  // namespace

std::optional<Place> place_from(const Variable& variable) {
  constexpr int64_t kMost = 1 << 20;
  for (const Names& names : kLaunchers) {
    if (variable(names.rank) == nullptr || variable(names.size) == nullptr) continue;
    Place place;
    place.size = number(variable, names.size, 1, kMost);
    place.rank = number(variable, names.rank, 0, place.size - 1);
    place.local_rank = place.rank;
    bool one_machine = place.size == 1;
    const char* local_size = variable(names.local_size) != nullptr ? names.local_size : "SLURM_STEP_TASKS_PER_NODE";
    if (const char* size = variable(local_size)) {
      // Slurm's is "4", or "4(x2)" for two machines.
      if (std::strspn(size, "0123456789") == std::strlen(size)) {
        place.local_size = number(variable, local_size, 1, place.size);
        one_machine = place.local_size == place.size;
      } else {
        place.local_size = std::max<int64_t>(1, std::atoll(size));
      }
    }
    // srun can speak PMI, which has no names for what is local.
    for (const char* name : {names.local_rank, "SLURM_LOCALID"}) {
      if (variable(name) == nullptr) continue;
      place.local_rank = number(variable, name, 0, kMost);
      break;
    }
    if (const char* host = variable("MASTER_ADDR")) {
      place.host = host;
    } else if (const char* nodes = variable("SLURM_STEP_NODELIST"); nodes != nullptr && !one_machine) {
      place.host = first_host(nodes);
    } else {
      place.host = "127.0.0.1";
      MOESAIC_CHECK(one_machine, UsageError,
                    "{} is {}: got no MASTER_ADDR in the environment, expected the address of rank 0's machine, since "
                    "not all ranks are on this one",
                    names.size, place.size);
    }
    if (variable("MASTER_PORT") != nullptr) place.port = number(variable, "MASTER_PORT", 1, 65535);
    const char* hosted = variable("TORCHELASTIC_USE_AGENT_STORE");
    place.hosted = hosted != nullptr && std::string(hosted) == "True";
    if (variable("TORCHELASTIC_RESTART_COUNT") != nullptr) {
      place.restart = number(variable, "TORCHELASTIC_RESTART_COUNT", 0, INT64_MAX);
    }
    return place;
  }
  return std::nullopt;
}

}  // namespace moesaic::ranks
