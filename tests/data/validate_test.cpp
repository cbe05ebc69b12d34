#include "moesaic/data/validate.h"

#include <gmock/gmock.h>

#include "tests/data/fixtures.h"

namespace moesaic::data {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

class ValidateTest : public FolderTest {};

TEST_F(ValidateTest, ListsEveryDamagedRow) {
  DatasetConfig config =
      dataset("a.jsonl",
              "{\"inputs\":\"a\",\"targets\":\"b\"}\n{oops\n{\"inputs\":\"a\"}\n{\"inputs\":\"a\",\"targets\":\"\"}\n");
  Validation result = validate(config);
  EXPECT_EQ(result.formatting, "inputs_targets");
  EXPECT_EQ(result.rows, 4);
  EXPECT_EQ(result.damaged, 2);
  EXPECT_EQ(result.unanswered, 1);
  EXPECT_THAT(result.problems,
              ElementsAre(HasSubstr("a.jsonl line 2"), HasSubstr("a.jsonl line 3: 'targets' is missing")));
  EXPECT_EQ(validate(config, 1).problems.size(), 1u);
}

}  // namespace
}  // namespace moesaic::data
