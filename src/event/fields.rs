//! Reads a JSON object strictly. A field that is missing, unknown, doubled or invalid is an error
//! that names it. A field that is null is missing.

use std::borrow::Cow;
use std::ops::RangeInclusive;
use std::vec::IntoIter;

use chrono::{DateTime, Datelike, Timelike, Utc};
use serde::de::value::{BorrowedStrDeserializer, CowStrDeserializer};
use serde::de::{
    DeserializeSeed, Deserializer, Error, Expected, IntoDeserializer as _, MapAccess, SeqAccess,
    Unexpected, Visitor,
};
use serde::{Deserialize, forward_to_deserialize_any};
use uuid::Uuid;

use super::cause::ParseError;
use crate::words::UnknownWord;

/// Maximum length of a text field, in bytes.
pub const MAX_TEXT_BYTES: usize = 4096;
/// Maximum length of an id, in bytes. PostgreSQL's indexes accept entries of at most 2704 bytes.
pub const MAX_ID_BYTES: usize = 1024;

/// A JSON value, borrowed if possible. Fractions and lists, which no field uses, are
/// [`Value::Other`].
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

impl Value<'_> {
    /// The value as a whole number that is not negative.
    pub(super) fn unsigned(&self) -> Option<u64> {
        match self {
            Value::Whole(number) => u64::try_from(*number).ok(),
            Value::Large(number) => Some(*number),
            _ => None,
        }
    }
}

/// The fields of a JSON object by name, each until it is taken. No key appears twice, also in
/// nested objects.
pub(super) struct Fields<'a>(Vec<(Cow<'a, str>, Option<Value<'a>>)>);

impl<'a> Fields<'a> {
    /// Parses `body` as exactly one JSON object.
    pub(super) fn of(body: &'a [u8]) -> Result<Self, ParseError> {
        let value =
            serde_json::from_slice(body).map_err(|error| ParseError::Json(error.to_string()))?;
        Self::from_value(value, "data")
    }

    pub(super) fn from_value(value: Value<'a>, what: &'static str) -> Result<Self, ParseError> {
        match value {
            Value::Object(fields) => Ok(fields),
            _ => Err(ParseError::field(what, "must be a JSON object")),
        }
    }

    /// Reads the struct whose fields these are.
    pub(super) fn read<T: Deserialize<'a>>(self) -> Result<T, ParseError> {
        T::deserialize(self)
    }

    pub(super) fn take(&mut self, name: &'static str) -> Option<Value<'a>> {
        let at = self.0.binary_search_by(|(key, _)| key.as_ref().cmp(name)).ok()?;
        self.0[at].1.take().filter(|value| !matches!(value, Value::Null))
    }

    pub(super) fn optional_text(
        &mut self,
        name: &'static str,
    ) -> Result<Option<String>, ParseError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Text(text)) => checked_text(name, text.into_owned()).map(Some),
            Some(_) => Err(ParseError::field(name, "must be a string")),
        }
    }

    /// The whole number of an object that has only this field.
    pub(super) fn only_number(mut self, name: &'static str) -> Result<u64, ParseError> {
        let value = self.take(name).ok_or_else(|| ParseError::field(name, "is missing"))?;
        let number = value.unsigned().ok_or_else(|| {
            ParseError::field(name, "must be a whole number of 64 bits that is not negative")
        })?;
        match self.0.into_iter().find(|(_, value)| value.is_some()) {
            None => Ok(number),
            Some((other, _)) => Err(ParseError::unknown_field(&other, &[])),
        }
    }

    /// The only field that is a whole number; none if several are.
    pub(super) fn only_whole(&self) -> Option<&Value<'a>> {
        let mut whole = self
            .0
            .iter()
            .filter_map(|(_, value)| value.as_ref())
            .filter(|value| matches!(value, Value::Whole(_) | Value::Large(_)));
        whole.next().filter(|_| whole.next().is_none())
    }
}

