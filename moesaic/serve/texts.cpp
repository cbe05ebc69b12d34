#include "moesaic/serve/texts.h"

#include "moesaic/nn/kernels.h"
#include "moesaic/serve/fields.h"

namespace moesaic::serve {
namespace {

constexpr int64_t kMostEmbedded = 256;  // texts of one request

/// RFC 4648.
std::string base64(std::string_view bytes) {
  constexpr std::string_view kLetters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  std::string text;
  for (size_t i = 0; i < bytes.size(); i += 3) {
    uint32_t group = 0;
    for (size_t j = i; j < i + 3; ++j)
      group = group << 8 | (j < bytes.size() ? static_cast<unsigned char>(bytes[j]) : 0u);
    for (size_t k = 0; k < 4; ++k) text += i + k <= bytes.size() ? kLetters[group >> (18 - 6 * k) & 63] : '=';
  }
  return text;
}

}  // namespace

OrderedJson tokenize(const OrderedJson& body, const Surroundings& around) {
  Fields fields(body);
  std::string model;
  const std::shared_ptr<const Entry> entry = read_entry(fields, "", around.catalog, model);
  std::string text;
  bool special = fields.flag("add_special_tokens", !fields.has("messages"));
  if (const OrderedJson* messages = fields.find("messages")) {
    if (!entry->chat_template)
      throw ApiError(400, fmt::format("model '{}' has no chat template", entry->name), "messages");
    text = entry->chat_template->render(read_messages(*messages), fields.flag("add_generation_prompt", true));
  } else {
    if (!fields.has("prompt")) fields.refuse("prompt", "a text, or \"messages\"");
    text = fields.text("prompt", "", size_t{8} << 20);
  }
  const bool names = fields.flag("return_token_strs", false);
  fields.unknown();
  const std::vector<int64_t> ids =
      special ? around.tokenizer.encode_start(text).ids : around.tokenizer.encode(text, false);
  OrderedJson json = {{"count", ids.size()}, {"max_model_len", around.max_model_len}, {"tokens", ids}};
  if (names) {
    json["token_strs"] = OrderedJson::array();
    for (const int64_t id : ids) json["token_strs"].push_back(around.tokenizer.id_to_token(id).value_or(""));
  }
  return json;
}

OrderedJson detokenize(const OrderedJson& body, const Surroundings& around) {
  Fields fields(body);
  fields.ignore("model");
  const OrderedJson* tokens = fields.find("tokens");
  if (tokens == nullptr || !tokens->is_array()) fields.refuse("tokens", "a list of token ids");
  const std::vector<int64_t> ids = fields.token_ids("tokens", *tokens, around.vocab_size);
  fields.unknown();
  return {{"prompt", around.tokenizer.decode(ids, false)}};
}

OrderedJson tokenizer_info(const Surroundings& around) {
  const auto& special = around.tokenizer.special_tokens();
  auto token = [&](const char* name) {
    const auto found = special.find(name);
    return found == special.end() ? OrderedJson(nullptr) : OrderedJson(found->second);
  };
  const auto& chat = around.catalog.base()->chat_template;
  return {{"eos_token", token("eos_token")},
          {"bos_token", token("bos_token")},
          {"pad_token", token("pad_token")},
          {"chat_template", chat ? OrderedJson(chat->source()) : OrderedJson(nullptr)}};
}

OrderedJson embeddings(const OrderedJson& body, const std::string& path_model, const Surroundings& around,
                       models::LanguageModel& language_model, Service& service) {
  Fields fields(body);
  std::string model;
  const std::shared_ptr<const Entry> entry = read_entry(fields, path_model, around.catalog, model);
  const std::string format = fields.text("encoding_format", "float");
  if (format != "float" && format != "base64") fields.refuse("encoding_format", "float or base64");
  fields.only("dimensions", {}, "a text's vector is as wide as the model");
  fields.ignore("user");
  bool normalize = true;
  if (const OrderedJson* own = fields.find("moesaic")) normalize = Fields(*own, "moesaic").flag("normalize", true);
  const OrderedJson* input = fields.find("input");
  if (input == nullptr || (input->is_array() && input->empty())) fields.refuse("input", "a text, texts or token ids");
  const bool one = input->is_string() || (input->is_array() && input->front().is_number());
  const OrderedJson list = one ? OrderedJson::array({*input}) : *input;
  if (!list.is_array() || std::ssize(list) > kMostEmbedded) {
    fields.refuse("input", fmt::format("{} texts at most", kMostEmbedded));
  }
  fields.unknown();
  std::vector<generate::Prompt> prompts;
  int64_t tokens = 0;
  for (const OrderedJson& each : list) {
    generate::Prompt& prompt = prompts.emplace_back();
    prompt.ids = each.is_string() ? around.tokenizer.encode_start(each.get<std::string>()).ids
                                  : fields.token_ids("input", each, around.vocab_size);
    if (prompt.ids.empty() || std::ssize(prompt.ids) > around.max_model_len) {
      fields.refuse("input", fmt::format("1 to {} tokens in each text", around.max_model_len));
    }
    tokens += std::ssize(prompt.ids);
  }
  OrderedJson data = OrderedJson::array();
  for (size_t i = 0; i < prompts.size(); ++i) {
    torch::Tensor vector;
    service.between_steps([&](generate::Engine&) {
      torch::NoGradGuard no_grad;
      const nn::AlikeRows alike(nn::AlikeRows::Number::kMany);
      generate::Prompt& prompt = prompts[i];
      prompt.mixture.assign(language_model.attachments().size(), 0.0);
      for (const auto& [adapter, weight] : entry->weights) prompt.mixture[language_model.column(adapter)] += weight;
      nn::Pass pass;
      vector = language_model.hidden(generate::text_of(language_model, {prompt}), pass)
                   .mean(0, /*keepdim=*/false, torch::kFloat32)
                   .cpu();
    });
    if (normalize) vector = vector / vector.norm();
    OrderedJson one = {{"object", "embedding"}, {"index", i}};
    const float* numbers = vector.data_ptr<float>();
    if (format == "base64") {
      one["embedding"] = base64({reinterpret_cast<const char*>(numbers), vector.nbytes()});
    } else {
      one["embedding"] = std::vector<float>(numbers, numbers + vector.numel());
    }
    data.push_back(std::move(one));
  }
  return {{"object", "list"},
          {"data", std::move(data)},
          {"model", model.empty() ? entry->name : model},
          {"usage", {{"prompt_tokens", tokens}, {"total_tokens", tokens}}}};
}

}  // namespace moesaic::serve
