// The processes that train one run together, and what they tell each other.
#pragma once
#include <torch/torch.h>

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "moesaic/base/check.h"
#include "moesaic/ranks/place.h"

namespace moesaic::ranks {

/// Another rank is gone or does not answer.
class Lost : public DataError {
 public:
  using DataError::DataError;
};

/// Every call but rank(), size() and first() is to be made by all ranks alike, in the same order, with no other
/// between; it returns when all have made it. Throws Lost naming the ranks that are gone or do not answer within
/// the group's time. A group of one talks to nobody and opens no socket.
///
/// Ranks of several machines trust each other and everybody on their network: nothing is encrypted, nobody is asked who
/// he is.
class Group {
 public:
  /// A group of one.
  Group();
  /// Meets the others at place.host:place.port; `timeout`: how long each waits for the others in a call.
  Group(const Place& place, std::chrono::seconds timeout);
  ~Group();

  int64_t rank() const { return rank_; }
  int64_t size() const { return size_; }
  bool first() const { return rank_ == 0; }
  /// Which of `count` pieces of work are `rank`'s: [first, last).
  std::pair<int64_t, int64_t> share(int64_t count, int64_t rank) const {
    return {count * rank / size_, count * (rank + 1) / size_};
  }

  /// Rank 0 says that the work has begun; begun(): whether it said so in an earlier start by the same launcher.
  void begin();
  bool begun();
  /// Waits for all, up to a day: rank 0 may have much to do before.
  void meet();
  /// What every rank gave, by rank.
  std::vector<std::string> gather(const std::string& own);
  /// What rank 0 gave.
  std::string from_first(const std::string& own) { return gather(first() ? own : "").front(); }
  /// Whether it is true at any rank.
  bool any(bool own);
  /// Float32 vectors on the CPU: sent_counts[r] numbers go to rank r, received_counts[r] come from it, by rank.
  void all_to_all(torch::Tensor& received, const std::vector<int64_t>& received_counts, const torch::Tensor& sent,
                  const std::vector<int64_t>& sent_counts);
  /// all: [size * n], of every rank its `own` [n].
  void all_gather(torch::Tensor& all, const torch::Tensor& own);

 private:
  struct Links;
  void done(const std::function<void()>& call);
  void all_gather(torch::Tensor& all, const torch::Tensor& own, std::chrono::milliseconds timeout);

  int64_t rank_ = 0, size_ = 1;
  std::unique_ptr<Links> links_;
};

/// A store for the ranks of this machine, at a free port of loopback, for as long as it lives.
class Host {
 public:
  Host();
  ~Host();
  int64_t port() const;

 private:
  struct Store;
  std::unique_ptr<Store> store_;
};

}  // namespace moesaic::ranks