/// Serde's errors, as the fault of a field. [`Access`] adds the name of the field.
impl Error for ParseError {
    fn custom<T: std::fmt::Display>(problem: T) -> Self {
        ParseError::field("data", problem.to_string())
    }
    fn invalid_type(_: Unexpected<'_>, expected: &dyn Expected) -> Self {
        ParseError::custom(format_args!("must be {expected}"))
    }
    fn unknown_variant(word: &str, known: &'static [&'static str]) -> Self {
        ParseError::custom(UnknownWord { word: word.to_owned(), known })
    }
    fn unknown_field(name: &str, _: &'static [&'static str]) -> Self {
        ParseError::UnknownField(name.chars().take(100).collect())
    }
    fn missing_field(name: &'static str) -> Self {
        ParseError::field(name, "is missing")
    }
}

impl<'de> Deserializer<'de> for Fields<'de> {
    type Error = ParseError;

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        names: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, ParseError> {
        visitor.visit_map(Access { names, fields: self.0.into_iter(), current: None })
    }

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ParseError> {
        self.deserialize_struct("", &[], visitor)
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option unit
        unit_struct newtype_struct seq tuple tuple_struct map enum identifier ignored_any
    }
}

/// Gives a struct its fields, and its errors their names.
struct Access<'a> {
    /// The names of the struct's fields.
    names: &'static [&'static str],
    fields: IntoIter<(Cow<'a, str>, Option<Value<'a>>)>,
    /// The field whose value comes next.
    current: Option<(&'static str, Value<'a>)>,
}

impl<'de> MapAccess<'de> for Access<'de> {
    type Error = ParseError;

    fn next_key_seed<K: DeserializeSeed<'de>>(
        &mut self,
        seed: K,
    ) -> Result<Option<K::Value>, ParseError> {
        for (key, value) in self.fields.by_ref() {
            let Some(name) = self.names.iter().find(|name| **name == key) else {
                return seed.deserialize(CowStrDeserializer::new(key)).map(Some);
            };
            match value {
                None | Some(Value::Null) => {}
                Some(value) => {
                    self.current = Some((name, value));
                    return seed.deserialize(BorrowedStrDeserializer::new(name)).map(Some);
                }
            }
        }
        Ok(None)
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(
        &mut self,
        seed: V,
    ) -> Result<V::Value, ParseError> {
        let (name, value) = self.current.take().unwrap_or(("data", Value::Null));
        seed.deserialize(value).map_err(|error| match error {
            ParseError::Field { problem, .. } => ParseError::Field { name, problem },
            other => other,
        })
    }
}

impl<'de> Deserializer<'de> for Value<'de> {
    type Error = ParseError;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ParseError> {
        match self {
            Value::Null => visitor.visit_unit(),
            Value::Flag(flag) => visitor.visit_bool(flag),
            Value::Whole(number) => visitor.visit_i64(number),
            Value::Large(number) => visitor.visit_u64(number),
            Value::Text(text) => match checked(text, MAX_TEXT_BYTES).map_err(ParseError::custom)? {
                Cow::Borrowed(text) => visitor.visit_borrowed_str(text),
                Cow::Owned(text) => visitor.visit_string(text),
            },
            Value::Object(_) | Value::Other => Err(Error::invalid_type(Unexpected::Map, &visitor)),
        }
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ParseError> {
        visitor.visit_some(self)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        visitor: V,
    ) -> Result<V::Value, ParseError> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        _: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, ParseError> {
        match self {
            Value::Text(word) => visitor.visit_enum(
                checked(word, MAX_TEXT_BYTES).map_err(ParseError::custom)?.into_deserializer(),
            ),
            _ => Err(ParseError::custom("must be a string")),
        }
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf unit
        unit_struct seq tuple tuple_struct map struct identifier ignored_any
    }
}

