//! `GET /healthz`: the process is alive. `GET /readyz`: missing dependencies, with reasons.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use serde::Serialize;
use tokio::sync::Mutex;
use tokio::time::Instant;
use utoipa::ToSchema;

use super::probe::{Check, Probe, Readiness};
use super::{ProcessHandles, Serving, Timeliness, lease};
use crate::cause;
use crate::coderd;
use crate::event::Topic;
use crate::ledger::{leases, recoveries, snapshots};

/// Timeout of one check.
const ANSWER: Duration = Duration::from_secs(3);

/// Timeout of the ledger's pool. After it, a separate connection finds the reason.
const POOL_ANSWER: Duration = Duration::from_secs(1);

/// Show whether the process is alive
#[utoipa::path(get, path = "/healthz", responses((status = 200, description = "It is alive.", body = Alive)))]
pub(super) async fn healthz() -> Json<Alive> {
    Json(Alive { alive: true })
}

/// The process is alive.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Alive {
    /// Always true.
    alive: bool,
}

/// Show whether the process is ready, with the reason of each failed check
#[utoipa::path(
    get,
    path = "/readyz",
    responses(
        (status = 200, description = "All checks passed.", body = Readiness),
        (status = 503, description = "A check failed.", body = Readiness),
    )
)]
pub(super) async fn readyz(State(serving): State<Arc<Serving>>) -> (StatusCode, Json<Readiness>) {
    let checks = async {
        let (mut checks, projections, holder) = tokio::join!(
            dependencies(&serving.probe),
            in_time(projections(&serving)),
            in_time(holder(&serving))
        );
        checks.extend([("projections", projections), ("metrics_lease", holder)]);
        readiness(checks)
    };
    answer(serving.probe.recent.get(Instant::now, checks).await)
}

/// The same for a process without the role `serve`, which has neither projections nor domain
/// series.
pub(super) async fn own_readyz(State(probe): State<Arc<Probe>>) -> (StatusCode, Json<Readiness>) {
    let checks = async { readiness(dependencies(&probe).await) };
    answer(probe.recent.get(Instant::now, checks).await)
}

fn answer(readiness: Readiness) -> (StatusCode, Json<Readiness>) {
    (
        if readiness.ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE },
        Json(readiness),
    )
}

fn readiness(checks: BTreeMap<&'static str, Check>) -> Readiness {
    Readiness { ready: checks.values().all(|check| check.ok), checks }
}

/// Checks of the dependencies that the process's roles need, apart from the role `serve`.
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
    tokio::time::timeout(ANSWER, check).await.unwrap_or_else(|_| {
        Check::missing(format!("no answer within {} seconds", ANSWER.as_secs()))
    })
}

async fn ledger(own: &ProcessHandles) -> Check {
    match tokio::time::timeout(POOL_ANSWER, own.ledger.check_schema()).await {
        Ok(Ok(())) => Check::well("reachable, and its schema fits"),
        Ok(Err(error)) => Check::missing(error),
        // the pool does not report why it has no connection
        Err(_) => match own.ledger.reach().await {
            Ok(()) => Check::missing(format!(
                "reachable, but no connection of the pool answered within {} second",
                POOL_ANSWER.as_secs()
            )),
            Err(error) => Check::missing(cause::text(&error)),
        },
    }
}

async fn log(own: &ProcessHandles) -> Check {
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

/// Checks over the open connection; replaces a broken one.
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
    let end = match serving.api.own.ledger.run(snapshots::head).await {
        Ok(head) => head.number,
        Err(error) => {
            return Check::missing(format!("ledger's end not readable: {}", cause::text(&error)));
        }
    };
    let mut texts = Vec::new();
    for (stage, freshness) in [
        ("metrics", *serving.api.metrics.watch().borrow()),
        ("licenses", *serving.api.licenses.watch().borrow()),
    ] {
        let Some(freshness) = freshness else {
            return Check::missing(format!("{stage}: nothing is folded"));
        };
        let behind = (end - freshness.sequence.number).max(0);
        texts.push(format!("{stage} at {}, {behind} behind", freshness.sequence));
        if freshness.as_of.is_none() {
            return Check::missing(format!(
                "{}: the ledger's end was not reached yet",
                texts.join("; ")
            ));
        }
    }
    let why = texts.join("; ");
    match serving.timeliness() {
        Timeliness::Current => Check::well(why),
        Timeliness::Rebuilding => Check::well(format!(
            "{why}: a rebuild is running; the previous state is shown until it ends"
        )),
        Timeliness::Behind => Check::missing(format!(
            "{why}: the ledger's end was not reached for {} seconds",
            serving.settings.fresh.as_secs()
        )),
    }
}

/// A failed check while a restored ledger catches up.
async fn recovery(own: &ProcessHandles) -> Option<Check> {
    let asked = tokio::time::timeout(ANSWER, own.ledger.run(recoveries::open)).await;
    asked.ok()?.ok()?.map(Check::missing)
}

/// The publisher's condition, which reports an unreachable vendor.
fn publisher(own: &ProcessHandles) -> Option<Check> {
    let cell = own.publisher.as_ref()?;
    let Some(handle) = cell.get() else {
        return Some(Check::missing(
            "not started: it waits for ledger, log and the deployment's id first",
        ));
    };
    let condition = handle.get();
    Some(if condition.is_healthy() { Check::well(condition) } else { Check::missing(condition) })
}

fn partitions(own: &ProcessHandles) -> Option<Check> {
    let stopped =
        own.stopped_partitions.as_ref()?.lock().unwrap_or_else(PoisonError::into_inner).clone();
    let why: Vec<String> =
        stopped.iter().map(|(partition, why)| format!("{partition}: {why}")).collect();
    Some(if why.is_empty() {
        Check::well("none is stopped")
    } else {
        Check::missing(why.join("; "))
    })
}

/// Pauses are reported but do not make the process unready, because operators want them.
fn pauses(own: &ProcessHandles) -> Check {
    let pauses: Vec<String> = own.paused.all().iter().map(ToString::to_string).collect();
    Check::well(if pauses.is_empty() { "nothing is paused".to_owned() } else { pauses.join("; ") })
}

async fn holder(serving: &Serving) -> Check {
    if serving.lease.held().is_some() {
        return Check::well("held by this process");
    }
    match serving.api.own.ledger.run(async |conn| leases::holder(conn, lease::NAME).await).await {
        Ok(Some(holder)) => Check::well(format!("held by {holder}")),
        Ok(None) => Check::missing("not held: no process shows the domain series"),
        Err(error) => Check::missing(format!("holder not readable: {}", cause::text(&error))),
    }
}
