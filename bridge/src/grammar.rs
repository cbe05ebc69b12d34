//! What a model may write, token by token: JSON schemas, regular expressions and Lark grammars through `llguidance`.
use std::collections::HashMap;
use std::sync::Arc;

use llguidance::api::TopLevelGrammar;
use llguidance::toktrie::{ApproximateTokEnv, InferenceCapabilities, TokEnv, TokRxInfo, TokTrie};
use llguidance::{Matcher, ParserFactory};
use serde_json::Value;

use crate::tokenizer::BridgeTokenizer;

const MAX_SOURCE_BYTES: usize = 64 << 10;
const MAX_DEPTH: usize = 32;
/// Deep schemas are compiled by recursion.
const STACK_BYTES: usize = 16 << 20;

/// A tokenizer's tokens by the bytes they write.
pub struct Grammars {
    factory: ParserFactory,
}

/// Where a text stands in its grammar.
pub struct GrammarMatcher(Matcher);

/// The bytes of a byte-level vocabulary's characters (GPT-2's): printable ones stand for themselves.
fn byte_level() -> HashMap<char, u8> {
    let mut map = HashMap::new();
    let mut next = 0x100;
    for byte in 0..=255u8 {
        let plain = matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
        let stands_for = if plain { u32::from(byte) } else { next };
        next += u32::from(!plain);
        map.insert(char::from_u32(stands_for).expect("below the surrogates"), byte);
    }
    map
}

/// How a tokenizer's decoder makes texts of tokens.
enum Writes {
    Bytes(HashMap<char, u8>),
    /// With this character for a blank, and tokens <0x0A> that are bytes.
    Texts(char),
}

fn writes(decoder: &Value) -> Result<Writes, String> {
    let kind = decoder["type"].as_str().unwrap_or("none");
    let of = |part: &Value| -> Option<Writes> {
        match part["type"].as_str()? {
            "ByteLevel" => Some(Writes::Bytes(byte_level())),
            "Metaspace" => Some(Writes::Texts(part["replacement"].as_str().and_then(|s| s.chars().next())?)),
            "Replace" if part["content"].as_str() == Some(" ") => {
                part["pattern"]["String"].as_str().and_then(|s| s.chars().next()).map(Writes::Texts)
            }
            _ => None,
        }
    };
    let parts = decoder["decoders"].as_array();
    of(decoder).or_else(|| parts.and_then(|parts| parts.iter().find_map(of))).ok_or(format!(
        "the tokenizer's decoder is {kind}, expected ByteLevel, Metaspace or one that replaces a character by a blank: \
         what its tokens write is not known one by one"
    ))
}

fn token_bytes(token: &str, writes: &Writes) -> Vec<u8> {
    match writes {
        Writes::Bytes(map) => token.chars().filter_map(|c| map.get(&c).copied()).collect(),
        Writes::Texts(blank) => {
            let byte = token.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
            match byte.and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
                Some(byte) => vec![byte],
                None => token.replace(*blank, " ").into_bytes(),
            }
        }
    }
}

fn depth(value: &Value) -> usize {
    match value {
        Value::Array(list) => 1 + list.iter().map(depth).max().unwrap_or(0),
        Value::Object(map) => 1 + map.values().map(depth).max().unwrap_or(0),
        _ => 0,
    }
}

/// Without freedom for blanks, which models print for ever.
fn schema(source: &str) -> Result<TopLevelGrammar, String> {
    let mut schema: Value = serde_json::from_str(source).map_err(|e| format!("the schema is no JSON: {e}"))?;
    if depth(&schema) > MAX_DEPTH {
        return Err(format!("the schema is nested {} deep, expected at most {MAX_DEPTH}", depth(&schema)));
    }
    if let Value::Object(map) = &mut schema {
        map.entry("x-guidance").or_insert(serde_json::json!(
            {"whitespace_flexible": false, "item_separator": ", ", "key_separator": ": "}
        ));
    }
    Ok(TopLevelGrammar::from_json_schema(schema))
}

impl Grammars {
    /// eos: the tokens that end an answer; vocab_size: of the model's logits.
    pub fn new(tokenizer: &BridgeTokenizer, eos: &[u32], vocab_size: usize) -> Result<Self, String> {
        let first = *eos.first().ok_or("the model has no token that ends an answer")?;
        let writes = writes(&tokenizer.decoder()?)?;
        let added = tokenizer.added();
        let mut words: Vec<Vec<u8>> = vec![Vec::new(); vocab_size];
        for (token, id) in tokenizer.vocabulary() {
            let Some(word) = words.get_mut(id as usize) else { continue };
            let special = added.get(&id);
            *word = if special.is_some() { token.into_bytes() } else { token_bytes(&token, &writes) };
            if special == Some(&true) || eos.contains(&id) {
                word.insert(0, TokTrie::SPECIAL_TOKEN_MARKER);
            }
        }
        let known: Vec<u32> = eos.iter().copied().filter(|&id| (id as usize) < vocab_size).collect();
        let trie = TokTrie::from(&TokRxInfo::new(vocab_size as u32, first), &words).with_eos_tokens(&known);
        let env: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
        let mut factory = ParserFactory::new(&env, InferenceCapabilities::default(), &[]).map_err(|e| e.to_string())?;
        factory.quiet();
        factory.limits_mut().verbose_errors = false;
        Ok(Self { factory })
    }

    /// kind: json_schema, regex or lark.
    pub fn compile(&self, kind: &str, source: &str) -> Result<GrammarMatcher, String> {
        if source.len() > MAX_SOURCE_BYTES {
            return Err(format!("{} bytes, expected at most {MAX_SOURCE_BYTES}", source.len()));
        }
        let grammar = match kind {
            "json_schema" => schema(source)?,
            "regex" => TopLevelGrammar::from_regex(source),
            _ => TopLevelGrammar::from_lark(source.to_string()),
        };
        std::thread::scope(|scope| {
            std::thread::Builder::new()
                .stack_size(STACK_BYTES)
                .spawn_scoped(scope, || {
                    let parser = self.factory.create_parser(grammar).map_err(|e| e.to_string())?;
                    let mut matcher = Matcher::new(Ok(parser));
                    matcher.compute_mask().map_err(|e| e.to_string())?;
                    let warnings = matcher.grammar_warnings();
                    if warnings.is_empty() { Ok(GrammarMatcher(matcher)) } else { Err(warnings.join("; ")) }
                })
                .map_err(|e| e.to_string())?
                .join()
                .map_err(|_| "it could not be compiled".to_string())?
        })
    }
}

impl GrammarMatcher {
    pub fn fork(&self) -> Self {
        Self(self.0.deep_clone())
    }

    /// Sets bit t % 32 of word t / 32 for every token t that may come next.
    pub fn mask(&mut self, bits: &mut [u32]) -> Result<(), String> {
        let allowed = self.0.compute_mask_or_eos().map_err(|e| e.to_string())?;
        let from = allowed.as_slice();
        let count = from.len().min(bits.len());
        bits[..count].copy_from_slice(&from[..count]);
        bits[count..].fill(0);
        Ok(())
    }

    pub fn take(&mut self, token: u32) -> Result<(), String> {
        self.0.consume_token(token).map_err(|e| e.to_string())
    }

    /// Whether nothing may come any more.
    pub fn ended(&self) -> bool {
        self.0.is_stopped()
    }
}
