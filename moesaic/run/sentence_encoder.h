// Vectors of prompts for routers that read sentences, made by an encoder of its own.
#pragma once
#include <torch/torch.h>

#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "moesaic/models/language_model.h"
#include "moesaic/tokenizer/tokenizer.h"

namespace moesaic::run {

/// A frozen sentence encoder.
class SentenceEncoder : public models::SentenceEncoder {
 public:
  virtual int64_t width() const = 0;
  /// Of its weights.
  virtual const std::string& fingerprint() const = 0;
};

/// The encoder in a folder as transformers (a T5 or T5EncoderModel: the mean of its last states) or
/// sentence-transformers writes it (modules.json: mean pooling, then a dense layer, then a length of 1, each where it
/// is there), so that of a prompt's text, special tokens left out,
///
///   v = normalise(W mean_n h_n + b),   h = encoder(text, EOS)             [width] float32
///
/// A text is cut to max_seq_length of sentence_bert_config.json where there is one. `model_tokenizer` turns prompts
/// back into texts. Vectors are kept by the text's hash, in the user's cache folder too where one is set
/// (file_memory.h), up to 1 GiB. Throws UsageError where there is no such folder, DataError for what is no such
/// encoder. Source: Ni et al., "Sentence-T5", arXiv 2108.08877.
std::shared_ptr<SentenceEncoder> open_sentence_encoder(const std::filesystem::path& folder,
                                                       std::shared_ptr<const tokenizer::Tokenizer> model_tokenizer,
                                                       torch::Device device);

}  // namespace moesaic::run
