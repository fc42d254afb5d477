//! This process's row in the ledger: that it lives, and how its roles stand. A heartbeat that fails is missed, and hurts nothing.

use std::sync::PoisonError;
use std::time::Duration;

use serde_json::{Map, Value, json};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tracing::debug;
use uuid::Uuid;

use super::{Parts, Site};
use crate::cause;
use crate::config::Role;
use crate::ledger::{Ledger, Process};
use crate::publisher::Shown;

/// Between two heartbeats.
const BEAT: Duration = Duration::from_secs(5);
/// How long one may take.
const ANSWER: Duration = Duration::from_secs(5);
/// How long a process that ends may take to say so.
const FAREWELL: Duration = Duration::from_secs(1);

/// The loop that tells.
pub(super) struct Heart {
    stop: CancellationToken,
    task: JoinHandle<Row>,
}

/// The process's row, and what is written into it.
struct Row {
    ledger: Ledger,
    process: Process,
    site: Site,
    parts: Parts,
    at: Value,
}

impl Row {
    async fn write(&self) -> Result<(), sqlx::Error> {
        let standing = standing(&self.site, &self.parts, &self.at);
        self.ledger.process_lives(&self.process, &standing).await
    }
}

impl Heart {
    /// Begins to tell, as soon as the ledger is there. `at` is an object that says where the process listens.
    pub fn start(site: &Site, parts: &Parts, at: Value) -> Self {
        let stop = CancellationToken::new();
        let process = Process {
            id: Uuid::new_v4(),
            host: host(),
            pid: std::process::id(),
            version: env!("CARGO_PKG_VERSION"),
            roles: site.pipeline.roles.iter().map(|role| role.name()).collect(),
            started_at: site.clock.now(),
        };
        let row = Row { ledger: site.ledger.ledger.clone(), process, site: site.clone(), parts: parts.clone(), at };
        let task = tokio::spawn(beat(row, stop.clone()));
        Heart { stop, task }
    }

    /// Ends. In good order, the row goes; otherwise it keeps the last standing of the roles, and the process is soon shown as gone.
    pub async fn stop(self, in_order: bool) {
        self.stop.cancel();
        let farewell = async {
            let Ok(row) = self.task.await else { return };
            let told = if in_order { row.ledger.process_ends(row.process.id).await } else { row.write().await };
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

/// How each role of this process stands.
fn standing(site: &Site, parts: &Parts, at: &Value) -> Value {
    let mut standing = at.as_object().cloned().unwrap_or_default();
    if site.has(Role::Collect) {
        standing.insert("collect".into(), json!({ "standing": parts.collecting.get() }));
    }
    if site.has(Role::Consume) {
        standing.insert("consume".into(), consuming(parts));
    }
    if site.has(Role::Publish) {
        standing.insert("publish".into(), publishing(parts.publishing.get()));
    }
    Value::Object(standing)
}

fn publishing(shown: Option<&Shown>) -> Value {
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
    let not_read: Map<String, Value> = not_read.into_iter().map(|(partition, why)| (partition.to_string(), why.into())).collect();
    let progress = parts.consumer.progress.lock().unwrap_or_else(PoisonError::into_inner);
    let partitions: Map<String, Value> = progress
        .partitions()
        .map(|(partition, position, at)| (partition.to_string(), json!({ "position": position, "progress_at": at })))
        .collect();
    json!({ "partitions": partitions, "not_read": not_read })
}

/// The machine's name, where the system tells it in the way of Linux.
fn host() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    if name.trim().is_empty() { "unknown".to_owned() } else { name.trim().to_owned() }
}
