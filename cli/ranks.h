// Work of several processes: started by us, or by torchrun, mpirun or srun.
#pragma once
#include <cstdint>
#include <functional>
#include <string>

#include "cli/command.h"
#include "moesaic/ranks/place.h"

namespace moesaic::cli {

/// Starts this program `ranks` times on this machine, each with its place in the environment; ends them when one fails,
/// and starts all again up to `restarts` times. Signals go to all of them. Returns the exit code of the first that
/// failed, 128 and its number for a signal; else what they ended with.
int launch(int64_t ranks, int64_t restarts);

/// --ranks.
void add_ranks_option(CLI::App& app, int64_t& ranks, const std::string& help);

/// Where this process stands; alone where no launcher says otherwise. Throws UsageError where one started other than
/// `asked` ranks (0: not asked for).
ranks::Place own_place(int64_t asked);

/// The device of this rank where `device` leaves it open: of several GPUs each rank has its own.
std::string device_of(const ranks::Place& place, const std::string& device);

/// Leaves printing to rank 0, but for warnings and errors, and takes this rank's part of the machine's cores where
/// neither `threads` (0: not given) nor the environment says how many.
void settle_down(const ranks::Place& place, int threads);

/// What `work` returns. An error of a rank above 0 is told after a moment: mostly it is rank 0's, too, which tells it,
/// and the launcher ends the others. That another rank is lost is told by rank 0 and the launcher alone.
int told_once(const ranks::Place& place, const std::function<int()>& work);

}  // namespace moesaic::cli
