#include "moesaic/data/record_file.h"

#include <arrow/api.h>
#include <arrow/io/compressed.h>
#include <arrow/io/file.h>
#include <arrow/io/memory.h>
#include <arrow/ipc/writer.h>
#include <arrow/util/compression.h>
#include <gmock/gmock.h>
#include <parquet/arrow/writer.h>

#include "tests/data/fixtures.h"

namespace moesaic::data {
namespace {

using testing::AllOf;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::Throws;
using testing::ThrowsMessage;

class RecordFileTest : public FolderTest {
 protected:
  std::vector<std::string> records(const std::string& name, std::string_view bytes) {
    auto file = RecordFile::open(write(name, bytes));
    std::vector<std::string> texts;
    for (int64_t row = 0; file->has(row); ++row) texts.push_back(file->read(row).dump());
    EXPECT_EQ(file->rows(), static_cast<int64_t>(texts.size()));
    return texts;
  }

  auto reading(const std::string& name, std::string_view bytes) {
    return [=, this] { records(name, bytes); };
  }
};

TEST_F(RecordFileTest, JsonLines) {
  EXPECT_THAT(records("a.jsonl", "{\"a\":1}\n{\"b\":\"x\\ny\"}\n"), ElementsAre(R"({"a":1})", R"({"b":"x\ny"})"));
  // Blank lines, Windows line breaks, a byte-order mark, no line break at the end.
  EXPECT_THAT(records("b.jsonl", "\xEF\xBB\xBF{\"a\":1}\r\n\r\n  \n{\"a\":2}"),
              ElementsAre(R"({"a":1})", R"({"a":2})"));
  EXPECT_THAT(records("c.jsonl", ""), ElementsAre());
  EXPECT_EQ(RecordFile::open(write("d.jsonl", "\n{}\n\n{}"))->where(1), (folder_ / "d.jsonl").string() + " line 4");
}

TEST_F(RecordFileTest, JsonArray) {
  EXPECT_THAT(records("a.json", R"( [ {"a": "],[\"{"} , {"b": [1, {"c": 2}]}
   ] )"),
              ElementsAre(R"({"a":"],[\"{"})", R"({"b":[1,{"c":2}]})"));
  EXPECT_THAT(records("b.json", "[]"), ElementsAre());
  EXPECT_EQ(RecordFile::open(write("c.json", "[\n{},\n\n{}\n]"))->where(1),
            (folder_ / "c.json").string() + " row 2 (line 4)");
}

TEST_F(RecordFileTest, JsonLinesUnderTheNameOfJson) {
  EXPECT_THAT(records("a.json", "{\"a\":1}\n{\"a\":2}\n"), ElementsAre(R"({"a":1})", R"({"a":2})"));
}

TEST_F(RecordFileTest, TaskFile) {
  const char* text = R"({"Source": ["x, [y"], "Definition": ["Add."],
    "Instances": [{"id": 1}, {"id": 2}], "License": {"Instances": []}})";
  EXPECT_THAT(records("a.json", text), ElementsAre(R"({"id":1})", R"({"id":2})"));
  EXPECT_EQ(RecordFile::open(folder_ / "a.json")->header().at("Definition").dump(), R"(["Add."])");
  EXPECT_THAT(reading("b.json", R"({"a": 1})"), ThrowsMessage<DataError>(HasSubstr("expected an array of rows")));
  EXPECT_THAT(reading("c.json", R"({"Definition": "x", "Instances": 3})"),
              ThrowsMessage<DataError>(HasSubstr("array")));
}

TEST_F(RecordFileTest, Csv) {
  EXPECT_THAT(records("a.csv", "inputs,targets\nx,1\n\"a,\"\"b\"\"\nc\", 2\n"),
              ElementsAre(R"({"inputs":"x","targets":"1"})", R"({"inputs":"a,\"b\"\nc","targets":" 2"})"));
  // A quote inside a field that does not begin with one is a letter; an empty first field is a row.
  EXPECT_THAT(records("b.csv", "a,b\r\n5\" disk,x\r\n,y\r\n\r\n"),
              ElementsAre(R"({"a":"5\" disk","b":"x"})", R"({"a":"","b":"y"})"));
  EXPECT_THAT(records("c.csv", "a,b"), ElementsAre());
  // Line numbers count the breaks inside quotes.
  EXPECT_EQ(RecordFile::open(write("d.csv", "a\n\"x\ny\"\nz\n"))->where(1), (folder_ / "d.csv").string() + " line 4");
}

