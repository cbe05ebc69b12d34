#include "moesaic/ranks/group.h"

#include <unistd.h>

#include <cmath>

#include "moesaic/ranks/deal.h"
#include "tests/ranks/threads.h"

namespace moesaic::ranks {
namespace {

TEST(Group, SaysWhatEveryRankSays) {
  as_ranks(3, [](const std::shared_ptr<Group>& group) {
    const std::string own(static_cast<size_t>(group->rank()), 'x');
    EXPECT_EQ(group->gather(own), (std::vector<std::string>{"", "x", "xx"}));
    EXPECT_EQ(group->from_first(group->first() ? "first" : "other"), "first");
    EXPECT_TRUE(group->any(group->rank() == 2));
    EXPECT_FALSE(group->any(false));
  });
}

TEST(Group, NamesWhoIsGone) {
  as_ranks(3, [](const std::shared_ptr<Group>& group) {
    if (group->rank() == 1) return;  // leaves without a word
    try {
      group->gather("x");
      FAIL() << "rank 1 said nothing";
    } catch (const Lost& error) {
      EXPECT_NE(std::string(error.what()).find("rank 1 is gone or does not answer"), std::string::npos) << error.what();
    }
  });
}

TEST(Group, OutlivesTheOtherEndOfAConnection) {
  as_ranks(2, [](const std::shared_ptr<Group>&) {
    int ends[2];
    ASSERT_EQ(pipe(ends), 0);
    close(ends[0]);
    EXPECT_EQ(write(ends[1], "x", 1), -1);
    EXPECT_EQ(errno, EPIPE);
    close(ends[1]);
  });
}

TEST(Deal, EachPieceIsDoneOnceAndKnownToAll) {
  for (const int64_t size : {1, 2, 3}) {
    std::atomic<int64_t> done = 0;
    as_ranks(size, [&](const std::shared_ptr<Group>& group) {
      const std::vector<Json> all = deal(*group, 7, [&](int64_t i) -> Json {
        ++done;
        return {i, std::nan(""), "\xff"};
      });
      ASSERT_EQ(all.size(), 7U);
      for (int64_t i = 0; i < 7; ++i) {
        EXPECT_EQ(all[i][0], i);
        EXPECT_TRUE(std::isnan(all[i][1].get<double>()));
        EXPECT_EQ(all[i][2].get<std::string>(), "\xff");
      }
      EXPECT_TRUE(deal(*group, 0, [](int64_t) -> Json { return 1; }).empty());
    });
    EXPECT_EQ(done, 7);
  }
}

}  // namespace
}  // namespace moesaic::ranks
