//! Templates over rows of data: minijinja as the Jinja2 environment that promptsource gives its templates.
use std::cell::Cell;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{from_args, Kwargs, Rest, ValueKind, ValueOrKwargs};
use minijinja::{Environment, Error, ErrorKind, State, UndefinedBehavior, Value};

use crate::template::{self, call_method, charge, describe, on_stack, python_str};

const NAME: &str = "template";
const TRUNCATE_LEEWAY: usize = 5;

thread_local! {
    /// State of the random numbers of the rendering that this thread does.
    static RANDOM: Cell<u64> = const { Cell::new(0) };
}

pub struct RowTemplate {
    environment: Environment<'static>,
}

impl RowTemplate {
    /// `strict`: what is undefined is an error, the line end at the end stays, and there is tojson.
    pub fn new(source: &str, strict: bool) -> Result<Self, String> {
        template::check_size(source)?;
        on_stack(template::parse_stack(source), || {
            let mut environment = Environment::new();
            template::set_python(&mut environment);
            if strict {
                let syntax = SyntaxConfig::builder().keep_trailing_newline(true).build().map_err(describe)?;
                environment.set_syntax(syntax);
                environment.set_undefined_behavior(UndefinedBehavior::Strict);
                environment.add_filter("tojson", template::tojson);
            }
            environment.set_unknown_method_callback(call_row_method);
            environment.add_function("zip", zip);
            environment.add_filter("choice", choice);
            environment.add_filter("random", choice);
            environment.add_filter("most_frequent", most_frequent);
            environment.add_filter("truncate", truncate);
            environment.add_filter("default", default);
            environment.add_filter("d", default);
            environment.add_filter("int", int);
            environment.add_filter("float", float);
            let source = source.replace("\r\n", "\n").replace('\r', "\n");
            environment.add_template_owned(NAME, source).map_err(describe)?;
            Ok(Self { environment })
        })
    }

    /// `seed` decides what the filters choice and random take.
    pub fn render(&self, variables: &[u8], seed: u64) -> Result<String, String> {
        on_stack(template::STACK_BYTES, || {
            RANDOM.set(seed);
            let variables: Value = serde_json::from_slice(variables).map_err(|e| format!("the row does not parse: {e}"))?;
            self.environment.get_template(NAME).and_then(|template| template.render(variables)).map_err(describe)
        })
    }
}

fn invalid(message: String) -> Error {
    Error::new(ErrorKind::InvalidOperation, message)
}

