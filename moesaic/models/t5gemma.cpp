// T5Gemma: an encoder and a decoder of Gemma 2's layers, of any two sizes. The encoder's attention looks both ways, the
// decoder's layers also read the encoder between their halves, and its embedding is the head. T5Gemma 2, text only: of
// Gemma 3's layers, of one width and with one embedding, and the decoder's attention reads its text and the encoder's
// states in one softmax.
#include "moesaic/formats/config.h"
#include "moesaic/models/families.h"

namespace moesaic::models {
namespace {

/// json's object `key`, an empty one where it is silent.
Json object_at(ConfigReader& reader, const Json& json, const char* key) {
  Json given = json.contains(key) && !json.at(key).is_null() ? json.at(key) : Json(Json::object());
  if (given.is_object()) return given;
  reader.error(key, fmt::format("got {}, expected an object", given.dump().substr(0, 80)));
  return Json::object();
}

/// The half of config.json that `given` is.
DecoderConfig read_half(ConfigReader& reader, const char* half, const Json& given,
                        DecoderConfig (*parse)(ConfigReader& reader)) {
  const std::string where = fmt::format("{}: {}", reader.where(), half);
  const Json json = formats::normalise_config(given, where);
  ConfigReader own(json, where);
  DecoderConfig config = parse(own);
  if (config.rope.type == "dynamic") own.error("rope_parameters.rope_type", "got dynamic, expected one that is fixed");
  own.finish();
  return config;
}

/// What both kinds have beside their halves.
Seq2SeqConfig read_both(ConfigReader& reader, Seq2SeqConfig::Halves halves) {
  Seq2SeqConfig config;
  config.model_type = reader.text("model_type", "");
  const DecoderConfig &encoder = halves.encoder, &decoder = halves.decoder;
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
  config.halves = std::move(halves);
  return config;
}

}  // namespace

Seq2SeqConfig parse_t5gemma(ConfigReader& reader) {
  auto half = [&](const char* key) {
    return read_half(reader, key, object_at(reader, reader.json(), key), parse_gemma2);
  };
  return read_both(reader, {half("encoder"), half("decoder")});
}

Seq2SeqConfig parse_t5gemma2(ConfigReader& reader) {
  const Json encoder = object_at(reader, reader.json(), "encoder");
  Seq2SeqConfig::Halves halves{
      read_half(reader, "encoder.text_config", object_at(reader, encoder, "text_config"), parse_gemma3),
      read_half(reader, "decoder", object_at(reader, reader.json(), "decoder"), parse_gemma3), /*merged=*/true};
  if (halves.encoder.hidden_size != halves.decoder.hidden_size) {
    reader.error("decoder.hidden_size", fmt::format("got {}, expected the encoder's {}: they share keys and values",
                                                    halves.decoder.hidden_size, halves.encoder.hidden_size));
  }
  if (halves.encoder.sliding_window > 0 && halves.encoder.sliding_window < 3) {
    reader.error("encoder.text_config.sliding_window", "expected 3 or more, for both sides");
  }
  constexpr int64_t kImageEnd = 256'000;
  halves.image_end_id = get_or<int64_t>(encoder, "eoi_token_index", kImageEnd, reader.where());
  return read_both(reader, std::move(halves));
}

}  // namespace moesaic::models
