// What a run with `init: random` starts from.
#pragma once
#include <memory>
#include <string>

#include "moesaic/formats/checkpoint.h"
#include "moesaic/run/config.h"

namespace moesaic::run {

/// A model without weights.
struct NewModel {
  std::shared_ptr<formats::Checkpoint> checkpoint;  // config and tokenizer
  std::string tokenizer;                            // where it is from, for people; "" = the model folder's own
};

/// The config.json that the run names and its tokenizer: the folder's own, a given one, or one trained on the run's own
/// training texts; of a resumed run, the one it began with. With a given or trained tokenizer the config's bos, eos and
/// pad ids are the tokenizer's, and so is vocab_size, unless a given tokenizer leaves a larger one unused.
/// Throws DataError for a tokenizer larger than vocab_size, or none.
NewModel open_new_model(const RunConfig& run);

}  // namespace moesaic::run
