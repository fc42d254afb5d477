//! Reads requests strictly: an unknown field is an error. Queries and bodies are read into the same types, by the fields in the OpenAPI
//! document. A segment in braces in a path is a field, too.

use std::ops::Deref;
use std::sync::Arc;

use axum::body::{Body, to_bytes};
use axum::extract::{FromRequest, FromRequestParts, RawPathParams, Request};
use axum::http::header::CONTENT_TYPE;
use axum::http::request::Parts;
use axum::http::{HeaderMap, Method, StatusCode, Uri};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use utoipa::ToSchema;

use super::Serving;
use super::answer::{Problem, ProblemBody};
use super::object;
use super::route::fields;
use super::tokens::Caller;
use crate::operations::{Actor, CANNOT_BE, can_be, reason};

/// Maximum size of a request body, in bytes.
const MOST_BYTES: usize = 1024 * 1024;

/// A read request: fields of the path and the query.
pub(super) struct Query<T>(pub(super) T);

/// A change request and its actor. Fields come from the path and the body, or from the query if the method has no body. The reason is a
/// field beside those of the type.
pub(super) struct Change<T> {
    pub(super) asked: T,
    pub(super) actor: Actor,
}

impl<T: DeserializeOwned + ToSchema> FromRequestParts<Arc<Serving>> for Query<T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, serving: &Arc<Serving>) -> Result<Self, Problem> {
        typed(pairs::<T>(parts, serving).await?).map(Query)
    }
}

impl<T: DeserializeOwned + ToSchema> FromRequest<Arc<Serving>> for Change<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, serving: &Arc<Serving>) -> Result<Self, Problem> {
        let (mut parts, body) = request.into_parts();
        // the guard rejects callers without a name
        let Some(Caller(Some(name))) = parts.extensions.get::<Caller>().cloned() else { return Err(Problem::unauthorized()) };
        let mut given = pairs::<T>(&mut parts, serving).await?;
        if parts.method == Method::POST {
            if let Some(stray) = parts.uri.query().filter(|query| !query.is_empty()) {
                return Err(Problem::wrong(format!("what is asked for belongs into the body, not behind the path: {stray}")));
            }
            put_all(&mut given, fields_of(&parts.headers, body).await?)?;
        }
        let (asked, reason) = with_reason(given)?;
        Ok(Self { asked, actor: Actor { name, reason } })
    }
}

impl<T> Deref for Query<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0
    }
}

/// Reads the query of this address, as every path does.
pub fn query_of<T: DeserializeOwned + ToSchema>(uri: &Uri) -> Result<T, ProblemBody> {
    let read = texts(uri).and_then(|texts| typed(of_texts::<T>(texts.into_iter())?));
    read.map_err(ProblemBody::from)
}

/// Reads the change and the reason in this body, as every path does.
pub fn body_of<T: DeserializeOwned + ToSchema>(body: &[u8]) -> Result<(T, String), ProblemBody> {
    let mut given = Map::new();
    let read = object::read(body).and_then(|fields| put_all(&mut given, fields)).and_then(|()| with_reason(given));
    read.map_err(ProblemBody::from)
}

/// The fields of the path and the query, with their JSON types.
async fn pairs<T: ToSchema>(parts: &mut Parts, serving: &Arc<Serving>) -> Result<Map<String, Value>, Problem> {
    let path = RawPathParams::from_request_parts(parts, serving).await.map_err(|error| Problem::wrong(error.to_string()))?;
    let path = path.iter().map(|(name, value)| (name.to_owned(), value.to_owned()));
    of_texts::<T>(path.chain(texts(&parts.uri)?))
}

fn texts(uri: &Uri) -> Result<Vec<(String, String)>, Problem> {
    axum::extract::Query::try_from_uri(uri).map(|query| query.0).map_err(|error| Problem::wrong(error.to_string()))
}

fn of_texts<T: ToSchema>(texts: impl Iterator<Item = (String, String)>) -> Result<Map<String, Value>, Problem> {
    let (properties, _) = fields::<T>();
    let mut given = Map::new();
    for (name, text) in texts {
        let value = match properties.get(&name) {
            Some(schema) => of_kind(schema, &text).map_err(|problem| Problem::field(&name, problem))?,
            None => Value::from(text),
        };
        put(&mut given, name, value)?;
    }
    Ok(given)
}

fn put_all(given: &mut Map<String, Value>, fields: Map<String, Value>) -> Result<(), Problem> {
    fields.into_iter().try_for_each(|(name, value)| put(given, name, value))
}