/// The next number of splitmix64.
fn next_random() -> u64 {
    let state = RANDOM.get().wrapping_add(0x9e37_79b9_7f4a_7c15);
    RANDOM.set(state);
    let x = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// random.choice(items)
fn choice(items: &Value) -> Result<Value, Error> {
    let items: Vec<Value> = items.try_iter()?.collect();
    if items.is_empty() {
        return Err(invalid("choice: got an empty sequence".into()));
    }
    Ok(items[(next_random() % items.len() as u64) as usize].clone())
}

/// Those of the items that stand there most often, in the order in which they come; none of none.
fn most_frequent(state: &State, items: &Value) -> Result<Value, Error> {
    let mut counts: Vec<(Value, usize)> = Vec::new();
    if !items.is_true() {
        return Ok(Value::from(()));
    }
    for item in items.try_iter()? {
        charge(state, 64 * counts.len())?;
        match counts.iter_mut().find(|(known, _)| *known == item) {
            Some((_, count)) => *count += 1,
            None => counts.push((item, 1)),
        }
    }
    let most = counts.iter().map(|(_, count)| *count).max();
    Ok(counts.into_iter().filter(|(_, count)| Some(*count) == most).map(|(item, _)| item).collect())
}

/// Python's zip: as many tuples as the shortest sequence has items.
fn zip(sequences: Rest<Value>) -> Result<Value, Error> {
    let columns = sequences.iter().map(|sequence| Ok(sequence.try_iter()?.collect())).collect::<Result<Vec<Vec<Value>>, Error>>()?;
    let rows = columns.iter().map(Vec::len).min().unwrap_or(0);
    Ok((0..rows).map(|row| columns.iter().map(|column| column[row].clone()).collect::<Value>()).collect())
}

/// Jinja2's: a text of at most `length` characters (a few more are let pass), cut between words, with `end` behind it.
fn truncate(state: &State, text: &Value, args: Rest<ValueOrKwargs>) -> Result<String, Error> {
    let (length, killwords, end, leeway, kwargs): (Option<usize>, Option<bool>, Option<String>, Option<usize>, Kwargs) =
        from_args(&args.into_values())?;
    let length = match length {
        Some(length) => length,
        None => kwargs.get::<Option<usize>>("length")?.unwrap_or(255),
    };
    let killwords = killwords.or(kwargs.get("killwords")?).unwrap_or(false);
    let end = end.or(kwargs.get("end")?).unwrap_or_else(|| "...".into());
    let leeway = leeway.or(kwargs.get("leeway")?).unwrap_or(TRUNCATE_LEEWAY);
    kwargs.assert_all_used()?;
    let text = template::printed(state, text)?;
    let end_length = end.chars().count();
    if length < end_length {
        return Err(invalid(format!("truncate: got the length {length}, expected {end_length} or more")));
    }
    if text.chars().count() <= length.saturating_add(leeway) {
        return Ok(text);
    }
    let cut: String = text.chars().take(length - end_length).collect();
    let kept = if killwords { &cut } else { cut.rsplit_once(' ').map_or(cut.as_str(), |(before, _)| before) };
    Ok(format!("{kept}{end}"))
}

/// `other` for what is undefined, with `boolean` also for what is false.
fn default(value: &Value, args: Rest<ValueOrKwargs>) -> Result<Value, Error> {
    let (other, boolean, kwargs): (Option<Value>, Option<bool>, Kwargs) = from_args(&args.into_values())?;
    let other = other.or(kwargs.get("default_value")?).unwrap_or_else(|| "".into());
    let boolean = boolean.or(kwargs.get("boolean")?).unwrap_or(false);
    kwargs.assert_all_used()?;
    Ok(if value.is_undefined() || (boolean && !value.is_true()) { other } else { value.clone() })
}

/// The first argument of int and float, what stands for values that are no number.
fn number_default(args: Rest<ValueOrKwargs>, fallback: Value) -> Result<Value, Error> {
    let (default, kwargs): (Option<Value>, Kwargs) = from_args(&args.into_values())?;
    let default = default.or(kwargs.get("default")?).unwrap_or(fallback);
    kwargs.assert_all_used()?;
    Ok(default)
}

/// int(value), of a text with a fraction its whole part, of what is no number the default.
fn int(value: &Value, args: Rest<ValueOrKwargs>) -> Result<Value, Error> {
    let default = number_default(args, 0.into())?;
    if value.is_integer() {
        return Ok(value.clone());
    }
    if let Some(whole) = value.as_str().and_then(|text| text.trim().parse::<i128>().ok()) {
        return Ok(whole.into());
    }
    Ok(match number(value).map(f64::trunc).filter(|number| number.abs() < 1e18) {
        Some(number) => Value::from(number as i64),
        None => default,
    })
}

/// float(value), of what is no number the default.
fn float(value: &Value, args: Rest<ValueOrKwargs>) -> Result<Value, Error> {
    let default = number_default(args, 0.0.into())?;
    Ok(number(value).map_or(default, Value::from))
}

fn number(value: &Value) -> Option<f64> {
    match value.kind() {
        ValueKind::Bool => Some(f64::from(u8::from(value.is_true()))),
        ValueKind::Number => f64::try_from(value.clone()).ok(),
        ValueKind::String => value.as_str()?.trim().parse().ok(),
        _ => None,
    }
}

/// Methods of lists and strings that chat templates have no use for.
fn call_row_method(state: &mut State, value: &Value, method: &str, args: &[Value]) -> Result<Value, Error> {
    match (method, value.kind()) {
        ("index", ValueKind::Seq) => {
            let (wanted,): (&Value,) = from_args(args)?;
            let found = value.try_iter()?.position(|item| item == *wanted);
            found.map(Value::from).ok_or_else(|| invalid(format!("index: {} is not in the list", python_str(wanted))))
        }
        ("index", ValueKind::String) => {
            let (text, (wanted,)): (_, (&str,)) = (value.as_str().unwrap_or_default(), from_args(args)?);
            let found = text.find(wanted).map(|at| text[..at].chars().count());
            found.map(Value::from).ok_or_else(|| invalid("index: substring not found".into()))
        }
        _ => call_method(state, value, method, args),
    }
}
