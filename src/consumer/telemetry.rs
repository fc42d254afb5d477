//! The consumer's metrics: batches and dispositions, never single events.

use chrono::{DateTime, Utc};
use prometheus::core::Collector;
use prometheus::{GaugeVec, IntCounter, IntCounterVec, IntGauge, Opts, Registry};

use crate::event::{Topic, TopicPartition};
use crate::ledger::Counts;

/// The metrics of this process's consumer. Names begin with `tallyline_consumer_`.
#[derive(Clone)]
pub struct ConsumerTelemetry {
    batches: IntCounterVec,
    records: IntCounterVec,
    fenced: IntCounter,
    not_read: IntGauge,
    stalls: IntCounterVec,
    progress: GaugeVec,
}

impl ConsumerTelemetry {
    /// Registers all metrics in `registry`.
    pub fn register(registry: &Registry) -> prometheus::Result<Self> {
        let telemetry = ConsumerTelemetry {
            batches: IntCounterVec::new(
                Opts::new("tallyline_consumer_batches_total", "Batches recorded in the ledger."),
                &["topic"],
            )?,
            records: IntCounterVec::new(
                Opts::new(
                    "tallyline_consumer_records_total",
                    "Records of recorded batches, by disposition.",
                ),
                &["disposition"],
            )?,
            fenced: IntCounter::new(
                "tallyline_consumer_fenced_total",
                "Batches dropped because another consumer has leased their partition with a later epoch.",
            )?,
            not_read: IntGauge::new(
                "tallyline_consumer_partitions_not_read",
                "Assigned partitions that are not read: they are stopped, not started yet, or retry a batch.",
            )?,
            stalls: IntCounterVec::new(
                Opts::new(
                    "tallyline_consumer_stalls_total",
                    "Stalls: records waited, their partition did not move, and this consumer left its group.",
                ),
                &["topic"],
            )?,
            progress: GaugeVec::new(
                Opts::new(
                    "tallyline_consumer_progress_timestamp_seconds",
                    "When the topic's slowest partition last moved or had nothing to read, in seconds since 1970. Absent: this process does not read the topic.",
                ),
                &["topic"],
            )?,
        };
        telemetry.collectors().into_iter().try_for_each(|one| registry.register(one))?;
        for topic in Topic::ALL {
            telemetry.stalls.with_label_values(&[topic.name()]);
        }
        Ok(telemetry)
    }

    /// Each metric, for its registration and for the reference.
    #[must_use]
    pub fn collectors(&self) -> Vec<Box<dyn Collector>> {
        vec![
            Box::new(self.batches.clone()),
            Box::new(self.records.clone()),
            Box::new(self.fenced.clone()),
            Box::new(self.not_read.clone()),
            Box::new(self.stalls.clone()),
            Box::new(self.progress.clone()),
        ]
    }

    pub(super) fn recorded(&self, partition: TopicPartition, counts: Counts) {
        self.batches.with_label_values(&[partition.topic.name()]).inc();
        for (disposition, number) in [
            ("accepted", counts.accepted),
            ("duplicate", counts.duplicates),
            ("conflict", counts.conflicts),
            ("rejected", counts.rejects),
            ("held", counts.held),
        ] {
            self.records
                .with_label_values(&[disposition])
                .inc_by(u64::try_from(number).unwrap_or_default());
        }
    }

    pub(super) fn stalled(&self, topic: Topic) {
        self.stalls.with_label_values(&[topic.name()]).inc();
    }

    /// Sets the series of each topic, and removes the series of a topic that is not read.
    pub(super) fn progress(&self, oldest: [(Topic, Option<DateTime<Utc>>); 3]) {
        for (topic, at) in oldest {
            match at {
                Some(at) => self
                    .progress
                    .with_label_values(&[topic.name()])
                    .set(at.timestamp_micros() as f64 / 1e6),
                None => drop(self.progress.remove_label_values(&[topic.name()])),
            }
        }
    }

    pub(super) fn fenced(&self) {
        self.fenced.inc();
    }

    pub(super) fn not_read(&self, partitions: usize) {
        self.not_read.set(i64::try_from(partitions).unwrap_or(i64::MAX));
    }
}
