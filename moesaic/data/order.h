// Orders of rows that need no memory: seeded permutations, and the rows of a split. Integer arithmetic only, so every
// machine draws the same rows from the same seed.
#pragma once
#include <algorithm>
#include <cstdint>
#include <string_view>

namespace moesaic::data {

/// A 64-bit hash of two integers (two rounds of splitmix64's finaliser).
inline uint64_t hash_mix(uint64_t a, uint64_t b) {
  uint64_t x = a;
  for (uint64_t word : {b, uint64_t{0}}) {
    x += 0x9e3779b97f4a7c15ULL + word;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
    x ^= x >> 31;
  }
  return x;
}

/// FNV-1a of a text, mixed.
inline uint64_t hash_text(std::string_view text, uint64_t seed) {
  uint64_t hash = 0xcbf29ce484222325ULL;
  for (unsigned char c : text) hash = (hash ^ c) * 0x100000001b3ULL;
  return hash_mix(seed, hash);
}

/// A number in [0, 1) from the upper 53 bits of a hash.
inline double hash_unit(uint64_t hash) { return static_cast<double>(hash >> 11) * 0x1.0p-53; }

/// A pseudo-random permutation of 0 .. n-1: a four-round Feistel network on the smallest even number of bits that
/// holds n, walked until the value falls below n (fewer than four steps on average).
class Permutation {
 public:
  Permutation(int64_t n, uint64_t key) : n_(n), key_(key) {
    while ((int64_t{1} << (2 * half_bits_)) < n) ++half_bits_;
  }

  int64_t operator()(int64_t index) const {
    const uint64_t mask = (uint64_t{1} << half_bits_) - 1;
    uint64_t x = static_cast<uint64_t>(index);
    do {
      uint64_t left = x >> half_bits_, right = x & mask;
      for (uint64_t round = 0; round < 4; ++round) {
        uint64_t next = left ^ (hash_mix(key_ + round, right) & mask);
        left = right;
        right = next;
      }
      x = left << half_bits_ | right;
    } while (x >= static_cast<uint64_t>(n_));
    return static_cast<int64_t>(x);
  }

 private:
  int64_t n_;
  uint64_t key_;
  int half_bits_ = 1;
};

/// The rows of one split of a file with `rows` rows, in file order.
///
/// The file is cut into `validation` strata of equal size (to one row); a hash of the seed and the stratum picks one
/// row of each for the validation split, and the others are the train split. So the two never overlap, have exact
/// sizes and cover the whole file, and any row is found without a table. `cap` keeps rows spread evenly.
class RowSubset {
 public:
  enum class Split { kAll, kTrain, kValidation };

  /// 0 <= validation < rows, or rows = 0. cap = 0: no cap.
  RowSubset(int64_t rows, int64_t validation, Split split, int64_t cap, uint64_t seed)
      : rows_(rows), validation_(split == Split::kAll ? 0 : validation), split_(split), seed_(seed) {
    available_ = split == Split::kValidation ? validation_ : rows_ - validation_;
    size_ = cap > 0 ? std::min(cap, available_) : available_;
  }

  int64_t size() const { return size_; }

  /// Row in the file of the i-th row of the split; grows with i.
  int64_t at(int64_t i) const {
    if (size_ < available_) i = scale(i, available_, size_);
    if (split_ == Split::kValidation) return picked(i);
    if (validation_ == 0) return i;
    // Stratum s holds the train rows start(s) - s .. start(s+1) - (s+1) - 1.
    int64_t low = 0, high = validation_ - 1;
    while (low < high) {
      int64_t middle = (low + high + 1) / 2;
      if (start(middle) - middle <= i)
        low = middle;
      else
        high = middle - 1;
    }
    int64_t row = i + low;
    return row < picked(low) ? row : row + 1;
  }

 private:
  static int64_t scale(int64_t i, int64_t n, int64_t parts) {
    return static_cast<int64_t>(static_cast<__int128>(i) * n / parts);
  }
  int64_t start(int64_t stratum) const { return scale(stratum, rows_, validation_); }
  int64_t picked(int64_t stratum) const {
    int64_t begin = start(stratum), length = start(stratum + 1) - begin;
    return begin +
           static_cast<int64_t>(hash_mix(seed_, static_cast<uint64_t>(stratum)) % static_cast<uint64_t>(length));
  }

  int64_t rows_, validation_;
  Split split_;
  uint64_t seed_;
  int64_t available_ = 0, size_ = 0;
};

}  // namespace moesaic::data
