//! C ABI over `tokenizers`, `minijinja`, `fancy-regex`, `llguidance` and `hyper`; bridge.h is its other half and says what each function does.
mod grammar;
mod http;
mod pattern;
mod row_template;
mod template;
mod tokenizer;

use std::os::raw::c_char;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::{Mutex, Once};

use grammar::{GrammarMatcher, Grammars};
use http::Http;
use pattern::Pattern;
use row_template::RowTemplate;
use template::ChatTemplate;
use tokenizer::BridgeTokenizer;

/// Owned UTF-8 handed to C++.
#[repr(C)]
pub struct Text {
    data: *mut u8,
    size: usize,
}

impl From<String> for Text {
    fn from(text: String) -> Self {
        let bytes = Box::leak(text.into_bytes().into_boxed_slice());
        Text { data: bytes.as_mut_ptr(), size: bytes.len() }
    }
}

/// UTF-8 that C++ keeps.
#[repr(C)]
pub struct View {
    data: *const c_char,
    size: usize,
}

/// Owned ids and offsets handed to C++.
#[repr(C)]
pub struct EncodingOut {
    ids: *mut u32,
    offsets: *mut usize,
    size: usize,
}

/// Where and why the last panic was, in whichever thread.
static PANIC: Mutex<String> = Mutex::new(String::new());

/// What onig, the standard library and its threads say. Most allocations that fail end the process (SIGABRT).
const OUT_OF_MEMORY: [&str; 4] = ["fail to memory allocation", "memory allocation failed", "(os error 11)", "(os error 12)"];

/// Runs `f`; an error or a panic becomes text in `error` and `None`.
fn guard<T>(error: *mut Text, f: impl FnOnce() -> Result<T, String>) -> Option<T> {
    static QUIET: Once = Once::new();
    QUIET.call_once(|| {
        std::panic::set_hook(Box::new(|info| {
            if let Ok(mut text) = PANIC.lock() {
                // The path of a source file would be one of the machine that built this.
                let place = info.location().map_or(String::new(), |at| {
                    format!("{}:{}", at.file().rsplit(['/', '\\']).next().unwrap_or_default(), at.line())
                });
                let payload = info.payload();
                let said = payload.downcast_ref::<&str>().map(|s| s.to_string()).or(payload.downcast_ref::<String>().cloned());
                *text = format!("{place}: {}", said.unwrap_or_default().replace('\n', " "));
            }
        }));
    });
    let reason = match catch_unwind(AssertUnwindSafe(f)) {
        Ok(Ok(value)) => return Some(value),
        Ok(Err(reason)) => reason,
        Err(_) => {
            let text = PANIC.lock().map_or(String::new(), |text| text.clone());
            format!("internal error of the library ({text})")
        }
    };
    if !error.is_null() {
        let memory = OUT_OF_MEMORY.iter().any(|words| reason.contains(words));
        unsafe { *error = if memory { Text { data: std::ptr::null_mut(), size: 0 } } else { reason.into() } };
    }
    None
}

/// The bytes C++ passed; an empty slice for a null pointer.
unsafe fn bytes<'a>(data: *const c_char, size: usize) -> &'a [u8] {
    if data.is_null() {
        return &[];
    }
    std::slice::from_raw_parts(data.cast(), size)
}

unsafe fn utf8<'a>(data: *const c_char, size: usize) -> Result<&'a str, String> {
    std::str::from_utf8(bytes(data, size)).map_err(|e| format!("the text is not valid UTF-8 at byte {}", e.valid_up_to()))
}

#[no_mangle]
pub unsafe extern "C" fn bridge_text_free(text: Text) {
    if !text.data.is_null() {
        drop(Box::from_raw(std::ptr::slice_from_raw_parts_mut(text.data, text.size)));
    }
}

#[no_mangle]
pub unsafe extern "C" fn bridge_lowercase(text: *const c_char, size: usize) -> Text {
    String::from_utf8_lossy(bytes(text, size)).to_lowercase().into()
}

