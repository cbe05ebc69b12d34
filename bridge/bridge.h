// The C side of the Rust crate in this folder: tokenizers (tokenizer.json), minijinja (chat templates and those over
// rows of data), fancy-regex (patterns in files), llguidance (what answers may hold) and hyper (HTTP).
//
// Handles are opaque, immutable after set-up and safe to share between threads. Texts are UTF-8 with explicit lengths.
// A function that can fail writes its reason to `error`, which the caller passes empty; no panic leaves the crate. A
// reason without data says that memory or threads ran out.
// Whatever is returned through an out parameter belongs to the caller and goes back through its free function.
#pragma once
#include <stddef.h>
#include <stdint.h>

extern "C" {

struct BridgeTokenizer;
struct BridgeTemplate;
struct BridgeRowTemplate;
struct BridgePattern;
struct BridgeGrammars;
struct BridgeMatcher;

struct BridgeText {
  char* data;
  size_t size;
};
void bridge_text_free(BridgeText text);

/// Lower case by Unicode's full mapping, as Python's str.lower; bytes that are no UTF-8 become U+FFFD.
BridgeText bridge_lowercase(const char* text, size_t size);

/// UTF-8 of the caller.
struct BridgeView {
  const char* data;
  size_t size;
};

struct BridgeEncoding {
  uint32_t* ids;    // [size]
  size_t* offsets;  // [size, 2] bytes, begin and end; null unless they were asked for
  size_t size;
};
void bridge_encoding_free(BridgeEncoding encoding);

/// Null on failure. Truncation, padding and offset trimming that the file asks for are switched off.
BridgeTokenizer* bridge_tokenizer_new(const char* json, size_t size, BridgeText* error);
void bridge_tokenizer_free(BridgeTokenizer* tokenizer);

/// Adds the tokens that are missing. json: [{content, special, normalized, lstrip, rstrip, single_word}].
bool bridge_tokenizer_add_tokens(BridgeTokenizer* tokenizer, const char* json, size_t size, BridgeText* error);

bool bridge_tokenizer_encode(const BridgeTokenizer* tokenizer, const char* text, size_t size, bool add_special_tokens,
                             bool with_offsets, BridgeEncoding* out, BridgeText* error);
bool bridge_tokenizer_decode(const BridgeTokenizer* tokenizer, const uint32_t* ids, size_t size,
                             bool skip_special_tokens, BridgeText* out, BridgeText* error);
/// -1 when the vocabulary does not hold the token.
int64_t bridge_tokenizer_token_to_id(const BridgeTokenizer* tokenizer, const char* token, size_t size);
/// False when no token has this id.
bool bridge_tokenizer_id_to_token(const BridgeTokenizer* tokenizer, uint32_t id, BridgeText* out);
/// Number of tokens, added ones included.
size_t bridge_tokenizer_vocab_size(const BridgeTokenizer* tokenizer);
/// JSON list of the special added tokens' texts.
BridgeText bridge_tokenizer_special_tokens(const BridgeTokenizer* tokenizer);

/// Writes the text of tokenizer.json of a byte-level BPE of at most `vocab_size` tokens learnt from the texts: <bos>,
/// <eos>, <pad> (ids 0 to 2), the 256 bytes, then merges; digits stand alone, <bos> is put before a text.
bool bridge_tokenizer_train(const BridgeView* texts, size_t count, size_t vocab_size, BridgeText* out,
                            BridgeText* error);

/// Null on failure; `error` then names the template's line.
BridgeTemplate* bridge_template_new(const char* source, size_t size, BridgeText* error);
void bridge_template_free(BridgeTemplate* tmpl);
/// context: JSON object with the template's variables, in the order its maps are to keep. mark_generation: what stands
/// in a {% generation %} block comes between U+FDEE and U+FDEF.
bool bridge_template_render(const BridgeTemplate* tmpl, const char* context, size_t size, bool mark_generation,
                            BridgeText* out, BridgeText* error);

/// A template over rows of data, in the environment that promptsource gives its Jinja2 templates; `strict`: what is
/// undefined is an error, the line end at the end stays, and there is tojson. Null on failure; `error` then names the
/// template's line.
BridgeRowTemplate* bridge_row_template_new(const char* source, size_t size, bool strict, BridgeText* error);
void bridge_row_template_free(BridgeRowTemplate* tmpl);
/// row: JSON object with the template's variables. `seed` decides what the filters choice and random take.
bool bridge_row_template_render(const BridgeRowTemplate* tmpl, const char* row, size_t size, uint64_t seed,
                                BridgeText* out, BridgeText* error);

/// A regular expression in Python's syntax. Null on failure.
BridgePattern* bridge_pattern_new(const char* source, size_t size, BridgeText* error);
void bridge_pattern_free(BridgePattern* pattern);
/// Whether the whole text matches; fails when that takes too many steps.
bool bridge_pattern_matches(const BridgePattern* pattern, const char* text, size_t size, bool* out, BridgeText* error);

/// A tokenizer's tokens by the bytes they write; eos: those that end an answer; vocab_size: of the model's logits. Null
/// on failure.
BridgeGrammars* bridge_grammars_new(const BridgeTokenizer* tokenizer, const uint32_t* eos, size_t eos_size,
                                    size_t vocab_size, BridgeText* error);
void bridge_grammars_free(BridgeGrammars* grammars);
/// A text's start in the grammar `source`; kind: "json_schema", "regex" or "lark". Not to be shared between threads,
/// unlike all other handles. Null on failure.
BridgeMatcher* bridge_matcher_new(const BridgeGrammars* grammars, const char* kind, size_t kind_size,
                                  const char* source, size_t size, BridgeText* error);
/// The same place, for another text.
BridgeMatcher* bridge_matcher_fork(const BridgeMatcher* matcher, BridgeText* error);
void bridge_matcher_free(BridgeMatcher* matcher);
/// Bit t % 32 of word t / 32: token t may come next.
bool bridge_matcher_mask(BridgeMatcher* matcher, uint32_t* bits, size_t words, BridgeText* error);
bool bridge_matcher_take(BridgeMatcher* matcher, uint32_t token, BridgeText* error);
/// Whether nothing may come any more.
bool bridge_matcher_ended(const BridgeMatcher* matcher);

/// An HTTP/1.1 server on a thread of its own.
struct BridgeHttp;
struct BridgeHttpLimits {
  size_t body_bytes;
  size_t header_bytes;
  size_t headers;
  size_t connections;
  size_t queued_bytes;    // of a streamed answer that its client has not taken
  size_t queued_pieces;   // likewise
  double header_seconds;  // for a request's head, counted from the last answer of its connection
  double body_seconds;
};
/// Both are called from the server's thread, with views that live as long as the call, and must neither block nor
/// throw.
struct BridgeHttpHandler {
  void* context;
  /// head: {"method", "path", "headers": [[name, value], ...]}, names in lower case. Wants one bridge_http_respond, or
  /// bridge_http_begin and later bridge_http_end, with this id, from any thread.
  void (*request)(void* context, uint64_t id, BridgeView head, BridgeView body);
  /// The client of an unfinished exchange left.
  void (*gone)(void* context, uint64_t id);
};
/// Listens when it returns; port 0: a free one. Null on failure.
BridgeHttp* bridge_http_start(const char* host, size_t size, uint16_t port, BridgeHttpLimits limits,
                              BridgeHttpHandler handler, BridgeText* error);
/// Ends everything at once.
void bridge_http_free(BridgeHttp* http);
uint16_t bridge_http_port(const BridgeHttp* http);
size_t bridge_http_connections(const BridgeHttp* http);
/// headers: JSON list of [name, value]. An exchange whose client left is ignored, here and below.
bool bridge_http_respond(const BridgeHttp* http, uint64_t id, uint16_t status, BridgeView headers, BridgeView body,
                         BridgeText* error);
/// The head of an answer that comes in pieces.
bool bridge_http_begin(const BridgeHttp* http, uint64_t id, uint16_t status, BridgeView headers, BridgeText* error);
/// Never blocks. 0: on its way; 1: the client left; 2: it reads too slowly, and the piece is dropped.
int32_t bridge_http_send(const BridgeHttp* http, uint64_t id, BridgeView data);
/// abort: the connection breaks, without the end that a whole answer has.
void bridge_http_end(const BridgeHttp* http, uint64_t id, bool abort);
/// Takes no new connections; those there are close behind their answers.
void bridge_http_drain(const BridgeHttp* http);

}  // extern "C"
