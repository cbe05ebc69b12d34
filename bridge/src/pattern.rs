//! Regular expressions in Python's syntax, from files: bounded in size and in steps.
use fancy_regex::{Regex, RegexBuilder};

const MAX_SOURCE_BYTES: usize = 64 << 10;
const MAX_STEPS: usize = 1_000_000;

pub struct Pattern(Regex);

impl Pattern {
    pub fn new(source: &str) -> Result<Self, String> {
        if source.len() > MAX_SOURCE_BYTES {
            return Err(format!("{} bytes, expected at most {MAX_SOURCE_BYTES}", source.len()));
        }
        let whole = format!(r"\A(?:{source})\z");
        RegexBuilder::new(&whole).backtrack_limit(MAX_STEPS).build().map(Self).map_err(|e| e.to_string())
    }

    /// Like Python's re.fullmatch.
    pub fn matches(&self, text: &str) -> Result<bool, String> {
        self.0.is_match(text).map_err(|e| e.to_string())
    }
}