#[no_mangle]
pub unsafe extern "C" fn bridge_encoding_free(encoding: EncodingOut) {
    if !encoding.ids.is_null() {
        drop(Box::from_raw(std::ptr::slice_from_raw_parts_mut(encoding.ids, encoding.size)));
    }
    if !encoding.offsets.is_null() {
        drop(Box::from_raw(std::ptr::slice_from_raw_parts_mut(encoding.offsets, 2 * encoding.size)));
    }
}

/// Frees what `Box::into_raw` gave; null is nothing.
unsafe fn release<T>(handle: *mut T) {
    if !handle.is_null() {
        guard(std::ptr::null_mut(), || {
            drop(Box::from_raw(handle));
            Ok(())
        });
    }
}

#[no_mangle]
pub unsafe extern "C" fn bridge_tokenizer_new(json: *const c_char, size: usize, error: *mut Text) -> *mut BridgeTokenizer {
    guard(error, || BridgeTokenizer::new(bytes(json, size)))
        .map_or(std::ptr::null_mut(), |tokenizer| Box::into_raw(Box::new(tokenizer)))
}

#[no_mangle]
pub unsafe extern "C" fn bridge_tokenizer_free(tokenizer: *mut BridgeTokenizer) {
    release(tokenizer);
}

#[no_mangle]
pub unsafe extern "C" fn bridge_tokenizer_add_tokens(
    tokenizer: *mut BridgeTokenizer,
    json: *const c_char,
    size: usize,
    error: *mut Text,
) -> bool {
    guard(error, || (*tokenizer).add_tokens(bytes(json, size))).is_some()
}

#[no_mangle]
pub unsafe extern "C" fn bridge_tokenizer_encode(
    tokenizer: *const BridgeTokenizer,
    text: *const c_char,
    size: usize,
    add_special_tokens: bool,
    with_offsets: bool,
    out: *mut EncodingOut,
    error: *mut Text,
) -> bool {
    guard(error, || {
        let (ids, offsets) = (*tokenizer).encode(utf8(text, size)?, add_special_tokens, with_offsets)?;
        let ids = Box::leak(ids.into_boxed_slice());
        let offsets = offsets.map_or(std::ptr::null_mut(), |offsets| Box::leak(offsets.into_boxed_slice()).as_mut_ptr());
        *out = EncodingOut { ids: ids.as_mut_ptr(), offsets, size: ids.len() };
        Ok(())
    })
    .is_some()
}

#[no_mangle]
pub unsafe extern "C" fn bridge_tokenizer_decode(
    tokenizer: *const BridgeTokenizer,
    ids: *const u32,
    size: usize,
    skip_special_tokens: bool,
    out: *mut Text,
    error: *mut Text,
) -> bool {
    guard(error, || {
        let ids = if size == 0 { &[] } else { std::slice::from_raw_parts(ids, size) };
        *out = (*tokenizer).decode(ids, skip_special_tokens)?.into();
        Ok(())
    })
    .is_some()
}

#[no_mangle]
pub unsafe extern "C" fn bridge_tokenizer_token_to_id(
    tokenizer: *const BridgeTokenizer,
    token: *const c_char,
    size: usize,
) -> i64 {
    guard(std::ptr::null_mut(), || Ok((*tokenizer).token_to_id(utf8(token, size)?)))
        .flatten()
        .map_or(-1, i64::from)
}

#[no_mangle]
pub unsafe extern "C" fn bridge_tokenizer_id_to_token(tokenizer: *const BridgeTokenizer, id: u32, out: *mut Text) -> bool {
    match guard(std::ptr::null_mut(), || Ok((*tokenizer).id_to_token(id))).flatten() {
        Some(token) => {
            *out = token.into();
            true
        }
        None => false,
    }
}

#[no_mangle]
pub unsafe extern "C" fn bridge_tokenizer_vocab_size(tokenizer: *const BridgeTokenizer) -> usize {
    guard(std::ptr::null_mut(), || Ok((*tokenizer).vocab_size())).unwrap_or(0)
}

