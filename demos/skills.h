// Small synthetic skills in instruction form: the demo's data. Everything follows from a seed.
#pragma once
#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "moesaic/base/json.h"

namespace moesaic::demos {

/// Rows of each skill in the demo.
constexpr int64_t kTrainRows = 200, kTestRows = 40;

/// A kind of question with one right, short answer.
struct Skill {
  std::string name;
  std::string summary;
  bool held_out;  // never in training data; close in kind to a trained skill
};

/// All skills: the trained ones, then the held-out ones.
const std::vector<Skill>& skills();

/// `count` different rows {"messages": [user, assistant], "skill", "id"} of a skill. `split`: "train" or "test"; a hash
/// of the question's content (not its wording, not the seed) assigns it to one of them, so they are disjoint for all
/// seeds. Throws UsageError for an unknown skill or split, a train split of a held-out skill, or more rows than the
/// skill has.
std::vector<OrderedJson> generate_skill(const std::string& skill, const std::string& split, int64_t count,
                                        uint64_t seed);

/// Writes <skill>.train.jsonl (trained skills) and <skill>.test.jsonl (all) into `folder`, and dataset_info.json with
/// the names <skill> and <skill>_test. Creates the folder; writes nothing when a skill has fewer rows.
void write_skills(const std::filesystem::path& folder, int64_t train_rows, int64_t test_rows, uint64_t seed);

}  // namespace moesaic::demos
