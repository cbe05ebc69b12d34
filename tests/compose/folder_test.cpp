#include "moesaic/compose/folder.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "moesaic/models/registry.h"
#include "tests/compose/small_models.h"
#include "tests/temporary_folder.h"

namespace moesaic::compose {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;
namespace fs = std::filesystem;

class CompositionFolder : public ::testing::Test {
 protected:
  CompositionFolder() {
    test::write_small_model(root_.path() / "anchor", "gpt2", 20, 3, 1);
    test::write_small_model(root_.path() / "aug", "llama3", 14, 4, 2);
    auto member = [&](const char* name) { return open_member(models::open_checkpoint(root_.path() / name), {}); };
    composition_ = std::make_shared<Composition>(test::config_of({{{{0, 1}, {2, 2}}, "token"}}), member("anchor"),
                                                 std::vector{member("aug")}, 7);
    test::randomise(*composition_);
    save_composition(*composition_, dir());
  }
  fs::path dir() const { return root_.path() / "calm"; }
  std::string error() const {
    try {
      load_composition(dir(), {});
    } catch (const DataError& error) {
      return error.what();
    }
    return "loads";
  }
  void edit(const std::function<void(Json&)>& change) const {
    Json json = read_json(dir() / "calm_config.json");
    change(json);
    write_file_atomically(dir() / "calm_config.json", json.dump());
  }
  void edit_tensors(const std::function<void(formats::TensorMap&)>& change) const {
    formats::TensorMap tensors;
    {
      const formats::SafetensorsFile file(dir() / "calm_model.safetensors");
      for (const auto& name : file.names()) tensors[name] = file.tensor(name).clone();
    }
    change(tensors);
    formats::save_safetensors(dir() / "calm_model.safetensors", tensors);
  }

