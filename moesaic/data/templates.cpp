#include "moesaic/data/templates.h"

#include <map>

namespace moesaic::data {
namespace {

/// Sets `turns` (the messages without a system turn) and `system` ("" without one), and refuses what the formats have
/// no words for. `bos` and `eos` are empty where the tokenizer has none.
constexpr const char* kBegin = R"({%- if tools -%}
  {{- raise_exception('this template has no words for tools; take a model with a chat template of its own') -}}
{%- endif -%}
{%- set bos = bos_token | default('') -%}
{%- set eos = eos_token | default('') -%}
{%- if messages and messages[0]['role'] == 'system' -%}
  {%- set system = messages[0]['content'] -%}
  {%- set turns = messages[1:] -%}
{%- else -%}
  {%- set system = '' -%}
  {%- set turns = messages -%}
{%- endif -%}
{%- for message in turns -%}
  {%- if message['role'] not in ['user', 'assistant', 'tool'] or message['tool_calls'] -%}
    {{- raise_exception('this template has words for user, assistant and tool turns alone') -}}
  {%- endif -%}
{%- endfor -%}
)";

const std::map<std::string, const char*> kTemplates{
    {"alpaca", R"({{- system or 'Below is an instruction that describes a task. '
    'Write a response that appropriately completes the request.\n\n' -}}
{%- for message in turns -%}
  {%- if message['role'] == 'assistant' -%}
    {{- message['content'] + eos + '\n\n' -}}
  {%- else -%}
    {{- '### Instruction:\n' + message['content'] + '\n\n### Response:\n' -}}
  {%- endif -%}
{%- endfor -%}
)"},
    {"chatml", R"({%- if system -%}
  {{- '<|im_start|>system\n' + system + '<|im_end|>\n' -}}
{%- endif -%}
{%- for message in turns -%}
  {{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|im_start|>assistant\n' -}}
{%- endif -%}
)"},
    {"default", R"({%- if system -%}
  {{- 'System: ' + system + eos + '\n' -}}
{%- endif -%}
{%- for message in turns -%}
  {%- if message['role'] == 'assistant' -%}
    {{- message['content'] + eos + '\n' -}}
  {%- else -%}
    {{- 'Human: ' + message['content'] + eos + '\nAssistant:' -}}
  {%- endif -%}
{%- endfor -%}
)"},
    {"gemma", R"({{- bos -}}
{%- for message in turns -%}
  {%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
  {{- '<start_of_turn>' + role + '\n' -}}
  {%- if loop.first and system -%}
    {{- system + '\n\n' -}}
  {%- endif -%}
  {{- message['content'] + '<end_of_turn>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<start_of_turn>model\n' -}}
{%- endif -%}
)"},
    {"llama3", R"({{- bos -}}
{%- if system -%}
  {{- '<|start_header_id|>system<|end_header_id|>\n\n' + system + '<|eot_id|>' -}}
{%- endif -%}
{%- for message in turns -%}
  {%- set role = 'ipython' if message['role'] == 'tool' else message['role'] -%}
  {{- '<|start_header_id|>' + role + '<|end_header_id|>\n\n' + message['content'] + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}
{%- endif -%}
)"},
    {"mistral", R"({{- bos -}}
{%- for message in turns -%}
  {%- if message['role'] == 'assistant' -%}
    {{- ' ' + message['content'] + eos -}}
  {%- else -%}
    {{- '[INST] ' -}}
    {%- if loop.first and system -%}
      {{- system + '\n\n' -}}
    {%- endif -%}
    {{- message['content'] + '[/INST]' -}}
  {%- endif -%}
{%- endfor -%}
)"},
};

}  // namespace

const std::vector<std::string>& template_names() {
  static const std::vector<std::string> kNames = [] {
    std::vector<std::string> names;
    for (const auto& [name, source] : kTemplates) names.push_back(name);
    return names;
  }();
  return kNames;
}

std::optional<std::string> template_source(const std::string& name) {
  const auto found = kTemplates.find(name);
  if (found == kTemplates.end()) return std::nullopt;
  return std::string(kBegin) + found->second;
}

}  // namespace moesaic::data
