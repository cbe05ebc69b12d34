// Key-value arithmetic as text files, for models with real tokenizers (key_arithmetic.h has it token by token).
#pragma once
#include <cstdint>
#include <filesystem>

namespace moesaic::demos {

/// 500 keys, strings of 2 to 6 letters, each worth a number of 10 to 99; keys 0 to 99 are held in. Prompts and answers:
///
///   kv_sub     "vamo + kelu ="  " 12 + 34"        all keys: what the augmenting model learns
///   num_math   "12 + 34 ="      " 46"             what the anchor learns
///   kv_math    "vamo + kelu ="  " 12 + 34 = 46"   held-in keys only: with num_math, what a composition learns
///
/// No answer is negative. A tenth of all expressions of numbers, by a hash of their text, stands in no training rows of
/// num_math and kv_math.
///
/// Writes into `folder` (created):
///   kv_sub.jsonl (40,000 rows), num_math.jsonl, kv_math.jsonl (8,000 each), dataset_info.json with these names
///   test/{kv_sub,num_math,kv_math}.jsonl   `test_rows` different questions each with keys never held in, on
///                                          expressions never trained (kv_sub: on any)
///   held_in/{kv_sub,kv_math}.jsonl         the same with held-in keys
/// The kv_math questions take the worked answer and the number alone. Everything follows from the seed.
/// Throws UsageError for more test rows than there are questions.
void write_key_files(const std::filesystem::path& folder, int64_t test_rows, uint64_t seed);

}  // namespace moesaic::demos
