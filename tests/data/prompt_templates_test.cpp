#include "moesaic/data/prompt_templates.h"

#include <gmock/gmock.h>

#include <map>
#include <set>

#include "moesaic/data/validate.h"
#include "tests/data/fixtures.h"

namespace moesaic::data {
namespace {

using testing::AllOf;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;
using testing::ThrowsMessage;

/// One entry of a templates.yaml, as promptsource writes it; `jinja` and `choices` are YAML.
std::string entry(const std::string& name, const std::string& jinja, const std::string& choices = "null") {
  return fmt::format(
      "  id-{0}: !Template\n    answer_choices: {2}\n    id: id-{0}\n    jinja: {1}\n    metadata: !TemplateMetadata\n"
      "      choices_in_prompt: true\n      metrics:\n      - Accuracy\n      original_task: true\n    name: {0}\n"
      "    reference: ''\n",
      name, jinja, choices);
}

class PromptTemplatesTest : public FolderTest {
 protected:
  std::filesystem::path write_templates(const std::string& entries, const std::string& folder = "prompts") const {
    return write(folder + "/templates.yaml", "dataset: d\ntemplates:\n" + entries);
  }
  PromptTemplates load(const std::string& entries) const { return PromptTemplates::load(write_templates(entries)); }
  std::optional<RenderedPrompt> render(const std::string& jinja, const char* row,
                                       const std::string& choices = "null") const {
    return load(entry("t", jinja, choices)).render(0, OrderedJson::parse(row), 0);
  }
};

TEST_F(PromptTemplatesTest, ReadsWhatPromptsourceWrites) {
  write_templates(entry("one", R"("{{a}}\n|||\n{{b}}")", "'Yes ||| No'") + entry("two", "'{{a}}|||x'"));
  const PromptTemplates read = PromptTemplates::load(folder_ / "prompts");  // the folder, too
  ASSERT_EQ(read.templates().size(), 2u);
  const PromptTemplate& first = read.templates()[0];
  EXPECT_EQ(first.id, "id-one");
  EXPECT_EQ(first.name, "one");
  EXPECT_EQ(first.jinja, "{{a}}\n|||\n{{b}}");
  EXPECT_EQ(first.answer_choices, "Yes ||| No");
  EXPECT_TRUE(first.original_task && first.choices_in_prompt);
  EXPECT_THAT(first.metrics, ElementsAre("Accuracy"));
  EXPECT_FALSE(read.templates()[1].answer_choices);
}

TEST_F(PromptTemplatesTest, PartsPromptFromAnswerAndStripsBoth) {
  const auto made = render(R"(" \n{{a}} ||| \n {{b}}\n")", R"({"a": " x ", "b": "　y "})");
  EXPECT_EQ(made->input, "x");
  EXPECT_THAT(made->targets, ElementsAre("y"));
  EXPECT_THAT(made->choices, IsEmpty());
}

TEST_F(PromptTemplatesTest, ChoicesAreAListInTheTemplate) {
  const auto made = render("\"{{ answer_choices | join(' or ') }} ||| {{ answer_choices[label] }}\"",
                           R"({"label": 1, "o": "B|||b"})", "'A ||| {{o}}'");
  // The data's own separators part the choices nowhere, but are themselves again in the template's list.
  EXPECT_FALSE(made);
  EXPECT_THAT(
      render("'{{label}} ||| {{ answer_choices[0] }}'", R"({"label": 1, "o": "B|||b"})", "'A ||| {{o}}'")->choices,
      ElementsAre("A", "B|||b"));
  EXPECT_EQ(render("\"{{ answer_choices | join(' or ') }} ||| {{ answer_choices[label] }}\"",
                   R"({"label": 1, "o": "B"})", "'A ||| {{o}}'")
                ->targets[0],
            "B");
}

TEST_F(PromptTemplatesTest, SeparatorsOfTheDataPartNothing) {
  const auto made = render("'{{a}} ||| {{b}}'", R"({"a": "x ||| y", "b": "|||"})");
  EXPECT_EQ(made->input, "x ||| y");
  EXPECT_THAT(made->targets, ElementsAre("|||"));
}

TEST_F(PromptTemplatesTest, WhatIsNotOnePromptAndOneAnswerIsLeftOut) {
  EXPECT_FALSE(render("'{% if a %}{{a}} ||| x{% endif %}'", R"({"a": ""})"));  // nothing
  EXPECT_FALSE(render("'{{a}}'", R"({"a": "x"})"));                            // no answer
  EXPECT_FALSE(render("'{{a}} ||| b ||| c'", R"({"a": "x"})"));                // two
  EXPECT_FALSE(render("' {{a}} ||| b'", R"({"a": " "})"));                     // no prompt
  EXPECT_EQ(render("'{{a}} ||| {{b}}'", R"({"a": "x", "b": " "})")->targets[0], "<NO LABEL>");
}

TEST_F(PromptTemplatesTest, FieldsWithAHyphenHaveALine) {
  EXPECT_EQ(render("'{{label_fine}} ||| b'", R"({"label-fine": "x"})")->input, "x");
}

// Words of 10 letters and a blank: 2,048 - 3 characters hold 185 whole ones, and the cut falls behind the last.
TEST_F(PromptTemplatesTest, WhatATemplatePrintsIsCut) {
  OrderedJson row;
  std::string text, kept;
  for (int i = 0; i < 300; ++i) text += "abcdefghij ";
  for (int i = 0; i < 185; ++i) kept += (i ? " " : "") + std::string("abcdefghij");
  row["a"] = text;
  const auto made = load(entry("t", "'{{a}}, {{a -}} ||| {{a}}'")).render(0, row, 0);
  EXPECT_EQ(made->input, kept + "..., " + kept + "...");
  EXPECT_EQ(made->targets[0], kept + "...");
}

TEST_F(PromptTemplatesTest, AFieldMayNotTakeTheNameOfTheChoices) {
  EXPECT_THAT([&] { render("'{{a}} ||| b'", R"({"a": "x", "answer_choices": ["y"]})"); },
              ThrowsMessage<DataError>(HasSubstr("got a field 'answer_choices'")));
}

TEST_F(PromptTemplatesTest, SaysAllThatIsWrongWithAFile) {
  const std::string file = (folder_ / "prompts" / "templates.yaml").string();
  // An entry has 11 lines; the first is line 3.
  EXPECT_THAT(
      [&] {
        load(entry("good", "'{{a}}|||b'") + entry("bad", R"("a\n{% if %}|||b")") + entry("worse", "[1]") +
             entry("choosy", "'{{a}}|||b'", "'{{ x'"));
      },
      ThrowsMessage<FormatError>(AllOf(
          HasSubstr(file + ":14: template 'bad': line 2: "), HasSubstr(file + ":25: template id-worse: jinja is [1]"),
          HasSubstr(file + ":36: template 'choosy': answer_choices: line 1: "), Not(HasSubstr("good")))));
  EXPECT_THAT([&] { load("  id: !Template\n    name: t\n  other: 3\n"); },
              ThrowsMessage<FormatError>(AllOf(HasSubstr(file + ":3: template id has no jinja"),
                                               HasSubstr(file + ":5: template other is number"))));
  EXPECT_THAT([&] { load("  id: {name: t, jinja: x, metadata: {original_task: 3}}\n"); },
              ThrowsMessage<FormatError>(HasSubstr("'original_task'")));
  write("prompts/templates.yaml", "dataset: d\ntemplates: {}\n");
  EXPECT_THAT([&] { PromptTemplates::load(folder_ / "prompts"); },
              ThrowsMessage<FormatError>(HasSubstr("no map `templates`")));
  write("prompts/templates.yaml", "templates:\n  a: !Template [x\n");
  EXPECT_THAT([&] { PromptTemplates::load(folder_ / "prompts"); },
              ThrowsMessage<FormatError>(HasSubstr(file + ": not valid YAML")));
  EXPECT_THAT([&] { PromptTemplates::load(folder_ / "none"); }, ThrowsMessage<UsageError>(HasSubstr("no such file")));
}

TEST_F(PromptTemplatesTest, WhatARowBreaksNamesTheTemplate) {
  const auto templates = load(entry("t", R"("a\n{{ a.b.c }} ||| d")"));
  EXPECT_THAT([&] { templates.render(0, {{"x", 1}}, 0); },
              ThrowsMessage<DataError>(HasSubstr("templates.yaml:3: template 't': line 2: ")));
}

// As training data.

class PromptedData : public PromptTemplatesTest {
 protected:
  PromptedData() {
    RenderOptions options;
    options.template_name = "none";
    renderer_ = std::make_shared<Renderer>(word_tokenizer(), nullptr, options);
  }

