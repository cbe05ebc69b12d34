#include "moesaic/base/yaml.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace moesaic {
namespace {

using testing::AllOf;
using testing::HasSubstr;
using testing::ThrowsMessage;

OrderedJson yaml(const std::string& text) { return parse_yaml(text, "run.yaml"); }

TEST(ParseYaml, TypesPlainScalarsAsYaml12) {
  EXPECT_EQ(yaml("1"), 1);
  EXPECT_EQ(yaml("-07"), -7);
  EXPECT_EQ(yaml("+3"), 3);
  EXPECT_EQ(yaml("0x1F"), 31);
  EXPECT_EQ(yaml("0o17"), 15);
  EXPECT_EQ(yaml("1e-3"), 0.001);
  EXPECT_EQ(yaml("3.0E-4"), 0.0003);
  EXPECT_EQ(yaml(".5"), 0.5);
  EXPECT_TRUE(yaml("2.").is_number_float());
  EXPECT_EQ(yaml("true"), true);
  EXPECT_EQ(yaml("FALSE"), false);
  EXPECT_TRUE(yaml("~").is_null());
  EXPECT_TRUE(yaml("a:").at("a").is_null());
  EXPECT_TRUE(yaml("").is_null());
  for (const char* text : {"yes", "on", "12:30", "1_000", "e5", "1.2.3", "tRue", "0b1"}) EXPECT_EQ(yaml(text), text);
}

TEST(ParseYaml, QuotedScalarsAreStrings) {
  EXPECT_EQ(yaml("'1'"), "1");
  EXPECT_EQ(yaml("\"true\""), "true");
  EXPECT_EQ(yaml("a: ''").at("a"), "");
}

TEST(ParseYaml, ReadsARun) {
  Json run =
      yaml("model: m.gguf\nlora_target: [q_proj, v_proj]\nrouter: {type: top_k, top_k: 2}\nlist:\n  - x: 1\n  - 2\n");
  EXPECT_EQ(run, Json::parse(R"({"model": "m.gguf", "lora_target": ["q_proj", "v_proj"],
                                 "router": {"type": "top_k", "top_k": 2}, "list": [{"x": 1}, 2]})"));
}

TEST(ParseYaml, KeysKeepTheFilesOrder) {
  const std::string json = R"({"b":1,"a":{"d":1,"c":2}})";
  EXPECT_EQ(yaml("b: 1\na: {d: 1, c: 2}").dump(), json);
  EXPECT_EQ(yaml(to_yaml(OrderedJson::parse(json))).dump(), json);
}

TEST(ParseYaml, TellsTheLineOfEveryValue) {
  YamlLines lines;
  parse_yaml("a: 1\nb:\n  - x: 1\n    y:\n      2\n  - {z: 3}\n", "run.yaml", &lines);
  const YamlLines expected{{"/a", 1}, {"/b", 2}, {"/b/0", 3}, {"/b/0/x", 3}, {"/b/0/y", 4}, {"/b/1", 6}, {"/b/1/z", 6}};
  EXPECT_EQ(lines, expected);
}

TEST(ParseYaml, SaysWhereItIsWrong) {
  EXPECT_THAT([] { yaml("a: 1\nb: 2\na: 3\n"); },
              ThrowsMessage<FormatError>(HasSubstr("run.yaml:3: key 'a' stands twice")));
  EXPECT_THAT([] { yaml("a: [1, 2\n"); }, ThrowsMessage<FormatError>(AllOf(HasSubstr("run.yaml"), HasSubstr("line"))));
  EXPECT_THAT([] { yaml("lr: .nan"); }, ThrowsMessage<FormatError>(HasSubstr("not a finite number")));
  EXPECT_THAT([] { yaml("lr: 99999999999999999999"); }, ThrowsMessage<FormatError>(HasSubstr("64 bits")));
  EXPECT_THAT([] { yaml("lr: 1e999"); }, ThrowsMessage<FormatError>(HasSubstr("out of range")));
  EXPECT_THAT([] { yaml("? [a]\n: 1"); }, ThrowsMessage<FormatError>(HasSubstr("expected a name")));
  EXPECT_THAT([] { yaml("a: !!int '3'"); }, ThrowsMessage<FormatError>(HasSubstr("tag")));
  EXPECT_THAT([] { yaml("a: 1\n---\nb: 2\n"); }, ThrowsMessage<FormatError>(HasSubstr("more than one YAML document")));
  EXPECT_THROW(yaml(","), FormatError);
  EXPECT_THAT([] { yaml("a: \xCF\xCF"); }, ThrowsMessage<FormatError>(HasSubstr("run.yaml: not UTF-8 text")));
  EXPECT_THAT([] { yaml("a: \x0E"); }, ThrowsMessage<FormatError>(HasSubstr("control character")));
}

TEST(ParseYaml, RefusesTreesThatAliasesBlowUp) {
  std::string bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n";
  for (int i = 1; i < 10; ++i) {
    std::string alias = "*a" + std::to_string(i - 1);
    bomb += fmt::format("a{0}: &a{0} [{1}, {1}, {1}, {1}, {1}, {1}, {1}, {1}, {1}, {1}]\n", i, alias);
  }
  EXPECT_THAT([&] { yaml(bomb); }, ThrowsMessage<FormatError>(HasSubstr("more than 100000 nodes")));
  EXPECT_THAT([] { yaml("&a [*a]"); }, ThrowsMessage<FormatError>(HasSubstr("deeper")));
  EXPECT_THROW(yaml(std::string(100000, '[')), FormatError);
}

TEST(ToYaml, ReadsBackToTheSameValue) {
  OrderedJson config = {{"lr", 3e-4},
                        {"whole", 2.0},
                        {"steps", -1},
                        {"flag", true},
                        {"none", nullptr},
                        {"text", "a: b # c"},
                        {"number_like", "007"},
                        {"empty", ""},
                        {"bool_like", "true"},
                        {"time", "12:30"},
                        {"lines", "x\ny"},
                        {"list", {1, "two", {{"x", 1}}}},
                        {"map", {{"inner", {{"k", "~"}}}}},
                        {"empty_map", Json::object()},
                        {"empty_list", Json::array()},
                        {"long", std::string(100, '7')},
                        {"dash", "- a"},
                        {"brace", "{x}"}};
  EXPECT_EQ(yaml(to_yaml(config)), config) << to_yaml(config);
}

TEST(ApplyOverrides, SetsTypedAndNestedKeys) {
  OrderedJson config = yaml("seed: 1\nrouter: {type: soft}");
  apply_overrides(config, {"seed=7", "router.top_k=2", "lora_target=[q_proj, v_proj]", "new.deep.key=x=y", "none="});
  EXPECT_EQ(Json(config), Json::parse(R"({"seed": 7, "router": {"type": "soft", "top_k": 2}, "none": null,
                                    "lora_target": ["q_proj", "v_proj"], "new": {"deep": {"key": "x=y"}}})"));
}

TEST(ApplyOverrides, RefusesWhatIsNotAnOverride) {
  OrderedJson config = {{"seed", 1}};
  EXPECT_THAT([&] { apply_overrides(config, {"seed"}); }, ThrowsMessage<UsageError>(HasSubstr("expected key=value")));
  EXPECT_THROW(apply_overrides(config, {"=1"}), UsageError);
  EXPECT_THROW(apply_overrides(config, {"a..b=1"}), UsageError);
  EXPECT_THAT([&] { apply_overrides(config, {"seed.x=1"}); }, ThrowsMessage<UsageError>(HasSubstr("not a map")));
  EXPECT_THAT([&] { apply_overrides(config, {"x=[1"}); }, ThrowsMessage<UsageError>(HasSubstr("override x")));
}

TEST(CheckKnownKeys, ListsEveryUnknownKeyWithTheNearest) {
  std::vector<std::string> known{"seed", "learning_rate", "router.type", "router.top_k", "columns.*"};
  EXPECT_NO_THROW(check_known_keys(yaml("seed: 1\nrouter: {type: soft}\ncolumns: {a: {b: 1}}"), known, "r"));
  EXPECT_THAT([&] { check_known_keys(yaml("lerning_rate: 1\nrouter: {typ: soft}\nzzz: 1"), known, "r.yaml"); },
              ThrowsMessage<UsageError>(
                  AllOf(HasSubstr("r.yaml: unknown keys"), HasSubstr("'lerning_rate' (did you mean 'learning_rate'?)"),
                        HasSubstr("'router.typ' (did you mean 'router.type'?)"), HasSubstr("'zzz'"))));
  EXPECT_THAT([&] { check_known_keys(yaml("router: 3"), known, "r"); },
              ThrowsMessage<UsageError>(HasSubstr("'router' expects a map, got 3")));
  EXPECT_THROW(check_known_keys(yaml("[1]"), known, "r"), UsageError);
}

}  // namespace
}  // namespace moesaic
