//! Reads requests strictly: serde rejects unknown and repeated fields. Fields come from the path,
//! and from the query or the body. A change has the field `reason` beside those of its type.

use std::fmt::Display;
use std::sync::Arc;

use axum::body::to_bytes;
use axum::extract::{FromRequest, RawPathParams, Request};
use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderMap, Method, StatusCode};
use axum::{RequestExt as _, body::Body};
use serde::de::value::MapDeserializer;
use serde::de::{DeserializeOwned, Deserializer, MapAccess, Visitor};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use serde_json::value::{RawValue, to_raw_value};

use super::Serving;
use super::answer::{Problem, ProblemBody};
use super::tokens::Caller;
use crate::operations::{Actor, reason};

/// Maximum size of a request body, in bytes.
const MAX_BODY_BYTES: usize = 1024 * 1024;

/// A request and its actor. A read may have a nameless actor.
pub(super) struct Received<T> {
    pub(super) request: T,
    pub(super) actor: Actor,
}

impl<T: DeserializeOwned + Serialize> FromRequest<Arc<Serving>> for Received<T> {
    type Rejection = Problem;

    async fn from_request(mut request: Request, _: &Arc<Serving>) -> Result<Self, Problem> {
        let path = request
            .extract_parts::<RawPathParams>()
            .await
            .map_err(|error| Problem::wrong(error.to_string()))?;
        let path = path.iter().map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
        let (mut parts, body) = request.into_parts();
        let query = parts.uri.query().unwrap_or_default();
        let (request, reason) = match parts.method {
            Method::POST if !query.is_empty() => {
                return Err(Problem::wrong(format!(
                    "the query {query:?} is not expected: put the fields into the body"
                )));
            }
            Method::POST => of_body(path, &bytes(&parts.headers, body).await?)?,
            _ => of_query(path, query)?,
        };
        let name = match parts.extensions.remove::<Caller>() {
            _ if parts.method.is_safe() && reason.is_some() => {
                return Err(Problem::field("reason", "unknown field `reason`"));
            }
            Some(Caller(Some(name))) => name,
            _ if parts.method.is_safe() => String::new(),
            // the guard rejects changes by callers without a name
            _ => return Err(Problem::unauthorized()),
        };
        Ok(Self { request, actor: Actor { name, reason: reason.unwrap_or_default() } })
    }
}

/// Reads the request and the reason in this query, as every path does.
pub fn query_of<T: DeserializeOwned + Serialize>(
    query: &str,
) -> Result<(T, Option<String>), ProblemBody> {
    of_query(Vec::new(), query).map_err(ProblemBody::from)
}

/// Reads the request and the reason in this body, as every path does.
pub fn body_of<T: DeserializeOwned + Serialize>(
    body: &[u8],
) -> Result<(T, Option<String>), ProblemBody> {
    of_body(Vec::new(), body).map_err(ProblemBody::from)
}

fn of_query<T: DeserializeOwned + Serialize>(
    path: Vec<(String, String)>,
    query: &str,
) -> Result<(T, Option<String>), Problem> {
    let mut fields = path;
    fields.extend(form_urlencoded::parse(query.as_bytes()).into_owned());
    let reason = take_reason(&mut fields)?;
    let has_nul = fields.iter().any(|(_, value)| value.contains('\0'));
    let texts = form_urlencoded::Serializer::new(String::new()).extend_pairs(fields).finish();
    let fields = serde_urlencoded::Deserializer::new(form_urlencoded::parse(texts.as_bytes()));
    // a value comes from one text, so the search for a NUL in the request costs only a wrong one
    let request = if has_nul { typed(fields)? } else { read(fields)? };
    Ok((request, checked(reason)?))
}

fn of_body<T: DeserializeOwned + Serialize>(
    path: Vec<(String, String)>,
    body: &[u8],
) -> Result<(T, Option<String>), Problem> {
    let mut fields = Vec::new();
    for (name, value) in path {
        fields.push((name, to_raw_value(&value).map_err(|error| Problem::internal(&error))?));
    }
    if !body.is_empty() {
        let object = serde_json::from_slice::<Object>(body);
        fields.extend(
            object
                .map_err(|error| Problem::wrong(format!("the body is not a JSON object: {error}")))?
                .0,
        );
    }
    let reason =
        take_reason(&mut fields)?.map(|reason| serde_json::from_str(reason.get())).transpose();
    let reason = reason.map_err(|_| Problem::field("reason", "must be a text"))?;
    let values = fields.iter().map(|(name, value)| (name.as_str(), &**value));
    Ok((typed(MapDeserializer::<_, serde_json::Error>::new(values))?, checked(reason)?))
}

