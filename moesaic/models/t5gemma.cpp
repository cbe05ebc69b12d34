// T5Gemma: an encoder and a decoder of Gemma 2's layers, of any two sizes. The encoder's attention looks both ways, the
// decoder's layers also read the encoder between their halves, and its embedding is the head.
#include "moesaic/formats/config.h"
#include "moesaic/models/families.h"

namespace moesaic::models {
namespace {

/// config.json's object `half` ("encoder" or "decoder"), an empty one where it is silent.
DecoderConfig read_half(ConfigReader& reader, const char* half) {
  const Json given = reader.has(half) ? reader.json().at(half) : Json(Json::object());
  if (!given.is_object()) {
    reader.error(half, fmt::format("got {}, expected an object", given.dump().substr(0, 80)));
    return {};
  }
  const std::string where = fmt::format("{}: {}", reader.where(), half);
  const Json json = formats::normalise_config(given, where);
  ConfigReader own(json, where);
  DecoderConfig config = parse_gemma2(own);
  if (config.rope.type == "dynamic") own.error("rope_parameters.rope_type", "got dynamic, expected one that is fixed");
  own.finish();
  return config;
}

}  // namespace

Seq2SeqConfig parse_t5gemma(ConfigReader& reader) {
  Seq2SeqConfig config;
  config.model_type = reader.text("model_type", "");
  config.halves = Seq2SeqConfig::Halves{read_half(reader, "encoder"), read_half(reader, "decoder")};
  const DecoderConfig &encoder = config.halves->encoder, &decoder = config.halves->decoder;
  if (encoder.vocab_size != decoder.vocab_size) {
    reader.error("encoder", fmt::format("got a vocabulary of {}, expected the decoder's {}", encoder.vocab_size,
                                        decoder.vocab_size));
  }
  if (!reader.flag("is_encoder_decoder", true)) {
    reader.error("is_encoder_decoder", "got false, expected true: half of a T5Gemma is not supported");
  }
  config.vocab_size = decoder.vocab_size;
  config.hidden_size = decoder.hidden_size;
  config.encoder_layers = encoder.num_layers;
  config.decoder_layers = decoder.num_layers;
  config.tie_word_embeddings = reader.flag("tie_word_embeddings", true);
  config.scale_output = false;
  config.eos_ids = reader.has("eos_token_id") ? reader.ids("eos_token_id", {}) : decoder.eos_ids;
  config.start_id = decoder.bos_id;
  if (config.start_id < 0 || config.start_id >= config.vocab_size) {
    reader.error("decoder.bos_token_id", fmt::format("got {}, expected an id below {}: answers begin with it",
                                                     config.start_id, config.vocab_size));
  }
  return config;
}

}  // namespace moesaic::models
