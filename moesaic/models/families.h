// One function per family: config.json's words to a DecoderConfig or a Seq2SeqConfig. Defaults are those of the
// family's configuration class in transformers 5. And one row: how the family lies in a GGUF file.
#pragma once
#include "moesaic/formats/gguf_checkpoint.h"
#include "moesaic/models/config_reader.h"

namespace moesaic::models {

DecoderConfig parse_llama(ConfigReader& reader);
DecoderConfig parse_mistral(ConfigReader& reader);
DecoderConfig parse_qwen2(ConfigReader& reader);
DecoderConfig parse_qwen3(ConfigReader& reader);
DecoderConfig parse_mixtral(ConfigReader& reader);
DecoderConfig parse_qwen2_moe(ConfigReader& reader);
DecoderConfig parse_qwen3_moe(ConfigReader& reader);
DecoderConfig parse_olmoe(ConfigReader& reader);
DecoderConfig parse_granitemoe(ConfigReader& reader);
DecoderConfig parse_granitemoeshared(ConfigReader& reader);
DecoderConfig parse_gemma(ConfigReader& reader);
DecoderConfig parse_gemma2(ConfigReader& reader);
DecoderConfig parse_gemma3(ConfigReader& reader);
Seq2SeqConfig parse_t5(ConfigReader& reader);
Seq2SeqConfig parse_mt5(ConfigReader& reader);
Seq2SeqConfig parse_umt5(ConfigReader& reader);
Seq2SeqConfig parse_switch(ConfigReader& reader);
Seq2SeqConfig parse_t5gemma(ConfigReader& reader);
Seq2SeqConfig parse_t5gemma2(ConfigReader& reader);

/// Whether a layer has Qwen's window where layer_types does not say it.
using Slides = bool (*)(int64_t layer, int64_t max_window_layers);
inline bool slides_from(int64_t layer, int64_t max_window_layers) { return layer >= max_window_layers; }
/// Qwen's windows, when use_sliding_window is set.
void read_qwen_windows(ConfigReader& reader, DecoderConfig& config, Slides slides);

extern const formats::GgufArchitecture kLlamaGguf, kQwen2Gguf, kQwen3Gguf, kGemmaGguf, kGemma2Gguf, kGemma3Gguf;
extern const formats::GgufArchitecture kQwen2MoeGguf, kQwen3MoeGguf, kOlmoeGguf, kGraniteMoeGguf;
/// The norms of a layer with one before each half.
inline constexpr formats::GgufName kPreNorms[] = {{"ffn_norm", "post_attention_layernorm"}};
/// The norms of a layer with one before and one behind each half (gemma 2 and 3).
inline constexpr formats::GgufName kPrePostNorms[] = {{"post_attention_norm", "post_attention_layernorm"},
                                                      {"ffn_norm", "pre_feedforward_layernorm"},
                                                      {"post_ffw_norm", "post_feedforward_layernorm"}};
/// What every sparse model keeps in a GGUF file: how many experts there are and are chosen, and their widths.
void complete_sparse(const formats::GgufMetadata& metadata, Json& config);
/// What gemma 2 and 3 keep in a GGUF file alike: window, soft caps and the softmax scale. llama.cpp scales the 27B
/// model, known by its number of layers, by the width per head and all others by the head size.
void complete_gemma(const formats::GgufMetadata& metadata, Json& config, int64_t layers_of_27b);

}  // namespace moesaic::models
