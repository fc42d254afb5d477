//! HTTP requests: queries and bodies, read as every path of the API reads them.

use std::fmt::Debug;

use chrono::{DateTime, Datelike as _, Utc};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use tallyline::api::{ProblemBody, body_of, query_of};
use tallyline::operations::recover::{RecoverExecution, RecoverRequest};
use tallyline::operations::{
    CoderdCutOff, CorrectionExecution, CorrectionRequest, CountRejects, DiscardRejects,
    ExplainRequest, ListActs, ListRejects, LogRange, PauseRequest, RebuildExecution,
    RebuildRequest, ReplayExecution, Resubmit, RunAudit, UnauditedPublishing,
};

/// The request's name, `?`, and its query.
pub fn query(input: &[u8]) -> bool {
    let text = String::from_utf8_lossy(input);
    let Some((which, query)) = text.trim_end_matches('\n').split_once('?') else { return false };
    match which {
        "acts" => in_a_query::<ListActs>(query),
        "rejects" => in_a_query::<ListRejects>(query),
        "counts" => in_a_query::<CountRejects>(query),
        "explain" => in_a_query::<ExplainRequest>(query),
        "pause" => in_a_query::<PauseRequest>(query),
        _ => false,
    }
}

fn in_a_query<T: DeserializeOwned + Serialize + PartialEq + Debug>(query: &str) -> bool {
    match query_of::<T>(query) {
        Ok((asked, reason)) => {
            let mut fields = serde_json::to_value(&asked).expect("JSON");
            bounds(&fields, &["from", "to"]);
            // as the command line sends it
            fields["reason"] = reason.clone().into();
            let mut again = form_urlencoded::Serializer::new(String::new());
            for (name, value) in
                fields.as_object().expect("fields").iter().filter(|(_, value)| !value.is_null())
            {
                again.append_pair(
                    name,
                    &value.as_str().map_or_else(|| value.to_string(), str::to_owned),
                );
            }
            let again = again.finish();
            assert_eq!(query_of::<T>(&again), Ok((asked, reason)), "{again}");
            true
        }
        Err(problem) => {
            named::<T>(&problem);
            false
        }
    }
}

/// A line with the request's name, then the body.
pub fn body(input: &[u8]) -> bool {
    let at = input.iter().position(|byte| *byte == b'\n').unwrap_or(input.len());
    let body = input.get(at + 1..).unwrap_or_default();
    match &input[..at] {
        b"pause" => in_a_body::<PauseRequest>(body),
        b"coderd cut off" => in_a_body::<CoderdCutOff>(body),
        b"unaudited" => in_a_body::<UnauditedPublishing>(body),
        b"resubmit" => in_a_body::<Resubmit>(body),
        b"discard" => in_a_body::<DiscardRejects>(body),
        b"audit" => in_a_body::<RunAudit>(body),
        b"replay" => in_a_body::<LogRange>(body),
        b"replay execution" => in_a_body::<ReplayExecution>(body),
        b"rebuild" => in_a_body::<RebuildRequest>(body),
        b"rebuild execution" => in_a_body::<RebuildExecution>(body),
        b"correction" => in_a_body::<CorrectionRequest>(body),
        b"correction execution" => in_a_body::<CorrectionExecution>(body),
        b"recover" => in_a_body::<RecoverRequest>(body),
        b"recover execution" => in_a_body::<RecoverExecution>(body),
        _ => false,
    }
}

fn in_a_body<T: DeserializeOwned + Serialize + PartialEq + Debug>(body: &[u8]) -> bool {
    match body_of::<T>(body) {
        Ok((request, reason)) => {
            let mut fields = serde_json::to_value(&request).expect("JSON");
            bounds(&fields, &["at"]);
            if let Some(reason) = &reason {
                fields["reason"] = reason.as_str().into();
            }
            assert_eq!(
                body_of::<T>(fields.to_string().as_bytes()),
                Ok((request, reason)),
                "{fields}"
            );
            true
        }
        Err(problem) => {
            named::<T>(&problem);
            false
        }
    }
}

/// Checks that PostgreSQL can store and look up every accepted value. [`crate::operators`] reads
/// the ends of ranges, which are texts.
fn bounds(fields: &Value, instants: &[&str]) {
    assert!(!holds_nul(fields), "NUL in {fields}");
    for name in instants {
        if let Some(instant) =
            fields[*name].as_str().and_then(|text| text.parse::<DateTime<Utc>>().ok())
        {
            assert!((1970..=9999).contains(&instant.year()), "{name} is {instant}");
        }
    }
}

fn holds_nul(value: &Value) -> bool {
    match value {
        Value::String(text) => text.contains('\0'),
        Value::Array(values) => values.iter().any(holds_nul),
        Value::Object(fields) => fields.values().any(holds_nul),
        Value::Null | Value::Bool(_) | Value::Number(_) => false,
    }
}

/// Checks that the problem and its place are reported.
fn named<T>(problem: &ProblemBody) {
    let what = std::any::type_name::<T>();
    assert!(!problem.message.is_empty(), "{what}");
    assert!(
        problem.field.is_some() || problem.message.starts_with("the body is not a JSON object"),
        "{what}: no field is named in {:?}",
        problem.message
    );
}
