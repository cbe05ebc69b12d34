// The models of `moesaic demo calm`: made from nothing on key-value arithmetic, joined, and asked.
#pragma once
#include <filesystem>
#include <string>
#include <vector>

#include "demos/key_arithmetic.h"
#include "moesaic/compose/composition.h"
#include "moesaic/train/trainer.h"

namespace moesaic::demos {

inline constexpr std::pair<const char*, KeyTask> kKeyTasks[] = {
    {"KV-SUB", KeyTask::kSubstitute}, {"NUM-MATH", KeyTask::kCalculate}, {"KV-MATH", KeyTask::kBoth}};

/// A line of the table.
struct KeyRow {
  std::string name;
  std::vector<double> scores;  // share of right answers, in the order of kKeyTasks
  int64_t trained = 0;         // numbers
  double seconds = 0;          // of training
};

/// Every method that trains shows its progress, writes what it made to <folder>/<name>, asks it `test_rows` questions
/// of each task and returns its line of the table. Starts and texts are drawn from `seed` and the name.
class KeyExperiment {
 public:
  /// fraction: share of all training steps.
  KeyExperiment(std::filesystem::path folder, uint64_t seed, double fraction, int64_t test_rows, c10::Device device)
      : folder_(std::move(folder)), seed_(seed), fraction_(fraction), test_rows_(test_rows), device_(device) {}

  KeyRow make_model(const std::string& name, KeyText texts, int64_t steps);
  /// A model of the same shape that is not trained.
  void make_random_model(const std::string& name);
  /// Joins two models and trains the connections on texts of held-in keys, mixed with arithmetic ("D_C").
  KeyRow compose(const std::string& name, const std::string& anchor, const std::string& augmenting,
                 const compose::CompositionConfig& config);
  /// A LoRA of the rank whose numbers come nearest to `parameters`, on the texts of `compose`.
  KeyRow adapt(const std::string& name, const std::string& model, int64_t parameters);
  /// Trains every weight of a copy of `model` on.
  KeyRow tune(const std::string& name, const std::string& model, KeyText texts);

 private:
  formats::ModelFolder folder_of() const;
  compose::Member open(const std::string& name) const;
  /// Trains `learner` of `model` on these texts and saves it.
  train::TrainResult train(const std::string& name, models::LanguageModel& model, nn::Learner& learner,
                           const std::vector<KeyText>& texts, int64_t steps, double learning_rate) const;
  KeyRow row(const std::string& name, models::LanguageModel& model, const tokenizer::Tokenizer& tokenizer,
             int64_t trained, double seconds) const;

  std::filesystem::path folder_;
  uint64_t seed_;
  double fraction_;
  int64_t test_rows_;
  c10::Device device_;
};

}  // namespace moesaic::demos
