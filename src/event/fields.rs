//! Reads a JSON object strictly, field by field. A field that is missing, unknown, doubled or out of range is an error that names it.

use std::borrow::Cow;
use std::ops::RangeInclusive;
use std::str::FromStr;

use chrono::{DateTime, Datelike, Timelike, Utc};
use serde::Deserialize;
use serde::de::{Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use uuid::Uuid;

use super::ParseError;
use crate::words::UnknownWord;

/// Maximum length of a text field, in bytes.
pub const MAX_TEXT_BYTES: usize = 4096;
/// Maximum length of an id, in bytes. PostgreSQL's indexes accept entries of at most 2704 bytes.
pub const MAX_ID_BYTES: usize = 1024;

/// A JSON value, borrowed if possible. Fractions and lists, which no field uses, are [`Value::Other`].
pub(super) enum Value<'a> {
    Null,
    Flag(bool),
    Whole(i64),
    /// A whole number that does not fit [`Value::Whole`].
    Large(u64),
    Text(Cow<'a, str>),
    Object(Fields<'a>),
    Other,
}

/// The fields of a JSON object by name, each until it is taken. No key appears twice, also in nested objects.
pub(super) struct Fields<'a>(Vec<(Cow<'a, str>, Option<Value<'a>>)>);

impl<'a> Fields<'a> {
    /// Parses `body` as exactly one JSON object.
    pub(super) fn of(body: &'a [u8]) -> Result<Self, ParseError> {
        let value = serde_json::from_slice(body).map_err(|error| ParseError::Json(error.to_string()))?;
        Self::from_value(value, "data")
    }

    pub(super) fn from_value(value: Value<'a>, what: &'static str) -> Result<Self, ParseError> {
        match value {
            Value::Object(fields) => Ok(fields),
            _ => Err(ParseError::field(what, "must be a JSON object")),
        }
    }

    pub(super) fn take(&mut self, name: &'static str) -> Option<Value<'a>> {
        let at = self.0.binary_search_by(|(key, _)| key.as_ref().cmp(name)).ok()?;
        self.0[at].1.take().filter(|value| !matches!(value, Value::Null))
    }

    fn need(&mut self, name: &'static str) -> Result<Value<'a>, ParseError> {
        self.take(name).ok_or_else(|| ParseError::field(name, "is missing"))
    }

    pub(super) fn uuid(&mut self, name: &'static str) -> Result<Uuid, ParseError> {
        self.optional_uuid(name)?.ok_or_else(|| ParseError::field(name, "is missing"))
    }

    pub(super) fn optional_uuid(&mut self, name: &'static str) -> Result<Option<Uuid>, ParseError> {
        self.optional_borrowed(name)?.map(|text| uuid(name, &text)).transpose()
    }

    pub(super) fn text(&mut self, name: &'static str) -> Result<String, ParseError> {
        self.optional_text(name)?.ok_or_else(|| ParseError::field(name, "is missing"))
    }

    pub(super) fn optional_text(&mut self, name: &'static str) -> Result<Option<String>, ParseError> {
        Ok(self.optional_borrowed(name)?.map(Cow::into_owned))
    }

    fn optional_borrowed(&mut self, name: &'static str) -> Result<Option<Cow<'a, str>>, ParseError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Text(text)) => checked_text(name, text).map(Some),
            Some(_) => Err(ParseError::field(name, "must be a string")),
        }
    }

    pub(super) fn time(&mut self, name: &'static str) -> Result<DateTime<Utc>, ParseError> {
        self.optional_time(name)?.ok_or_else(|| ParseError::field(name, "is missing"))
    }

    pub(super) fn optional_time(&mut self, name: &'static str) -> Result<Option<DateTime<Utc>>, ParseError> {
        self.optional_borrowed(name)?.map(|text| time(name, &text)).transpose()
    }

    pub(super) fn integer(&mut self, name: &'static str) -> Result<i64, ParseError> {
        match self.need(name)? {
            Value::Whole(number) => Ok(number),
            _ => Err(ParseError::field(name, "must be a whole number of 64 bits")),
        }
    }

    /// A whole number from `least` to `i32::MAX`.
    pub(super) fn small_integer(&mut self, name: &'static str, least: i32) -> Result<i32, ParseError> {
        let number = self.integer(name)?;
        i32::try_from(number)
            .ok()
            .filter(|number| *number >= least)
            .ok_or_else(|| ParseError::field(name, format!("must lie between {least} and {}", i32::MAX)))
    }

    pub(super) fn unsigned(&mut self, name: &'static str) -> Result<u64, ParseError> {
        let number = match self.need(name)? {
            Value::Whole(number) => u64::try_from(number).ok(),
            Value::Large(number) => Some(number),
            _ => None,
        };
        number.ok_or_else(|| ParseError::field(name, "must be a whole number of 64 bits that is not negative"))
    }

    /// The only field that is a whole number; none if several are.
    pub(super) fn only_whole(&self) -> Option<&Value<'a>> {
        let mut whole =
            self.0.iter().filter_map(|(_, value)| value.as_ref()).filter(|value| matches!(value, Value::Whole(_) | Value::Large(_)));
        whole.next().filter(|_| whole.next().is_none())
    }

    pub(super) fn flag(&mut self, name: &'static str) -> Result<bool, ParseError> {
        self.optional_flag(name)?.ok_or_else(|| ParseError::field(name, "is missing"))
    }

    pub(super) fn optional_flag(&mut self, name: &'static str) -> Result<Option<bool>, ParseError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Flag(flag)) => Ok(Some(flag)),
            Some(_) => Err(ParseError::field(name, "must be true or false")),
        }
    }

    /// One of a closed set of words.
    pub(super) fn word<T: FromStr<Err = UnknownWord>>(&mut self, name: &'static str) -> Result<T, ParseError> {
        self.optional_word(name)?.ok_or_else(|| ParseError::field(name, "is missing"))
    }

    /// An optional word of a closed set.
    pub(super) fn optional_word<T: FromStr<Err = UnknownWord>>(&mut self, name: &'static str) -> Result<Option<T>, ParseError> {
        self.optional_borrowed(name)?.map(|text| word(name, &text)).transpose()
    }

    /// Checks that every field is taken. The remaining ones are unknown.
    pub(super) fn finish(self) -> Result<(), ParseError> {
        match self.0.into_iter().find(|(_, value)| value.is_some()) {
            None => Ok(()),
            Some((name, _)) => Err(ParseError::UnknownField(name.chars().take(100).collect())),
        }
    }
}

