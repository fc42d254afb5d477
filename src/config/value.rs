//! Parses and checks given values.

use std::net::{IpAddr, SocketAddr};

use chrono::{DateTime, SubsecRound as _, Utc};
use serde_json::{Value, json};
use uuid::Uuid;

use super::{Kind, Secret, TokenSetting};

/// Minimum length of a signature key, as in `event/signature.rs`. The two parts may not use each
/// other.
const MIN_KEY_BYTES: usize = 32;

/// A value before it is checked.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Raw {
    /// A value of a flag or a variable. The kind of its key decides how it is parsed.
    Untyped(String),
    Text(String),
    Number(String),
    Boolean(bool),
    Time(String),
    List(Vec<Raw>),
}

/// Parses a value for [`super::Pipeline`]. The error continues the key's name, names the allowed
/// values and never repeats the value.
pub(super) fn read(kind: Kind, raw: &Raw) -> Result<Value, String> {
    let must_be = || format!("must be {}", kind.allowed());
    match kind {
        Kind::Choice(words) => checked(raw, |text| words.contains(&text)).ok_or_else(must_be),
        Kind::Choices(words) => word_list(raw, |word| words.contains(&word)).ok_or_else(must_be),
        Kind::Whole(least, most) => number(raw)
            .and_then(|text| text.parse().ok())
            .filter(|whole| (least..=most).contains(whole))
            .map(|whole: u32| whole.into())
            .ok_or_else(must_be),
        Kind::Seconds(least, most) => duration(raw, least, most, 1.0).ok_or_else(must_be),
        Kind::Time => time(raw).map(|time| json!(time)).ok_or_else(must_be),
        Kind::Id => checked(raw, |text| text.parse::<Uuid>().is_ok()).ok_or_else(must_be),
        Kind::Name(least, most) => checked(raw, |text| is_name(text, least, most)).ok_or_else(must_be),
        Kind::Brokers => checked(raw, are_brokers).ok_or_else(must_be),
        Kind::Url => checked(raw, is_http_url).ok_or_else(must_be),
        Kind::Listen => checked(raw, |text| text.parse::<SocketAddr>().is_ok()).ok_or_else(must_be),
        Kind::HostNames => word_list(raw, is_host).ok_or_else(must_be),
        Kind::SecretPostgresUrl => secret(raw, is_postgres_url).ok_or_else(must_be),
        Kind::Properties => {
            property(raw).ok_or_else(|| "must be a text, a number, true or false; or env:NAME, file:PATH, exec:COMMAND".into())
        }
        Kind::PublicKeys => public_key(raw),
        Kind::SignatureKeys => secret(raw, |text| text.trim().len() >= MIN_KEY_BYTES)
            .ok_or_else(|| format!("must be a secret of at least {MIN_KEY_BYTES} bytes, or env:NAME, file:PATH, exec:COMMAND")),
        Kind::Tokens => TokenSetting::try_from(text(raw).unwrap_or_default().to_owned()).map(|_| json!(text(raw))),
    }
}

fn text(raw: &Raw) -> Option<&str> {
    match raw {
        Raw::Untyped(text) | Raw::Text(text) => Some(text),
        _ => None,
    }
}

fn number(raw: &Raw) -> Option<&str> {
    match raw {
        Raw::Untyped(text) | Raw::Number(text) => Some(text),
        _ => None,
    }
}

fn checked(raw: &Raw, holds: impl Fn(&str) -> bool) -> Option<Value> {
    text(raw).filter(|text| holds(text)).map(Value::from)
}

/// Parses a list of one or more words, each once.
fn word_list(raw: &Raw, is_allowed: impl Fn(&str) -> bool) -> Option<Value> {
    let entries: Vec<&str> = match raw {
        Raw::Untyped(text) => text.split(',').map(str::trim).collect(),
        Raw::List(items) => items.iter().map(text).collect::<Option<_>>()?,
        _ => return None,
    };
    let each_once = entries
        .iter()
        .enumerate()
        .all(|(index, word)| is_allowed(word) && !entries[..index].contains(word));
    (each_once && !entries.is_empty()).then(|| entries.into())
}

/// Parses a duration to seconds.
fn duration(raw: &Raw, least: f64, most: f64, unit_seconds: f64) -> Option<Value> {
    let units: f64 = number(raw)?.parse().ok()?;
    // false also for NaN
    let within = units >= least && units <= most;
    within.then(|| (units * unit_seconds).into())
}

/// Parses an instant, in microseconds like PostgreSQL.
fn time(raw: &Raw) -> Option<DateTime<Utc>> {
    match raw {
        Raw::Untyped(text) | Raw::Text(text) | Raw::Time(text) => {
            DateTime::parse_from_rfc3339(text).ok().map(|time| time.to_utc().trunc_subsecs(6))
        }
        _ => None,
    }
}

fn secret(raw: &Raw, holds: impl Fn(&str) -> bool) -> Option<Value> {
    let secret = Secret::new(text(raw)?);
    (secret.is_whole() && secret.literal().is_none_or(holds)).then(|| json!(text(raw)))
}

fn property(raw: &Raw) -> Option<Value> {
    let text = match raw {
        Raw::Untyped(text) | Raw::Text(text) | Raw::Number(text) => text.as_str(),
        Raw::Boolean(true) => "true",
        Raw::Boolean(false) => "false",
        Raw::Time(_) | Raw::List(_) => return None,
    };
    let secret = Secret::new(text);
    // librdkafka accepts an empty literal
    (secret.is_whole() || secret.literal().is_some()).then(|| text.into())
}

/// Reads a public key. Public keys are not secret, so a file is read at once.
fn public_key(raw: &Raw) -> Result<Value, String> {
    let text = text(raw).ok_or("must be PEM, 32 bytes in base64 or hex, or file:PATH")?;
    match text.strip_prefix("file:") {
        Some(path) => std::fs::read_to_string(path)
            .map(Value::from)
            .map_err(|error| format!("cannot be read from {path}: {error}")),
        None => Ok(text.into()),
    }
}

pub(super) fn is_name(text: &str, least: usize, most: usize) -> bool {
    (least..=most).contains(&text.len())
        && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte))
}

fn is_host(text: &str) -> bool {
    let is_label = |label: &str| {
        (1..=63).contains(&label.len())
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte))
    };
    text.parse::<IpAddr>().is_ok() || (text.len() <= 253 && text.split('.').all(is_label))
}

fn are_brokers(text: &str) -> bool {
    text.split(',').all(|broker| {
        broker.trim().rsplit_once(':').is_some_and(|(host, port)| {
            let bracketed = host.starts_with('[') && host.ends_with(']');
            let host_is_plain = !host.is_empty()
                && !host.contains(['/', '@', ' '])
                && (bracketed || !host.contains(':'));
            host_is_plain && port.parse::<u16>().is_ok_and(|port| port > 0)
        })
    })
}

fn is_http_url(text: &str) -> bool {
    reqwest::Url::parse(text).is_ok_and(|url| {
        matches!(url.scheme(), "http" | "https")
            && url.has_host()
            && url.username().is_empty()
            && url.password().is_none()
    })
}

fn is_postgres_url(text: &str) -> bool {
    reqwest::Url::parse(text).is_ok_and(|url| {
        // the folder of a socket is given as ?host=
        let host = url.has_host()
            || url.query_pairs().any(|(name, value)| name == "host" && !value.is_empty());
        matches!(url.scheme(), "postgres" | "postgresql") && host && url.path().len() > 1
    })
}