/// The fields of a JSON object, in order and possibly repeated, with unparsed values.
struct Object(Vec<(String, Box<RawValue>)>);

impl<'de> Deserialize<'de> for Object {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Fields;
        impl<'de> Visitor<'de> for Fields {
            type Value = Object;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Object, A::Error> {
                let mut fields = Vec::new();
                while let Some(field) = entries.next_entry()? {
                    fields.push(field);
                }
                Ok(Object(fields))
            }
        }
        deserializer.deserialize_map(Fields)
    }
}

/// The body, which must be JSON unless it is empty.
async fn bytes(headers: &HeaderMap, body: Body) -> Result<axum::body::Bytes, Problem> {
    let too_large = || format!("the body cannot be read, or is larger than {MAX_BODY_BYTES} bytes");
    let bytes = to_bytes(body, MAX_BODY_BYTES)
        .await
        .map_err(|_| Problem::new(StatusCode::PAYLOAD_TOO_LARGE, too_large()))?;
    let content_type =
        headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    if !bytes.is_empty()
        && content_type.split(';').next().unwrap_or_default().trim() != "application/json"
    {
        return Err(Problem::new(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            "the body must be JSON: set content-type: application/json",
        ));
    }
    Ok(bytes)
}

fn take_reason<V>(fields: &mut Vec<(String, V)>) -> Result<Option<V>, Problem> {
    let at = fields.iter().position(|(name, _)| name == "reason");
    let reason = at.map(|at| fields.remove(at).1);
    match fields.iter().any(|(name, _)| name == "reason") {
        true => Err(Problem::field("reason", "duplicate field `reason`")),
        false => Ok(reason),
    }
}

fn checked(text: Option<String>) -> Result<Option<String>, Problem> {
    match text {
        Some(text) if text.contains('\0') => Err(Problem::field("reason", NUL)),
        Some(text) => reason(&text).map(Some).map_err(|problem| Problem::field("reason", problem)),
        None => Ok(None),
    }
}

/// PostgreSQL cannot store it in a text.
const NUL: &str = "contains a NUL character";

fn typed<'de, T: DeserializeOwned + Serialize, D: Deserializer<'de, Error: Display>>(
    fields: D,
) -> Result<T, Problem> {
    let request: T = read(fields)?;
    let written = serde_json::to_value(&request).map_err(|error| Problem::internal(&error))?;
    match written.as_object().into_iter().flatten().find(|(_, value)| has_nul(value)) {
        Some((name, _)) => Err(Problem::field(name, NUL)),
        None => Ok(request),
    }
}

fn read<'de, T: Deserialize<'de>, D: Deserializer<'de, Error: Display>>(
    fields: D,
) -> Result<T, Problem> {
    serde_path_to_error::deserialize(fields).map_err(|error| wrong(&error))
}

fn has_nul(value: &Value) -> bool {
    match value {
        Value::String(text) => text.contains('\0'),
        Value::Array(values) => values.iter().any(has_nul),
        Value::Object(fields) => fields.values().any(has_nul),
        Value::Null | Value::Bool(_) | Value::Number(_) => false,
    }
}

fn wrong(error: &serde_path_to_error::Error<impl Display>) -> Problem {
    let message = error.inner().to_string();
    // a position in the value of one field
    let message = message.split(" at line ").next().unwrap_or_default();
    let path = error.path().to_string();
    let named = |begin| message.strip_prefix(begin)?.split('`').next();
    // only an unknown field can already be part of the path
    let field = match named("missing field `")
        .or_else(|| named("duplicate field `"))
        .or_else(|| named("unknown field `"))
    {
        Some(name) if path == "." => name.to_owned(),
        Some(name) if !message.starts_with("unknown") => format!("{path}.{name}"),
        None if path == "." => return Problem::wrong(message),
        _ => path,
    };
    Problem::field(&field, message)
}

#[cfg(test)]
mod tests {
    use chrono::{DateTime, Utc};
    use serde_json::json;
    use uuid::Uuid;

    use super::*;
    use crate::operations::{OUTSIDE_YEARS, exact_instant};

    #[derive(Debug, PartialEq, Deserialize, Serialize)]
    #[serde(deny_unknown_fields)]
    struct Window {
        #[serde(deserialize_with = "exact_instant")]
        start: DateTime<Utc>,
        source: Option<Uuid>,
        days: Option<Days>,
        limit: Option<u16>,
        #[serde(flatten)]
        which: Which,
        inner: Option<Inner>,
    }

    #[derive(Debug, PartialEq, Deserialize, Serialize)]
    struct Which {
        deep: Option<String>,
    }