TEST_F(RecordFileTest, CsvErrorsNameTheLine) {
  EXPECT_THAT(reading("a.csv", "a,b\n1,2\n3\n"),
              ThrowsMessage<DataError>(HasSubstr("a.csv line 3: got 1 fields, expected 2")));
  EXPECT_THAT(reading("b.csv", "a,b\n1,\"2\n3,4\n"), ThrowsMessage<FormatError>(HasSubstr("line 2: cut short")));
  EXPECT_THAT(reading("c.csv", "a,a\n1,2\n"), ThrowsMessage<DataError>(HasSubstr("two columns are named 'a'")));
  EXPECT_THAT(reading("d.csv", ""), ThrowsMessage<DataError>(HasSubstr("empty")));
  EXPECT_THAT(reading("e.csv", "a\n\xff\n"), ThrowsMessage<DataError>(HasSubstr("line 2: not UTF-8")));
}

TEST_F(RecordFileTest, DamagedJsonNamesTheLine) {
  EXPECT_THAT(reading("a.jsonl", "{\"a\":1}\n{\"a\":\n"), ThrowsMessage<FormatError>(HasSubstr("a.jsonl line 2")));
  EXPECT_THAT(reading("b.jsonl", "{\"a\":\"\xff\xfe\"}\n"), ThrowsMessage<FormatError>(HasSubstr("b.jsonl line 1")));
  EXPECT_THAT(reading("c.json", "[{\"a\":1},\n{\"a\":"), ThrowsMessage<FormatError>(HasSubstr("line 2: cut short")));
  EXPECT_THAT(reading("d.json", "[{\"a\":1}"), ThrowsMessage<FormatError>(HasSubstr("cut short")));
  EXPECT_THAT(reading("e.json", "[{}]\n[{}]"), ThrowsMessage<FormatError>(HasSubstr("the file goes on")));
  EXPECT_THAT(reading("f.json", "[{},,{}]"), ThrowsMessage<FormatError>(HasSubstr("line 1")));
  EXPECT_THAT(reading("g.json", "hello"), ThrowsMessage<FormatError>(HasSubstr("got 'h' at line 1")));
  EXPECT_THAT(reading("h.json", " \n"), ThrowsMessage<FormatError>(HasSubstr("an empty file")));
  std::string deep = std::string(100000, '[') + std::string(100000, ']');
  EXPECT_THAT(reading("i.jsonl", deep), ThrowsMessage<FormatError>(HasSubstr("line 1")));
  EXPECT_THAT(reading("j.json", "[" + deep + "]"), ThrowsMessage<FormatError>(HasSubstr("line 1")));
}

TEST_F(RecordFileTest, ARowThatNeverEndsIsRefused) {
  EXPECT_THAT(reading("a.jsonl", "{\"a\":\"" + std::string(70 << 20, 'x')),
              ThrowsMessage<FormatError>(HasSubstr("more than 64 MiB")));
}

TEST_F(RecordFileTest, AnyRowInAnyOrderOverManyBlocks) {
  // 5000 rows of 1 to 2000 bytes: blocks end by count and by size.
  for (std::string name : {"a.jsonl", "a.json", "a.csv"}) {
    std::string text = name == "a.json" ? "[" : name == "a.csv" ? "n,pad\n" : "";
    for (int i = 0; i < 5000; ++i) {
      std::string pad(static_cast<size_t>(i % 7 * i % 2000), 'x');
      text +=
          name == "a.csv" ? fmt::format("{},\"{}\n\"\n", i, pad) : fmt::format(R"({{"n":"{}","pad":"{}"}})", i, pad);
      if (name == "a.jsonl") text += "\n";
      if (name == "a.json") text += i == 4999 ? "]" : ",\n";
    }
    auto file = RecordFile::open(write(name, text));
    for (int64_t i = 0, row = 0; i < 5000; ++i, row = (row + 1237) % 5000) {
      ASSERT_EQ(file->read(row).at("n"), std::to_string(row)) << name;
    }
    EXPECT_EQ(file->rows(), 5000);
  }
}

TEST_F(RecordFileTest, UnknownEndingAndMissingFile) {
  EXPECT_THAT(reading("a.txt", "x"), ThrowsMessage<UsageError>(HasSubstr("got '.txt'")));
  EXPECT_THAT([&] { RecordFile::open(folder_ / "none.jsonl"); },
              ThrowsMessage<DataError>(HasSubstr("no such data file")));
}

