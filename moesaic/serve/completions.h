// Bodies of OpenAI's /v1/chat/completions and /v1/completions.
#pragma once
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "moesaic/generate/generate.h"
#include "moesaic/serve/catalog.h"
#include "moesaic/serve/tools.h"

namespace moesaic::serve {

class Fields;

/// What every request meets.
struct Surroundings {
  const tokenizer::Tokenizer& tokenizer;
  const Catalog& catalog;
  std::vector<int64_t> eos_ids;
  int64_t vocab_size = 0;
  const tokenizer::Grammars& grammars;
  int64_t max_model_len = 0;      // tokens of a prompt and its answer
  double max_request_time = 600;  // seconds
  std::string fingerprint{};      // system_fingerprint
};

/// A body, read and checked.
struct Completion {
  bool chat = false;
  std::string model;                   // as the client wrote it
  std::shared_ptr<const Entry> entry;  // what answers
  std::vector<std::vector<int64_t>> prompts;
  std::vector<std::string> texts;      // of the prompts, where they are echoed
  generate::SamplingOptions sampling;  // of every prompt; num_return_sequences is `n`
  bool stream = false, include_usage = false, echo = false;
  std::optional<ToolFormat> tool_format{};  // how calls stand in answers; nullopt: none are looked for
  bool prompt_only = false;                 // max_tokens 0: the prompt's scores alone
  int64_t logprobs = -1;                    // how many of the likeliest tokens are told; -1: no log-probabilities
  bool seed_given = false;
  std::string salt;
  double timeout = 0;                  // seconds
  std::vector<std::string> unknown{};  // fields that this server does not know
};

/// A number for JSON's readers: 53 bits.
uint64_t random_number();

/// Reads a body. path_model: the model that the path names, "" for none. Throws ApiError.
Completion read_completion(const OrderedJson& body, bool chat, const std::string& path_model,
                           const Surroundings& around);
/// The ids of a chat's prompt. Throws ApiError.
std::vector<int64_t> read_chat_prompt(const OrderedJson& body, const std::string& path_model,
                                      const Surroundings& around);
/// messages as a chat template takes them: developers are systems, parts of text are joined. Throws ApiError.
OrderedJson read_messages(const OrderedJson& messages);
/// The adapters that a body names in `lora`, `adapter_id` or `model`. Throws ApiError.
std::shared_ptr<const Entry> read_entry(Fields& fields, const std::string& path_model, const Catalog& catalog,
                                        std::string& model);

}  // namespace moesaic::serve
