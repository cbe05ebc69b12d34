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
  ranks::as_ranks(3, [&](const std::shared_ptr<ranks::Group>& group) {
    TinyRun run;
    if (group->rank() == 1) {
      torch::NoGradGuard no_grad;
      run.adapter->parameters().front().tensor.flatten()[0].mul_(1 + 1e-7);
    }
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

TEST(Ranks, MicroBatchesAreDealtByLengthAlone) {
  TrainConfig config;
  config.per_device_train_batch_size = 3;
  config.gradient_accumulation_steps = 4;
  CountingStream stream;
  BatchReader reader(stream, config);
  const std::vector<MicroBatch> batches = reader.next_step();
  ASSERT_EQ(batches.size(), 4U);
  int64_t least = INT64_MAX, most = 0, count = 0, longest = 0;
  for (const MicroBatch& batch : batches) {
    least = std::min(least, batch.tokens);
    most = std::max(most, batch.tokens);
    count += std::ssize(batch.examples);
    int64_t tokens = 0;
    for (const data::Example& example : batch.examples) {
      tokens += std::ssize(example.ids);
      longest = std::max(longest, static_cast<int64_t>(example.ids.size()));
    }
    EXPECT_EQ(tokens, batch.tokens);
  }
  EXPECT_EQ(count, 12);
  EXPECT_LE(most - least, longest) << "the last one dealt went to the lightest";
}

}  // namespace
}  // namespace moesaic::train
