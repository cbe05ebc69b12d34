// Prompt templates: any bytes are a file of templates that render rows within their budget, or Error.
#include "moesaic/data/prompt_templates.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace moesaic;
  static const auto row = OrderedJson::parse(
      R"({"text": "a ||| b c", "label": 1, "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "a-b": null})");
  try {
    const auto templates = data::PromptTemplates::parse(std::string(reinterpret_cast<const char*>(data), size), "fuzz");
    for (size_t i = 0; i < templates.templates().size(); ++i) templates.render(i, row, size);
  } catch (const Error&) {
  }
  return 0;
}
