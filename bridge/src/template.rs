//! Chat templates: minijinja with the environment that transformers gives its Jinja2 templates, and with Python's way
//! of printing, stripping and dumping where minijinja's own differs.
use std::fmt;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{from_args, Kwargs, Rest, Tuple, ValueKind, ValueOrKwargs};
use minijinja::{Environment, Error, ErrorKind, State, UndefinedBehavior, Value};
use minijinja_contrib::pycompat;

const NAME: &str = "chat_template";
/// The template with {% generation %} blocks that mark what they print.
const MARKED: &str = "marked chat_template";
const GENERATION_MARKS: (char, char) = ('\u{FDEE}', '\u{FDEF}');
const MAX_SOURCE_BYTES: usize = 256 << 10;
/// Parsing goes a few calls deeper with every link of a chain ("not not ...", "a.b.b", elif), and a link is a byte or
/// more. Only what is touched of the stack takes memory.
const STACK_PER_SOURCE_BYTE: usize = 4 << 10;
/// A chain of constants joined by `~` or `+` is folded in time that grows with the cube of its length.
const MAX_JOINS: usize = 4_000;
/// One unit per instruction and per 64 bytes made: a fraction of a second of work or 128 MB at most.
const FUEL: u64 = 2_000_000;
/// Dropping a value goes one call deeper per level of nesting, and FUEL buys about a million levels. Only what is
/// touched of the stack takes memory.
pub const STACK_BYTES: usize = 256 << 20;
const MAX_JSON_DEPTH: usize = 200;

pub struct ChatTemplate {
    environment: Environment<'static>,
    marks: bool,
}

impl ChatTemplate {
    pub fn new(source: &str) -> Result<Self, String> {
        check_size(source)?;
        on_stack(parse_stack(source), || Self::compile(source))
    }

    fn compile(source: &str) -> Result<Self, String> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build().map_err(describe)?;
        environment.set_syntax(syntax);
        set_python(&mut environment);
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", strftime_now);
        environment.add_filter("tojson", tojson);
        environment.add_function("moesaic_generation", mark_generation);
        let source = source.replace("\r\n", "\n").replace('\r', "\n");
        let plain = replace_generation_tags(&source, "with", "endwith");
        let marked = replace_generation_tags(&source, "call moesaic_generation()", "endcall");
        let marks = plain != source && environment.add_template_owned(MARKED, marked).is_ok();
        environment.add_template_owned(NAME, plain).map_err(describe)?;
        Ok(Self { environment, marks })
    }

    /// `mark_generation`: what `{% generation %}` blocks print stands between marks.
    pub fn render(&self, context: &[u8], mark_generation: bool) -> Result<String, String> {
        let name = if mark_generation && self.marks { MARKED } else { NAME };
        on_stack(STACK_BYTES, || self.render_here(name, context))
    }

    fn render_here(&self, name: &str, context: &[u8]) -> Result<String, String> {
        let context: Value = serde_json::from_slice(context).map_err(|e| format!("the conversation does not parse: {e}"))?;
        self.environment.get_template(name).and_then(|template| template.render(context)).map_err(describe)
    }
}

/// Refuses a source that would take too long to parse.
pub fn check_size(source: &str) -> Result<(), String> {
    if source.len() > MAX_SOURCE_BYTES {
        return Err(format!("{} bytes, expected at most {MAX_SOURCE_BYTES}", source.len()));
    }
    let joins = source.matches(['~', '+']).count();
    if joins > MAX_JOINS {
        return Err(format!("{joins} times '~' or '+', expected at most {MAX_JOINS}"));
    }
    Ok(())
}

/// Bytes of stack that parsing `source` may take.
pub fn parse_stack(source: &str) -> usize {
    (1 << 20) + STACK_PER_SOURCE_BYTE * source.len()
}

/// The fuel, and what prints, strips and tests as in Python.
pub fn set_python(environment: &mut Environment) {
    environment.set_fuel(Some(FUEL));
    environment.set_unknown_method_callback(call_method);
    environment.set_formatter(|out, _, value| out.write_str(&python_str(value)).map_err(Error::from));
    environment.add_filter("string", |state: &State, value: &Value| printed(state, value));
    environment.add_filter("trim", |state: &State, value: &Value, chars: Option<&str>| {
        printed(state, value).map(|text| strip(&text, chars, true, true).to_string())
    });
    environment.add_test("sequence", is_sequence);
    environment.add_test("iterable", |value: &Value| is_sequence(value) || value.kind() == ValueKind::Iterable);
}

