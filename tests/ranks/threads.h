// Ranks as threads of one process.
#pragma once
#include <cstdlib>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#include "moesaic/ranks/group.h"

namespace moesaic::ranks {

/// Runs `work` as every rank of a group, each on a thread of its own.
inline void as_ranks(int64_t size, const std::function<void(std::shared_ptr<Group>)>& work) {
  if (size == 1) return work(std::make_shared<Group>());
  // What c10d keeps for its reports is one for a process, where a group is meant to be one, too, and not locked.
  setenv("TORCH_FR_BUFFER_SIZE", "0", /*overwrite=*/1);
  const Host host;
  std::vector<std::thread> threads;
  for (int64_t rank = 0; rank < size; ++rank) {
    threads.emplace_back([&, rank] {
      const Place place{rank, size, rank, size, "127.0.0.1", host.port(), /*hosted=*/true};
      work(std::make_shared<Group>(place, std::chrono::seconds(60)));
    });
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace moesaic::ranks
