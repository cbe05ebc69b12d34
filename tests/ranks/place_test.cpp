#include "moesaic/ranks/place.h"

#include <map>

#include "moesaic/base/check.h"

namespace moesaic::ranks {
namespace {

using Environment = std::map<std::string, std::string>;

std::optional<Place> place(const Environment& environment) {
  return place_from([&](const char* name) {
    const auto found = environment.find(name);
    return found == environment.end() ? nullptr : found->second.c_str();
  });
}

std::string refusal(const Environment& environment) {
  try {
    place(environment);
  } catch (const UsageError& error) {
    return error.what();
  }
  return "";
}

TEST(Place, IsNowhereWithoutALauncher) {
  EXPECT_FALSE(place({}));
  EXPECT_FALSE(place({{"RANK", "1"}})) << "not complete";
}

TEST(Place, OfTorchrun) {
  const Environment torchrun{{"RANK", "5"},
                             {"WORLD_SIZE", "8"},
                             {"LOCAL_RANK", "1"},
                             {"LOCAL_WORLD_SIZE", "4"},
                             {"MASTER_ADDR", "node7"},
                             {"MASTER_PORT", "29511"},
                             {"TORCHELASTIC_USE_AGENT_STORE", "True"},
                             {"TORCHELASTIC_RESTART_COUNT", "2"},
                             {"PMI_RANK", "0"},
                             {"PMI_SIZE", "1"}};
  const auto found = place(torchrun);
  ASSERT_TRUE(found);
  EXPECT_EQ(found->rank, 5);
  EXPECT_EQ(found->size, 8);
  EXPECT_EQ(found->local_rank, 1);
  EXPECT_EQ(found->local_size, 4);
  EXPECT_EQ(found->host, "node7");
  EXPECT_EQ(found->port, 29511);
  EXPECT_TRUE(found->hosted);
  EXPECT_EQ(found->restart, 2);
}

TEST(Place, OfMpirun) {
  const auto open_mpi = place({{"OMPI_COMM_WORLD_RANK", "3"},
                               {"OMPI_COMM_WORLD_SIZE", "4"},
                               {"OMPI_COMM_WORLD_LOCAL_RANK", "3"},
                               {"OMPI_COMM_WORLD_LOCAL_SIZE", "4"}});
  ASSERT_TRUE(open_mpi);
  EXPECT_EQ(open_mpi->rank, 3);
  EXPECT_EQ(open_mpi->host, "127.0.0.1") << "all are here";
  EXPECT_EQ(open_mpi->port, 29500);
  EXPECT_FALSE(open_mpi->hosted);
  const auto mpich = place({{"PMI_RANK", "1"}, {"PMI_SIZE", "2"}, {"MPI_LOCALRANKID", "1"}, {"MPI_LOCALNRANKS", "2"}});
  ASSERT_TRUE(mpich);
  EXPECT_EQ(mpich->local_rank, 1);
  EXPECT_EQ(mpich->local_size, 2);
}

TEST(Place, OfAStepOfSlurm) {
  const Environment step{{"SLURM_PROCID", "9"},
                         {"SLURM_NTASKS", "16"},
                         {"SLURM_STEP_NUM_TASKS", "16"},
                         {"SLURM_LOCALID", "1"},
                         {"SLURM_STEP_TASKS_PER_NODE", "8(x2)"},
                         {"SLURM_STEP_NODELIST", "gpu[10,20-22],big3"}};
  const auto found = place(step);
  ASSERT_TRUE(found);
  EXPECT_EQ(found->rank, 9);
  EXPECT_EQ(found->size, 16);
  EXPECT_EQ(found->local_rank, 1);
  EXPECT_EQ(found->local_size, 8);
  EXPECT_EQ(found->host, "gpu10");
  for (const auto& [list, first] : Environment{{"a", "a"}, {"a,b", "a"}, {"n[07-09]", "n07"}, {"n[3]", "n3"}}) {
    Environment other = step;
    other["SLURM_STEP_NODELIST"] = list;
    EXPECT_EQ(place(other)->host, first);
  }
}

TEST(Place, OfPmiUnderSlurm) {
  const auto found = place({{"PMI_RANK", "9"},
                            {"PMI_SIZE", "16"},
                            {"SLURM_LOCALID", "1"},
                            {"SLURM_STEP_TASKS_PER_NODE", "8(x2)"},
                            {"SLURM_STEP_NODELIST", "gpu[10,20]"}});
  ASSERT_TRUE(found);
  EXPECT_EQ(found->local_rank, 1);
  EXPECT_EQ(found->local_size, 8);
  EXPECT_EQ(found->host, "gpu10");
}

TEST(Place, ABatchScriptOfSlurmIsNoStep) {
  EXPECT_FALSE(place({{"SLURM_PROCID", "0"}, {"SLURM_NTASKS", "4"}, {"SLURM_LOCALID", "0"}}));
}

TEST(Place, RefusesWhatCannotBe) {
  EXPECT_NE(refusal({{"RANK", "2"}, {"WORLD_SIZE", "2"}}).find("RANK: got '2' in the environment, expected 0 to 1"),
            std::string::npos);
  EXPECT_NE(refusal({{"RANK", "0"}, {"WORLD_SIZE", "two"}}).find("WORLD_SIZE: got 'two'"), std::string::npos);
  EXPECT_NE(refusal({{"RANK", "0"}, {"WORLD_SIZE", "2"}}).find("MASTER_ADDR"), std::string::npos)
      << "nothing says that both are here";
}

}  // namespace
}  // namespace moesaic::ranks
