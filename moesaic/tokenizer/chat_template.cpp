// Chat templates: the variables transformers gives them, and where in the rendered text each assistant turn stands.
#include <algorithm>

#include "moesaic/formats/checkpoint.h"
#include "moesaic/tokenizer/bridge_call.h"
#include "moesaic/tokenizer/tokenizer.h"

namespace moesaic::tokenizer {
namespace {

// Names a message's reasoning is passed under, in the order they are looked up.
constexpr const char* kReasoningKeys[] = {"reasoning_content", "thinking", "reasoning"};
// Stands in for an assistant's words. No blanks at its ends, so that a template that strips does not change it.
constexpr std::string_view kStandIn = "moesaic-stand-in-for-the-words-of-this-turn";

/// A message as transformers hands it to a template: no null values, reasoning under both names templates read.
OrderedJson normalized(const OrderedJson& message) {
  OrderedJson out = OrderedJson::object();
  const OrderedJson* reasoning = nullptr;
  for (const char* key : kReasoningKeys) {
    auto it = message.find(key);
    if (it != message.end() && !it->is_null()) {
      reasoning = &*it;
      break;
    }
  }
  if (reasoning) out["thinking"] = *reasoning;
  for (const auto& [key, value] : message.items()) {
    if (!value.is_null()) out[key] = value;
  }
  if (reasoning) out["reasoning_content"] = *reasoning;
  return out;
}

bool is_trained(const OrderedJson& message) {
  if (message.value("role", "") != "assistant") return false;
  auto train = message.find("train");
  if (train != message.end() && train->is_boolean() && !train->get<bool>()) return false;
  auto weight = message.find("weight");
  return weight == message.end() || !weight->is_number() || weight->get<double>() != 0.0;
}

OrderedJson first_messages(const OrderedJson& messages, size_t count) {
  return OrderedJson(OrderedJson::array_t(messages.begin(), messages.begin() + count));
}

/// Bytes at the start that are alike, up to a whole character.
size_t common_prefix(std::string_view a, std::string_view b) {
  size_t size = 0;
  while (size < a.size() && size < b.size() && a[size] == b[size]) ++size;
  while (size > 0 && size < a.size() && (static_cast<unsigned char>(a[size]) & 0xC0) == 0x80) --size;
  return size;
}

}  // namespace

struct ChatTemplate::Impl {
  std::unique_ptr<BridgeTemplate, void (*)(BridgeTemplate*)> bridge{nullptr, bridge_template_free};
  std::string source;
  std::map<std::string, std::string> special_tokens;
  std::vector<std::string> special_texts;