  test::TemporaryFolder root_;
  std::shared_ptr<Composition> composition_;
};

TEST_F(CompositionFolder, LoadsBackEqual) {
  const std::vector<std::vector<int64_t>> sequences{{40, 90, 91, 3}, {17, 18}};
  const auto loaded = load_composition(dir(), {});
  EXPECT_TRUE(torch::equal(test::logits_of(*loaded, sequences), test::logits_of(*composition_, sequences)));
  EXPECT_EQ(loaded->config().augmenting, composition_->config().augmenting);
  for (const auto& entry : fs::directory_iterator(dir())) {
    EXPECT_LT(fs::file_size(entry.path()), 20000u) << "connections only: " << entry.path();
  }
}

TEST_F(CompositionFolder, KeepsFormsAndWhatConnectionsKnowOfTheirInputs) {
  CompositionConfig config = test::config_of({{{{0, kFinal}, {kFinal, kFinal, /*newest=*/true}}, "token"}});
  config.connection.cross_position = "recency";
  config.connection.norm = "standard";
  config.connection.output_scale = 0.5;
  Composition made(config, composition_->anchor_member(), composition_->augmenting(), 7);
  test::randomise(made);
  made.train();
  const std::vector<std::vector<int64_t>> sequences{{40, 90, 91, 3}, {17, 18}};
  test::logits_of(made, sequences);  // means and deviations are those of these
  made.eval();
  const fs::path forms = root_.path() / "forms";
  save_composition(made, forms);
  const auto loaded = load_composition(forms, {});
  EXPECT_TRUE(torch::equal(test::logits_of(*loaded, sequences), test::logits_of(made, sequences)));
  EXPECT_EQ(loaded->config().augmenting, config.augmenting);
  const Json json = read_json(forms / "calm_config.json");
  EXPECT_EQ(json["augmenting"][0]["connections"][1],
            (Json{{"anchor", "final"}, {"aug", "final"}, {"reads", "newest"}}));
}

TEST_F(CompositionFolder, MovesWithItsModels) {
  const fs::path other = root_.path() / "moved";
  fs::create_directories(other);
  for (const char* name : {"anchor", "aug", "calm"}) fs::rename(root_.path() / name, other / name);
  EXPECT_NO_THROW(load_composition(other / "calm", {}));
}

TEST_F(CompositionFolder, LinksToFoldersAndModelsAreFollowed) {
  const fs::path other = root_.path() / "elsewhere" / "below";
  fs::create_directories(other);
  fs::create_directory_symlink(dir(), other / "calm");
  EXPECT_NO_THROW(load_composition(other / "calm", {}));
  // A link's name stays: files of a download cache are links to names without an ending.
  fs::create_directory_symlink(root_.path() / "aug", root_.path() / "aug-link");
  Composition linked(composition_->config(), composition_->anchor_member(),
                     {open_member(models::open_checkpoint(root_.path() / "aug-link/"), {})}, 7);
  save_composition(linked, other / "calm");  // through the link
  EXPECT_EQ(read_json(dir() / "calm_config.json")["augmenting"][0]["model"], "../aug-link");
  EXPECT_NO_THROW(load_composition(dir(), {}));
}

TEST_F(CompositionFolder, AModelsFolderIsNotWrittenInto) {
  EXPECT_THROW(save_composition(*composition_, root_.path() / "anchor"), UsageError);
  EXPECT_FALSE(is_composition(root_.path() / "anchor"));
}

TEST_F(CompositionFolder, ConnectionsAloneCanBeLoaded) {
  const auto loaded = load_composition(dir(), {});
  test::randomise(*loaded, 99);
  Connections(loaded, false).load(dir());
  for (const auto& item : loaded->named_parameters()) {
    EXPECT_TRUE(torch::equal(item.value(), composition_->named_parameters()[item.key()]));
  }
}

TEST_F(CompositionFolder, NumbersOfAnotherCompositionAreRefused) {
  const auto loaded = load_composition(dir(), {});
  edit([](Json& json) { json["augmenting"][0]["fingerprint"] = "sha256-all:0"; });
  EXPECT_THAT([&] { Connections(loaded, false).load(dir()); },
              ::testing::ThrowsMessage<DataError>(HasSubstr("augmenting[0]: got numbers trained on other weights")));
}

TEST_F(CompositionFolder, ChangedModelsAreRefusedTogether) {
  test::write_small_model(root_.path() / "anchor", "gpt2", 20, 3, 5);
  test::write_small_model(root_.path() / "aug", "llama3", 14, 4, 6);
  write_file_atomically(root_.path() / "aug" / "tokenizer.json", test::golden_tokenizer("unigram")->json());
  EXPECT_THAT(error(),
              AllOf(HasSubstr("anchor: the weights' hash"), HasSubstr("augmenting[0]: the weights' hash"),
                    HasSubstr("augmenting[0]: the tokenizer's hash"), Not(HasSubstr("anchor: the tokenizer"))));
}

TEST_F(CompositionFolder, MissingModelSaysWhatToDo) {
  fs::remove_all(root_.path() / "aug");
  EXPECT_THAT(error(), AllOf(HasSubstr("augmenting[0]"), HasSubstr("does not exist"), HasSubstr("correct its path")));
}

TEST_F(CompositionFolder, AModelOfAnotherWidthNamesTheModelAndEveryTensor) {
  test::write_small_model(root_.path() / "aug", "llama3", 16, 4, 2);
  EXPECT_THAT(error(), AllOf(HasSubstr("augmenting[0]: the weights' hash"), HasSubstr("put that model back"),
                             HasSubstr("connections.0.proj.weight: got [20, 14], expected [20, 16]"),
                             HasSubstr("connections.1.proj.weight: got [20, 14], expected [20, 16]")));
}

TEST_F(CompositionFolder, AModelOfFewerBlocksIsNamedBesideTheBlockItLacks) {
  test::write_small_model(root_.path() / "anchor", "gpt2", 20, 2, 1);
  EXPECT_THAT(error(), AllOf(HasSubstr("anchor: the weights' hash"), HasSubstr("got anchor 2, aug 2")));
}

TEST_F(CompositionFolder, WhatIsNoModelIsNamed) {
  fs::remove(root_.path() / "anchor" / "config.json");
  fs::remove(root_.path() / "aug" / "model.safetensors");
  EXPECT_THAT(error(), AllOf(HasSubstr("anchor: "), HasSubstr("has no config.json"), HasSubstr("augmenting[0]: "),
                             HasSubstr("has no model.safetensors")));
  edit([](Json& json) { json["anchor"]["model"] = "."; });
  EXPECT_THAT(error(), HasSubstr("has no config.json"));
}

TEST_F(CompositionFolder, MissingOrDamagedConnections) {
  const fs::path file = dir() / "calm_model.safetensors";
  const std::string bytes = read_file(file);
  fs::remove(root_.path() / "aug" / "tokenizer.json");
  fs::remove(file);
  EXPECT_THAT(error(), AllOf(HasSubstr("calm_model.safetensors is missing; put it back"),
                             HasSubstr("augmenting[0]: the tokenizer's hash"), HasSubstr("got none")));
  write_file_atomically(file, bytes.substr(0, bytes.size() - 7));
  EXPECT_THAT(error(), HasSubstr("calm_model.safetensors"));
  write_file_atomically(dir() / "calm_config.json", "{\"type\": \"calm\", ");
  EXPECT_THAT(error(), HasSubstr("calm_config.json"));
}

TEST_F(CompositionFolder, EveryWrongTensorIsListed) {
  edit_tensors([](formats::TensorMap& tensors) {
    tensors.erase("connections.0.q_proj.weight");
    tensors["connections.1.proj.weight"] = torch::zeros({20, 15});
    tensors["connections.2.proj.weight"] = torch::zeros({2});
    tensors["connections.1.v_proj.weight"] = torch::zeros({20, 20}, torch::kInt64);
  });
  EXPECT_THAT(error(), AllOf(HasSubstr("missing (1):\n    connections.0.q_proj.weight"),
                             HasSubstr("connections.1.proj.weight: got [20, 15], expected [20, 14]"),
                             HasSubstr("unexpected (1):\n    connections.2.proj.weight"),
                             HasSubstr("connections.1.v_proj.weight: got Long")));
}

TEST_F(CompositionFolder, BadConfigsAreRefused) {
  const std::vector<std::pair<std::function<void(Json&)>, std::string>> cases{
      {[](Json& json) { json["version"] = 2; }, "version 2"},
      {[](Json& json) { json["num_head"] = 2; }, "unknown keys num_head"},
      {[](Json& json) { json["num_heads"] = 3; }, "num_heads: got 3"},
      {[](Json& json) { json.erase("norm"); }, "'norm' is missing"},
      {[](Json& json) { json["augmenting"][0]["connections"][0] = {0, 1}; }, "expected {anchor: block"},
      {[](Json& json) { json["augmenting"][0]["connections"][0]["aug"] = 9; }, "aug 9"},
      {[](Json& json) { json["augmenting"][0]["connections"][0]["aug"] = "last"; }, "got \"last\", expected a block's"},
      {[](Json& json) { json["augmenting"][0]["connections"][0]["reads"] = "none"; }, "expected all or newest"},
      {[](Json& json) { json["augmenting"][0]["connections"][0]["from"] = 1; }, "unknown key 'from'"},
      {[](Json& json) { json["output_scale"] = -1; }, "output_scale: got -1"},
      {[](Json& json) { json["augmenting"][0]["connections"] = {{"anchor", 0}}; }, "expected a list"},
      {[](Json& json) { json["augmenting"][0] = "model"; }, "augmenting[0]: got \"model\""},
      {[](Json& json) { json["augmenting"] = Json::array(); }, "expected at least one"},
      {[](Json& json) { json["anchor"] = 3; }, "anchor"},
      {[](Json& json) { json = Json::array(); }, "type none"},
  };
  const std::string original = read_file(dir() / "calm_config.json");
  for (const auto& [change, message] : cases) {
    edit(change);
    EXPECT_THAT(error(), HasSubstr(message));
    write_file_atomically(dir() / "calm_config.json", original);
  }
}

}  // namespace
}  // namespace moesaic::compose