#[no_mangle]
pub unsafe extern "C" fn bridge_tokenizer_special_tokens(tokenizer: *const BridgeTokenizer) -> Text {
    guard(std::ptr::null_mut(), || Ok((*tokenizer).special_tokens())).unwrap_or_else(|| "[]".into()).into()
}

#[no_mangle]
pub unsafe extern "C" fn bridge_tokenizer_train(
    texts: *const View,
    count: usize,
    vocab_size: usize,
    out: *mut Text,
    error: *mut Text,
) -> bool {
    guard(error, || {
        let views = if count == 0 { &[] } else { std::slice::from_raw_parts(texts, count) };
        let texts = views.iter().map(|view| utf8(view.data, view.size)).collect::<Result<Vec<_>, _>>()?;
        *out = tokenizer::train(&texts, vocab_size)?.into();
        Ok(())
    })
    .is_some()
}

#[no_mangle]
pub unsafe extern "C" fn bridge_template_new(source: *const c_char, size: usize, error: *mut Text) -> *mut ChatTemplate {
    guard(error, || ChatTemplate::new(utf8(source, size)?))
        .map_or(std::ptr::null_mut(), |template| Box::into_raw(Box::new(template)))
}

#[no_mangle]
pub unsafe extern "C" fn bridge_template_free(template: *mut ChatTemplate) {
    release(template);
}

#[no_mangle]
pub unsafe extern "C" fn bridge_template_render(
    template: *const ChatTemplate,
    context: *const c_char,
    size: usize,
    mark_generation: bool,
    out: *mut Text,
    error: *mut Text,
) -> bool {
    guard(error, || {
        *out = (*template).render(bytes(context, size), mark_generation)?.into();
        Ok(())
    })
    .is_some()
}

#[no_mangle]
pub unsafe extern "C" fn bridge_row_template_new(
    source: *const c_char,
    size: usize,
    strict: bool,
    error: *mut Text,
) -> *mut RowTemplate {
    guard(error, || RowTemplate::new(utf8(source, size)?, strict))
        .map_or(std::ptr::null_mut(), |template| Box::into_raw(Box::new(template)))
}

#[no_mangle]
pub unsafe extern "C" fn bridge_row_template_free(template: *mut RowTemplate) {
    release(template);
}

#[no_mangle]
pub unsafe extern "C" fn bridge_row_template_render(
    template: *const RowTemplate,
    row: *const c_char,
    size: usize,
    seed: u64,
    out: *mut Text,
    error: *mut Text,
) -> bool {
    guard(error, || {
        *out = (*template).render(bytes(row, size), seed)?.into();
        Ok(())
    })
    .is_some()
}

#[no_mangle]
pub unsafe extern "C" fn bridge_pattern_new(source: *const c_char, size: usize, error: *mut Text) -> *mut Pattern {
    let pattern = guard(error, || Pattern::new(utf8(source, size)?));
    pattern.map_or(std::ptr::null_mut(), |pattern| Box::into_raw(Box::new(pattern)))
}

#[no_mangle]
pub unsafe extern "C" fn bridge_pattern_free(pattern: *mut Pattern) {
    if !pattern.is_null() {
        drop(Box::from_raw(pattern));
    }
}

#[no_mangle]
pub unsafe extern "C" fn bridge_pattern_matches(
    pattern: *const Pattern,
    text: *const c_char,
    size: usize,
    out: *mut bool,
    error: *mut Text,
) -> bool {
    let matched = guard(error, || (*pattern).matches(utf8(text, size)?));
    if let Some(matched) = matched {
        *out = matched;
    }
    matched.is_some()
}

#[no_mangle]
pub unsafe extern "C" fn bridge_http_start(
    host: *const c_char,
    size: usize,
    port: u16,
    limits: http::Limits,
    handler: http::Handler,
    error: *mut Text,
) -> *mut Http {
    guard(error, || Http::start(utf8(host, size)?, port, limits, handler))
        .map_or(std::ptr::null_mut(), |http| Box::into_raw(Box::new(http)))
}

#[no_mangle]
pub unsafe extern "C" fn bridge_http_free(http: *mut Http) {
    release(http);
}

