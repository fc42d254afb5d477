//! HTTP requests: queries and bodies, read as every path of the API reads them.

use std::fmt::Debug;

use axum::http::Uri;
use chrono::{DateTime, Datelike as _, Utc};
use reqwest::Url;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use tallyline::api::{ProblemBody, body_of, query_of};
use tallyline::ledger::ListActs;
use tallyline::operations::recover::{RecoverExecution, RecoverRequest};
use tallyline::operations::{
    CoderdCutOff, CountRejects, DiscardRejects, ListRejects, LogRange, PauseRequest, ProveRequest, RebuildExecution, RebuildRequest,
    ReplayExecution, Resubmit, RunAudit,
};
use utoipa::ToSchema;

/// The request's name, `?`, and its query.
pub fn query(input: &[u8]) -> bool {
    let text = String::from_utf8_lossy(input);
    let Some((which, query)) = text.trim_end_matches('\n').split_once('?') else { return false };
    let Ok(uri) = format!("/path?{query}").parse() else { return false };
    match which {
        "acts" => in_a_query::<ListActs>(&uri),
        "rejects" => in_a_query::<ListRejects>(&uri),
        "counts" => in_a_query::<CountRejects>(&uri),
        "proof" => in_a_query::<ProveRequest>(&uri),
        "pause" => in_a_query::<PauseRequest>(&uri),
        _ => false,
    }
}

fn in_a_query<T: DeserializeOwned + ToSchema + Serialize + PartialEq + Debug>(uri: &Uri) -> bool {
    match query_of::<T>(uri) {
        Ok(request) => {
            let fields = serde_json::to_value(&request).expect("JSON");
            bounds(&fields, &["from", "to"]);
            // as the command line sends it
            let mut url = Url::parse("http://h/path").expect("an address");
            for (name, value) in fields.as_object().expect("fields").iter().filter(|(_, value)| !value.is_null()) {
                url.query_pairs_mut().append_pair(name, &value.as_str().map_or_else(|| value.to_string(), str::to_owned));
            }
            let again = format!("/path?{}", url.query().unwrap_or_default()).parse().expect("an address");
            assert_eq!(query_of::<T>(&again), Ok(request), "{again}");
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
        b"resubmit" => in_a_body::<Resubmit>(body),
        b"discard" => in_a_body::<DiscardRejects>(body),
        b"audit" => in_a_body::<RunAudit>(body),
        b"replay" => in_a_body::<LogRange>(body),
        b"replay execution" => in_a_body::<ReplayExecution>(body),
        b"rebuild" => in_a_body::<RebuildRequest>(body),
        b"rebuild execution" => in_a_body::<RebuildExecution>(body),
        b"recover" => in_a_body::<RecoverRequest>(body),
        b"recover execution" => in_a_body::<RecoverExecution>(body),
        _ => false,
    }
}

fn in_a_body<T: DeserializeOwned + ToSchema + Serialize + PartialEq + Debug>(body: &[u8]) -> bool {
    match body_of::<T>(body) {
        Ok((request, reason)) => {
            let mut fields = serde_json::to_value(&request).expect("JSON");
            bounds(&fields, &["at"]);
            fields["reason"] = reason.clone().into();
            assert_eq!(body_of::<T>(fields.to_string().as_bytes()), Ok((request, reason)), "{fields}");
            true
        }
        Err(problem) => {
            named::<T>(&problem);
            false
        }
    }
}

/// Checks that PostgreSQL can store and look up every accepted value. [`crate::operators`] reads the ends of ranges, which are texts.
fn bounds(fields: &Value, instants: &[&str]) {
    assert!(!holds_nul(fields), "NUL in {fields}");
    for name in instants {
        if let Some(instant) = fields[*name].as_str().and_then(|text| text.parse::<DateTime<Utc>>().ok()) {
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
    let unnamed = ["the body is no JSON object", "Failed to deserialize query string"];
    assert!(
        problem.field.is_some() || unnamed.iter().any(|begin| problem.message.starts_with(begin)),
        "{what}: no field is named in {:?}",
        problem.message
    );
}
