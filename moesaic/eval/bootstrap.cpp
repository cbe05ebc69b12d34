#include "moesaic/eval/bootstrap.h"

#include <cmath>
#include <limits>
#include <numeric>
#include <random>

namespace moesaic::eval {
namespace {

/// The state that Python's random.seed(0) gives the Mersenne Twister: init_by_array of one word (Matsumoto and
/// Nishimura, mt19937ar, 2002).
struct PythonSeedZero {
  using result_type = uint32_t;
  template <class Iterator>
  void generate(Iterator begin, Iterator end) const {
    const auto n = static_cast<uint32_t>(end - begin);
    auto at = [&](uint32_t i) -> decltype(auto) { return begin[i]; };
    at(0) = 19650218u;
    for (uint32_t i = 1; i < n; ++i) {
      at(i) = static_cast<uint32_t>(1812433253u * (at(i - 1) ^ (at(i - 1) >> 30)) + i);
    }
    uint32_t i = 1;
    auto next = [&] {
      if (++i < n) return;
      at(0) = at(n - 1);
      i = 1;
    };
    auto mixed = [&](uint32_t factor) {
      return static_cast<uint32_t>(at(i) ^ ((at(i - 1) ^ (at(i - 1) >> 30)) * factor));
    };
    for (uint32_t k = 0; k < n; ++k, next()) at(i) = mixed(1664525u);
    for (uint32_t k = 1; k < n; ++k, next()) at(i) = static_cast<uint32_t>(mixed(1566083941u) - i);
    at(0) = 0x80000000u;
  }
};

}  // namespace

double bootstrap_error(size_t count, int64_t iterations,
                       const std::function<double(const std::vector<size_t>&)>& score) {
  if (count < 2 || iterations < 2) return std::numeric_limits<double>::quiet_NaN();
  PythonSeedZero seed;
  std::mt19937 random(seed);
  auto uniform = [&] {  // 53 bits
    const uint32_t high = random() >> 5, low = random() >> 6;
    return (high * 67108864.0 + low) / 9007199254740992.0;
  };
  std::vector<double> scores;
  std::vector<size_t> rows(count);
  for (int64_t i = 0; i < iterations; ++i) {
    for (size_t& row : rows) row = static_cast<size_t>(uniform() * static_cast<double>(count));
    scores.push_back(score(rows));
  }
  const double n = static_cast<double>(scores.size());
  const double mean = std::accumulate(scores.begin(), scores.end(), 0.0) / n;
  double squares = 0;
  for (const double value : scores) squares += (value - mean) * (value - mean);
  return std::sqrt(squares / (n - 1));
}

}  // namespace moesaic::eval
