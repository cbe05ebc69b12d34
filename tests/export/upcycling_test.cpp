#include "moesaic/export/upcycling.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace moesaic::exporting {
namespace {

using testing::HasSubstr;
using testing::ThrowsMessage;

Upcycling parsed(Json keys) {
  keys["base_model"] = "base";
  return parse_upcycling(keys, "moe.yaml", 7);
}

TEST(Upcycling, DefaultsAndTheirExceptions) {
  const Upcycling copy = parsed({{"method", "copy"}, {"num_experts", 3}, {"dtype", nullptr}});
  EXPECT_EQ(copy.experts_per_token, 2);
  EXPECT_EQ(copy.seed, 7u);
  EXPECT_EQ(copy.dtype, "");
  const Upcycling groups = parsed({{"method", "virtual_group"}, {"num_experts", 8}, {"granularity", 4}, {"seed", 1}});
  EXPECT_EQ(groups.experts_per_token, 4) << "one copy";
  EXPECT_EQ(groups.seed, 1u);
  const Upcycling lora = parsed({{"method", "lora"}, {"adapters", {"a", "b", "c"}}});
  EXPECT_EQ(lora.num_experts, 3);
  EXPECT_THAT(lora.inputs(), testing::ElementsAre("base", "a", "b", "c"));
}

TEST(Upcycling, AFileWithExpertsIsMergekits) {
  const Json experts = Json::array({{{"source_model", "x"}, {"positive_prompts", {"p"}}},
                                    {{"source_model", "y"}, {"positive_prompts", {"q"}}, {"residual_scale", 0.5}}});
  const Upcycling merge = parsed({{"experts", experts}});
  EXPECT_EQ(merge.method, "mergekit");
  EXPECT_EQ(merge.gate_mode, "hidden");
  EXPECT_EQ(merge.num_experts, 2);
  EXPECT_EQ(merge.experts[1].residual_scale, 0.5);
  EXPECT_THAT(merge.inputs(), testing::ElementsAre("base", "x", "y"));
  EXPECT_THAT([&] { parsed({{"experts", experts}, {"num_experts", 2}}); },
              ThrowsMessage<UsageError>(HasSubstr("'num_experts'")));
}

TEST(Upcycling, KeysOfAnotherMethodAreNamedWithTheirOwner) {
  EXPECT_THAT([] { parsed({{"method", "residual"}, {"num_experts", 2}, {"noise", 0.1}}); },
              ThrowsMessage<UsageError>(HasSubstr("noise is a key of method copy, got method residual")));
  EXPECT_THAT([] { parsed({{"method", "lora"}, {"adapters", {"a"}}, {"num_experts", 2}}); },
              ThrowsMessage<UsageError>(HasSubstr("num_experts: got 2")));
}

}  // namespace
}  // namespace moesaic::exporting