/// Runs `work` in a thread with a stack of `bytes`.
pub fn on_stack<T: Send>(bytes: usize, work: impl FnOnce() -> Result<T, String> + Send) -> Result<T, String> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().stack_size(bytes).spawn_scoped(scope, work);
        let thread = thread.map_err(|e| format!("cannot start a thread with a stack of {} MiB: {e}", bytes >> 20))?;
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Has a length and items, which for Python a text and a map have too.
fn is_sequence(value: &Value) -> bool {
    matches!(value.kind(), ValueKind::Undefined | ValueKind::String | ValueKind::Seq | ValueKind::Map)
}

/// What a template said itself through raise_exception.
#[derive(Debug)]
struct Raised;

impl fmt::Display for Raised {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("raise_exception")
    }
}

impl std::error::Error for Raised {}

pub fn describe(error: Error) -> String {
    let line = error.line().map_or(String::new(), |line| format!("line {line}: "));
    let detail = error.detail().unwrap_or_default();
    let cause = std::error::Error::source(&error);
    if cause.is_some_and(|cause| cause.is::<Raised>()) {
        return format!("{line}{detail}");
    }
    let colon = if detail.is_empty() { "" } else { ": " };
    let cause = cause.map_or(String::new(), |cause| format!(" ({cause})"));
    format!("{line}{}{colon}{detail}{cause}", error.kind())
}

fn raise_exception(message: &Value) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, python_str(message)).with_source(Raised))
}

/// The local time in C's strftime format, as Python's datetime.now().strftime.
fn strftime_now(format: &str) -> Result<String, Error> {
    let invalid = || Error::new(ErrorKind::InvalidOperation, format!("strftime_now: the format {format:?} is not usable"));
    // A leading blank tells an empty result from a buffer that is too small: both return 0.
    let format = std::ffi::CString::new(format!(" {format}")).map_err(|_| invalid())?;
    let mut buffer = vec![0u8; 4096];
    let written = unsafe {
        let now = libc::time(std::ptr::null_mut());
        let mut local: libc::tm = std::mem::zeroed();
        libc::localtime_r(&now, &mut local);
        libc::strftime(buffer.as_mut_ptr().cast(), buffer.len(), format.as_ptr(), &local)
    };
    if written == 0 {
        return Err(invalid());
    }
    String::from_utf8(buffer[1..written].to_vec()).map_err(|_| invalid())
}

/// The body of a `{% generation %}` block between its marks.
fn mark_generation(state: &mut State, kwargs: Kwargs) -> Result<String, Error> {
    let body = kwargs.get::<Value>("caller")?.call(state, &[])?;
    Ok(format!("{}{body}{}", GENERATION_MARKS.0, GENERATION_MARKS.1))
}

/// `{% generation %}` marks the assistant's words for a training mask. It prints its body and keeps what is set inside
/// to itself, as an empty `{% with %}` does, or a `{% call %}`.
fn replace_generation_tags(source: &str, begin: &str, end: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = rest.find("{%") {
        let (before, tag) = rest.split_at(at + 2);
        out.push_str(before);
        let body = tag.strip_prefix(['-', '+']).unwrap_or(tag);
        let name = body.trim_start();
        let replaced = [("generation", begin), ("endgeneration", end)].into_iter().find_map(|(from, to)| {
            let after = name.strip_prefix(from)?;
            let close = after.trim_start();
            close.strip_prefix(['-', '+']).unwrap_or(close).starts_with("%}").then_some((after, to))
        });
        rest = match replaced {
            Some((after, to)) => {
                out.push_str(&tag[..tag.len() - name.len()]);
                out.push_str(to);
                after
            }
            None => tag,
        };
    }
    out.push_str(rest);
    out
}

/// str(value)
pub fn python_str(value: &Value) -> String {
    match float_of(value) {
        Some(number) => python_float(number),
        None => value.to_string(),
    }
}

/// What a filter of texts reads of any value; an error where what is undefined is one.
pub fn printed(state: &State, value: &Value) -> Result<String, Error> {
    if value.is_undefined() && state.env().undefined_behavior() == UndefinedBehavior::Strict {
        return Err(Error::from(ErrorKind::UndefinedError));
    }
    Ok(python_str(value))
}

fn float_of(value: &Value) -> Option<f64> {
    (value.kind() == ValueKind::Number && !value.is_integer()).then(|| f64::try_from(value.clone()).ok()).flatten()
}

/// repr(number): the shortest digits that read back, with an exponent outside [1e-4, 1e16).
fn python_float(number: f64) -> String {
    if number.is_nan() {
        return "nan".into();
    }
    if number.is_infinite() {
        return if number > 0.0 { "inf".into() } else { "-inf".into() };
    }
    let text = format!("{number:?}");
    match text.split_once('e').and_then(|(digits, exponent)| Some((digits, exponent.parse::<i32>().ok()?))) {
        Some((digits, exponent)) => format!("{}e{exponent:+03}", digits.strip_suffix(".0").unwrap_or(digits)),
        None => text,
    }
}