/// One of a closed set of words.
pub(super) fn word<T: FromStr<Err = UnknownWord>>(name: &'static str, text: &str) -> Result<T, ParseError> {
    text.parse().map_err(|error: UnknownWord| ParseError::field(name, error.to_string()))
}

/// Text that PostgreSQL accepts: without NUL, and of limited length.
pub(super) fn checked_text<T: AsRef<str>>(name: &'static str, text: T) -> Result<T, ParseError> {
    checked(name, text, MAX_TEXT_BYTES)
}

/// Does the same as [`checked_text`] for an id.
pub(super) fn checked_id<T: AsRef<str>>(name: &'static str, id: T) -> Result<T, ParseError> {
    checked(name, id, MAX_ID_BYTES)
}

fn checked<T: AsRef<str>>(name: &'static str, text: T, most: usize) -> Result<T, ParseError> {
    if text.as_ref().contains('\0') {
        return Err(ParseError::field(name, "holds a NUL character"));
    }
    if text.as_ref().len() > most {
        return Err(ParseError::field(name, format!("is longer than {most} bytes")));
    }
    Ok(text)
}

/// A UUID in its canonical hyphenated form, the only one that coderd writes and the only one of 36 characters.
pub(super) fn uuid(name: &'static str, text: &str) -> Result<Uuid, ParseError> {
    Uuid::try_parse(text)
        .ok()
        .filter(|_| text.len() == uuid::fmt::Hyphenated::LENGTH)
        .ok_or_else(|| ParseError::field(name, "must be a UUID like 00000000-0000-0000-0000-000000000000"))
}

/// The years in which event times may be.
pub const YEARS: RangeInclusive<i32> = 1970..=9999;

/// An RFC 3339 instant within [`YEARS`], not finer than a microsecond. coderd's zero time (year 1) means "unknown" and is not an instant.
pub(super) fn time(name: &'static str, text: &str) -> Result<DateTime<Utc>, ParseError> {
    let at = DateTime::parse_from_rfc3339(text).map_err(|error| ParseError::field(name, format!("is no RFC 3339 time: {error}")))?.to_utc();
    if !YEARS.contains(&at.year()) {
        return Err(ParseError::field(name, format!("lies outside the years {} to {}", YEARS.start(), YEARS.end())));
    }
    if !at.nanosecond().is_multiple_of(1000) || at.nanosecond() >= 1_000_000_000 {
        return Err(ParseError::field(name, "is finer than a microsecond or a leap second"));
    }
    Ok(at)
}

impl<'de> Deserialize<'de> for Value<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ValueVisitor)
    }
}

struct ValueVisitor;

impl<'de> Visitor<'de> for ValueVisitor {
    type Value = Value<'de>;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a JSON value")
    }
    fn visit_unit<E>(self) -> Result<Value<'de>, E> {
        Ok(Value::Null)
    }
    fn visit_bool<E>(self, value: bool) -> Result<Value<'de>, E> {
        Ok(Value::Flag(value))
    }
    fn visit_i64<E>(self, value: i64) -> Result<Value<'de>, E> {
        Ok(Value::Whole(value))
    }
    fn visit_u64<E>(self, value: u64) -> Result<Value<'de>, E> {
        Ok(i64::try_from(value).map_or(Value::Large(value), Value::Whole))
    }
    fn visit_f64<E>(self, _: f64) -> Result<Value<'de>, E> {
        Ok(Value::Other)
    }
    fn visit_borrowed_str<E>(self, value: &'de str) -> Result<Value<'de>, E> {
        Ok(Value::Text(Cow::Borrowed(value)))
    }
    fn visit_str<E>(self, value: &str) -> Result<Value<'de>, E> {
        Ok(Value::Text(Cow::Owned(value.to_owned())))
    }
    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value<'de>, A::Error> {
        while items.next_element::<Value>()?.is_some() {}
        Ok(Value::Other)
    }
    /// serde_json alone would silently keep the last of two fields with one name.
    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Value<'de>, A::Error> {
        let mut fields = Vec::new();
        while let Some((Name(name), value)) = entries.next_entry()? {
            fields.push((name, Some(value)));
        }
        fields.sort_by(|(one, _), (other, _)| one.cmp(other));
        match fields.windows(2).find(|two| two[0].0 == two[1].0) {
            None => Ok(Value::Object(Fields(fields))),
            Some(two) => {
                let name: String = two[0].0.chars().take(100).collect();
                Err(A::Error::custom(format!("the field {name:?} stands there twice")))
            }
        }
    }
}

/// The name of a field, borrowed unless it has escapes.
#[derive(Deserialize)]
struct Name<'a>(#[serde(borrow)] Cow<'a, str>);
