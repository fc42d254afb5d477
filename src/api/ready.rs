//! `GET /healthz`: the process is alive. `GET /readyz`: which of the things that it depends on is missing, and why.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use serde::Serialize;
use tokio::sync::Mutex;
use tokio::time::Instant;
use utoipa::ToSchema;

use super::recent::Recent;
use super::{Freshness, Own, Serving, lease};
use crate::cause;
use crate::coderd;
use crate::event::Topic;

/// How long each dependency may take to answer.
const ANSWER: Duration = Duration::from_secs(3);

/// How long the ledger's pool may take to answer before a connection beside it is asked for the reason.
const POOL_ANSWER: Duration = Duration::from_secs(1);

/// Alive for as long as this is answered.
pub(super) async fn healthz() -> Json<Alive> {
    Json(Alive { alive: true })
}

/// The process is alive.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Alive {
    /// True.
    alive: bool,
}

/// What the process depends on.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub(super) struct Readiness {
    /// Whether every check is well.
    ready: bool,
    /// By name; which there are depends on the process's roles.
    checks: BTreeMap<&'static str, Check>,
}

/// One dependency: whether it is well, and why it is not or how it stands.
#[derive(Clone, Debug, Serialize, ToSchema)]
struct Check {
    /// Whether it is well.
    ok: bool,
    /// Why it is not, or how it stands.
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

/// What answers `/readyz`: however many ask, each dependency is asked once a second at most, on connections that stay open.
pub(super) struct Probe {
    pub(super) own: Own,
    recent: Recent<Readiness>,
    /// The connection to coderd's database, while nothing asks on it.
    source: Mutex<Option<coderd::Reader>>,
}

impl Probe {
    pub(super) fn new(own: Own) -> Self {
        Self { own, recent: Recent::default(), source: Mutex::default() }
    }
}

/// Ready only if every check is well.
pub(super) async fn readyz(State(serving): State<Arc<Serving>>) -> (StatusCode, Json<Readiness>) {
    let checks = async {
        let (mut checks, projections, holder) =
            tokio::join!(dependencies(&serving.probe), in_time(projections(&serving)), in_time(holder(&serving)));
        checks.extend([("projections", projections), ("metrics_lease", holder)]);
        readiness(checks)
    };
    answer(serving.probe.recent.get(Instant::now, checks).await)
}

/// The same for a process that does not serve: it folds nothing and shows no domain series.
pub(super) async fn own_readyz(State(probe): State<Arc<Probe>>) -> (StatusCode, Json<Readiness>) {
    let checks = async { readiness(dependencies(&probe).await) };
    answer(probe.recent.get(Instant::now, checks).await)
}

fn answer(readiness: Readiness) -> (StatusCode, Json<Readiness>) {
    (if readiness.ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }, Json(readiness))
}

fn readiness(checks: BTreeMap<&'static str, Check>) -> Readiness {
    Readiness { ready: checks.values().all(|check| check.ok), checks }
}

/// What a process depends on whether or not it serves, as far as its roles need it.
async fn dependencies(probe: &Probe) -> BTreeMap<&'static str, Check> {
    let own = &probe.own;
    let (ledger, log, coderd) = tokio::join!(
        async { in_time(ledger(own)).await.at(&own.addresses.ledger) },
        async { in_time(log(own)).await.at(&own.addresses.log) },
        source(probe),
    );
    let mut checks = BTreeMap::from([("ledger", ledger), ("log", log), ("pauses", pauses(own))]);
    checks.extend(recovery(own).await.map(|check| ("recovery", check)));
    checks.extend(coderd.map(|check| ("coderd", check)));
    checks.extend(publisher(own).map(|check| ("publisher", check)));
    checks.extend(partitions(own).map(|check| ("partitions", check)));
    checks
}

async fn in_time(check: impl Future<Output = Check>) -> Check {
    tokio::time::timeout(ANSWER, check).await.unwrap_or_else(|_| Check::missing(format!("no answer within {} seconds", ANSWER.as_secs())))
}

async fn ledger(own: &Own) -> Check {
    match tokio::time::timeout(POOL_ANSWER, own.ledger.check_schema()).await {
        Ok(Ok(())) => Check::well("reachable, and its schema fits"),
        Ok(Err(error)) => Check::missing(error),
        // the pool hides why it has no connection
        Err(_) => match own.ledger.reach().await {
            Ok(()) => Check::missing(format!("reachable, but no connection of the pool answered within {} second", POOL_ANSWER.as_secs())),
            Err(error) => Check::missing(cause::text(&error)),
        },
    }
}