fn put(given: &mut Map<String, Value>, name: String, value: Value) -> Result<(), Problem> {
    if given.contains_key(&name) {
        return Err(Problem::field(&name, "given more than once"));
    }
    if holds_nul(&value) {
        return Err(Problem::field(&name, "holds a NUL character"));
    }
    given.insert(name, value);
    Ok(())
}

/// Whether the value contains a NUL character, which PostgreSQL cannot store in a text.
fn holds_nul(value: &Value) -> bool {
    match value {
        Value::String(text) => text.contains('\0'),
        Value::Array(values) => values.iter().any(holds_nul),
        Value::Object(fields) => fields.values().any(holds_nul),
        Value::Null | Value::Bool(_) | Value::Number(_) => false,
    }
}

/// The fields of a JSON object; none for an empty body.
async fn fields_of(headers: &HeaderMap, body: Body) -> Result<Map<String, Value>, Problem> {
    let too_large = || format!("the body cannot be read, or is larger than {MOST_BYTES} bytes");
    let bytes = to_bytes(body, MOST_BYTES).await.map_err(|_| Problem::new(StatusCode::PAYLOAD_TOO_LARGE, too_large()))?;
    if bytes.is_empty() {
        return Ok(Map::new());
    }
    let content_type = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    if content_type.split(';').next().unwrap_or_default().trim() != "application/json" {
        return Err(Problem::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "the body must be JSON: set content-type: application/json"));
    }
    object::read(&bytes)
}

/// Converts a text to the JSON type of a field's schema.
fn of_kind(schema: &Value, text: &str) -> Result<Value, &'static str> {
    let is = |kind: &str| schema["type"] == kind || schema["type"].as_array().is_some_and(|kinds| kinds.iter().any(|found| found == kind));
    if is("integer") {
        text.parse::<i64>().map(Value::from).map_err(|_| "is no whole number")
    } else if is("boolean") {
        text.parse::<bool>().map(Value::from).map_err(|_| "is neither true nor false")
    } else {
        Ok(Value::from(text))
    }
}

/// The typed fields, and the separate reason.
fn with_reason<T: DeserializeOwned + ToSchema>(mut given: Map<String, Value>) -> Result<(T, String), Problem> {
    let reason = match given.remove("reason") {
        None => String::new(),
        Some(Value::String(text)) => reason(&text).map_err(|problem| Problem::field("reason", problem))?,
        Some(_) => return Err(Problem::field("reason", "must be a text")),
    };
    Ok((typed(given)?, reason))
}

/// The fields as their type.
fn typed<T: DeserializeOwned + ToSchema>(given: Map<String, Value>) -> Result<T, Problem> {
    let (properties, _) = fields::<T>();
    if let Some(name) = given.keys().find(|name| !properties.contains_key(*name)) {
        let known: Vec<&str> = properties.keys().map(String::as_str).collect();
        return Err(Problem::field(name, format!("is unknown; there are {}", known.join(", "))));
    }
    for (name, value) in &given {
        let instant = value.as_str().filter(|_| properties[name]["format"] == "date-time").and_then(|text| text.parse().ok());
        if instant.is_some_and(|instant| !can_be(instant)) {
            return Err(Problem::field(name, CANNOT_BE));
        }
    }
    let texts = Value::Object(given);
    serde_path_to_error::deserialize(&texts).map_err(|error| wrong(&properties, &texts, &error))
}

fn wrong(properties: &Map<String, Value>, given: &Value, error: &serde_path_to_error::Error<serde_json::Error>) -> Problem {
    let message = error.inner().to_string();
    let path = error.path().to_string();
    // the error for a missing field has no path; only its message contains the name
    let missing = message.strip_prefix("missing field `").and_then(|rest| rest.split('`').next());
    let field = match missing {
        Some(name) if path == "." => name.to_owned(),
        Some(name) => format!("{path}.{name}"),
        None if path == "." => return Problem::wrong(message),
        None => path,
    };
    let format = properties.get(&field).and_then(|schema| schema["format"].as_str());
    let shape = match format {
        Some("date-time") => "an instant such as 2025-07-01T00:00:00Z",
        Some("uuid") => "a UUID",
        _ => return Problem::field(&field, if missing.is_some() { "is needed".to_owned() } else { message }),
    };
    // an unescaped plus sign of an offset arrives as a blank
    let blank = format == Some("date-time") && given[&field].as_str().is_some_and(|text| text.contains(' '));
    Problem::field(
        &field,
        match missing {
            Some(_) => format!("is needed, {shape}"),
            None if blank => format!("is not {shape}: write an offset's + as %2B, or use Z"),
            None => format!("is not {shape}"),
        },
    )
}

