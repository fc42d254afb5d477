//! This process's row in the ledger, with a heartbeat and the state of its roles. A missed
//! heartbeat does no harm.

use std::sync::PoisonError;
use std::time::Duration;

use serde_json::{Map, Value, json};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tracing::debug;
use uuid::Uuid;

use super::{Handles, Parts};
use crate::cause;
use crate::config::Role;
use crate::ledger::{Ledger, Process, StatementError, processes};
use crate::publisher::ConditionHandle;

/// Interval of the heartbeats.
const BEAT: Duration = Duration::from_secs(5);
/// Timeout of one heartbeat.
const ANSWER: Duration = Duration::from_secs(5);
/// Time for the last update when the process ends.
const FAREWELL: Duration = Duration::from_secs(1);

/// The task that updates the row.
pub(super) struct Heartbeat {
    stop: CancellationToken,
    task: JoinHandle<Row>,
}

/// The row of this process, and the data for it.
struct Row {
    ledger: Ledger,
    process: Process,
    handles: Handles,
    parts: Parts,
    at: Value,
}

impl Row {
    async fn write(&self) -> Result<(), StatementError> {
        let standing = standing(&self.handles, &self.parts, &self.at);
        self.ledger
            .run(async |conn| processes::record_heartbeat(conn, &self.process, &standing).await)
            .await
    }
}

impl Heartbeat {
    /// Starts the heartbeat, which succeeds when the ledger is reachable. `at` is an object with
    /// the process's addresses.
    pub fn start(handles: &Handles, parts: &Parts, at: Value) -> Self {
        let stop = CancellationToken::new();
        let process = Process {
            id: Uuid::new_v4(),
            host: host(),
            pid: std::process::id(),
            version: env!("CARGO_PKG_VERSION"),
            roles: handles.pipeline.roles.iter().map(|role| role.name()).collect(),
            started_at: handles.clock.now(),
        };
        let row = Row {
            ledger: handles.ledger.ledger.clone(),
            process,
            handles: handles.clone(),
            parts: parts.clone(),
            at,
        };
        let task = tokio::spawn(beat(row, stop.clone()));
        Heartbeat { stop, task }
    }

    /// Stops the heartbeat. An orderly stop deletes the row. Otherwise it keeps the last state, and
    /// the process is soon shown as gone.
    pub async fn stop(self, in_order: bool) {
        self.stop.cancel();
        let farewell = async {
            let Ok(row) = self.task.await else { return };
            let told = if in_order {
                row.ledger.run(async |conn| processes::end(conn, row.process.id).await).await
            } else {
                row.write().await
            };
            if let Err(error) = told {
                debug!(error = cause::text(&error), "the process's row stays as it is");
            }
        };
        let _ = tokio::time::timeout(FAREWELL, farewell).await;
    }
}

async fn beat(row: Row, stop: CancellationToken) -> Row {
    let telling = async {
        loop {
            match tokio::time::timeout(ANSWER, row.write()).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => debug!(error = cause::text(&error), "heartbeat missed"),
                Err(_) => debug!("heartbeat missed: no answer"),
            }
            tokio::time::sleep(BEAT).await;
        }
    };
    stop.run_until_cancelled(telling).await;
    row
}

/// State of each role of this process.
fn standing(handles: &Handles, parts: &Parts, at: &Value) -> Value {
    let mut standing = at.as_object().cloned().unwrap_or_default();
    if handles.has(Role::Collect) {
        standing.insert("collect".into(), json!({ "standing": parts.collecting.get() }));
    }
    if handles.has(Role::Consume) {
        standing.insert("consume".into(), consuming(parts));
    }
    if handles.has(Role::Publish) {
        standing.insert("publish".into(), publishing(parts.publishing.get()));
    }
    Value::Object(standing)
}

fn publishing(shown: Option<&ConditionHandle>) -> Value {
    let Some(shown) = shown else { return json!({ "condition": "not begun", "healthy": true }) };
    let condition = shown.get();
    json!({
        "condition": condition.to_string(),
        "healthy": condition.is_healthy(),
        "deployment_id": shown.source(),
        "publishes": shown.publishes(),
        "refused": shown.refusal(),
    })
}

fn consuming(parts: &Parts) -> Value {
    let not_read = parts.consumer.stopped.lock().unwrap_or_else(PoisonError::into_inner).clone();
    let not_read: Map<String, Value> =
        not_read.into_iter().map(|(partition, why)| (partition.to_string(), why.into())).collect();
    let progress = parts.consumer.progress.lock().unwrap_or_else(PoisonError::into_inner);
    let partitions: Map<String, Value> = progress
        .partitions()
        .map(|(partition, position, at)| {
            (partition.to_string(), json!({ "position": position, "progress_at": at }))
        })
        .collect();
    json!({ "partitions": partitions, "not_read": not_read })
}

/// The machine's name on Linux; `unknown` elsewhere.
fn host() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    if name.trim().is_empty() { "unknown".to_owned() } else { name.trim().to_owned() }
}
