#include "moesaic/run/foreign_keys.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace moesaic::run {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

TEST(ForeignKeys, AreTakenOutOrRefused) {
  OrderedJson run = {{"tf32", true},      {"learning_rate", 1e-4}, {"do_train", true},
                     {"plot_loss", true}, {"use_dora", false},     {"neftune_noise_alpha", 5}};
  std::vector<std::string> refused;
  EXPECT_THAT(take_foreign_keys(run, refused),
              testing::UnorderedElementsAre("tf32", "plot_loss", "do_train", "use_dora"));
  EXPECT_THAT(refused, ElementsAre(HasSubstr("neftune_noise_alpha: got 5")));
  EXPECT_EQ(run, OrderedJson({{"learning_rate", 1e-4}}));
}

TEST(ForeignKeys, ValuesThatWouldLearnSomethingElseAreRefused) {
  for (const auto& [key, value] : std::vector<std::pair<const char*, OrderedJson>>{{"do_train", false},
                                                                                   {"mask_history", true},
                                                                                   {"additional_target", "lm_head"},
                                                                                   {"greater_is_better", true},
                                                                                   {"logging_strategy", "epoch"}}) {
    OrderedJson run = {{key, value}};
    std::vector<std::string> refused;
    EXPECT_TRUE(take_foreign_keys(run, refused).empty()) << key;
    EXPECT_THAT(refused, ElementsAre(HasSubstr(key)));
  }
}

}  // namespace
}  // namespace moesaic::run
