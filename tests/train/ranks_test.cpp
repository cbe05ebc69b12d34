#include "moesaic/base/check.h"
#include "moesaic/train/step.h"
#include "tests/ranks/threads.h"
#include "tests/temporary_folder.h"
#include "tiny_run.h"

namespace moesaic::train {
namespace {

TrainResult train_as(TinyRun& run, const std::shared_ptr<ranks::Group>& group, const TrainConfig& config) {
  CountingStream stream;
  TrainHooks hooks;
  hooks.group = group;
  return train(*run.model, *run.adapter, stream, {}, config, 0, hooks);
}

TEST(Ranks, ADifferentBitAtOneIsFoundAtTheNextCheckpoint) {
  const test::TemporaryFolder folder;
  TrainConfig config;
  config.output_dir = folder.path();
  config.max_steps = 4;
  config.save_steps = 2;
  config.gradient_accumulation_steps = 2;
  config.per_device_train_batch_size = 2;
  std::vector<TinyRun> runs(3);  // not made by the threads, which share a random generator
  {
    torch::NoGradGuard no_grad;
    runs[1].adapter->parameters().front().tensor.flatten()[0].mul_(1 + 1e-7);
  }
  ranks::as_ranks(3, [&](const std::shared_ptr<ranks::Group>& group) {
    TinyRun& run = runs[group->rank()];
    try {
      train_as(run, group, config);
      ADD_FAILURE() << "rank " << group->rank() << " went on";
    } catch (const DataError& error) {
      EXPECT_NE(std::string(error.what()).find("step 2: got other weights at rank 1 than at rank 0"), std::string::npos)
          << error.what();
    }
  });
  EXPECT_FALSE(std::filesystem::exists(folder.path() / "checkpoint-2"));
}

/// Examples of these lengths.
class Lengths : public data::ExampleStream {
 public:
  explicit Lengths(std::vector<size_t> lengths) : lengths_(std::move(lengths)) {}
  std::optional<data::Example> next() override {
    if (position_ == lengths_.size()) return std::nullopt;
    data::Example example;
    example.ids.assign(lengths_[position_++], 1);
    example.mask.assign(example.ids.size(), 1);
    return example;
  }
  Json state() const override { return {}; }
  void set_state(const Json& state) override {}

 private:
  std::vector<size_t> lengths_;
  size_t position_ = 0;
};

TEST(Ranks, MicroBatchesAreDealtByLengthAlone) {
  TrainConfig config;
  config.per_device_train_batch_size = 2;
  config.gradient_accumulation_steps = 3;
  Lengths stream({1, 2, 3, 9, 8, 7, 4, 6});
  BatchReader reader(stream, config);
  auto lengths = [&] {
    std::vector<std::vector<size_t>> of_step;
    for (const MicroBatch& batch : reader.next_step()) {
      of_step.emplace_back();
      int64_t tokens = 0;
      for (const data::Example& example : batch.examples) {
        of_step.back().push_back(example.ids.size());
        tokens += std::ssize(example.ids);
      }
      EXPECT_EQ(tokens, batch.tokens);
    }
    return of_step;
  };
  // 9, 8, 7 begin one each; 3 joins the 7, 2 the 8, and 1 the first of those with fewest: 9 and 1. In the stream's
  // order.
  EXPECT_EQ(lengths(), (std::vector<std::vector<size_t>>{{1, 9}, {2, 8}, {3, 7}}));
  EXPECT_EQ(lengths(), (std::vector<std::vector<size_t>>{{4, 6}})) << "the last step has one";
}

}  // namespace
}  // namespace moesaic::train
