// Chat templates: the variables transformers gives them, and where in the rendered text each assistant turn stands.
#include <algorithm>

#include "moesaic/formats/checkpoint.h"
#include "moesaic/tokenizer/bridge_call.h"
#include "moesaic/tokenizer/learnt_spans.h"
#include "moesaic/tokenizer/tokenizer.h"

namespace moesaic::tokenizer {
namespace {

// Names a message's reasoning is passed under, in the order they are looked up.
constexpr const char* kDefault = "default";
constexpr const char* kToolUse = "tool_use";
constexpr const char* kReasoningKeys[] = {"reasoning_content", "thinking", "reasoning"};
// What a row says of its turns for training alone.
constexpr const char* kTrainingKeys[] = {"train", "weight"};

/// `bare` as {"type": "function", "function": bare}, unless it has that form already.
OrderedJson wrapped(const OrderedJson& bare) {
  if (!bare.is_object() || bare.contains("function") || !bare.contains("name")) return bare;
  OrderedJson function = bare, out = {{"type", "function"}};
  if (function.contains("type") && function["type"] == "function") function.erase("type");
  if (function.contains("id")) {
    out["id"] = function["id"];
    function.erase("id");
  }
  out["function"] = std::move(function);
  return out;
}

/// Sets the arguments of a call: as an object where they are the text of one, or else as text.
void set_arguments(OrderedJson& call, bool as_text) {
  if (!call.is_object() || !call.contains("function") || !call["function"].is_object()) return;
  const auto arguments = call["function"].find("arguments");
  if (arguments == call["function"].end()) return;
  if (as_text) {
    if (arguments->is_object()) *arguments = arguments->dump();
  } else if (arguments->is_string()) {
    try {
      OrderedJson parsed = parse_ordered_json(arguments->get_ref<const std::string&>(), "arguments");
      if (parsed.is_object()) *arguments = std::move(parsed);
    } catch (const FormatError&) {
    }
  }
}

/// A message as transformers hands it to a template: no null values, reasoning under both names templates read. Calls
/// have one form, whichever the data has.
OrderedJson normalized(const OrderedJson& message, bool arguments_as_text) {
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
  if (const auto calls = out.find("tool_calls"); calls != out.end() && calls->is_array()) {
    for (OrderedJson& call : *calls) {
      call = wrapped(call);
      set_arguments(call, arguments_as_text);
    }
  }
  return out;
}

bool has_arguments(const OrderedJson& messages) {
  return std::any_of(messages.begin(), messages.end(),
                     [](const OrderedJson& message) { return message.contains("tool_calls"); });
}

bool is_trained(const OrderedJson& message) {
  if (message.value("role", "") != "assistant") return false;
  auto train = message.find("train");
  if (train != message.end() && train->is_boolean() && !train->get<bool>()) return false;
  auto weight = message.find("weight");
  return weight == message.end() || !weight->is_number() || weight->get<double>() != 0.0;
}

}  // namespace

/// A template that compiled, or why it did not.
struct Compiled {
  std::unique_ptr<BridgeTemplate, void (*)(BridgeTemplate*)> bridge{nullptr, bridge_template_free};
  std::string error;

  explicit Compiled(const std::string& source) {
    OwnedText text;
    bridge.reset(bridge_template_new(source.data(), source.size(), text.out()));
    if (!bridge) error = text.reason();
  }
};

struct ChatTemplate::Impl {
  std::map<std::string, std::string> sources;
  std::map<std::string, Compiled> compiled;
  std::map<std::string, std::string> special_tokens;
  std::vector<std::string> special_texts;

  /// The template transformers chooses: tool_use where there are tools and it exists, default otherwise.
  const BridgeTemplate* choose(bool tools) const {
    auto it = tools ? compiled.find(kToolUse) : compiled.end();
    if (it == compiled.end()) it = compiled.find(kDefault);
    if (it == compiled.end()) {
      std::vector<std::string> names;
      for (const auto& [name, source] : sources) names.push_back(name);
      throw DataError(
          fmt::format("chat template: the model has only those named {}, expected one named default. The run's key "
                      "`template` takes a name or a file.",
                      fmt::join(names, ", ")));
    }
    MOESAIC_CHECK(it->second.bridge, FormatError, "chat template {}: {}", it->first, it->second.error);
    return it->second.bridge.get();
  }

  std::string render(const BridgeTemplate* bridge, const OrderedJson& context, bool blocks) const {
    std::string variables;
    try {
      variables = context.dump();
    } catch (const nlohmann::json::exception& e) {
      throw DataError(fmt::format("chat template: the conversation is not valid UTF-8: {}", e.what()));
    }
    OwnedText text, error;
    MOESAIC_CHECK(bridge_template_render(bridge, variables.data(), variables.size(), blocks, text.out(), error.out()),
                  DataError, "chat template: {}", error.reason());
    return text.str();
  }

