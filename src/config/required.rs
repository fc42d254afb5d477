//! What must be there and what must fit together.

use std::path::Path;

use super::PropertyFaults;
use super::given::Values;
use super::mistakes::{Mistakes, Place};
use super::value::Value;

pub(super) fn check(values: &Values, file: &Path, mistakes: &mut Mistakes) {
    let nowhere = Place::File(file.to_owned(), None);
    let mut needed = |key: &str, reason: &str| {
        if values.is_missing(key) {
            mistakes.add(&nowhere, key, format!("is missing: {reason}"));
        }
    };
    needed("ledger.url", "every command needs the ledger");
    if values.get("log.kind") == Some(&Value::Text("kafka".into())) {
        needed("kafka.brokers", "log.kind is kafka");
    }
    let roles = match values.get("roles") {
        Some(Value::Words(words)) => words.as_slice(),
        _ => &[],
    };
    for role in ["collect", "publish"] {
        if roles.iter().any(|given| given == role) {
            needed("source.coderd_url", &format!("the role {role} reads coderd's database"));
        }
    }
    signing_key(values, mistakes);
    listeners(values, mistakes);
    times(values, mistakes);
}

/// The key that signs is one of those that verify.
fn signing_key(values: &Values, mistakes: &mut Mistakes) {
    let Some(Value::Text(name)) = values.get("log.signing_key") else { return };
    if values.is_missing(&format!("log.verification_keys.{name}")) {
        mistakes.add(&values.place("log.signing_key"), "log.signing_key", "must be the name of one of log.verification_keys");
    }
}

/// A property whose value is looked up later is checked by its name alone.
pub(super) fn properties(values: &Values, rule: PropertyFaults, mistakes: &mut Mistakes) {
    let given: Vec<(&str, &Value, &Place)> = values.table("kafka.properties").collect();
    let literal = |value: &Value| if let Value::Secret(secret) = value { secret.literal().map(str::to_owned) } else { None };
    let literals: Vec<Option<String>> = given.iter().map(|(_, value, _)| literal(value)).collect();
    let properties: Vec<(&str, Option<&str>)> = given.iter().zip(&literals).map(|((name, ..), value)| (*name, value.as_deref())).collect();
    for (index, fault) in rule(&properties) {
        let (name, _, place) = given[index];
        mistakes.add(place, &format!("kafka.properties.{name}"), fault);
    }
}

/// Nothing listens beyond loopback without TLS, and TLS is not there yet.
fn listeners(values: &Values, mistakes: &mut Mistakes) {
    for key in ["serve.api_listen", "serve.metrics_listen"] {
        let Some(Value::Listen(address)) = values.get(key) else { continue };
        if !address.ip().is_loopback() {
            let mut problem =
                "lies beyond loopback, which needs TLS, and TLS is not there yet: listen on 127.0.0.1 behind a proxy".to_owned();
            if values.is_empty_table("serve.tokens") {
                problem.push_str("; it also needs serve.tokens");
            }
            mistakes.add(&values.place(key), key, problem);
        }
    }
    if let Some(Value::Listen(address)) = values.get("telemetry.listen")
        && !address.ip().is_loopback()
    {
        let problem = "lies beyond loopback, which needs TLS, and TLS is not there yet: listen on 127.0.0.1 behind a proxy";
        mistakes.add(&values.place("telemetry.listen"), "telemetry.listen", problem);
    }
    let (api, metrics) = (values.get("serve.api_listen"), values.get("serve.metrics_listen"));
    if api == metrics && !matches!(api, Some(Value::Listen(address)) if address.port() == 0) && api.is_some() {
        mistakes.add(&values.place("serve.metrics_listen"), "serve.metrics_listen", "must be another address than serve.api_listen");
    }
}

/// Builds that are not collected cannot be in the histograms.
fn times(values: &Values, mistakes: &mut Mistakes) {
    let (introduced, backfill) = (values.get("source.introduced_at"), values.get("source.backfill_from"));
    if let (Some(Value::Time(introduced)), Some(Value::Time(backfill))) = (introduced, backfill)
        && introduced < backfill
    {
        let problem = "must not be before source.backfill_from: builds that are not collected cannot be in the histograms";
        mistakes.add(&values.place("source.introduced_at"), "source.introduced_at", problem);
    }
}
