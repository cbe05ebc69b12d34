#include <algorithm>

#include "moesaic/base/sha256.h"
#include "moesaic/base/text.h"
#include "moesaic/data/dataset.h"
#include "moesaic/data/templates.h"

namespace moesaic::data {
namespace {

OrderedJson conversation(const Row& row) {
  if (!row.messages.is_null()) return row.messages;
  return {{{"role", "user"}, {"content", row.prompt}}, {{"role", "assistant"}, {"content", row.target}}};
}

/// A row of one question and one answer as prompt and target. Throws DataError for longer conversations.
Row raw(const Row& row) {
  if (row.messages.is_null()) return row;
  bool pair = row.messages.size() == 2 && row.messages[0].at("role") == "user" &&
              row.messages[1].at("role") == "assistant" && row.tools.is_null();
  MOESAIC_CHECK(pair, DataError,
                "without a chat template only one user turn and its answer can be rendered, got {} turns. Use a model "
                "with a chat template, or name a template file",
                row.messages.size());
  Row result = row;
  result.prompt = row.messages[0].at("content").get<std::string>();
  result.target = row.messages[1].at("content").get<std::string>();
  return result;
}

/// Whether any answer holds something to learn.
bool answered(const OrderedJson& messages) {
  return std::any_of(messages.begin(), messages.end(), [](const OrderedJson& message) {
    return message.at("role") == "assistant" &&
           (message.contains("tool_calls") || !stripped(message.at("content").get_ref<const std::string&>()).empty());
  });
}

/// Leaves `keep` of the prompt's tokens, the last `tail` of them from its end.
void cut_prompt(Example& example, int64_t prompt, int64_t keep, int64_t tail) {
  const int64_t head = keep - tail;
  example.ids.erase(example.ids.begin() + head, example.ids.begin() + prompt - tail);
  example.mask.erase(example.mask.begin() + head, example.mask.begin() + prompt - tail);
}

}  // namespace

void check_options(const RenderOptions& options) {
  std::vector<std::string> wrong;
  if (options.cutoff_len < 2) {
    wrong.push_back(fmt::format("cutoff_len is {}, expected 2 or more", options.cutoff_len));
  }
  if (options.source_cutoff_len < 0) {
    wrong.push_back(fmt::format("source_cutoff_len is {}, expected 0 or more", options.source_cutoff_len));
  }
  if (options.target_cutoff_len < 0) {
    wrong.push_back(fmt::format("target_cutoff_len is {}, expected 0 or more", options.target_cutoff_len));
  }
  if (options.on_bad_row != "stop" && options.on_bad_row != "skip") {
    wrong.push_back(fmt::format("on_bad_row: got '{}', expected stop or skip", options.on_bad_row));
  }
  MOESAIC_CHECK(wrong.empty(), UsageError, "{}", fmt::join(wrong, "; "));
}

formats::ChatTemplates chat_templates(const formats::Checkpoint& checkpoint, const std::string& name) {
  if (name == "none") return {};
  formats::ChatTemplates sources = checkpoint.chat_templates();
  if (name == "auto") return sources;
  if (const auto source = template_source(name)) return {{"default", *source}};
  if (const auto named = sources.find(name); named != sources.end()) return {{"default", named->second}};
  if (std::filesystem::is_regular_file(name)) return {{"default", read_file(name)}};
  std::vector<std::string> known{"auto", "none"};
  known.insert(known.end(), template_names().begin(), template_names().end());
  for (const auto& [own, source] : sources) {
    if (own != "default") known.push_back(own);
  }
  const std::string near = nearest_name(name, known);
  throw UsageError(fmt::format("template is '{}', expected one of {}, or a file with a Jinja template{}{}", name,
                               fmt::join(known, ", "), near.empty() ? "" : fmt::format(". Did you mean '{}'?", near),
                               sources.empty() ? "" : "\nhint: auto takes the model's own"));
}

Renderer::Renderer(std::shared_ptr<const tokenizer::Tokenizer> tokenizer,
                   std::shared_ptr<const tokenizer::ChatTemplate> chat, RenderOptions options)
    : tokenizer_(std::move(tokenizer)), chat_(std::move(chat)), options_(std::move(options)) {
  check_options(options_);
  if (options_.template_name == "none") chat_ = nullptr;
  const bool apart = tokenizer_->prompts_apart();
  MOESAIC_CHECK(
      !apart || !options_.train_on_prompt, UsageError,
      "train_on_prompt: got true for an encoder-decoder, expected false: its encoder reads prompts, and predicts "
      "nothing");
  MOESAIC_CHECK(apart || options_.source_cutoff_len == 0, UsageError,
                "source_cutoff_len: got {} for a decoder, expected 0: the end of a prompt is where its question "
                "stands\nhint: cutoff_len cuts the middle of long prompts",
                options_.source_cutoff_len);
  MOESAIC_CHECK(apart || options_.prompt_eos, UsageError,
                "prompt_eos: got false for a decoder, expected true: the answer goes on behind the prompt, and nothing "
                "stands between them");
  if (!options_.prompt_eos) {
    Json config = tokenizer_->config();
    config["add_eos_token"] = false;  // transformers' word, and what the output folder says
    tokenizer_ = std::make_shared<tokenizer::Tokenizer>(tokenizer_->json(), config, "tokenizer.json", apart);
  }
}

std::shared_ptr<Renderer> Renderer::open(const formats::Checkpoint& checkpoint, RenderOptions options) {
  auto tokenizer = tokenizer::Tokenizer::open(checkpoint);
  formats::ChatTemplates sources = chat_templates(checkpoint, options.template_name);
  std::shared_ptr<tokenizer::ChatTemplate> chat;
  if (!sources.empty()) chat = std::make_shared<tokenizer::ChatTemplate>(std::move(sources), *tokenizer);
  MOESAIC_CHECK(
      !template_source(options.template_name) || chat->end_of_turn(), UsageError,
      "template: got {}, whose end of turn is no special token of the model's tokenizer: no answer would ever "
      "end\nhint: alpaca, default and mistral end answers in the EOS token",
      options.template_name);
  return std::make_shared<Renderer>(std::move(tokenizer), std::move(chat), std::move(options));
}

Json Renderer::identity() const {
  Json identity{{"tokenizer", sha256_hex(tokenizer_->json() + tokenizer_->config().dump())},
                {"template", chat_ ? sha256_hex(Json(chat_->sources()).dump()) : ""},
                {"cutoff_len", options_.cutoff_len},
                {"target_cutoff_len", options_.target_cutoff_len},
                {"train_on_prompt", options_.train_on_prompt},
                {"sentence_column", options_.sentence_column}};
  if (options_.source_cutoff_len > 0) identity["source_cutoff_len"] = options_.source_cutoff_len;
  return identity;
}

std::optional<Example> Renderer::render(const Row& row) const {
  try {
    return render_row(row);
  } catch (const DataError& error) {
    if (row.where.empty()) throw;
    throw DataError(row.where + ": " + error.what());
  }
}

std::optional<Example> Renderer::render_row(const Row& row) const {
  Example example;
  example.sentence = row.sentence;
  if (chat_ && (!row.messages.is_null() || !row.prompt.empty())) {
    OrderedJson messages = conversation(row);
    if (!answered(messages)) return std::nullopt;
    tokenizer::RenderedChat chat = chat_->render_for_training(messages, row.tools);
    tokenizer::Encoding encoding = tokenizer_->encode_with_offsets(chat.text, false);
    example.mask = tokenizer::loss_mask(encoding, chat);
    example.ids = std::move(encoding.ids);
    // A template that writes nothing behind the last answer would never teach the model to stop.
    bool open_end = !chat.trained.empty() && chat.trained.back().second == chat.text.size() &&
                    messages.back().at("role") == "assistant" && !messages.back().contains("tool_calls") &&
                    stripped(chat.text).ends_with(stripped(messages.back().at("content").get<std::string>()));
    if (open_end && tokenizer_->eos_id() && example.ids.back() != *tokenizer_->eos_id()) {
      example.ids.push_back(*tokenizer_->eos_id());
      example.mask.push_back(1);
    }
  } else {
    Row pair = raw(row);
    if (stripped(pair.target).empty()) return std::nullopt;
    MOESAIC_CHECK(tokenizer_->eos_id().has_value(), DataError,
                  "the tokenizer has no end-of-text token, and an answer without one can't be learnt to stop");
    MOESAIC_CHECK(!tokenizer_->prompts_apart() || !stripped(pair.prompt).empty(), DataError,
                  "got a text without a prompt, expected one for the encoder to read");
    if (pair.prompt.empty()) {
      example.ids = tokenizer_->encode_start(pair.target).ids;
      const bool begins = !example.ids.empty() && tokenizer_->bos_id() == example.ids.front();
      example.mask.assign(begins ? 1 : 0, 0);
    } else {
      example.ids = render_prompt(pair);
      example.mask.assign(example.ids.size(), 0);
      for (int64_t id : tokenizer_->encode_behind(pair.target)) example.ids.push_back(id);
    }
    // An answer that ends in the EOS token's own text has it already.
    if (example.ids.empty() || example.ids.back() != *tokenizer_->eos_id())
      example.ids.push_back(*tokenizer_->eos_id());
    example.mask.resize(example.ids.size(), 1);
  }

  int64_t prompt = std::find(example.mask.begin(), example.mask.end(), 1) - example.mask.begin();
  if (const int64_t most = options_.source_cutoff_len; most > 0 && prompt > most) {
    cut_prompt(example, prompt, most, example.ids[prompt - 1] == tokenizer_->eos_id() ? 1 : 0);
    prompt = most;
  }
  int64_t answer = static_cast<int64_t>(example.ids.size()) - prompt;
  if (options_.target_cutoff_len > 0) answer = std::min(answer, options_.target_cutoff_len);
  int64_t keep = std::min(prompt, std::max(options_.cutoff_len - answer, options_.cutoff_len / 2));
  const int64_t size = keep + std::min(answer, options_.cutoff_len - keep);
  if (keep < prompt) cut_prompt(example, prompt, keep, keep / 2);
  example.ids.resize(static_cast<size_t>(size));
  example.mask.resize(static_cast<size_t>(size));
  if (example.targets() == 0) return std::nullopt;
  example.end_prompts_by_mask();
  if (options_.train_on_prompt) std::fill(example.mask.begin(), example.mask.end(), 1);
  return example;
}

std::vector<int64_t> Renderer::render_prompt(const OrderedJson& messages, const OrderedJson& tools) const {
  if (chat_) return tokenizer_->encode(chat_->render(messages, true, tools), false);
  MOESAIC_CHECK(messages.size() == 1 && messages[0].at("role") == "user", DataError,
                "without a chat template only a single user message can be answered, got {} messages", messages.size());
  Row row;
  row.prompt = messages[0].at("content").get<std::string>();
  return render_prompt(row);
}

std::vector<int64_t> Renderer::render_prompt(const Row& row) const {
  if (chat_ && (!row.messages.is_null() || !row.prompt.empty())) {
    OrderedJson messages = conversation(row);
    if (messages.back().at("role") == "assistant") messages.erase(messages.size() - 1);
    return render_prompt(messages, row.tools);
  }
  return tokenizer_->encode_start(raw(row).prompt).ids;
}

}  // namespace moesaic::data
