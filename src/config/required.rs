//! Checks required settings, and settings that depend on each other.

use std::net::SocketAddr;
use std::path::Path;

use chrono::{DateTime, Utc};

use super::Secret;
use super::mistakes::{Mistakes, Place};
use super::settings::Values;

/// Checks properties, given by name and by value if the value is literal. Returns the index of each
/// wrong property, with a text that continues its name and contains no value.
pub type PropertyFaults = fn(&[(&str, Option<&str>)]) -> Vec<(usize, String)>;

pub(super) fn check(values: &Values, file: &Path, mistakes: &mut Mistakes) {
    let place = Place::File(file.to_owned(), None);
    let mut require = |key: &str, reason: &str| {
        if values.is_missing(key) {
            mistakes.add(&place, key, format!("is missing: {reason}"));
        }
    };
    require("ledger.url", "every command needs the ledger");
    if values.text("log.kind") == Some("kafka") {
        require("kafka.brokers", "log.kind is kafka");
    }
    let roles = values.entries.get("roles").and_then(|(roles, _)| roles.as_array());
    for role in ["collect", "publish"] {
        if roles.is_some_and(|roles| roles.iter().any(|name| name == role)) {
            require("source.coderd_url", &format!("the role {role} reads coderd's database"));
        }
    }
    signing_key(values, mistakes);
    listeners(values, mistakes);
    times(values, mistakes);
}

/// The signing key must be one of the verification keys.
fn signing_key(values: &Values, mistakes: &mut Mistakes) {
    let Some(name) = values.text("log.signing_key") else { return };
    if values.is_missing(&format!("log.verification_keys.{name}")) {
        mistakes.add(
            &values.place("log.signing_key"),
            "log.signing_key",
            "must be the name of one of log.verification_keys",
        );
    }
}

/// Checks the properties. A property whose value is resolved later is checked only by name.
pub(super) fn properties(values: &Values, rule: PropertyFaults, mistakes: &mut Mistakes) {
    let entries: Vec<(&str, Option<&str>, &Place)> = values.table("kafka.properties").collect();
    let literal = |value: &str| Secret::new(value).literal().is_some();
    let properties: Vec<(&str, Option<&str>)> = entries
        .iter()
        .map(|(name, value, _)| (*name, value.filter(|value| literal(value))))
        .collect();
    for (index, fault) in rule(&properties) {
        let (name, _, place) = entries[index];
        mistakes.add(place, &format!("kafka.properties.{name}"), fault);
    }
}

/// Listeners beyond loopback need TLS, which is not implemented yet.
fn listeners(values: &Values, mistakes: &mut Mistakes) {
    let address = |key: &str| values.text(key).and_then(|text| text.parse::<SocketAddr>().ok());
    for key in ["serve.api_listen", "serve.metrics_listen", "telemetry.listen"] {
        if address(key).is_some_and(|address| !address.ip().is_loopback()) {
            let mut problem = "must be a loopback address, because TLS is not supported yet: listen on 127.0.0.1 behind a proxy".to_owned();
            if key.starts_with("serve.") && values.is_empty_table("serve.tokens") {
                problem.push_str("; it also needs serve.tokens");
            }
            mistakes.add(&values.place(key), key, problem);
        }
    }
    let (api, metrics) = (address("serve.api_listen"), address("serve.metrics_listen"));
    if api == metrics && api.is_some_and(|address| address.port() != 0) {
        mistakes.add(
            &values.place("serve.metrics_listen"),
            "serve.metrics_listen",
            "must differ from serve.api_listen",
        );
    }
}

/// Histograms cannot begin before collection, because earlier builds are missing.
fn times(values: &Values, mistakes: &mut Mistakes) {
    let time = |key: &str| values.text(key).and_then(|text| text.parse::<DateTime<Utc>>().ok());
    if let (Some(introduced), Some(backfill)) =
        (time("source.introduced_at"), time("source.backfill_from"))
        && introduced < backfill
    {
        let problem = "must not be before source.backfill_from: builds that are not collected cannot be in the histograms";
        mistakes.add(&values.place("source.introduced_at"), "source.introduced_at", problem);
    }
}