    #[derive(Debug, PartialEq, Deserialize, Serialize)]
    #[serde(rename_all = "lowercase")]
    enum Days {
        Whole,
    }

    #[derive(Debug, PartialEq, Deserialize, Serialize)]
    #[serde(deny_unknown_fields)]
    struct Inner {
        text: String,
    }

    const START: &str = "start=2025-07-01T00:00:00Z";

    fn field(query: &str) -> String {
        query_of::<Window>(query).unwrap_err().field.expect("a field")
    }

    #[test]
    fn a_query_is_read_as_its_type() {
        let all = "start=2025-07-01T02:00:00.000001%2B02:00&source=00000000-0000-0000-0000-0000000000d1&days=whole&limit=7&deep=true&reason=x";
        let start = "2025-07-01T00:00:00.000001Z".parse().unwrap();
        let (source, days, which) =
            (Some(Uuid::from_u128(0xd1)), Some(Days::Whole), Which { deep: Some("true".into()) });
        let window = Window { start, source, days, limit: Some(7), which, inner: None };
        assert_eq!(query_of(all), Ok((window, Some("x".to_owned()))));
        let least = Window {
            start,
            source: None,
            days: None,
            limit: None,
            which: Which { deep: None },
            inner: None,
        };
        assert_eq!(query_of("start=2025-07-01T00:00:00.000001Z"), Ok((least, None)));
    }

    #[test]
    fn a_wrong_field_of_a_query_is_named() {
        for (query, named) in
            [("", "start"), ("start=x&start=y", "start"), ("reason=x&reason=y", "reason")]
        {
            assert_eq!(field(query), named, "{query}");
        }
        let wrong = [
            "strat=x",
            "days=half",
            "source=x",
            "limit=x",
            "limit=-1",
            "limit=65536",
            "limit=",
            "inner=x",
            "deep=a%00",
            "reason=a%00",
        ];
        for wrong in wrong {
            assert_eq!(
                field(&format!("{START}&{wrong}")),
                wrong.split('=').next().unwrap(),
                "{wrong}"
            );
        }
        for wrong in ["", "2025-07-01", "1751328000", "2025-02-30T00:00:00Z", "2025-07-01T00:00:00"]
        {
            assert_eq!(field(&format!("start={wrong}")), "start", "{wrong}");
        }
        for far in ["-9000-01-01T00:00:00Z", "0001-01-01T00:00:00Z", "%2B12000-01-01T00:00:00Z"] {
            assert_eq!(
                query_of::<Window>(&format!("start={far}")).unwrap_err().message,
                OUTSIDE_YEARS,
                "{far}"
            );
        }
        let unescaped = query_of::<Window>("start=2025-07-01T00:00:00+02:00").unwrap_err();
        assert!(unescaped.message.contains("%2B"), "{unescaped:?}");
    }

    #[test]
    fn a_wrong_field_of_a_body_is_named_by_its_path() {
        let read = |inner: &str| {
            let body =
                format!(r#"{{"start": "2025-07-01T00:00:00Z", "inner": {inner}, "reason": "x"}}"#);
            body_of::<Window>(body.as_bytes())
                .map(|(window, _)| window.inner)
                .map_err(|problem| problem.field.unwrap())
        };
        assert_eq!(read(r#"{"text": "\\u0000"}"#), Ok(Some(Inner { text: "\\u0000".into() })));
        for (inner, named) in [
            (r#"{"text": 1}"#, "inner.text"),
            (r#"{"text": "a", "more": 1}"#, "inner.more"),
            ("{}", "inner.text"),
            (r#"{"text": "a", "\u0074ext": "a"}"#, "inner.text"),
            (r#"{"text": "a\u0000"}"#, "inner"),
            (r#"{"text": "a"}, "inner": null"#, "inner"),
            (r#"{"text": "a"}, "reason": "y""#, "reason"),
            (r#"{"text": "a"}, "strat": null"#, "strat"),
            ("1e999", "inner"),
        ] {
            assert_eq!(read(inner), Err(named.to_owned()), "{inner}");
        }
    }

    #[test]
    fn a_body_that_is_not_an_object_names_no_field() {
        let start = json!({ "start": "2025-07-01T00:00:00Z" });
        for text in
            ["[]", "1", "null", "{", r#"{"a": }"#, &format!("{start} {{}}"), &"[".repeat(1_000)]
        {
            let problem = body_of::<Window>(text.as_bytes()).unwrap_err();
            assert!(
                problem.field.is_none() && problem.message.contains("not a JSON object"),
                "{text}: {problem:?}"
            );
        }
    }
}
