//! Reads a JSON object and rejects duplicate keys at any depth. serde_json alone would silently keep the last value.

use std::fmt::Display;

use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::error::Category;
use serde_json::{Map, Value};

use super::answer::Problem;

/// Reads an object without trailing text. The error for a duplicate key contains its path.
pub(super) fn read(bytes: &[u8]) -> Result<Map<String, Value>, Problem> {
    let no_object = |why: &dyn Display| Problem::wrong(format!("the body is no JSON object: {why}"));
    let mut reader = serde_json::Deserializer::from_slice(bytes);
    let read = serde_path_to_error::deserialize(&mut reader).map_err(|error| match error.inner().classify() {
        // all JSON types are accepted, so this error comes from `Twice`
        Category::Data => Problem::field(&error.path().to_string(), error.inner().to_string()),
        Category::Io | Category::Syntax | Category::Eof => no_object(error.inner()),
    })?;
    reader.end().map_err(|error| no_object(&error))?;
    match read {
        Once(Value::Object(fields)) => Ok(fields),
        Once(_) => Err(no_object(&"it is another value")),
    }
}

/// Any JSON value without duplicate keys.
struct Once(Value);

/// The value of a duplicate key. Deserializing it always fails, so the path of the error ends with the key.
struct Twice;

impl<'de> Deserialize<'de> for Once {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(OnceVisitor).map(Once)
    }
}

impl<'de> Deserialize<'de> for Twice {
    fn deserialize<D: Deserializer<'de>>(_: D) -> Result<Self, D::Error> {
        Err(D::Error::custom("given more than once"))
    }
}

struct OnceVisitor;

impl<'de> Visitor<'de> for OnceVisitor {
    type Value = Value;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a JSON value")
    }
    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }
    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
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
        Ok(value.into())
    }
    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(value.into())
    }
    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut values = Vec::new();
        while let Some(Once(value)) = items.next_element()? {
            values.push(value);
        }
        Ok(values.into())
    }
    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
        let mut fields = Map::new();
        while let Some(name) = entries.next_key::<String>()? {
            if fields.contains_key(&name) {
                entries.next_value::<Twice>()?;
            }
            let Once(value) = entries.next_value()?;
            fields.insert(name, value);
        }
        Ok(fields.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_given_once_is_had_as_it_stands() {
        let text = r#"{"a": {"b": [1, -2, 3.5, {"a": null}], "a": true}, "\u0062": "\ud83d\ude00", "": 18446744073709551615}"#;
        assert_eq!(read(text.as_bytes()), Ok(serde_json::from_str(text).unwrap()));
        assert_eq!(read(b" {} "), Ok(Map::new()));
    }

    #[test]
    fn what_stands_twice_is_named_by_its_path() {
        for (text, path) in [
            (r#"{"a": 1, "b": 2, "a": 1}"#, "a"),
            (r#"{"a": 1, "\u0061": 2}"#, "a"),
            (r#"{"rebuild": {"stage": "metrics", "stage": "licenses"}}"#, "rebuild.stage"),
            (r#"{"ids": [0, {"n": null, "n": null}]}"#, "ids[1].n"),
        ] {
            let problem = read(text.as_bytes()).unwrap_err();
            assert_eq!(problem.field.as_deref(), Some(path), "{text}");
            assert!(problem.message.starts_with("given more than once"), "{problem:?}");
        }
    }

    #[test]
    fn what_is_no_object_names_no_field() {
        for text in ["", "[]", "1", "null", "{", r#"{"a": }"#, r#"{"a": 1e999}"#, r#"{"a": 1} {}"#, &"[".repeat(1_000)] {
            let problem = read(text.as_bytes()).unwrap_err();
            assert!(problem.field.is_none() && problem.message.contains("no JSON object"), "{text}: {problem:?}");
        }
    }
}
