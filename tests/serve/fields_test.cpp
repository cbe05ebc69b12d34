#include "moesaic/serve/fields.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "moesaic/serve/catalog.h"
#include "moesaic/serve/metrics.h"

namespace moesaic::serve {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

std::string refusal(const std::function<void()>& act) {
  try {
    act();
  } catch (const ApiError& error) {
    return fmt::format("{} {}: {}", error.status, error.param, error.what());
  }
  return "";
}

TEST(Fields, NullIsAbsentAndTypesAreExact) {
  const OrderedJson body = {{"n", nullptr}, {"whole", 3.0}, {"half", 1.5}, {"large", 1e300}, {"text", 3}, {"yes", 1}};
  Fields fields(body);
  EXPECT_EQ(fields.integer("n", 7, 0), 7);
  EXPECT_EQ(fields.integer("whole", 0, 0), 3);
  EXPECT_EQ(refusal([&] { fields.integer("half", 0, 0, 9); }),
            "400 half: half: got 1.5, expected a whole number, 0 to 9");
  EXPECT_THAT(refusal([&] { fields.integer("large", 0, 0); }), HasSubstr("0 or more"));
  EXPECT_THAT(refusal([&] { fields.number("half", 0, 2, 3); }), HasSubstr("expected a number, 2 to 3"));
  EXPECT_THAT(refusal([&] { fields.text("text", ""); }), HasSubstr("got 3"));
  EXPECT_THAT(refusal([&] { fields.flag("yes", false); }), HasSubstr("true or false"));
  EXPECT_THAT(refusal([] { Fields{OrderedJson::array()}; }), HasSubstr("expected a JSON object"));
}

TEST(Fields, OneLetterFromAKnownNameIsAMistake) {
  for (const char* name : {"temprature", "temperatur", "temperaturee", "tempreature", "temperaturs"}) {
    const OrderedJson body = {{name, 1}};
    Fields fields(body);
    fields.has("temperature");
    EXPECT_THAT(refusal([&] { fields.unknown(); }), HasSubstr("did you mean 'temperature'?")) << name;
  }
  const OrderedJson body = {{"temper", 1}, {"toq", 2}};
  Fields fields(body);
  fields.has("temperature");
  fields.has("top");
  EXPECT_THAT(fields.unknown(), ElementsAre("temper", "toq"));
}

TEST(Fields, ForeignFieldsAreTakenWhereTheySayNothing) {
  const OrderedJson body = {{"best_of", 1}, {"mirostat", 2}};
  Fields fields(body);
  fields.only("best_of", {1}, "why");
  fields.only("absent", {}, "why");
  EXPECT_EQ(refusal([&] { fields.only("mirostat", {0}, "why"); }),
            "400 mirostat: mirostat: got 2, expected 0 or none: why");
}

TEST(Catalog, NamesAreFoundOrTheKnownOnesTold) {
  Catalog catalog;
  catalog.put({"smol", "", "m", {}, "h0", {}});
  catalog.put({"law", "smol", "l", {{"law#1", 1.0}}, "h1", {}});
  EXPECT_EQ(catalog.find("")->name, "smol");
  EXPECT_EQ(catalog.find("base")->name, "smol");
  EXPECT_EQ(refusal([&] { catalog.find("lwa"); }), "404 model: The model `lwa` does not exist. Known: smol, law.");
  EXPECT_FALSE(catalog.remove("smol")) << "the base stays";
  EXPECT_TRUE(catalog.remove("law"));
  EXPECT_FALSE(catalog.holds("law"));
}

TEST(Catalog, AMixtureIsItsPartsAndHasTheirContentsHash) {
  Catalog catalog;
  catalog.put({"smol", "", "m", {}, "h0", {}});
  catalog.put({"a", "smol", "", {{"a#1", 1.0}}, "h1", {}});
  catalog.put({"b", "smol", "", {{"b#2", 1.0}}, "h2", {}});
  catalog.put(catalog.mixed("both", {{"a", 0.5}, {"b", 2.0}}));
  const Weights twice = catalog.mixed("x", {{"both", 2.0}}).weights;
  EXPECT_EQ(twice, (Weights{{"a#1", 1.0}, {"b#2", 4.0}}));
  EXPECT_EQ(catalog.mixed("x", {{"a", 0.5}, {"b", 2.0}}).hash, catalog.find("both")->hash);
  EXPECT_NE(catalog.mixed("x", {{"a", 0.25}, {"b", 2.0}}).hash, catalog.find("both")->hash);
  EXPECT_EQ(catalog.mixed("x", {}).hash, "h0");
}

TEST(Metrics, AreInPrometheusText) {
  Metrics metrics;
  metrics.count("vllm:request_success_total", 2, "finished_reason=\"stop\"");
  metrics.observe("vllm:time_to_first_token_seconds", 0.02);
  const std::string text = metrics.text({{"vllm:num_requests_running", "Requests", 3, {}}});
  EXPECT_THAT(text, HasSubstr("vllm:request_success_total{finished_reason=\"stop\"} 2\n"));
  EXPECT_THAT(text, HasSubstr("vllm:time_to_first_token_seconds_bucket{le=\"0.01\"} 0\n"));
  EXPECT_THAT(text, HasSubstr("vllm:time_to_first_token_seconds_bucket{le=\"0.025\"} 1\n"));
  EXPECT_THAT(text, HasSubstr("# TYPE vllm:num_requests_running gauge\nvllm:num_requests_running 3\n"));
}

}  // namespace
}  // namespace moesaic::serve
