#include "moesaic/base/row_template.h"

#include <gmock/gmock.h>

#include <set>

namespace moesaic {
namespace {

using testing::HasSubstr;
using testing::ThrowsMessage;

std::string render(const std::string& source, const char* row = "{}", uint64_t seed = 0) {
  return RowTemplate(source, "test").render(OrderedJson::parse(row), seed);
}

TEST(RowTemplate, KeepsTheLineEndsAroundBlocks) {
  EXPECT_EQ(render("a\n{% if x %}\nb\n{% endif %}\nc\n", R"({"x": 1})"), "a\n\nb\n\nc");
  EXPECT_EQ(render("a\n{%- if x -%}\nb\n{%- endif %}", R"({"x": 1})"), "ab");
}

TEST(RowTemplate, PrintsAsPython) {
  EXPECT_EQ(render("{{ a }} {{ b }} {{ c }} {{ d }} {{ e }} {{ missing }}",
                   R"({"a": true, "b": null, "c": 2.0, "d": ["x", "it's"], "e": 0.19165472801356442})"),
            "True None 2.0 ['x', \"it's\"] 0.19165472801356442 ");
}

TEST(RowTemplate, HasPythonsMethods) {
  EXPECT_EQ(render("{{ a.split(',')[1].strip() ~ a[-1:] }} {{ b.index('y') }} {{ a.index('p') }} {{ a.title() }}",
                   R"({"a": "a, p", "b": ["x", "y"]})"),
            "pp 1 3 A, P");
  EXPECT_THAT([] { render("{{ b.index('z') }}", R"({"b": ["x"]})"); },
              ThrowsMessage<DataError>(HasSubstr("z is not in the list")));
}

TEST(RowTemplate, HasTheFiltersOfPromptsource) {
  EXPECT_EQ(render("{{ ['b', 'a', 'b', 'a', 'c'] | most_frequent | join }} {{ [] | most_frequent }}"), "ba None");
  EXPECT_EQ(render("{% for a, b in zip([1, 2, 3], ['x', 'y']) %}{{ a }}{{ b }} {% endfor %}"), "1x 2y ");
  EXPECT_EQ(render("{{ x | default('d') }}{{ '' | default('e') }}{{ '' | default('f', boolean=true) }}"), "df");
  EXPECT_EQ(render("{{ '3.7' | int }} {{ 'x' | int(-1) }} {{ 'x' | float }} {{ 2 | float }}"), "3 -1 0.0 2.0");
}

// Jinja2's: cut in front of the last blank, three dots behind it, five characters more are let pass.
TEST(RowTemplate, CutsBetweenWords) {
  EXPECT_EQ(render("{{ 'aaa bbb cccc' | truncate(7) }}"), "aaa bbb cccc");
  EXPECT_EQ(render("{{ 'aaa bbb ccccc' | truncate(7) }}"), "aaa...");
  EXPECT_EQ(render("{{ 'äää bbb ccccc' | truncate(8) }}"), "äää bbb ccccc");
  EXPECT_EQ(render("{{ 'äääääääää bbb ccccc' | truncate(8) }}"), "äääää...");
  EXPECT_EQ(render("{{ 'aaa bbb ccccc' | truncate(7, true, '', leeway=0) }}"), "aaa bbb");
  EXPECT_THAT([] { render("{{ 'a' | truncate(2) }}"); }, ThrowsMessage<DataError>(HasSubstr("expected 3 or more")));
}

TEST(RowTemplate, TheSeedChooses) {
  const std::string source = "{{ range(100) | choice }} {{ range(100) | choice }}";
  std::set<std::string> drawn;
  for (uint64_t seed = 0; seed < 20; ++seed) {
    drawn.insert(render(source, "{}", seed));
    EXPECT_EQ(render(source, "{}", seed), render(source, "{}", seed));
  }
  EXPECT_GT(drawn.size(), 15u);
  EXPECT_THAT([] { render("{{ [] | choice }}"); }, ThrowsMessage<DataError>(HasSubstr("empty sequence")));
}

TEST(RowTemplate, SaysTheLine) {
  EXPECT_THAT([] { render("a\n{% if %}"); }, ThrowsMessage<FormatError>(HasSubstr("test: line 2: ")));
  EXPECT_THAT([] { render("a\n\n{{ x.y }}"); }, ThrowsMessage<DataError>(HasSubstr("test: line 3: ")));
  EXPECT_THAT([] { render("{{ x | nothing }}"); }, ThrowsMessage<DataError>(HasSubstr("filter nothing is unknown")));
  EXPECT_THROW(RowTemplate("{{ x }}", "test").render({{"x", "\xff"}}, 0), DataError);
}

TEST(RowTemplate, IsBounded) {
  EXPECT_THROW(render("{% for a in range(9999) %}{% for b in range(9999) %}{{ a }}{% endfor %}{% endfor %}"),
               DataError);
  EXPECT_THROW(render("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}"), DataError);
  EXPECT_THROW(render("{{ 'x' * 9999999999 }}"), DataError);
  EXPECT_THROW(
      render("{% set ns = namespace(s='ab') %}{% for a in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}"),
      DataError);
  EXPECT_THROW(RowTemplate(std::string(300 << 10, 'x'), "test"), FormatError);
  EXPECT_THROW(RowTemplate("{{ " + std::string(100'000, '(') + " }}", "test"), FormatError);
}

}  // namespace
}  // namespace moesaic
