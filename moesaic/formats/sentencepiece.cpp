#include "moesaic/formats/sentencepiece.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "moesaic/base/check.h"
#include "moesaic/base/file_errors.h"
#include "moesaic/base/json.h"
#include "moesaic/formats/utf8.h"

namespace moesaic::formats {
namespace {

constexpr size_t kMostPieces = size_t{1} << 20;
constexpr const char *kEos = "</s>", *kPad = "<pad>";
constexpr std::string_view kSpaceMark = "\xE2\x96\x81";  // U+2581
// SentencePiece.type
constexpr uint64_t kNormal = 1, kControl = 3, kUserDefined = 4;
// TrainerSpec.model_type
constexpr uint64_t kUnigram = 1;

/// The fields of one protocol buffer, in the file's order.
class Message {
 public:
  Message(std::string_view bytes, const std::string& where) : bytes_(bytes), where_(where) {}

  /// The next field; false at the end.
  bool next() {
    if (at_ == bytes_.size()) return false;
    const uint64_t tag = varint();
    field = tag >> 3;
    wire_ = tag & 7;
    switch (wire_) {
      case 0: number_ = varint(); break;
      case 1: chunk_ = take(8); break;
      case 2: chunk_ = take(varint()); break;
      case 5: chunk_ = take(4); break;
      default: fail(fmt::format("field {} has wire type {}, expected 0, 1, 2 or 5", field, wire_));
    }
    return true;
  }

  uint64_t number() const {
    expect(0);
    return number_;
  }
  std::string_view chunk() const {
    expect(2);
    return chunk_;
  }
  float real() const {
    expect(5);
    float value = 0;
    std::memcpy(&value, chunk_.data(), sizeof(value));
    return value;
  }
  [[noreturn]] void fail(const std::string& what) const {
    throw FormatError(fmt::format("{}: is not a SentencePiece vocabulary, or is damaged: {}", where_, what));
  }

  uint64_t field = 0;

 private:
  void expect(uint64_t wire) const {
    if (wire_ != wire) fail(fmt::format("field {} has wire type {}, expected {}", field, wire_, wire));
  }
  std::string_view take(uint64_t size) {
    if (size > bytes_.size() - at_) {
      fail(fmt::format("field {} needs {} bytes, but {} are left", field, size, bytes_.size() - at_));
    }
    at_ += size;
    return bytes_.substr(at_ - size, size);
  }
  uint64_t varint() {
    uint64_t value = 0;
    for (int shift = 0; shift < 64; shift += 7) {
      const auto byte = static_cast<uint8_t>(take(1)[0]);
      value |= static_cast<uint64_t>(byte & 0x7f) << shift;
      if (byte < 0x80) return value;
    }
    fail("a number has more than 64 bits");
  }