  /// `blocks`: {% generation %} blocks stand between signs of learnt_spans.h.
  std::string render(const OrderedJson& messages, bool add_generation_prompt, const OrderedJson& tools,
                     const OrderedJson& extra, bool blocks) const {
    MOESAIC_CHECK(messages.is_array(), DataError,
                  "chat template: messages are {}, expected a list of {{role, content}}", messages.type_name());
    MOESAIC_CHECK(tools.is_null() || tools.is_array(), DataError, "chat template: tools are {}, expected a list",
                  tools.type_name());
    for (size_t i = 0; i < messages.size(); ++i) {
      MOESAIC_CHECK(messages[i].is_object(), DataError,
                    "chat template: message {} is {}, expected an object with a role", i, messages[i].type_name());
    }
    const BridgeTemplate* bridge = choose(!tools.empty());
    OrderedJson context = OrderedJson::object();
    for (const auto& [name, text] : special_tokens) context[name] = text;
    for (const auto& [name, value] : extra.items()) context[name] = value;
    context["messages"] = nullptr;
    context["tools"] = nullptr;
    if (!tools.empty()) {
      OrderedJson& list = context["tools"] = OrderedJson::array();
      for (const OrderedJson& tool : tools) list.push_back(wrapped(tool));
    }
    context["documents"] = nullptr;
    context["add_generation_prompt"] = add_generation_prompt;
    const auto with_arguments = [&](bool as_text) {
      OrderedJson& chat = context["messages"] = OrderedJson::array();
      for (const OrderedJson& message : messages) chat.push_back(normalized(message, as_text));
      return render(bridge, context, blocks);
    };
    try {
      return with_arguments(/*as_text=*/false);
    } catch (const DataError&) {
      // Some templates put the arguments of a call together from texts.
      if (!has_arguments(messages)) throw;
      try {
        return with_arguments(/*as_text=*/true);
      } catch (const DataError&) {
      }
      throw;
    }
  }
};

ChatTemplate::ChatTemplate(std::map<std::string, std::string> sources, const Tokenizer& tokenizer)
    : impl_(std::make_unique<Impl>()) {
  impl_->sources = std::move(sources);
  for (const char* name : {kDefault, kToolUse}) {
    const auto source = impl_->sources.find(name);
    if (source != impl_->sources.end()) impl_->compiled.emplace(name, Compiled(source->second));
  }
  if (impl_->compiled.contains(kDefault)) impl_->choose(/*tools=*/false);
  impl_->special_tokens = tokenizer.special_tokens();
  impl_->special_texts = tokenizer.special_texts();
}

ChatTemplate::ChatTemplate(std::string source, const Tokenizer& tokenizer)
    : ChatTemplate(std::map<std::string, std::string>{{kDefault, std::move(source)}}, tokenizer) {}

ChatTemplate::~ChatTemplate() = default;

std::shared_ptr<ChatTemplate> ChatTemplate::open(const formats::Checkpoint& checkpoint, const Tokenizer& tokenizer) {
  auto sources = checkpoint.chat_templates();
  return sources.empty() ? nullptr : std::make_shared<ChatTemplate>(std::move(sources), tokenizer);
}

const std::map<std::string, std::string>& ChatTemplate::sources() const { return impl_->sources; }

const std::string& ChatTemplate::source() const {
  const auto found = impl_->sources.find(kDefault);
  return found == impl_->sources.end() ? impl_->sources.begin()->second : found->second;
}

std::string ChatTemplate::render(const OrderedJson& messages, bool add_generation_prompt, const OrderedJson& tools,
                                 const OrderedJson& extra) const {
  return impl_->render(messages, add_generation_prompt, tools, extra, /*blocks=*/false);
}

RenderedChat ChatTemplate::render_for_training(const OrderedJson& messages, const OrderedJson& tools) const {
  MOESAIC_CHECK(messages.is_array(), DataError, "chat template: messages are {}, expected a list of {{role, content}}",
                messages.type_name());
  OrderedJson chat = messages;
  std::vector<bool> learnt;
  for (OrderedJson& message : chat) {
    learnt.push_back(message.is_object() && is_trained(message));
    if (!message.is_object()) continue;
    for (const char* key : kTrainingKeys) message.erase(key);
  }
  RenderedChat out;
  out.text = render(chat, false, tools);
  out.trained =
      learnt_spans(out.text, chat, learnt, impl_->special_texts,
                   [&](const OrderedJson& signed_messages, bool add_generation_prompt, bool blocks) {
                     return impl_->render(signed_messages, add_generation_prompt, tools, OrderedJson::object(), blocks);
                   });
  return out;
}

std::optional<std::string> ChatTemplate::end_of_turn() const {
  const OrderedJson question = {{"role", "user"}, {"content", "a"}}, answer = {{"role", "assistant"}, {"content", "b"}};
  try {
    const RenderedChat chat = render_for_training(OrderedJson::array({question, answer}));
    if (chat.trained.empty()) return std::nullopt;
    const std::string_view turn = std::string_view(chat.text).substr(0, chat.trained.back().second);
    for (const std::string& token : impl_->special_texts) {
      if (turn.ends_with(token)) return token;
    }
  } catch (const Error&) {  // a template that wants more than a question and an answer
  }
  return std::nullopt;
}

}  // namespace moesaic::tokenizer