#[no_mangle]
pub unsafe extern "C" fn bridge_http_port(http: *const Http) -> u16 {
    (*http).port()
}

#[no_mangle]
pub unsafe extern "C" fn bridge_http_connections(http: *const Http) -> usize {
    (*http).connections()
}

#[no_mangle]
pub unsafe extern "C" fn bridge_http_respond(
    http: *const Http,
    id: u64,
    status: u16,
    headers: View,
    body: View,
    error: *mut Text,
) -> bool {
    guard(error, || (*http).respond(id, status, bytes(headers.data, headers.size), bytes(body.data, body.size))).is_some()
}

#[no_mangle]
pub unsafe extern "C" fn bridge_http_begin(http: *const Http, id: u64, status: u16, headers: View, error: *mut Text) -> bool {
    guard(error, || (*http).begin(id, status, bytes(headers.data, headers.size))).is_some()
}

#[no_mangle]
pub unsafe extern "C" fn bridge_http_send(http: *const Http, id: u64, data: View) -> i32 {
    guard(std::ptr::null_mut(), || Ok((*http).send(id, bytes(data.data, data.size)))).unwrap_or(1)
}

#[no_mangle]
pub unsafe extern "C" fn bridge_http_end(http: *const Http, id: u64, abort: bool) {
    guard(std::ptr::null_mut(), || {
        (*http).end(id, abort);
        Ok(())
    });
}

#[no_mangle]
pub unsafe extern "C" fn bridge_http_drain(http: *const Http) {
    guard(std::ptr::null_mut(), || {
        (*http).drain();
        Ok(())
    });
}

#[no_mangle]
pub unsafe extern "C" fn bridge_grammars_new(
    tokenizer: *const BridgeTokenizer,
    eos: *const u32,
    eos_size: usize,
    vocab_size: usize,
    error: *mut Text,
) -> *mut Grammars {
    guard(error, || {
        let eos = if eos_size == 0 { &[] } else { std::slice::from_raw_parts(eos, eos_size) };
        Grammars::new(&*tokenizer, eos, vocab_size)
    })
    .map_or(std::ptr::null_mut(), |grammars| Box::into_raw(Box::new(grammars)))
}

#[no_mangle]
pub unsafe extern "C" fn bridge_grammars_free(grammars: *mut Grammars) {
    release(grammars);
}

#[no_mangle]
pub unsafe extern "C" fn bridge_matcher_new(
    grammars: *const Grammars,
    kind: *const c_char,
    kind_size: usize,
    source: *const c_char,
    size: usize,
    error: *mut Text,
) -> *mut GrammarMatcher {
    guard(error, || (*grammars).compile(utf8(kind, kind_size)?, utf8(source, size)?))
        .map_or(std::ptr::null_mut(), |matcher| Box::into_raw(Box::new(matcher)))
}

#[no_mangle]
pub unsafe extern "C" fn bridge_matcher_fork(matcher: *const GrammarMatcher, error: *mut Text) -> *mut GrammarMatcher {
    guard(error, || Ok((*matcher).fork())).map_or(std::ptr::null_mut(), |matcher| Box::into_raw(Box::new(matcher)))
}

#[no_mangle]
pub unsafe extern "C" fn bridge_matcher_free(matcher: *mut GrammarMatcher) {
    release(matcher);
}

#[no_mangle]
pub unsafe extern "C" fn bridge_matcher_mask(
    matcher: *mut GrammarMatcher,
    bits: *mut u32,
    words: usize,
    error: *mut Text,
) -> bool {
    guard(error, || (*matcher).mask(std::slice::from_raw_parts_mut(bits, words))).is_some()
}

#[no_mangle]
pub unsafe extern "C" fn bridge_matcher_take(matcher: *mut GrammarMatcher, token: u32, error: *mut Text) -> bool {
    guard(error, || (*matcher).take(token)).is_some()
}

#[no_mangle]
pub unsafe extern "C" fn bridge_matcher_ended(matcher: *const GrammarMatcher) -> bool {
    (*matcher).ended()
}