  std::string_view bytes_;
  const std::string& where_;
  size_t at_ = 0;
  uint64_t wire_ = 0, number_ = 0;
  std::string_view chunk_;
};

struct Piece {
  std::string text;
  float score = 0;
  uint64_t type = kNormal;
};

/// What of a ModelProto a tokenizer needs. Defaults are the format's own.
struct Model {
  std::vector<Piece> pieces;
  uint64_t kind = kUnigram, unknown = 0;
  std::string charsmap;  // the compiled normaliser
};

Piece read_piece(std::string_view bytes, const std::string& where) {
  Piece piece;
  Message message(bytes, where);
  while (message.next()) {
    if (message.field == 1) piece.text = message.chunk();
    if (message.field == 2) piece.score = message.real();
    if (message.field == 3) piece.type = message.number();
  }
  if (!is_utf8(piece.text)) message.fail("a piece is not valid UTF-8");
  if (!std::isfinite(piece.score)) message.fail(fmt::format("the score of '{}' is not finite", piece.text));
  return piece;
}

Model read_model(const Bytes& file) {
  Model model;
  Message message(file.text(0, file.size), file.where);
  while (message.next()) {
    if (message.field == 1) {
      if (model.pieces.size() == kMostPieces) message.fail(fmt::format("there are more than {} pieces", kMostPieces));
      model.pieces.push_back(read_piece(message.chunk(), file.where));
    } else if (message.field == 2) {
      for (Message trainer(message.chunk(), file.where); trainer.next();) {
        if (trainer.field == 3) model.kind = trainer.number();
        if (trainer.field == 40) model.unknown = trainer.number();
      }
    } else if (message.field == 3) {
      for (Message normalizer(message.chunk(), file.where); normalizer.next();) {
        if (normalizer.field == 2) model.charsmap = normalizer.chunk();
      }
    }
  }
  if (model.pieces.empty()) message.fail("there is no piece");
  if (model.unknown >= model.pieces.size()) {
    message.fail(fmt::format("the unknown piece is {} of {}", model.unknown, model.pieces.size()));
  }
  return model;
}

std::string base64(std::string_view bytes) {
  constexpr const char* kDigits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  std::string text;
  for (size_t i = 0; i < bytes.size(); i += 3) {
    const size_t count = std::min<size_t>(bytes.size() - i, 3);
    uint32_t group = 0;
    for (size_t k = 0; k < 3; ++k) group = group << 8 | (k < count ? static_cast<uint8_t>(bytes[i + k]) : 0);
    for (size_t k = 0; k < 4; ++k) text += k <= count ? kDigits[group >> (18 - 6 * k) & 63] : '=';
  }
  return text;
}

}  // namespace

std::string sentencepiece_tokenizer_json(const Bytes& file, int64_t extra_ids) {
  const Model model = read_model(file);
  MOESAIC_CHECK(model.kind == kUnigram, DataError,
                "{}: got a vocabulary of kind {}, expected a unigram one, as T5's are. Save the tokenizer.json with "
                "transformers' save_pretrained.",
                file.where, model.kind);
  Json vocab = Json::array(), added = Json::array();
  std::optional<size_t> eos;
  auto add = [&](const std::string& text, bool special) {
    added.push_back({{"id", vocab.size()},
                     {"content", text},
                     {"single_word", false},
                     {"lstrip", false},
                     {"rstrip", false},
                     {"normalized", false},
                     {"special", special}});
  };
  for (const Piece& piece : model.pieces) {
    if (piece.text == kEos) eos = vocab.size();
    const bool special =
        piece.type == kControl || piece.text == kEos || piece.text == kPad || vocab.size() == model.unknown;
    if (special || piece.type == kUserDefined) add(piece.text, special);
    vocab.push_back({piece.text, piece.score});
  }
  MOESAIC_CHECK(eos, DataError, "{}: has no piece {}, expected T5's vocabulary", file.where, kEos);
  for (int64_t i = extra_ids; i-- > 0;) {
    const std::string text = fmt::format("<extra_id_{}>", i);
    add(text, true);
    vocab.push_back({text, 0.0});
  }
  const Json marks{{"type", "Metaspace"}, {"replacement", kSpaceMark}, {"prepend_scheme", "always"}, {"split", true}};
  const Json words{{"type", "WhitespaceSplit"}};
  Json normalizer;
  if (!model.charsmap.empty()) {
    normalizer = {{"type", "Precompiled"}, {"precompiled_charsmap", base64(model.charsmap)}};
  }
  Json single = Json::array(), pair = Json::array();
  auto sequence = [&](const char* id, Json& to) {
    to.push_back({{"Sequence", {{"id", id}, {"type_id", 0}}}});
    to.push_back({{"SpecialToken", {{"id", kEos}, {"type_id", 0}}}});
  };
  sequence("A", single);
  sequence("A", pair);
  sequence("B", pair);
  const Json ends{{kEos, {{"id", kEos}, {"ids", {*eos}}, {"tokens", {kEos}}}}};
  const Json json{
      {"version", "1.0"},
      {"truncation", nullptr},
      {"padding", nullptr},
      {"added_tokens", added},
      {"normalizer", normalizer},
      {"pre_tokenizer", {{"type", "Sequence"}, {"pretokenizers", {words, marks}}}},
      {"post_processor",
       {{"type", "TemplateProcessing"}, {"single", single}, {"pair", pair}, {"special_tokens", ends}}},
      {"decoder", marks},
      {"model", {{"type", "Unigram"}, {"unk_id", model.unknown}, {"vocab", vocab}, {"byte_fallback", false}}}};
  return json.dump();
}

}  // namespace moesaic::formats