  /// Rows {"a": "w<i>", "odd": i % 2}.
  void write_rows(int rows, const std::string& name = "raw/set/rows.jsonl") const {
    std::string text;
    for (int i = 0; i < rows; ++i) text += fmt::format(R"({{"a":"w{}","odd":{}}})", i, i % 2) + "\n";
    write(name, text);
  }

  std::vector<DatasetConfig> resolve(const char* item) const { return resolve_datasets(Json::parse(item), folder_); }

  std::shared_ptr<const Renderer> renderer_;
};

TEST_F(PromptedData, EveryTemplateIsASourceOfItsOwn) {
  write_rows(4);
  write_templates(entry("asks", "'w80 {{a}} ||| w1'") + entry("odd", "'{% if odd %}w81 {{a}} ||| w2{% endif %}'"));
  const auto configs = resolve(R"({"name": "raw/set", "prompts": "prompts"})");
  ASSERT_EQ(configs.size(), 2u);
  EXPECT_EQ(configs[0].label(), "raw/set: asks");
  EXPECT_EQ(configs[1].label(), "raw/set: odd");
  EXPECT_EQ(configs[0].templates, 2);
  const auto rows = read_all(configs[1]);
  ASSERT_EQ(rows.size(), 4u);
  EXPECT_EQ(rows[1].prompt, "w81 w1");
  EXPECT_EQ(rows[1].target, "w2");
  EXPECT_EQ(rows[0].target, "");  // leaves nothing to learn
  const Validation judged = validate(configs[1]);
  EXPECT_EQ(judged.name, "raw/set: odd");
  EXPECT_EQ(judged.formatting, "prompts");
  EXPECT_EQ(judged.unanswered, 2);
}

TEST_F(PromptedData, TemplatesAreFoundByTheDataSetsName) {
  write_rows(2);
  write_templates(entry("t", "'{{a}}|||b'"), "promptsource/raw/set");
  EXPECT_EQ(resolve(R"({"name": "raw/set", "prompts": "promptsource"})").size(), 1u);
  EXPECT_EQ(resolve(R"({"name": "raw/set", "prompts": "promptsource/raw/set/templates.yaml"})").size(), 1u);
  EXPECT_THAT([&] { resolve(R"({"name": "raw/set", "prompts": "raw"})"); },
              ThrowsMessage<UsageError>(HasSubstr("raw/set/templates.yaml")));
}

TEST_F(PromptedData, AFolderIsOneDataSet) {
  write_rows(2, "raw/set/train-0.jsonl");
  write_rows(3, "raw/set/train-1.jsonl");
  write_templates(entry("t", "'{{a}}|||b'"));
  const auto configs = resolve(R"({"name": "raw/set", "prompts": "prompts"})");
  ASSERT_EQ(configs.size(), 1u);
  EXPECT_EQ(RowReader::open(configs[0])->count(), 5);
}

TEST_F(PromptedData, WhatTheTemplatesDecideIsNotSetBesideThem) {
  write_rows(2);
  write_templates(entry("t", "'{{a}}|||b'"));
  for (const char* other : {R"("formatting": "alpaca")", R"("columns": {"prompt": "a"})", R"("templates": 3)"}) {
    const std::string item = fmt::format(R"({{"name": "raw/set", "prompts": "prompts", {}}})", other);
    EXPECT_THAT([&] { resolve(item.c_str()); }, ThrowsMessage<UsageError>(HasSubstr("beside prompts"))) << other;
  }
}

// Rates are of templates, as in the T0 mixture: one that leaves out half of the rows is drawn as often as the other.
TEST_F(PromptedData, EveryTemplateHasItsRate) {
  write_rows(10);
  write_templates(entry("asks", "'w80 {{a}} ||| w1'") + entry("odd", "'{% if odd %}w81 {{a}} ||| w2{% endif %}'"));
  Mixture mixture(resolve(R"({"name": "raw/set", "prompts": "prompts"})"), renderer_, 1, "t0");
  std::map<int64_t, std::set<int64_t>> prompts;
  for (int i = 0; i < 1000; ++i) {
    const Example example = *mixture.next();
    EXPECT_EQ(example.ids.at(1), 90 + example.dataset);
    prompts[example.dataset].insert(example.ids.at(2));
  }
  const auto counts = mixture.counts();
  EXPECT_EQ(counts[1].name, "raw/set: odd");
  EXPECT_NEAR(static_cast<double>(counts[1].drawn), 500, 60);
  EXPECT_EQ(counts[0].skipped, 0);
  EXPECT_NEAR(static_cast<double>(counts[1].skipped), static_cast<double>(counts[1].drawn), 5);
  EXPECT_EQ(prompts[0].size(), 10u);
  EXPECT_EQ(prompts[1].size(), 5u);
  EXPECT_EQ(mixture.epoch_size(), 20);
}

TEST_F(PromptedData, EveryTemplateHasItsOrderAndResumes) {
  write_rows(20);
  write_templates(entry("a", "'w80 {{a}} ||| w1'") + entry("b", "'w81 {{a}} ||| w2'"));
  const auto configs = resolve(R"({"name": "raw/set", "prompts": "prompts"})");
  Mixture mixture(configs, renderer_, 1, "t0");
  std::vector<std::vector<int64_t>> orders(2);
  for (int i = 0; i < 30; ++i) {
    const Example example = *mixture.next();
    orders.at(example.dataset).push_back(example.ids.at(2));
  }
  orders[0].resize(10);
  orders[1].resize(10);
  EXPECT_NE(orders[0], orders[1]);
  Mixture resumed(configs, renderer_, 1, "t0");
  resumed.set_state(mixture.state());
  for (int i = 0; i < 30; ++i) EXPECT_EQ(resumed.next()->ids, mixture.next()->ids);
}

// A row is held out through all templates, or through none.
TEST_F(PromptedData, ValidationRowsAreOfNoTemplateTrained) {
  write_rows(20);
  write_templates(entry("a", "'{{a}} ||| w1'") + entry("b", "'{{a}} ||| w2'"));
  const auto [training, validation] = train_validation(resolve(R"({"name": "raw/set", "prompts": "prompts"})"), 5, 3);
  std::set<std::string> trained, held;
  for (const DatasetConfig& config : training) {
    for (const Row& row : read_all(config)) trained.insert(row.prompt);
  }
  for (const DatasetConfig& config : validation) {
    for (const Row& row : read_all(config)) held.insert(row.prompt);
  }
  EXPECT_EQ(trained.size(), 15u);
  EXPECT_EQ(held.size(), 5u);
  for (const std::string& prompt : held) EXPECT_FALSE(trained.contains(prompt));
}

TEST_F(PromptedData, ARowThatATemplateRefusesIsNamedWithBoth) {
  write("raw/set/rows.jsonl", "{\"a\": \"w1\"}\n{\"b\": 1}\n");
  write_templates(entry("t", "'{{a.x.y}}{{ a | length + a }} ||| b'"));
  const Validation judged = validate(resolve(R"({"name": "raw/set", "prompts": "prompts"})")[0]);
  EXPECT_EQ(judged.damaged, 2);
  EXPECT_THAT(judged.problems.at(1),
              AllOf(HasSubstr("rows.jsonl line 2"), HasSubstr("templates.yaml:3: template 't'")));
}

}  // namespace
}  // namespace moesaic::data