TEST_F(RecordFileTest, TabsBetweenFields) {
  auto file = RecordFile::open(write("a.tsv", "a\tb\n1,5\t\"x\ty\"\n"));
  EXPECT_EQ(file->rows(), 1);
  EXPECT_EQ(file->read(0).dump(), R"({"a":"1,5","b":"x\ty"})");
}

/// `text` behind gzip or Zstandard.
std::string compressed(const std::string& text, arrow::Compression::type type) {
  const auto codec = arrow::util::Codec::Create(type).ValueOrDie();
  auto bytes = arrow::io::BufferOutputStream::Create().ValueOrDie();
  const auto out = arrow::io::CompressedOutputStream::Make(codec.get(), bytes).ValueOrDie();
  EXPECT_TRUE(out->Write(text.data(), static_cast<int64_t>(text.size())).ok() && out->Close().ok());
  return bytes->Finish().ValueOrDie()->ToString();
}

TEST_F(RecordFileTest, CompressedFilesAreReadAsWhatTheyHold) {
  const std::pair<const char*, std::string> plain[] = {
      {"a.jsonl", "{\"n\":1}\n{\"n\":2}\n"}, {"b.json", "[{\"n\":1},{\"n\":2}]"}, {"c.csv", "n\n1\n2\n"}};
  for (const auto& [name, text] : plain) {
    for (const auto& [ending, type] :
         {std::pair(".gz", arrow::Compression::GZIP), std::pair(".zst", arrow::Compression::ZSTD)}) {
      const auto path = write(std::string(name) + ending, compressed(text, type));
      auto file = RecordFile::open(path);
      EXPECT_EQ(file->rows(), 2) << path;
      EXPECT_THAT(file->read(1).at("n").dump(), HasSubstr("2")) << path;
      EXPECT_THAT(file->where(1), HasSubstr(path.string()));
    }
  }
  const std::string whole = compressed(std::string(1000, '['), arrow::Compression::GZIP);
  EXPECT_THAT(reading("cut.jsonl.gz", whole.substr(0, whole.size() / 2)), Throws<DataError>());
  EXPECT_THAT(reading("none.jsonl.gz", "{}"), ThrowsMessage<DataError>(HasSubstr("can't be decompressed")));
  EXPECT_THAT(reading("a.txt.gz", whole), ThrowsMessage<UsageError>(HasSubstr("data files end in")));
}

TEST_F(RecordFileTest, AFolderIsItsFilesOneBehindTheOther) {
  write("many/b.jsonl", "{\"n\":3}\n");
  write("many/a.jsonl", "{\"n\":1}\n{\"n\":2}\n");
  write("many/README.md", "");
  auto file = RecordFile::open(folder_ / "many");
  EXPECT_EQ(file->rows(), 3);
  EXPECT_TRUE(file->has(2));
  EXPECT_FALSE(file->has(3));
  for (int64_t i = 0; i < 3; ++i) EXPECT_EQ(file->read(i).at("n"), i + 1);
  EXPECT_THAT(file->where(2), HasSubstr("b.jsonl line 1"));
  EXPECT_THAT(file->blocks(), ElementsAre(0, 2, 3));
}

// --- Arrow and Parquet ---------------------------------------------------------------------------------------------

std::shared_ptr<arrow::Array> from_json(const std::shared_ptr<arrow::DataType>& type,
                                        const std::vector<std::string>& v) {
  auto builder = arrow::MakeBuilder(type).ValueOrDie();
  auto& strings = dynamic_cast<arrow::StringBuilder&>(*builder);
  for (const std::string& text : v) EXPECT_TRUE(strings.Append(text).ok());
  return builder->Finish().ValueOrDie();
}

