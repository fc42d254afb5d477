//! `GET /healthz`: the process is alive. `GET /readyz`: which of the things that it depends on is missing, and why.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use serde::Serialize;

use super::known::FRESH;
use super::{Serving, lease};
use crate::event::Topic;

/// How long each dependency may take to answer.
const ANSWER: Duration = Duration::from_secs(3);

/// Alive for as long as this is answered.
pub(super) async fn healthz() -> Json<serde_json::Value> {
    Json(serde_json::json!({ "alive": true }))
}

#[derive(Debug, Serialize)]
pub(super) struct Readiness {
    ready: bool,
    checks: BTreeMap<&'static str, Check>,
}

/// One dependency: whether it is well, and why it is not or how it stands.
#[derive(Debug, Serialize)]
struct Check {
    ok: bool,
    why: String,
}

impl Check {
    fn well(why: impl Display) -> Self {
        Self { ok: true, why: why.to_string() }
    }

    fn missing(why: impl Display) -> Self {
        Self { ok: false, why: why.to_string() }
    }

    /// Says where to look when something is missing.
    fn at(self, address: &str) -> Self {
        if self.ok { self } else { Self::missing(format!("{address}: {}", self.why)) }
    }
}

/// Ready only if every check is well.
pub(super) async fn readyz(State(serving): State<Arc<Serving>>) -> (StatusCode, Json<Readiness>) {
    let addresses = &serving.api.addresses;
    let (ledger, log, coderd, projections, holder) = tokio::join!(
        async { in_time(ledger(&serving)).await.at(&addresses.ledger) },
        async { in_time(log(&serving)).await.at(&addresses.log) },
        coderd(&serving),
        in_time(projections(&serving)),
        in_time(holder(&serving))
    );
    let mut checks = BTreeMap::from([("ledger", ledger), ("log", log), ("projections", projections), ("metrics_lease", holder)]);
    checks.extend(recovery(&serving).await.map(|check| ("recovery", check)));
    checks.extend(coderd.map(|check| ("coderd", check)));
    checks.extend(publisher(&serving).map(|check| ("publisher", check)));
    checks.extend(partitions(&serving).map(|check| ("partitions", check)));
    let ready = checks.values().all(|check| check.ok);
    (if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }, Json(Readiness { ready, checks }))
}

async fn in_time(check: impl Future<Output = Check>) -> Check {
    tokio::time::timeout(ANSWER, check).await.unwrap_or_else(|_| Check::missing(format!("no answer within {} seconds", ANSWER.as_secs())))
}

async fn ledger(serving: &Serving) -> Check {
    if let Err(error) = serving.api.ledger.reach().await {
        return Check::missing(error);
    }
    match serving.api.ledger.check_schema().await {
        Ok(()) => Check::well("reachable, and its schema fits"),
        Err(error) => Check::missing(error),
    }
}

async fn log(serving: &Serving) -> Check {
    for topic in Topic::ALL {
        if let Err(error) = serving.api.log.partitions(topic).await {
            return Check::missing(format!("{topic}: {error}"));
        }
    }
    Check::well("reachable, and its topics are there")
}

async fn coderd(serving: &Serving) -> Option<Check> {
    let database = serving.api.coderd.as_ref()?;
    Some(in_time(reach(database)).await)
}

async fn reach(database: &crate::coderd::Database) -> Check {
    match database.connect().await {
        Ok(reader) => {
            reader.close().await;
            Check::well(format!("{} is reachable", database.address()))
        }
        Err(error) => Check::missing(error),
    }
}

async fn projections(serving: &Serving) -> Check {
    let end = match serving.api.ledger.head().await {
        Ok(head) => head.sequence,
        Err(error) => return Check::missing(format!("how far they are behind is not known: {error}")),
    };
    let mut standings = Vec::new();
    for (stage, standing) in [("metrics", *serving.api.metrics.watch().borrow()), ("licenses", *serving.api.licenses.watch().borrow())] {
        let Some(standing) = standing else { return Check::missing(format!("{stage}: nothing is folded")) };
        let behind = (end - standing.sequence).max(0);
        standings.push(format!("{stage} at {}, {behind} behind", standing.sequence));
        if standing.as_of.is_none() {
            return Check::missing(format!("{}: the ledger's end was not reached yet", standings.join("; ")));
        }
    }
    let fresh = serving.known.is_fresh();
    let why = standings.join("; ");
    if fresh {
        Check::well(why)
    } else {
        Check::missing(format!("{why}: the ledger's end was not reached for {} seconds", FRESH.as_secs()))
    }
}

/// Only while a ledger that was restored from a backup catches up.
async fn recovery(serving: &Serving) -> Option<Check> {
    let asked = tokio::time::timeout(ANSWER, serving.api.ledger.recovering()).await;
    asked.ok()?.ok()?.map(Check::missing)
}

/// Also whether the vendor can be reached.
fn publisher(serving: &Serving) -> Option<Check> {
    let begun = serving.api.publisher.as_ref()?;
    let Some(shown) = begun.get() else { return Some(Check::missing("not begun: it needs ledger, log and the deployment's id first")) };
    let condition = shown.get();
    Some(if condition.is_healthy() { Check::well(condition) } else { Check::missing(condition) })
}

fn partitions(serving: &Serving) -> Option<Check> {
    let stopped = serving.api.stopped_partitions.as_ref()?.lock().unwrap_or_else(PoisonError::into_inner).clone();
    let why: Vec<String> = stopped.iter().map(|(partition, why)| format!("{partition} is stopped: {why}")).collect();
    Some(if why.is_empty() { Check::well("none is stopped") } else { Check::missing(why.join("; ")) })
}

async fn holder(serving: &Serving) -> Check {
    if serving.lease.held().is_some() {
        return Check::well("held by this process");
    }
    match serving.api.ledger.lease_holder(lease::NAME).await {
        Ok(Some(holder)) => Check::well(format!("held by {holder}")),
        Ok(None) => Check::missing("nobody holds it: no process shows the domain series"),
        Err(error) => Check::missing(format!("who holds it is not known: {error}")),
    }
}
