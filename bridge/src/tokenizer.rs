//! tokenizer.json through the `tokenizers` crate, set up as transformers sets it up.
use std::collections::HashMap;

use serde_json::Value;
use tokenizers::models::bpe::{BpeTrainer, BPE};
use tokenizers::models::TrainerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::metaspace::PrependScheme;
use tokenizers::pre_tokenizers::sequence::Sequence as Steps;
use tokenizers::processors::sequence::Sequence;
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::{AddedToken, PostProcessorWrapper, PreTokenizerWrapper, Tokenizer};

pub struct BridgeTokenizer {
    tokenizer: Tokenizer,
    prepends_blank: bool,
}

/// True for the pre-tokenizer of Llama's and Mistral's SentencePiece vocabularies, which puts a blank in front of a text.
/// It leaves texts that begin with one as they are; SentencePiece itself and llama.cpp put another in front of these.
fn prepends_blank(tokenizer: &Tokenizer) -> bool {
    match tokenizer.get_pre_tokenizer() {
        Some(PreTokenizerWrapper::Metaspace(metaspace)) => {
            !metaspace.split && metaspace.prepend_scheme != PrependScheme::Never
        }
        _ => false,
    }
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

/// A pair of tokens that stands in the texts once teaches nothing.
const MIN_FREQUENCY: u64 = 2;
const SPECIAL_TOKENS: [&str; 3] = ["<bos>", "<eos>", "<pad>"];

/// tokenizer.json of a byte-level BPE learnt from `texts`; the order of the texts does not matter.
pub fn train(texts: &[&str], vocab_size: usize) -> Result<String, String> {
    let mut tokenizer = Tokenizer::new(BPE::default());
    tokenizer
        .with_pre_tokenizer(Some(Steps::new(vec![Digits::new(true).into(), ByteLevel::new(false, false, true).into()])))
        .with_decoder(Some(ByteLevel::default()));
    let mut trainer: TrainerWrapper = BpeTrainer::builder()
        .vocab_size(vocab_size)
        .min_frequency(MIN_FREQUENCY)
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .special_tokens(SPECIAL_TOKENS.map(|text| AddedToken::from(text, true)).to_vec())
        .show_progress(false)
        .build()
        .into();
    tokenizer.train(&mut trainer, texts.iter()).map_err(|e| e.to_string())?;
    let begin = TemplateProcessing::builder()
        .try_single("<bos> $A")
        .and_then(|builder| builder.try_pair("<bos> $A $B:1"))
        .map_err(|e| e.to_string())?
        .special_tokens(vec![("<bos>", 0)])
        .build()
        .map_err(|e| e.to_string())?;
    tokenizer.with_post_processor(Some(begin));
    tokenizer.to_string(false).map_err(|e| e.to_string())
}

impl BridgeTokenizer {
    pub fn new(json: &[u8]) -> Result<Self, String> {
        let mut tokenizer = Tokenizer::from_bytes(json).map_err(|e| e.to_string())?;
        tokenizer.with_truncation(None).map_err(|e| e.to_string())?;
        tokenizer.with_padding(None);
        if let Some(processor) = tokenizer.get_post_processor().cloned() {
            tokenizer.with_post_processor(Some(without_trimming(processor)));
        }
        let prepends_blank = prepends_blank(&tokenizer);
        Ok(Self { tokenizer, prepends_blank })
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
        let blank = if self.prepends_blank && text.starts_with([' ', '\u{2581}']) { " " } else { "" };
        let text = [blank, text].concat();
        if !with_offsets {
            let encoding = self.tokenizer.encode_fast(text.as_str(), add_special_tokens).map_err(|e| e.to_string())?;
            return Ok((encoding.get_ids().to_vec(), None));
        }
        let encoding = self.tokenizer.encode(text.as_str(), add_special_tokens).map_err(|e| e.to_string())?;
        let offsets = encoding.get_offsets().iter()
            .flat_map(|&(begin, end)| [begin, end])
            .map(|at| at.saturating_sub(blank.len()))
            .collect();
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

    pub fn vocabulary(&self) -> HashMap<String, u32> {
        self.tokenizer.get_vocab(true).into_iter().collect()
    }

    /// The added tokens' ids, and whether each is special.
    pub fn added(&self) -> HashMap<u32, bool> {
        self.tokenizer.get_added_tokens_decoder().into_iter().map(|(id, token)| (id, token.special)).collect()
    }

    pub fn decoder(&self) -> Result<Value, String> {
        serde_json::to_value(self.tokenizer.get_decoder()).map_err(|e| e.to_string())
    }

    pub fn special_tokens(&self) -> String {
        let mut tokens: Vec<(u32, AddedToken)> =
            self.tokenizer.get_added_tokens_decoder().into_iter().filter(|(_, token)| token.special).collect();
        tokens.sort_by_key(|(id, _)| *id);
        Value::from_iter(tokens.into_iter().map(|(_, token)| token.content)).to_string()
    }
}