/// What Python's str.strip() takes for blank: Unicode white space and four control characters.
fn is_python_space(c: char) -> bool {
    c.is_whitespace() || ('\x1c'..='\x1f').contains(&c)
}

fn strip<'a>(text: &'a str, chars: Option<&str>, left: bool, right: bool) -> &'a str {
    let matches = |c: char| chars.map_or_else(|| is_python_space(c), |chars| chars.contains(c));
    let text = if left { text.trim_start_matches(matches) } else { text };
    if right { text.trim_end_matches(matches) } else { text }
}

/// Charges the template for a text of `bytes` before it is made.
pub fn charge(state: &State, bytes: usize) -> Result<(), Error> {
    state.consume_fuel(bytes as u64 / 64)
}

/// Methods of Python's str and dict that minijinja-contrib lacks or answers otherwise.
pub fn call_method(state: &mut State, value: &Value, method: &str, args: &[Value]) -> Result<Value, Error> {
    let Some(text) = value.as_str() else {
        return match (value.kind(), method) {
            (ValueKind::Map, "copy") => {
                let () = from_args(args)?;
                Ok(value.clone())
            }
            _ => pycompat::unknown_method_callback(state, value, method, args),
        };
    };
    match method {
        "strip" | "lstrip" | "rstrip" => {
            let (chars,): (Option<&str>,) = from_args(args)?;
            Ok(strip(text, chars, method != "rstrip", method != "lstrip").into())
        }
        "removeprefix" => {
            let (prefix,): (&str,) = from_args(args)?;
            Ok(text.strip_prefix(prefix).unwrap_or(text).into())
        }
        "removesuffix" => {
            let (suffix,): (&str,) = from_args(args)?;
            Ok(text.strip_suffix(suffix).unwrap_or(text).into())
        }
        "partition" | "rpartition" => {
            let (separator,): (&str,) = from_args(args)?;
            let first = method == "partition";
            let parts = if first { text.split_once(separator) } else { text.rsplit_once(separator) };
            let (head, middle, tail) = match parts {
                Some((head, tail)) => (head, separator, tail),
                None if first => (text, "", ""),
                None => ("", "", text),
            };
            Ok(Value::from(Tuple::from([head.into(), middle.into(), tail.into()])))
        }
        "rsplit" => {
            let (separator, limit): (&str, Option<usize>) = from_args(args)?;
            let mut parts: Vec<&str> = match limit {
                Some(limit) => text.rsplitn(limit.saturating_add(1), separator).collect(),
                None => text.rsplit(separator).collect(),
            };
            parts.reverse();
            Ok(parts.into_iter().map(Value::from).collect())
        }
        "replace" => {
            let (from, to): (&str, &str) = from_args(&args[..args.len().min(2)])?;
            charge(state, (text.len() + 1).saturating_mul(to.len()) / from.len().max(1))?;
            pycompat::unknown_method_callback(state, value, method, args)
        }
        "join" => {
            let (items,): (&Value,) = from_args(args)?;
            charge(state, text.len().saturating_mul(items.len().unwrap_or(0)))?;
            pycompat::unknown_method_callback(state, value, method, args)
        }
        _ => pycompat::unknown_method_callback(state, value, method, args),
    }
}

/// json.dumps(value, ensure_ascii, indent, separators, sort_keys)
pub fn tojson(state: &State, value: &Value, args: Rest<ValueOrKwargs>) -> Result<Value, Error> {
    let args = args.into_values();
    let (positional, kwargs) = match args.split_last() {
        Some((last, before)) if last.is_kwargs() => (before, Kwargs::try_from(last.clone())?),
        _ => (&args[..], Kwargs::from_iter(std::iter::empty::<(String, Value)>())),
    };
    let argument = |index: usize, name: &str| -> Result<Option<Value>, Error> {
        let value = match positional.get(index) {
            Some(value) => Some(value.clone()),
            None => kwargs.get::<Option<Value>>(name)?,
        };
        Ok(value.filter(|value| !value.is_none()))
    };
    let ensure_ascii = argument(0, "ensure_ascii")?.is_some_and(|value| value.is_true());
    let indent = argument(1, "indent")?;
    let separators = argument(2, "separators")?;
    let sort_keys = argument(3, "sort_keys")?.is_some_and(|value| value.is_true());
    kwargs.assert_all_used()?;

    let indent = match indent {
        Some(indent) => match indent.as_str() {
            Some(text) => Some(text.to_string()),
            None => Some(" ".repeat(i64::try_from(indent)?.clamp(0, 64) as usize)),
        },
        None => None,
    };
    let (item_separator, key_separator) = match separators {
        Some(pair) => (pair.get_item_by_index(0)?.to_string(), pair.get_item_by_index(1)?.to_string()),
        None => (if indent.is_some() { ",".into() } else { ", ".into() }, ": ".into()),
    };
    let mut dump = JsonDump { state, ensure_ascii, indent, item_separator, key_separator, sort_keys, out: String::new() };
    dump.value(value, 0)?;
    Ok(dump.out.into())
}

