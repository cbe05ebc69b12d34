// Tools of a chat: what may be called, and the calls in an answer's text.
#pragma once
#include <optional>
#include <string>
#include <vector>

#include "moesaic/base/json.h"
#include "moesaic/tokenizer/tokenizer.h"

namespace moesaic::serve {

/// How a model writes calls, by its chat template.
enum class ToolFormat {
  kHermes,  // <tool_call>\n{"name": .., "arguments": {..}}\n</tool_call>, repeated: Qwen 2.5 and 3, Hermes
  kLlama3,  // {"name": .., "parameters": {..}}, several with ; between
};
/// nullopt: its template takes no tools, or writes calls in a way that is not read here.
std::optional<ToolFormat> tool_format(const tokenizer::ChatTemplate& chat_template);

struct ToolCall {
  std::string name, arguments;  // arguments: JSON text of an object
};
/// An answer taken apart. What is no whole call stays in the content.
struct ToolAnswer {
  std::string content;
  std::vector<ToolCall> calls;
};
ToolAnswer read_tool_calls(ToolFormat format, const std::string& text);
/// Bytes of `text`, an answer so far, that are content whatever follows.
size_t certain_content(ToolFormat format, const std::string& text);

/// A Lark grammar of calls of `tools`, [{"type": "function", "function": {"name", "parameters"}}], one or, where
/// `several` says so, more.
std::string tool_grammar(ToolFormat format, const OrderedJson& tools, bool several);

}  // namespace moesaic::serve