async fn log(own: &Own) -> Check {
    for topic in Topic::ALL {
        if let Err(error) = own.log.partitions(topic).await {
            return Check::missing(format!("{topic}: {error}"));
        }
    }
    Check::well("reachable, and its topics are there")
}

async fn source(probe: &Probe) -> Option<Check> {
    let database = probe.own.coderd.as_ref()?;
    Some(in_time(reach(database, &probe.source)).await)
}

/// Asks on the connection that was opened before; one that no longer answers is replaced.
async fn reach(database: &coderd::Database, kept: &Mutex<Option<coderd::Reader>>) -> Check {
    let mut kept = kept.lock().await;
    if let Some(mut reader) = kept.take()
        && reader.now().await.is_ok()
    {
        *kept = Some(reader);
    } else {
        match database.connect().await {
            Ok(reader) => *kept = Some(reader),
            Err(error) => return Check::missing(error),
        }
    }
    Check::well(format!("{} is reachable", database.address()))
}

async fn projections(serving: &Serving) -> Check {
    let end = match serving.api.own.ledger.head().await {
        Ok(head) => head.number,
        Err(error) => return Check::missing(format!("how far they are behind is not known: {}", cause::text(&error))),
    };
    let mut standings = Vec::new();
    for (stage, standing) in [("metrics", *serving.api.metrics.watch().borrow()), ("licenses", *serving.api.licenses.watch().borrow())] {
        let Some(standing) = standing else { return Check::missing(format!("{stage}: nothing is folded")) };
        let behind = (end - standing.sequence.number).max(0);
        standings.push(format!("{stage} at {}, {behind} behind", standing.sequence));
        if standing.as_of.is_none() {
            return Check::missing(format!("{}: the ledger's end was not reached yet", standings.join("; ")));
        }
    }
    let why = standings.join("; ");
    match serving.freshness() {
        Freshness::Current => Check::well(why),
        Freshness::Rebuilding => Check::well(format!("{why}: an operator has it folded anew, and the state before is shown meanwhile")),
        Freshness::Behind => {
            Check::missing(format!("{why}: the ledger's end was not reached for {} seconds", serving.settings.fresh.as_secs()))
        }
    }
}

/// Only while a ledger that was restored from a backup catches up.
async fn recovery(own: &Own) -> Option<Check> {
    let asked = tokio::time::timeout(ANSWER, own.ledger.recovering()).await;
    asked.ok()?.ok()?.map(Check::missing)
}

/// Also whether the vendor can be reached.
fn publisher(own: &Own) -> Option<Check> {
    let begun = own.publisher.as_ref()?;
    let Some(shown) = begun.get() else { return Some(Check::missing("not begun: it needs ledger, log and the deployment's id first")) };
    let condition = shown.get();
    Some(if condition.is_healthy() { Check::well(condition) } else { Check::missing(condition) })
}

fn partitions(own: &Own) -> Option<Check> {
    let stopped = own.stopped_partitions.as_ref()?.lock().unwrap_or_else(PoisonError::into_inner).clone();
    let why: Vec<String> = stopped.iter().map(|(partition, why)| format!("{partition}: {why}")).collect();
    Some(if why.is_empty() { Check::well("none is stopped") } else { Check::missing(why.join("; ")) })
}

/// What is paused is as its operators want it: said, and no reason to be unready.
fn pauses(own: &Own) -> Check {
    let pauses: Vec<String> = own.paused.all().iter().map(ToString::to_string).collect();
    Check::well(if pauses.is_empty() { "nothing is paused".to_owned() } else { pauses.join("; ") })
}

async fn holder(serving: &Serving) -> Check {
    if serving.lease.held().is_some() {
        return Check::well("held by this process");
    }
    match serving.api.own.ledger.lease_holder(lease::NAME).await {
        Ok(Some(holder)) => Check::well(format!("held by {holder}")),
        Ok(None) => Check::missing("nobody holds it: no process shows the domain series"),
        Err(error) => Check::missing(format!("who holds it is not known: {}", cause::text(&error))),
    }
}
