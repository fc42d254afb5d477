//! A publisher's own metrics.

use chrono::{DateTime, Utc};
use prometheus::core::Collector;
use prometheus::{IntCounterVec, IntGaugeVec, Opts, Registry};
use uuid::Uuid;

use super::Cycle;
use crate::ledger::{Pending, Settled};
use crate::tallyman::SendError;

/// Counters and gauges of this process's publishers. Names begin with `tallyline_publisher_`;
/// `source` is the deployment id.
#[derive(Clone)]
pub struct PublisherTelemetry {
    verdicts: IntCounterVec,
    settled: IntCounterVec,
    send_errors: IntCounterVec,
    pending: IntGaugeVec,
    held_back: IntGaugeVec,
    unanswered: IntGaugeVec,
    oldest: IntGaugeVec,
    stopped: IntGaugeVec,
}

impl PublisherTelemetry {
    pub fn register(registry: &Registry) -> prometheus::Result<Self> {
        let counter = |name: &str, help: &str, label: &str| {
            IntCounterVec::new(Opts::new(format!("tallyline_publisher_{name}"), help), &[label])
        };
        let gauge = |name: &str, help: &str| {
            IntGaugeVec::new(Opts::new(format!("tallyline_publisher_{name}"), help), &["source"])
        };
        let telemetry = PublisherTelemetry {
            verdicts: counter(
                "verdicts_total",
                "Events sent, by the vendor's verdict.",
                "verdict",
            )?,
            settled: counter(
                "settled_total",
                "Publications settled without an answer of the vendor, by state.",
                "state",
            )?,
            send_errors: counter(
                "send_errors_total",
                "Requests to the vendor without a verdict, by kind of failure.",
                "kind",
            )?,
            pending: gauge("pending", "Publications that wait for the vendor's verdict.")?,
            held_back: gauge(
                "held_back",
                "Pending publications that are held although they are due.",
            )?,
            unanswered: gauge(
                "unanswered",
                "Pending publications with an attempt that the vendor may have accepted.",
            )?,
            oldest: gauge(
                "pending_oldest_age_seconds",
                "Age of the oldest pending publication; 0 without one. It expires at 30 days.",
            )?,
            stopped: gauge(
                "stopped",
                "1 if this process refuses to publish: coderd publishes by itself, belongs to another source, or has a license of another deployment; 0 if it publishes. Absent: it does neither.",
            )?,
        };
        telemetry.collectors().into_iter().try_for_each(|one| registry.register(one))?;
        Ok(telemetry)
    }

    /// Each metric, for its registration and for the reference.
    #[must_use]
    pub fn collectors(&self) -> Vec<Box<dyn Collector>> {
        vec![
            Box::new(self.verdicts.clone()),
            Box::new(self.settled.clone()),
            Box::new(self.send_errors.clone()),
            Box::new(self.pending.clone()),
            Box::new(self.held_back.clone()),
            Box::new(self.unanswered.clone()),
            Box::new(self.oldest.clone()),
            Box::new(self.stopped.clone()),
        ]
    }

    /// Counts the recorded verdicts of a request.
    pub(super) fn request(&self, cycle: &Cycle) {
        add(&self.verdicts, "accepted", cycle.accepted);
        add(&self.verdicts, "refused", cycle.refused);
        add(&self.verdicts, "refused_for_now", cycle.refused_for_now);
        add(&self.verdicts, "left_out", cycle.left_out);
    }

    pub(super) fn settled(&self, settled: &Settled) {
        add(&self.settled, "not_ours", settled.not_ours);
        add(&self.settled, "expired", settled.expired);
        add(&self.settled, "unknown", settled.unknown);
    }

    pub(super) fn send_error(&self, error: &SendError) {
        let kind = match error {
            SendError::LicenseNotAHeader => "license",
            SendError::Unreachable(_) => "unreachable",
            SendError::Unanswered(_) => "unanswered",
            SendError::Status { .. } => "status",
            SendError::Undecodable(_) => "undecodable",
        };
        self.send_errors.with_label_values(&[kind]).inc();
    }

    pub(super) fn queue(&self, source: Uuid, pending: &Pending, now: DateTime<Utc>) {
        let source = source.to_string();
        self.pending.with_label_values(&[&source]).set(pending.events);
        self.held_back.with_label_values(&[&source]).set(pending.held_back);
        self.unanswered.with_label_values(&[&source]).set(pending.unanswered);
        let age = pending.oldest.map_or(0, |oldest| (now - oldest).num_seconds().max(0));
        self.oldest.with_label_values(&[&source]).set(age);
    }

    /// A publisher that neither publishes nor has stopped has no series: its 0 would contradict
    /// another one that has stopped.
    pub(super) fn publishes(&self, source: Uuid, publishes: Option<bool>) {
        let source = source.to_string();
        match publishes {
            Some(publishes) => {
                self.stopped.with_label_values(&[&source]).set(i64::from(!publishes))
            }
            // a series that was never set is not an error
            None => drop(self.stopped.remove_label_values(&[&source])),
        }
    }
}

fn add(counter: &IntCounterVec, label: &str, number: usize) {
    counter.with_label_values(&[label]).inc_by(number as u64);
}
