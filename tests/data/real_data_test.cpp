// Every file of the shared data that is in one of our shapes, when it lies beside the checkout.
#include <gmock/gmock.h>

#include <cstdlib>

#include "tests/data/fixtures.h"

namespace moesaic::data {
namespace {

std::filesystem::path data_dir() {
  const char* set = std::getenv("MOESAIC_DATA_DIR");
  return set ? std::filesystem::path(set) : std::filesystem::path(MOESAIC_SOURCE_DIR) / "../shared/data";
}

class RealData : public testing::Test {
 protected:
  void SetUp() override {
    if (!std::filesystem::exists(data_dir() / "MANIFEST.md")) GTEST_SKIP() << data_dir() << " is not there";
  }

  /// Rows of all files of a folder. Some tasks have questions with an empty answer; more than 1 % would be our mistake.
  int64_t count(const std::string& folder) {
    int64_t rows = 0, empty = 0;
    for (const DatasetConfig& config : resolve_datasets(folder, data_dir())) {
      auto all = read_all(config);
      for (const Row& row : all) {
        std::string answer = row.messages.is_null() ? row.target : row.messages.back().at("content").get<std::string>();
        empty += answer.empty();
      }
      EXPECT_EQ(RowReader::open(config)->count(), static_cast<int64_t>(all.size()));
      rows += static_cast<int64_t>(all.size());
    }
    EXPECT_LE(empty * 100, rows);
    return rows;
  }
};

// The numbers of rows are those of the data's MANIFEST.md.
TEST_F(RealData, SuperNaturalInstructions) {
  EXPECT_EQ(count("superni/train"), 24218);
  EXPECT_EQ(count("superni/eval"), 2800);
}

TEST_F(RealData, RenderedP3) {
  EXPECT_EQ(count("p3_rendered/train"), 6477);
  EXPECT_EQ(count("p3_rendered/eval"), 5350);
}

TEST_F(RealData, Instructions) {
  EXPECT_EQ(read_all(resolve_datasets("instruct/alpaca_en_demo.json", data_dir())[0]).size(), 999u);
  EXPECT_EQ(read_all(resolve_datasets("instruct/dolly_hhrlhf_train_small.jsonl", data_dir())[0]).size(), 1000u);
}

TEST_F(RealData, ColumnsOfGsm8k) {
  Json item = {{"name", "gsm8k/test.jsonl"},
               {"formatting", "alpaca"},
               {"columns", {{"prompt", "question"}, {"response", "answer"}}}};
  EXPECT_EQ(read_all(resolve_datasets(item, data_dir())[0]).size(), 1319u);
}

}  // namespace
}  // namespace moesaic::data
