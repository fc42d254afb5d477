//! Reads a JSON object strictly, field by field: what is missing, unknown, twice there or out of range is an error that names it.

use chrono::{DateTime, Datelike, Timelike, Utc};
use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, Visitor};
use serde_json::Value;
use uuid::Uuid;

use super::ParseError;

/// Longest text taken for a name or an id, in bytes.
pub const MAX_TEXT_BYTES: usize = 4096;

/// A JSON object in which no key stood twice. Nested objects are checked too.
pub(super) struct Fields(Vec<(String, Value)>);

impl Fields {
    /// Parses `body` as one JSON object with nothing behind it.
    pub(super) fn of(body: &[u8]) -> Result<Self, ParseError> {
        let Unique(value) = serde_json::from_slice(body).map_err(|error| ParseError::Json(error.to_string()))?;
        Self::from_value(value, "data")
    }

    pub(super) fn from_value(value: Value, what: &'static str) -> Result<Self, ParseError> {
        match value {
            Value::Object(map) => Ok(Fields(map.into_iter().collect())),
            _ => Err(ParseError::field(what, "must be a JSON object")),
        }
    }

    pub(super) fn take(&mut self, name: &'static str) -> Option<Value> {
        let at = self.0.iter().position(|(key, _)| key == name)?;
        Some(self.0.swap_remove(at).1).filter(|value| !value.is_null())
    }

    fn need(&mut self, name: &'static str) -> Result<Value, ParseError> {
        self.take(name).ok_or_else(|| ParseError::field(name, "is missing"))
    }

    pub(super) fn uuid(&mut self, name: &'static str) -> Result<Uuid, ParseError> {
        self.optional_uuid(name)?.ok_or_else(|| ParseError::field(name, "is missing"))
    }

    pub(super) fn optional_uuid(&mut self, name: &'static str) -> Result<Option<Uuid>, ParseError> {
        self.optional_text(name)?.map(|text| uuid(name, &text)).transpose()
    }

    pub(super) fn text(&mut self, name: &'static str) -> Result<String, ParseError> {
        self.optional_text(name)?.ok_or_else(|| ParseError::field(name, "is missing"))
    }

    pub(super) fn optional_text(&mut self, name: &'static str) -> Result<Option<String>, ParseError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::String(text)) => checked_text(name, text).map(Some),
            Some(_) => Err(ParseError::field(name, "must be a string")),
        }
    }

    pub(super) fn time(&mut self, name: &'static str) -> Result<DateTime<Utc>, ParseError> {
        self.optional_time(name)?.ok_or_else(|| ParseError::field(name, "is missing"))
    }

    pub(super) fn optional_time(&mut self, name: &'static str) -> Result<Option<DateTime<Utc>>, ParseError> {
        self.optional_text(name)?.map(|text| time(name, &text)).transpose()
    }

    pub(super) fn integer(&mut self, name: &'static str) -> Result<i64, ParseError> {
        self.need(name)?.as_i64().ok_or_else(|| ParseError::field(name, "must be a whole number of 64 bits"))
    }

    /// A whole number from `least` up to what fits 32 signed bits.
    pub(super) fn small_integer(&mut self, name: &'static str, least: i32) -> Result<i32, ParseError> {
        let number = self.integer(name)?;
        i32::try_from(number)
            .ok()
            .filter(|number| *number >= least)
            .ok_or_else(|| ParseError::field(name, format!("must lie between {least} and {}", i32::MAX)))
    }

    pub(super) fn unsigned(&mut self, name: &'static str) -> Result<u64, ParseError> {
        self.need(name)?.as_u64().ok_or_else(|| ParseError::field(name, "must be a whole number of 64 bits that is not negative"))
    }

    pub(super) fn flag(&mut self, name: &'static str) -> Result<bool, ParseError> {
        self.optional_flag(name)?.ok_or_else(|| ParseError::field(name, "is missing"))
    }

    pub(super) fn optional_flag(&mut self, name: &'static str) -> Result<Option<bool>, ParseError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Bool(flag)) => Ok(Some(flag)),
            Some(_) => Err(ParseError::field(name, "must be true or false")),
        }
    }

    /// One of a closed set of words.
    pub(super) fn word<T>(&mut self, name: &'static str, read: impl Fn(&str) -> Option<T>) -> Result<T, ParseError> {
        let text = self.text(name)?;
        read(&text).ok_or_else(|| ParseError::field(name, format!("{text:?} is not one of its values")))
    }

    /// Every field has been taken: what is left is unknown.
    pub(super) fn finish(self) -> Result<(), ParseError> {
        match self.0.into_iter().map(|(name, _)| name).min() {
            None => Ok(()),
            Some(name) => Err(ParseError::UnknownField(name.chars().take(100).collect())),
        }
    }
}

/// Text that PostgreSQL can hold: no NUL, not endless.
pub(super) fn checked_text(name: &'static str, text: String) -> Result<String, ParseError> {
    if text.contains('\0') {
        return Err(ParseError::field(name, "holds a NUL character"));
    }
    if text.len() > MAX_TEXT_BYTES {
        return Err(ParseError::field(name, format!("is longer than {MAX_TEXT_BYTES} bytes")));
    }
    Ok(text)
}

/// A UUID in its canonical hyphenated form, the only one that coderd writes.
pub(super) fn uuid(name: &'static str, text: &str) -> Result<Uuid, ParseError> {
    Uuid::try_parse(text)
        .ok()
        .filter(|uuid| uuid.hyphenated().to_string() == text.to_ascii_lowercase())
        .ok_or_else(|| ParseError::field(name, "must be a UUID like 00000000-0000-0000-0000-000000000000"))
}

/// An RFC 3339 instant of the years 1970 to 9999, no finer than a microsecond. coderd's zero time (year 1) means "unknown" and is no instant.
pub(super) fn time(name: &'static str, text: &str) -> Result<DateTime<Utc>, ParseError> {
    let at = DateTime::parse_from_rfc3339(text).map_err(|error| ParseError::field(name, format!("is no RFC 3339 time: {error}")))?.to_utc();
    if !(1970..=9999).contains(&at.year()) {
        return Err(ParseError::field(name, "lies outside the years 1970 to 9999"));
    }
    if !at.nanosecond().is_multiple_of(1000) || at.nanosecond() >= 1_000_000_000 {
        return Err(ParseError::field(name, "is finer than a microsecond or a leap second"));
    }
    Ok(at)
}

/// A JSON value in which no object holds a key twice: serde_json alone would keep the last one silently.
pub(super) struct Unique(pub(super) Value);

impl<'de> Deserialize<'de> for Unique {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(UniqueVisitor).map(Unique)
    }
}

struct UniqueVisitor;

impl<'de> Visitor<'de> for UniqueVisitor {
    type Value = Value;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a JSON value")
    }
    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }
    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }
    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }
    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }
    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(value.into())
    }
    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(Value::String(value.to_owned()))
    }
    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(Value::String(value))
    }
    fn visit_seq<A: serde::de::SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut list = Vec::new();
        while let Some(Unique(item)) = items.next_element()? {
            list.push(item);
        }
        Ok(Value::Array(list))
    }
    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
        let mut map = serde_json::Map::new();
        while let Some((key, Unique(value))) = entries.next_entry::<String, Unique>()? {
            let name: String = key.chars().take(100).collect();
            if map.insert(key, value).is_some() {
                return Err(A::Error::custom(format!("the field {name:?} stands there twice")));
            }
        }
        Ok(Value::Object(map))
    }
}
