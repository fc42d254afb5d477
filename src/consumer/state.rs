//! One consumer: its dependencies, and its state for display.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tracing::{error, warn};

use super::{ConsumerTelemetry, Progress};
use crate::event::TopicPartition;
use crate::ledger::Ledger;
use crate::log::Log;
use crate::pauses::Paused;

/// How long records may wait while their partition does not move, unless the pipeline sets another
/// value.
const STALL: Duration = Duration::from_secs(60);

/// One consumer, with its dependencies and its observable state.
#[derive(Clone)]
pub struct Consumer {
    pub log: Log,
    pub ledger: Ledger,
    /// The group whose members share the partitions.
    pub group: String,
    pub telemetry: ConsumerTelemetry,
    /// Assigned partitions that are not read, with the reason.
    pub stopped: Arc<Mutex<BTreeMap<TopicPartition, String>>>,
    /// The progress of the partitions that this process reads.
    pub progress: Arc<Mutex<Progress>>,
    pub paused: Paused,
    /// Whether this process has seen a cutover in the ledger.
    pub(crate) cutover_seen: Arc<tokio::sync::Mutex<bool>>,
}

impl Consumer {
    /// A consumer of `group` without pauses. It rejoins if a partition does not move for a minute
    /// while records wait.
    #[must_use]
    pub fn new(log: Log, ledger: Ledger, group: &str, telemetry: ConsumerTelemetry) -> Self {
        let progress = Arc::new(Mutex::new(Progress::new(STALL)));
        let (group, stopped, cutover_seen) = (group.to_owned(), Arc::default(), Arc::default());
        Consumer {
            log,
            ledger,
            group,
            telemetry,
            stopped,
            progress,
            paused: Paused::never(),
            cutover_seen,
        }
    }

    /// Sets how long records may wait while their partition does not move.
    #[must_use]
    pub fn with_stall_limit(self, limit: Duration) -> Self {
        Consumer { progress: Arc::new(Mutex::new(Progress::new(limit))), ..self }
    }

    /// Sets the reason why the partition is not read for now; none: it is read.
    /// Logs each reason once. The reason of a stopped partition is kept.
    pub(super) fn set_problem(
        &self,
        partition: TopicPartition,
        last_problem: &mut Option<String>,
        problem: Option<String>,
    ) {
        let reason = problem.map(|problem| format!("not read yet: {problem}"));
        if *last_problem == reason {
            return;
        }
        if let Some(reason) = &reason {
            warn!(%partition, reason, "partition not read, retrying");
        }
        self.not_read(|not_read| {
            if not_read.get(&partition) == last_problem.as_ref() {
                not_read.remove(&partition);
                not_read.extend(reason.clone().map(|reason| (partition, reason)));
            }
        });
        *last_problem = reason;
    }

    pub(super) fn stop_partition(&self, partition: TopicPartition, reason: &str) {
        error!(%partition, reason, "partition stopped");
        self.not_read(|not_read| not_read.insert(partition, reason.to_owned()));
        self.progress(|progress| progress.end(partition));
    }

    pub(super) fn forget(&self, partitions: &[TopicPartition]) {
        self.not_read(|not_read| not_read.retain(|partition, _| !partitions.contains(partition)));
    }

    /// Changes the set of partitions that are not read.
    pub(super) fn not_read<R>(
        &self,
        change: impl FnOnce(&mut BTreeMap<TopicPartition, String>) -> R,
    ) -> R {
        let mut stopped = self.stopped.lock().unwrap_or_else(PoisonError::into_inner);
        let changed = change(&mut stopped);
        self.telemetry.not_read(stopped.len());
        changed
    }

    pub(super) fn progress<R>(&self, change: impl FnOnce(&mut Progress) -> R) -> R {
        change(&mut self.progress.lock().unwrap_or_else(PoisonError::into_inner))
    }
}
