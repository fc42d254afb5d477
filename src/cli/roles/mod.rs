//! Wires the roles of one process from its pipeline. Roles meet only in the log and in the ledger,
//! also within one process.

mod admit;
mod audit;
mod collect;
mod handles;
mod parts;
mod pauses;
mod processes;
mod prune;
mod publish;
mod serve;

pub use handles::Handles;
pub use parts::Listening;
pub use pauses::paused_gauge;
pub use prune::PruneTelemetry;

use std::time::Duration;

use parts::{Parts, Publishing};
use prometheus::Registry;
use serde_json::json;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::{error, info};

use super::{Exit, Failure};
use crate::audit::AuditTelemetry;
use crate::collectors;
use crate::config::{PublishMode, Role};
use crate::consumer::{Consumer, ConsumerTelemetry, GRACE};
use crate::operations::recover::RestoreMonitor;

/// Time for a role to end after the stop: its unfinished batch, open requests, the last snapshot.
const STOP_GRACE: Duration = Duration::from_secs(GRACE.as_secs() + 5);
/// Time to record the result of a request to the vendor after its timeout.
const RECORDING: Duration = Duration::from_secs(5);

/// Runs the pipeline's roles until `stop`. Logs unreachable dependencies and waits for them;
/// `/healthz` and `/readyz` answer meanwhile. `listening` gets the addresses of a serving process.
///
/// # Errors
/// A wrong setting or a broken invariant. In that case all roles have stopped.
pub async fn run(
    handles: Handles,
    stop: &CancellationToken,
    listening: impl FnOnce(Listening),
) -> Result<(), Failure> {
    let registry = Registry::new();
    let mut roles: JoinSet<Result<(), Failure>> = JoinSet::new();
    let internal = |error| Failure::new(Exit::Internal, error);
    let telemetry = ConsumerTelemetry::register(&registry).map_err(internal)?;
    let (pause_watcher, paused) =
        pauses::PauseWatcher::new(handles.ledger.ledger.clone(), &registry).map_err(internal)?;
    let consumer = Consumer::new(
        handles.log.log.clone(),
        handles.ledger.ledger.clone(),
        &handles.pipeline.log.group,
        telemetry,
    );
    let consumer = Consumer {
        paused: paused.clone(),
        ..consumer.with_stall_limit(handles.pipeline.consume.stall)
    };
    let (collecting, publishing) = (collectors::CollectorStatus::default(), Publishing::default());
    let parts = Parts { consumer, collecting, publishing, paused };
    let (grace, mut at) = (grace(&handles), json!({}));
    if handles.has(Role::Serve) {
        let server = serve::bind(&handles, &registry, &parts).await?;
        let bound = server.listening()?;
        at = json!({ "serve": { "api": bound.api, "metrics": bound.metrics } });
        listening(bound);
        roles.spawn(server.run(stop.clone()));
    } else if let Some(address) = handles.pipeline.telemetry.listen {
        let server = serve::bind_own(&handles, &registry, &parts, address).await?;
        let telemetry = server.address().map_err(|error| Failure::new(Exit::Internal, error))?;
        at = json!({ "telemetry": telemetry });
        info!(%telemetry, "listening");
        let stop = stop.clone();
        roles.spawn(async move {
            server.run(&stop).await;
            Ok(())
        });
    }
    let audited = audit::register(&handles, &registry)?;
    let restore_monitor = RestoreMonitor::new(handles.operations()?);
    let token = stop.clone();
    roles.spawn(async move {
        restore_monitor.keep(&token).await;
        Ok(())
    });
    let heart = processes::Heartbeat::start(&handles, &parts, at);
    roles.spawn(work(handles, registry, parts, pause_watcher, audited, stop.clone()));
    let outcome = end(roles, stop, grace).await;
    heart.stop(outcome.is_ok()).await;
    outcome?;
    info!("stopped");
    Ok(())
}

/// Runs the roles that need the ledger and the log. None of them starts before the pauses are
/// known.
async fn work(
    handles: Handles,
    registry: Registry,
    parts: Parts,
    pause_watcher: pauses::PauseWatcher,
    audited: Option<AuditTelemetry>,
    stop: CancellationToken,
) -> Result<(), Failure> {
    match handles.wait(&stop).await {
        Err(failure) if failure.exit == Exit::Interrupted => return Ok(()),
        waited => waited?,
    }
    if !pause_watcher.first(&stop).await {
        return Ok(());
    }
    let mut roles: JoinSet<Result<(), Failure>> = JoinSet::new();
    let grace = grace(&handles);
    roles.spawn(pause_watcher.run(stop.clone()));
    if handles.has(Role::Consume) {
        roles.spawn(admit::run(handles.clone(), stop.clone()));
        let telemetry = PruneTelemetry::register(&registry)
            .map_err(|error| Failure::new(Exit::Internal, error))?;
        roles.spawn(prune::run(handles.clone(), telemetry, stop.clone()));
        let (consumer, token) = (parts.consumer.clone(), stop.clone());
        roles.spawn(async move {
            consumer.run(&token).await;
            Ok(())
        });
    }
    if let Some(telemetry) = audited {
        roles.spawn(audit::run(handles.clone(), telemetry, stop.clone()));
    }
    if handles.has(Role::Collect) {
        roles.spawn(collect::run(handles.clone(), registry.clone(), parts.clone(), stop.clone()));
    }
    if handles.has(Role::Publish) {
        roles.spawn(publish::run(handles.clone(), registry, parts, stop.clone()));
    }
    end(roles, &stop, grace).await
}

/// Time for the roles to end after the stop. It includes a pending answer of the vendor: without
/// the answer, its events would be sent again, and only the vendor's memory would prevent a double
/// bill. Mode `shadow` sends no requests.
fn grace(handles: &Handles) -> Duration {
    let publish = &handles.pipeline.publish;
    if handles.has(Role::Publish) && publish.mode == PublishMode::Sole {
        STOP_GRACE.max(publish.request_timeout + RECORDING)
    } else {
        STOP_GRACE
    }
}

/// Waits for all roles. The first failure stops the other roles. A role that does not end in time
/// is abandoned.
async fn end(
    mut roles: JoinSet<Result<(), Failure>>,
    stop: &CancellationToken,
    grace: Duration,
) -> Result<(), Failure> {
    let mut outcome = Ok(());
    let all = async {
        while let Some(ended) = roles.join_next().await {
            let ended = ended.unwrap_or_else(|panic| Err(Failure::new(Exit::Internal, panic)));
            if let Err(failure) = ended {
                error!(error = failure.text(), "a role has failed, all stop");
                stop.cancel();
                if outcome.is_ok() {
                    outcome = Err(failure);
                }
            }
        }
    };
    let overdue = async {
        stop.cancelled().await;
        tokio::time::sleep(grace).await;
    };
    tokio::select! {
        () = all => {}
        () = overdue => info!("grace period over: unfinished batches are dropped and will be retried by another process"),
    }
    outcome
}