/// Columns inputs, n (int64, null in odd rows), turns: list<struct<from, value>> with one turn per row.
std::shared_ptr<arrow::Table> table(int64_t rows, size_t pad = 0) {
  auto turn_type = arrow::struct_({arrow::field("from", arrow::utf8()), arrow::field("value", arrow::utf8())});
  arrow::StringBuilder inputs;
  arrow::Int64Builder numbers;
  auto from = std::make_shared<arrow::StringBuilder>(), value = std::make_shared<arrow::StringBuilder>();
  auto turn = std::make_shared<arrow::StructBuilder>(turn_type, arrow::default_memory_pool(),
                                                     std::vector<std::shared_ptr<arrow::ArrayBuilder>>{from, value});
  arrow::ListBuilder turns(arrow::default_memory_pool(), turn);
  for (int64_t i = 0; i < rows; ++i) {
    EXPECT_TRUE(inputs.Append(std::to_string(i) + std::string(pad, 'x')).ok());
    EXPECT_TRUE((i % 2 ? numbers.AppendNull() : numbers.Append(i)).ok());
    EXPECT_TRUE(turns.Append().ok() && turn->Append().ok() && from->Append("human").ok());
    EXPECT_TRUE((i % 2 ? value->AppendNull() : value->Append("ä")).ok());
  }
  auto schema = arrow::schema({arrow::field("inputs", arrow::utf8()), arrow::field("n", arrow::int64()),
                               arrow::field("turns", arrow::list(turn_type))});
  return arrow::Table::Make(schema,
                            {inputs.Finish().ValueOrDie(), numbers.Finish().ValueOrDie(), turns.Finish().ValueOrDie()});
}

void write_parquet(const std::filesystem::path& path, const arrow::Table& table, int64_t rows_per_group) {
  auto file = arrow::io::FileOutputStream::Open(path.string()).ValueOrDie();
  ASSERT_TRUE(parquet::arrow::WriteTable(table, arrow::default_memory_pool(), file, rows_per_group).ok());
  ASSERT_TRUE(file->Close().ok());
}

void write_ipc(const std::filesystem::path& path, const arrow::Table& table, bool stream, int64_t rows_per_batch) {
  auto file = arrow::io::FileOutputStream::Open(path.string()).ValueOrDie();
  auto writer = stream ? arrow::ipc::MakeStreamWriter(file, table.schema()).ValueOrDie()
                       : arrow::ipc::MakeFileWriter(file, table.schema()).ValueOrDie();
  ASSERT_TRUE(writer->WriteTable(table, rows_per_batch).ok());
  ASSERT_TRUE(writer->Close().ok() && file->Close().ok());
}

TEST_F(RecordFileTest, ColumnarFilesBecomeJson) {
  write_parquet(folder_ / "a.parquet", *table(5), 2);
  write_ipc(folder_ / "file.arrow", *table(5), false, 2);
  write_ipc(folder_ / "stream.arrow", *table(5), true, 2);
  for (const char* name : {"a.parquet", "file.arrow", "stream.arrow"}) {
    auto file = RecordFile::open(folder_ / name);
    EXPECT_EQ(file->rows(), 5) << name;
    EXPECT_THAT(file->blocks(), ElementsAre(0, 5)) << name;  // small: shuffled as a whole
    EXPECT_EQ(file->read(4).dump(), R"({"inputs":"4","n":4,"turns":[{"from":"human","value":"ä"}]})") << name;
    // A null number stays null; a struct's null field is a key the row lacks.
    EXPECT_EQ(file->read(1).dump(), R"({"inputs":"1","n":null,"turns":[{"from":"human"}]})") << name;
    EXPECT_FALSE(file->has(5));
    EXPECT_THAT(file->where(1), HasSubstr("row 2"));
  }
}

TEST_F(RecordFileTest, OnlyColumnsThatAreReadAreJudged) {
  arrow::BinaryBuilder bytes;
  EXPECT_TRUE(bytes.Append("\xff\x00", 2).ok());
  auto image_bytes = bytes.Finish().ValueOrDie();
  auto image = arrow::StructArray::Make({image_bytes}, {arrow::field("bytes", arrow::binary())}).ValueOrDie();
  auto keys = std::make_shared<arrow::StringBuilder>();
  auto values = std::make_shared<arrow::Int64Builder>();
  arrow::MapBuilder map(arrow::default_memory_pool(), keys, values);
  EXPECT_TRUE(map.Append().ok() && keys->Append("k").ok() && values->Append(1).ok());
  auto counts = map.Finish().ValueOrDie();
  auto schema = arrow::schema({arrow::field("text", arrow::utf8()), arrow::field("raw", arrow::binary()),
                               arrow::field("image", image->type()), arrow::field("counts", counts->type())});
  auto table = arrow::Table::Make(schema, {from_json(arrow::utf8(), {"hello"}), image_bytes, image, counts});
  write_parquet(folder_ / "a.parquet", *table, 2);
  write_ipc(folder_ / "b.arrow", *table, true, 2);
  for (const char* name : {"a.parquet", "b.arrow"}) {
    DatasetConfig config;
    config.path = folder_ / name;
    EXPECT_EQ(read_all(config).at(0).target, "hello") << name;
    config.columns = {{"prompt", "raw"}};
    config.formatting = "text";
    EXPECT_THAT([&] { read_all(config); }, ThrowsMessage<DataError>(HasSubstr("'raw' is of the type binary"))) << name;
  }
}

