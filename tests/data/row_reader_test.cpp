#include <gmock/gmock.h>

#include <set>

#include "tests/data/fixtures.h"

namespace moesaic::data {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::ThrowsMessage;

class RowReaderTest : public FolderTest {
 protected:
  DatasetConfig numbered(int rows) {
    std::string text;
    for (int i = 0; i < rows; ++i) text += fmt::format(R"({{"inputs":"{}","targets":"t"}})", i) + "\n";
    return dataset("rows.jsonl", text);
  }
};

std::vector<std::string> prompts(const DatasetConfig& config) {
  std::vector<std::string> texts;
  for (const Row& row : read_all(config)) texts.push_back(row.prompt);
  return texts;
}

TEST_F(RowReaderTest, ReadsCountsAndSeeks) {
  DatasetConfig config = numbered(5);
  auto reader = RowReader::open(config);
  EXPECT_EQ(reader->formatting(), "inputs_targets");
  EXPECT_EQ(reader->next()->prompt, "0");
  EXPECT_EQ(reader->count(), 5);
  reader->seek(3);
  EXPECT_EQ(reader->next()->prompt, "3");
  EXPECT_EQ(reader->next()->where, config.path.string() + " line 5");
  EXPECT_EQ(reader->next(), std::nullopt);
}

TEST_F(RowReaderTest, SplitsNeverOverlap) {
  DatasetConfig config = numbered(100);
  config.val_size = 0.2;
  config.split = "train";
  auto train = prompts(config);
  config.split = "validation";
  auto validation = prompts(config);
  EXPECT_EQ(train.size(), 80u);
  EXPECT_EQ(validation.size(), 20u);
  std::set<std::string> all(train.begin(), train.end());
  all.insert(validation.begin(), validation.end());
  EXPECT_EQ(all.size(), 100u);
  // A number of rows instead of a share; the cap counts rows of the split.
  config.val_size = 7;
  EXPECT_EQ(prompts(config).size(), 7u);
  config.cap = 3;
  EXPECT_EQ(prompts(config).size(), 3u);
}

TEST_F(RowReaderTest, TrainValidationCutsEveryDataset) {
  auto [train, validation] = train_validation({numbered(10), numbered(10)}, 4, 7);
  ASSERT_EQ(validation.size(), 2u);
  EXPECT_EQ(prompts(train[1]).size(), 6u);
  EXPECT_EQ(prompts(validation[1]).size(), 4u);
  EXPECT_TRUE(train_validation({numbered(10)}, 0, 7).second.empty());
  EXPECT_THROW(train_validation(train, 4, 7), UsageError);
}

TEST_F(RowReaderTest, RowsOfPandasHaveNoNumberForNothing) {
  const char* row = R"({"instruction": "a", "input": NaN, "output": "b", "score": -Infinity})";
  for (const auto& [name, bytes] : {std::pair{"x.jsonl", fmt::format("{}\n{}\n", row, row)},
                                    {"x.json", fmt::format("{}\n{}\n", row, row)},
                                    {"y.json", fmt::format("[{}, {}]", row, row)}}) {
    const auto rows = read_all(dataset(name, bytes));
    ASSERT_EQ(rows.size(), 2u) << name;
    EXPECT_EQ(rows[1].messages[0]["content"], "a");
  }
}

TEST_F(RowReaderTest, GoesOnBehindADamagedRow) {
  auto reader = RowReader::open(dataset("a.jsonl", "{\"text\":\"a\"}\n{\"text\":[1]}\n{oops}\n{\"text\":\"b\"}\n"));
  EXPECT_EQ(reader->next()->target, "a");
  EXPECT_THAT([&] { reader->next(); }, ThrowsMessage<DataError>(HasSubstr("a.jsonl line 2: 'text' is array [1]")));
  EXPECT_THAT([&] { reader->next(); }, ThrowsMessage<DataError>(HasSubstr("a.jsonl line 3")));
  EXPECT_EQ(reader->next()->target, "b");
  EXPECT_EQ(reader->next(), std::nullopt);
}

TEST_F(RowReaderTest, WrongConfigs) {
  DatasetConfig config = numbered(3);
  config.split = "dev";
  EXPECT_THROW(RowReader::open(config), UsageError);
  config.split = "train";
  config.val_size = 3;
  EXPECT_THAT([&] { RowReader::open(config)->count(); }, ThrowsMessage<DataError>(HasSubstr("leaves none")));
  config.val_size = -1;
  EXPECT_THROW(RowReader::open(config), UsageError);
  EXPECT_THAT([&] { RowReader::open(dataset("e.jsonl", "")); }, ThrowsMessage<DataError>(HasSubstr("no rows")));
}

class RegistryTest : public FolderTest {
 protected:
  std::vector<DatasetConfig> resolve(const char* dataset) { return resolve_datasets(Json::parse(dataset), folder_); }
};

TEST_F(RegistryTest, NamesPathsAndFolders) {
  write("dataset_info.json", R"({
    "small": {"file_name": "data/a.jsonl", "num_samples": 5},
    "talk": {"file_name": "data/b.json", "formatting": "sharegpt", "columns": {"messages": "turns"},
             "tags": {"role_tag": "role"}},
    "renamed": {"file_name": "data/a.jsonl", "columns": {"prompt": "q"}}})");
  write("data/b.json", "[]");
  auto file = write("data/a.jsonl", "");
  write("data/notes.txt", "");
  auto configs = resolve(R"(["small", {"name": "talk", "weight": 2.5, "cap": 10, "split": "validation",
                            "val_size": 0.1, "templates": 3}, "data/a.jsonl", "data", "renamed"])");
  ASSERT_EQ(configs.size(), 6u);
  EXPECT_EQ(configs[0].name, "small");
  EXPECT_EQ(configs[0].path, file);
  EXPECT_EQ(configs[0].cap, 5);
  EXPECT_EQ(configs[0].formatting, "auto");
  EXPECT_EQ(configs[0].weight, -1);
  EXPECT_EQ(configs[1].formatting, "sharegpt");
  EXPECT_EQ(configs[1].columns.at("messages"), "turns");
  EXPECT_EQ(configs[1].tags.at("role_tag"), "role");
  EXPECT_EQ(configs[1].weight, 2.5);
  EXPECT_EQ(configs[1].cap, 10);
  EXPECT_EQ(configs[1].split, "validation");
  EXPECT_EQ(configs[1].val_size, 0.1);
  EXPECT_EQ(configs[1].templates, 3);
  EXPECT_EQ(configs[2].path, file);
  EXPECT_EQ(configs[3].name + " " + configs[4].name, "a b");  // the folder
  EXPECT_EQ(configs[5].formatting, "alpaca");                 // LLaMA-Factory's default
  // Names separated by commas, as LLaMA-Factory takes them; an absolute path.
  EXPECT_EQ(resolve(R"("small, talk")").size(), 2u);
  EXPECT_EQ(resolve_datasets(file.string(), "nowhere")[0].path, file);
}