#[cfg(test)]
mod tests {
    use chrono::{DateTime, Utc};
    use serde::Deserialize;
    use uuid::Uuid;

    use super::*;

    #[derive(Debug, PartialEq, Deserialize, ToSchema)]
    struct Asked {
        start: DateTime<Utc>,
        source: Option<Uuid>,
        days: Option<Days>,
        limit: Option<u16>,
        #[serde(flatten)]
        which: Which,
        inner: Option<Inner>,
    }

    #[derive(Debug, PartialEq, Deserialize, ToSchema)]
    struct Which {
        deep: Option<bool>,
    }

    #[derive(Debug, PartialEq, Deserialize, ToSchema)]
    #[serde(rename_all = "lowercase")]
    enum Days {
        Whole,
    }

    #[derive(Debug, PartialEq, Deserialize, ToSchema)]
    #[serde(deny_unknown_fields)]
    struct Inner {
        text: String,
    }

    fn read(text: &str) -> Result<Asked, Problem> {
        let uri = format!("/path?{text}").parse().unwrap();
        typed(of_texts::<Asked>(texts(&uri)?.into_iter())?)
    }

    fn field(text: &str) -> String {
        read(text).unwrap_err().field.expect("a field")
    }

    #[test]
    fn what_is_given_is_had() {
        let all = "start=2025-07-01T02:00:00.000001%2B02:00&source=00000000-0000-0000-0000-0000000000d1&days=whole&limit=7&deep=true";
        let start = "2025-07-01T00:00:00.000001Z".parse().unwrap();
        let (source, days) = (Some(Uuid::from_u128(0xd1)), Some(Days::Whole));
        assert_eq!(read(all), Ok(Asked { start, source, days, limit: Some(7), which: Which { deep: Some(true) }, inner: None }));
        let least = Asked { start, source: None, days: None, limit: None, which: Which { deep: None }, inner: None };
        assert_eq!(read("start=2025-07-01T00:00:00.000001Z"), Ok(least));
    }

    #[test]
    fn what_is_wrong_is_named() {
        const START: &str = "start=2025-07-01T00:00:00Z";
        for (text, named) in [("", "start"), ("strat=x", "strat"), ("start=x&start=y", "start")] {
            assert_eq!(field(text), named, "{text}");
        }
        for named in ["days=half", "source=x", "limit=x", "limit=-1", "limit=65536", "limit=", "deep=yes", "inner=x"] {
            assert_eq!(field(&format!("{START}&{named}")), named.split('=').next().unwrap(), "{named}");
        }
        for wrong in ["", "2025-07-01", "1751328000", "2025-02-30T00:00:00Z", "2025-07-01T00:00:00"] {
            assert_eq!(field(&format!("start={wrong}")), "start", "{wrong}");
        }
        for far in ["-9000-01-01T00:00:00Z", "0001-01-01T00:00:00Z", "%2B12000-01-01T00:00:00Z"] {
            assert_eq!(read(&format!("start={far}")).unwrap_err().message, CANNOT_BE, "{far}");
        }
        assert_eq!(field(&format!("{START}&inner=a%00")), "inner");
        let unescaped = read("start=2025-07-01T00:00:00+02:00").unwrap_err();
        assert!(unescaped.message.contains("%2B"), "{unescaped:?}");
    }

    #[test]
    fn a_body_gives_no_nul() {
        let wrong = |body: &str| {
            let mut given = Map::new();
            put_all(&mut given, object::read(body.as_bytes()).unwrap()).err().map(|problem| problem.field.unwrap())
        };
        assert_eq!(wrong(r#"{"a":1,"b":["x"]}"#), None);
        assert_eq!(wrong(r#"{"a":1,"b":[{"c":"x\u0000"}]}"#).as_deref(), Some("b"));
    }

    #[test]
    fn what_is_wrong_within_a_field_is_named_by_its_path() {
        let asked = |inner: Value| {
            let given = serde_json::json!({ "start": "2025-07-01T00:00:00Z", "inner": inner });
            typed::<Asked>(given.as_object().cloned().unwrap()).map(|asked| asked.inner).map_err(|problem| problem.field.unwrap())
        };
        assert_eq!(asked(serde_json::json!({ "text": "a" })), Ok(Some(Inner { text: "a".into() })));
        assert_eq!(asked(serde_json::json!({ "text": 1 })), Err("inner.text".into()));
        assert_eq!(asked(serde_json::json!({ "text": "a", "more": 1 })), Err("inner.more".into()));
        assert_eq!(asked(serde_json::json!({})), Err("inner.text".into()));
    }
}