TEST_F(RecordFileTest, WhatSaveToDiskWroteIsOneDataset) {
  for (const char* split : {"train", "test"}) {
    const std::filesystem::path dir = folder_ / "dict" / split;
    std::filesystem::create_directories(dir);
    for (const char* shard : {"data-1.arrow", "data-0.arrow"}) {
      const std::string text = std::string(split) + shard;
      write_ipc(
          dir / shard,
          *arrow::Table::Make(arrow::schema({arrow::field("text", arrow::utf8())}), {from_json(arrow::utf8(), {text})}),
          true, 1);
    }
    write("dict/" + std::string(split) + "/state.json",
          R"({"_data_files": [{"filename": "data-1.arrow"}, {"filename": "data-0.arrow"}], "_split": null})");
    write("dict/" + std::string(split) + "/dataset_info.json", R"({"features": {}, "splits": null})");
  }
  write("dict/dataset_dict.json", R"({"splits": ["test", "train"]})");
  auto texts = [&](const std::string& name, const std::filesystem::path& in) {
    const auto configs = resolve_datasets(name, in);
    EXPECT_EQ(configs.size(), 1u);
    std::vector<std::string> texts;
    for (const Row& row : read_all(configs.at(0))) texts.push_back(row.target);
    return texts;
  };
  EXPECT_THAT(texts("dict/test", folder_), ElementsAre("testdata-1.arrow", "testdata-0.arrow"));
  EXPECT_THAT(texts("dict", folder_), ElementsAre("traindata-1.arrow", "traindata-0.arrow"));
  EXPECT_THAT(texts((folder_ / "dict" / "test").string(), folder_ / "dict" / "test"),
              ElementsAre("testdata-1.arrow", "testdata-0.arrow"));
  write("dict/dataset_dict.json", R"({"splits": ["dev", "test"]})");
  EXPECT_THAT([&] { resolve_datasets("dict", folder_); }, ThrowsMessage<UsageError>(HasSubstr("splits dev, test")));
  write("dict/test/state.json", R"({"_data_files": [{"filename": "../train/data-0.arrow"}]})");
  EXPECT_THAT([&] { texts("dict/test", folder_); }, ThrowsMessage<DataError>(HasSubstr("without a folder")));
}

TEST_F(RecordFileTest, ARegistrysFileNameMayBeAFolder) {
  write("many/a.jsonl", "{\"text\":\"x\"}\n");
  write("many/b.jsonl", "{\"text\":\"y\"}\n");
  write("dataset_info.json", R"({"mine": {"file_name": "many"}})");
  const auto configs = resolve_datasets("mine", folder_);
  ASSERT_EQ(configs.size(), 1u);
  EXPECT_EQ(read_all(configs[0]).size(), 2u);
}

TEST_F(RecordFileTest, LargeColumnarFilesAreReadInBlocks) {
  // 1600 rows of 50,000 bytes, 80 MB, in 2 row groups (or 8 batches).
  auto large = table(1600, 50000);
  write_parquet(folder_ / "a.parquet", *large, 800);
  write_ipc(folder_ / "file.arrow", *large, false, 200);
  write_ipc(folder_ / "stream.arrow", *large, true, 200);
  for (const char* name : {"a.parquet", "file.arrow", "stream.arrow"}) {
    auto file = RecordFile::open(folder_ / name);
    std::vector<int64_t> blocks = file->blocks();
    EXPECT_GE(blocks.size(), 5u) << name;
    EXPECT_EQ(blocks.back(), 1600) << name;
    // Blocks backwards, rows inside forwards: every block is loaded by going back.
    for (size_t b = blocks.size() - 1; b-- > 0;) {
      for (int64_t row : {blocks[b], blocks[b + 1] - 1}) {
        std::string text = file->read(row).at("inputs");
        ASSERT_EQ(std::stoll(text.substr(0, text.find('x'))), row) << name;
      }
    }
  }
}