struct JsonDump<'a> {
    state: &'a State<'a, 'a>,
    ensure_ascii: bool,
    indent: Option<String>,
    item_separator: String,
    key_separator: String,
    sort_keys: bool,
    out: String,
}

impl JsonDump<'_> {
    fn value(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        if depth > MAX_JSON_DEPTH {
            return Err(Error::new(ErrorKind::InvalidOperation, "tojson: the value is nested too deeply"));
        }
        self.state.consume_fuel(1)?;
        match value.kind() {
            ValueKind::None => self.out.push_str("null"),
            ValueKind::Bool => self.out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => self.out.push_str(&json_number(value)),
            ValueKind::String => self.string(value.as_str().unwrap_or_default())?,
            ValueKind::Seq | ValueKind::Iterable => {
                let items: Vec<Value> = value.try_iter()?.collect();
                self.container('[', ']', items.len(), depth, |dump, i| dump.value(&items[i], depth + 1))?;
            }
            ValueKind::Map => {
                let mut items = Vec::new();
                for key in value.try_iter()? {
                    items.push((json_key(&key)?, value.get_item(&key)?));
                }
                if self.sort_keys {
                    items.sort_by(|a, b| a.0.cmp(&b.0));
                }
                self.container('{', '}', items.len(), depth, |dump, i| {
                    dump.string(&items[i].0)?;
                    dump.out.push_str(&dump.key_separator.clone());
                    dump.value(&items[i].1, depth + 1)
                })?;
            }
            kind => return Err(Error::new(ErrorKind::InvalidOperation, format!("tojson: {kind} is not JSON serializable"))),
        }
        Ok(())
    }

    fn container(
        &mut self,
        open: char,
        close: char,
        size: usize,
        depth: usize,
        mut item: impl FnMut(&mut Self, usize) -> Result<(), Error>,
    ) -> Result<(), Error> {
        self.out.push(open);
        for i in 0..size {
            if i > 0 {
                self.out.push_str(&self.item_separator.clone());
            }
            self.new_line(depth + 1)?;
            item(self, i)?;
        }
        if size > 0 {
            self.new_line(depth)?;
        }
        self.out.push(close);
        Ok(())
    }

    fn new_line(&mut self, depth: usize) -> Result<(), Error> {
        if let Some(indent) = &self.indent {
            charge(self.state, indent.len() * depth)?;
            self.out.push('\n');
            self.out.push_str(&indent.repeat(depth));
        }
        Ok(())
    }

    fn string(&mut self, text: &str) -> Result<(), Error> {
        charge(self.state, text.len())?;
        self.out.push('"');
        for c in text.chars() {
            match c {
                '"' => self.out.push_str("\\\""),
                '\\' => self.out.push_str("\\\\"),
                '\n' => self.out.push_str("\\n"),
                '\r' => self.out.push_str("\\r"),
                '\t' => self.out.push_str("\\t"),
                '\x08' => self.out.push_str("\\b"),
                '\x0c' => self.out.push_str("\\f"),
                c if c < ' ' || (self.ensure_ascii && !(' '..='~').contains(&c)) => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        self.out.push_str(&format!("\\u{unit:04x}"));
                    }
                }
                c => self.out.push(c),
            }
        }
        self.out.push('"');
        Ok(())
    }
}

fn json_number(value: &Value) -> String {
    match float_of(value) {
        Some(number) if number.is_nan() => "NaN".into(),
        Some(number) if number.is_infinite() => if number > 0.0 { "Infinity".into() } else { "-Infinity".into() },
        Some(number) => python_float(number),
        None => value.to_string(),
    }
}

fn json_key(key: &Value) -> Result<String, Error> {
    match key.kind() {
        ValueKind::String => Ok(key.to_string()),
        ValueKind::Number => Ok(json_number(key)),
        ValueKind::Bool => Ok(if key.is_true() { "true".into() } else { "false".into() }),
        ValueKind::None => Ok("null".into()),
        kind => Err(Error::new(ErrorKind::InvalidOperation, format!("tojson: a key must be a string, got {kind}"))),
    }
}