/// Reads a UUID, as [`parse_uuid`] does.
pub(super) fn uuid<'de, D: Deserializer<'de>, T: From<Uuid>>(value: D) -> Result<T, D::Error> {
    let Text(text) = Text::deserialize(value)?;
    parse_uuid(&text).map(T::from).map_err(D::Error::custom)
}

/// Reads an instant, as [`parse_time`] does.
pub(super) fn time<'de, D: Deserializer<'de>, T: From<DateTime<Utc>>>(
    value: D,
) -> Result<T, D::Error> {
    let Text(text) = Text::deserialize(value)?;
    parse_time(&text).map(T::from).map_err(D::Error::custom)
}

/// Reads a whole number from `LEAST` to `i32::MAX`.
pub(super) fn number<'de, D: Deserializer<'de>, const LEAST: i32>(
    value: D,
) -> Result<i32, D::Error> {
    let Ok(Value::Whole(number)) = Value::deserialize(value) else {
        return Err(D::Error::custom("must be a whole number of 64 bits"));
    };
    let number = i32::try_from(number).ok().filter(|number| *number >= LEAST);
    number.ok_or_else(|| D::Error::custom(format_args!("must be between {LEAST} and {}", i32::MAX)))
}

/// Checks for text that PostgreSQL accepts: without NUL, and of limited length.
pub(super) fn checked_text<T: AsRef<str>>(name: &'static str, text: T) -> Result<T, ParseError> {
    checked(text, MAX_TEXT_BYTES).map_err(|problem| ParseError::field(name, problem))
}

/// Does the same as [`checked_text`] for an id.
pub(super) fn checked_id<T: AsRef<str>>(name: &'static str, id: T) -> Result<T, ParseError> {
    checked(id, MAX_ID_BYTES).map_err(|problem| ParseError::field(name, problem))
}

fn checked<T: AsRef<str>>(text: T, most: usize) -> Result<T, String> {
    if text.as_ref().contains('\0') {
        return Err("contains a NUL character".to_owned());
    }
    if text.as_ref().len() > most {
        return Err(format!("is longer than {most} bytes"));
    }
    Ok(text)
}

/// A UUID in its canonical hyphenated form, the only one that coderd writes and the only one of 36
/// characters.
pub(super) fn parse_uuid(text: &str) -> Result<Uuid, &'static str> {
    let id = Uuid::try_parse(text).ok().filter(|_| text.len() == uuid::fmt::Hyphenated::LENGTH);
    id.ok_or("must be a UUID like 00000000-0000-0000-0000-000000000000")
}

/// The years in which event times may be.
pub const YEARS: RangeInclusive<i32> = 1970..=9999;

/// An RFC 3339 instant within [`YEARS`], not finer than a microsecond. coderd's zero time (year 1)
/// means "unknown" and is not an instant.
pub(super) fn parse_time(text: &str) -> Result<DateTime<Utc>, String> {
    let at = DateTime::parse_from_rfc3339(text)
        .map_err(|error| format!("is not an RFC 3339 time: {error}"))?
        .to_utc();
    if !YEARS.contains(&at.year()) {
        return Err(format!("is outside the years {} to {}", YEARS.start(), YEARS.end()));
    }
    if !at.nanosecond().is_multiple_of(1000) || at.nanosecond() >= 1_000_000_000 {
        return Err("is finer than a microsecond or a leap second".to_owned());
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
        while let Some((Text(name), value)) = entries.next_entry()? {
            fields.push((name, Some(value)));
        }
        fields.sort_by(|(one, _), (other, _)| one.cmp(other));
        match fields.windows(2).find(|two| two[0].0 == two[1].0) {
            None => Ok(Value::Object(Fields(fields))),
            Some(two) => {
                let name: String = two[0].0.chars().take(100).collect();
                Err(A::Error::custom(format!("the field {name:?} occurs twice")))
            }
        }
    }
}

/// Text, borrowed unless it has escapes.
#[derive(Deserialize)]
struct Text<'a>(#[serde(borrow)] Cow<'a, str>);