  /// Blanks a template writes behind the end-of-turn token are not the assistant's: generation stops before them.
  size_t end_of_turn(const std::string& text, size_t begin, size_t end) const {
    size_t last = end;
    while (last > begin && (text[last - 1] == '\n' || text[last - 1] == ' ')) --last;
    const std::string_view turn(text.data() + begin, last - begin);
    const bool closed = std::any_of(special_texts.begin(), special_texts.end(),
                                    [&](const std::string& token) { return turn.ends_with(token); });
    return closed ? last : end;
  }
};

ChatTemplate::ChatTemplate(std::string source, const Tokenizer& tokenizer) : impl_(std::make_unique<Impl>()) {
  OwnedText error;
  impl_->bridge.reset(bridge_template_new(source.data(), source.size(), error.out()));
  MOESAIC_CHECK(impl_->bridge, FormatError, "chat template: {}", error.str());
  impl_->source = std::move(source);
  impl_->special_tokens = tokenizer.special_tokens();
  impl_->special_texts = tokenizer.special_texts();
}

ChatTemplate::~ChatTemplate() = default;

std::shared_ptr<ChatTemplate> ChatTemplate::open(const formats::Checkpoint& checkpoint, const Tokenizer& tokenizer) {
  auto source = checkpoint.chat_template();
  return source ? std::make_shared<ChatTemplate>(std::move(*source), tokenizer) : nullptr;
}

const std::string& ChatTemplate::source() const { return impl_->source; }

std::string ChatTemplate::render(const OrderedJson& messages, bool add_generation_prompt, const OrderedJson& tools,
                                 const OrderedJson& extra) const {
  MOESAIC_CHECK(messages.is_array(), DataError, "chat template: messages are {}, expected a list of {{role, content}}",
                messages.type_name());
  MOESAIC_CHECK(tools.is_null() || tools.is_array(), DataError, "chat template: tools are {}, expected a list",
                tools.type_name());
  OrderedJson context = OrderedJson::object();
  for (const auto& [name, text] : impl_->special_tokens) context[name] = text;
  for (const auto& [name, value] : extra.items()) context[name] = value;
  OrderedJson& chat = context["messages"] = OrderedJson::array();
  for (const auto& message : messages) {
    MOESAIC_CHECK(message.is_object(), DataError, "chat template: message {} is {}, expected an object with a role",
                  chat.size(), message.type_name());
    chat.push_back(normalized(message));
  }
  context["tools"] = tools;
  context["documents"] = nullptr;
  context["add_generation_prompt"] = add_generation_prompt;

  std::string variables;
  try {
    variables = context.dump();
  } catch (const nlohmann::json::exception& e) {
    throw DataError(fmt::format("chat template: the conversation is not valid UTF-8: {}", e.what()));
  }
  OwnedText text, error;
  MOESAIC_CHECK(
      bridge_template_render(impl_->bridge.get(), variables.data(), variables.size(), text.out(), error.out()),
      DataError, "chat template: {}", error.str());
  return text.str();
}

RenderedChat ChatTemplate::render_for_training(const OrderedJson& messages, const OrderedJson& tools) const {
  MOESAIC_CHECK(messages.is_array(), DataError, "chat template: messages are {}, expected a list of {{role, content}}",
                messages.type_name());
  OrderedJson chat = messages;
  for (auto& message : chat) {
    if (!message.is_object()) continue;
    message.erase("train");
    message.erase("weight");
  }
  RenderedChat out;
  out.text = render(chat, false, tools);

  // What a conversation cut short looks like; nullopt when the template does not render it like the whole one.
  const auto prefix = [&](size_t count, bool prompt) -> std::optional<size_t> {
    try {
      const std::string text = render(first_messages(chat, count), prompt, tools);
      return out.text.starts_with(text) ? std::optional(text.size()) : std::nullopt;
    } catch (const DataError&) {
      return std::nullopt;
    }
  };

  // Templates may write earlier turns otherwise than the last one (reasoning dropped, the system prompt moved). Then
  // the words are where the text changes when a stand-in takes their place, and the end-of-turn token is what follows
  // them both in the whole conversation and in the one that ends there.
  const auto by_stand_in = [&](size_t i) -> std::optional<std::pair<size_t, size_t>> {
    OrderedJson changed = chat;
    changed[i]["content"] = kStandIn;
    try {
      const std::string whole = render(changed, false, tools);
      const std::string cut = render(first_messages(changed, i + 1), false, tools);
      const size_t at = whole.find(kStandIn), cut_at = cut.find(kStandIn);
      if (at == std::string::npos || cut_at == std::string::npos) return std::nullopt;
      const std::string_view tail = std::string_view(whole).substr(at + kStandIn.size());
      const size_t begin = std::min(at, common_prefix(out.text, whole));
      if (!out.text.ends_with(tail) || out.text.size() - tail.size() < begin) return std::nullopt;
      const size_t closing = common_prefix(tail, std::string_view(cut).substr(cut_at + kStandIn.size()));
      return std::pair(begin, out.text.size() - tail.size() + closing);
    } catch (const DataError&) {
      return std::nullopt;
    }
  };

  for (size_t i = 0; i < messages.size(); ++i) {
    if (!is_trained(messages[i])) continue;
    auto begin = prefix(i, true);
    auto end = i + 1 == messages.size() ? out.text.size() : prefix(i + 1, false);
    if (!begin || !end || *end < *begin) {
      const auto found = by_stand_in(i);
      MOESAIC_CHECK(found, DataError,
                    "chat template: cannot tell which part of the rendered conversation is message {} ({}). The "
                    "template renders it otherwise than a conversation that ends there. Set \"train\": false on it, or "
                    "use another template.",
                    i, messages[i].dump(-1, ' ', false, OrderedJson::error_handler_t::replace).substr(0, 80));
      if (!begin || *begin > found->second) begin = found->first;
      end = found->second;
    }
    const size_t closed = impl_->end_of_turn(out.text, *begin, *end);
    if (closed > *begin) out.trained.emplace_back(*begin, closed);
  }
  return out;
}

}  // namespace moesaic::tokenizer