TEST_F(RegistryTest, Errors) {
  write("dataset_info.json", R"({"alpaca_demo": {"file_name": "a.json"}, "hub": {"hf_hub_url": "x/y"},
    "pairs": {"file_name": "a.json", "ranking": true}, "typo": {"file_nam": "a.json"}})");
  auto error = [&](const char* dataset) { return [=, this] { resolve(dataset); }; };
  EXPECT_THAT(error(R"("alpaca_deno")"), ThrowsMessage<UsageError>(HasSubstr("did you mean 'alpaca_demo'?")));
  EXPECT_THAT(error(R"("hub")"), ThrowsMessage<UsageError>(HasSubstr("has no file_name")));
  EXPECT_THAT(error(R"("pairs")"), ThrowsMessage<UsageError>(HasSubstr("ranking")));
  EXPECT_THAT(error(R"("typo")"), ThrowsMessage<UsageError>(HasSubstr("did you mean 'file_name'?")));
  EXPECT_THAT(error(R"([{"name": "alpaca_demo", "wieght": 1}])"),
              ThrowsMessage<UsageError>(HasSubstr("did you mean 'weight'?")));
  EXPECT_THAT(error(R"([{"name": "alpaca_demo", "weight": 0}])"), ThrowsMessage<UsageError>(HasSubstr("above 0")));
  EXPECT_THAT(error(R"([{"name": "alpaca_demo", "templates": 0}])"), ThrowsMessage<UsageError>(HasSubstr("1 or more")));
  EXPECT_THAT(error(R"([{"name": "alpaca_demo", "cap": "many"}])"), ThrowsMessage<ConfigError>(HasSubstr("'cap'")));
  EXPECT_THAT(error("[]"), ThrowsMessage<UsageError>(HasSubstr("names no data set")));
}

}  // namespace
}  // namespace moesaic::data