TEST_F(RecordFileTest, DamagedColumnarFilesAreErrors) {
  write_parquet(folder_ / "a.parquet", *table(50), 10);
  write_ipc(folder_ / "file.arrow", *table(50), false, 10);
  write_ipc(folder_ / "stream.arrow", *table(50), true, 10);
  for (const char* name : {"a.parquet", "file.arrow", "stream.arrow"}) {
    std::string bytes = read_file(folder_ / name);
    EXPECT_THROW(records(std::string("cut_") + name, std::string_view(bytes).substr(0, bytes.size() / 2)), FormatError)
        << name;
    EXPECT_THROW(records(std::string("empty_") + name, ""), FormatError) << name;
    // Any single byte changed: an error or other values, never a crash.
    for (size_t i = 0; i < bytes.size(); i += 7) {
      std::string damaged = bytes;
      damaged[i] = static_cast<char>(damaged[i] ^ 0xA5);
      try {
        records(std::string("damaged_") + name, damaged);
      } catch (const DataError&) {
      }
    }
  }
}

TEST_F(RecordFileTest, TextThatIsNotUtf8HarmsOnlyWhoReadsIt) {
  auto builder = std::make_shared<arrow::StringBuilder>();
  EXPECT_TRUE(builder->Append("fine").ok() && builder->Append("\xff\xfe").ok());
  const std::shared_ptr<arrow::Array> raw = builder->Finish().ValueOrDie();
  auto listed = std::make_shared<arrow::ListBuilder>(arrow::default_memory_pool(), builder);
  for (const char* text : {"a", "\x80"}) EXPECT_TRUE(listed->Append().ok() && builder->Append(text).ok());
  const std::shared_ptr<arrow::Array> list = listed->Finish().ValueOrDie();
  const auto nested = arrow::StructArray::Make({list}, {arrow::field("inner", list->type())}).ValueOrDie();
  arrow::Int32Builder indices;
  EXPECT_TRUE(indices.AppendValues({1, 0}).ok());
  const auto words = arrow::DictionaryArray::FromArrays(indices.Finish().ValueOrDie(), raw).ValueOrDie();
  auto schema = arrow::schema({arrow::field("text", arrow::utf8()), arrow::field("raw", arrow::utf8()),
                               arrow::field("nested", nested->type()), arrow::field("words", words->type())});
  auto table = arrow::Table::Make(schema, {from_json(arrow::utf8(), {"hello", "there"}), raw, nested, words});
  write_parquet(folder_ / "a.parquet", *table, 2);
  write_ipc(folder_ / "b.arrow", *table, true, 2);
  write_ipc(folder_ / "c.arrow", *table, false, 1);
  for (const char* name : {"a.parquet", "b.arrow", "c.arrow"}) {
    DatasetConfig config;
    config.path = folder_ / name;
    EXPECT_EQ(read_all(config).at(1).target, "there") << name;
    config.formatting = "text";
    for (const char* column : {"raw", "words"}) {
      config.columns = {{"prompt", column}};
      EXPECT_THAT([&] { read_all(config); },
                  ThrowsMessage<DataError>(
                      AllOf(HasSubstr(std::string("'") + column + "' is of the type "), HasSubstr("not UTF-8"))))
          << name;
    }
  }
}

TEST_F(RecordFileTest, MemoryDoesNotGrowWithTheFile) {
  // 50 MB of JSON lines; a reader that kept the text would grow by that.
  {
    std::ofstream file(folder_ / "a.jsonl");
    const std::string pad(1000, 'x');
    for (int i = 0; i < 50000; ++i) file << R"({"n":)" << i << R"(,"text":")" << pad << "\"}\n";
  }
  auto resident_kib = [] {
    std::ifstream status("/proc/self/status");
    for (std::string line; std::getline(status, line);) {
      if (line.starts_with("VmRSS:")) return std::stoll(line.substr(6));
    }
    return 0LL;
  };
  auto file = RecordFile::open(folder_ / "a.jsonl");
  file->read(0);
  const int64_t before = resident_kib();
  ASSERT_GT(before, 0);
  int64_t sum = 0;
  for (int64_t row = 0; file->has(row); ++row) sum += file->read(row).at("n").get<int64_t>();
  EXPECT_EQ(sum, int64_t{50000} * 49999 / 2);
  EXPECT_LT(resident_kib() - before, 8 << 10);
}

}  // namespace
}  // namespace moesaic::data
