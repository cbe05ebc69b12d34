//! tokenizer.json through the `tokenizers` crate, set up as transformers sets it up.
use serde_json::Value;
use tokenizers::processors::sequence::Sequence;
use tokenizers::{AddedToken, PostProcessorWrapper, Tokenizer};

pub struct BridgeTokenizer {
    tokenizer: Tokenizer,
}

/// Keeps the whole byte range of every token: a trimmed token of blanks would have an empty one and never be trained.
fn without_trimming(processor: PostProcessorWrapper) -> PostProcessorWrapper {
    match processor {
        PostProcessorWrapper::ByteLevel(byte_level) => byte_level.trim_offsets(false).into(),
        PostProcessorWrapper::Roberta(roberta) => roberta.trim_offsets(false).into(),
        PostProcessorWrapper::Sequence(sequence) => {
            Sequence::new(sequence.into_iter().map(without_trimming).collect()).into()
        }
        other => other,
    }
}

impl BridgeTokenizer {
    pub fn new(json: &[u8]) -> Result<Self, String> {
        let mut tokenizer = Tokenizer::from_bytes(json).map_err(|e| e.to_string())?;
        tokenizer.with_truncation(None).map_err(|e| e.to_string())?;
        tokenizer.with_padding(None);
        if let Some(processor) = tokenizer.get_post_processor().cloned() {
            tokenizer.with_post_processor(Some(without_trimming(processor)));
        }
        Ok(Self { tokenizer })
    }

    pub fn add_tokens(&mut self, json: &[u8]) -> Result<(), String> {
        let entries: Vec<Value> = serde_json::from_slice(json).map_err(|e| e.to_string())?;
        let flag = |entry: &Value, key: &str, default| entry[key].as_bool().unwrap_or(default);
        let tokens = entries.iter().map(|entry| {
            let special = flag(entry, "special", false);
            AddedToken::from(entry["content"].as_str().unwrap_or_default(), special)
                .normalized(flag(entry, "normalized", !special))
                .lstrip(flag(entry, "lstrip", false))
                .rstrip(flag(entry, "rstrip", false))
                .single_word(flag(entry, "single_word", false))
        });
        self.tokenizer.add_tokens(tokens.collect::<Vec<_>>()).map_err(|e| e.to_string())?;
        Ok(())
    }

    pub fn encode(
        &self,
        text: &str,
        add_special_tokens: bool,
        with_offsets: bool,
    ) -> Result<(Vec<u32>, Option<Vec<usize>>), String> {
        if !with_offsets {
            let encoding = self.tokenizer.encode_fast(text, add_special_tokens).map_err(|e| e.to_string())?;
            return Ok((encoding.get_ids().to_vec(), None));
        }
        let encoding = self.tokenizer.encode(text, add_special_tokens).map_err(|e| e.to_string())?;
        let offsets = encoding.get_offsets().iter().flat_map(|&(begin, end)| [begin, end]).collect();
        Ok((encoding.get_ids().to_vec(), Some(offsets)))
    }

    pub fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> Result<String, String> {
        self.tokenizer.decode(ids, skip_special_tokens).map_err(|e| e.to_string())
    }

    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.tokenizer.token_to_id(token)
    }

    pub fn id_to_token(&self, id: u32) -> Option<String> {
        self.tokenizer.id_to_token(id)
    }

    pub fn vocab_size(&self) -> usize {
        self.tokenizer.get_vocab_size(true)
    }

    pub fn special_tokens(&self) -> String {
        let mut tokens: Vec<(u32, AddedToken)> =
            self.tokenizer.get_added_tokens_decoder().into_iter().filter(|(_, token)| token.special).collect();
        tokens.sort_by_key(|(id, _)| *id);
        Value::from_iter(tokens.into_iter().map(|(_, token)| token.content)).to_string()
    }
}
