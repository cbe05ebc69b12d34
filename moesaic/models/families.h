// One function per family: config.json's words to a DecoderConfig. Defaults are those of the family's configuration
// class in transformers 5.
#pragma once
#include "moesaic/models/config_reader.h"

namespace moesaic::models {

DecoderConfig parse_llama(ConfigReader& reader);
DecoderConfig parse_mistral(ConfigReader& reader);
DecoderConfig parse_qwen2(ConfigReader& reader);
DecoderConfig parse_qwen3(ConfigReader& reader);
DecoderConfig parse_gemma(ConfigReader& reader);
DecoderConfig parse_gemma2(ConfigReader& reader);
DecoderConfig parse_gemma3(ConfigReader& reader);

/// Qwen's windows: layers from max_window_layers on slide when use_sliding_window is set.
void read_qwen_windows(ConfigReader& reader, DecoderConfig& config);

}  // namespace moesaic::models
