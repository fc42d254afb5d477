//! Gauges of open rejects. The loop that queries the sources also updates these gauges; a scrape
//! never does.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use prometheus::core::Collector;
use prometheus::{Gauge, GaugeVec, IntGaugeVec, Opts, Registry};
use tokio::sync::Mutex;
use tokio::time::Instant;

use crate::clock::Clock;
use crate::event::{RejectCause, UsageType};
use crate::ledger::{Disposition, Ledger, OpenRejects, reject_counts};

/// The pause after each count, as a multiple of its duration. Many open rejects are counted less
/// often.
const PAUSE: u32 = 20;

/// Gauges of open rejects, in every process with the role `serve`.
pub struct RejectsTelemetry {
    open: IntGaugeVec,
    unbilled: GaugeVec,
    oldest: Gauge,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    next_look: Option<Instant>,
    /// Shown dispositions and causes. Those without open rejects are set to 0.
    shown: BTreeSet<(Disposition, RejectCause)>,
}

impl RejectsTelemetry {
    /// Registers the gauges. Before the first answer of the ledger, only an age of 0 is shown.
    pub fn register(registry: &Registry) -> prometheus::Result<Self> {
        let telemetry = Self {
            open: IntGaugeVec::new(
                Opts::new(
                    "tallyline_rejects_open",
                    "Records that are not accepted events and wait for an operator.",
                ),
                &["disposition", "cause"],
            )?,
            unbilled: GaugeVec::new(
                Opts::new(
                    "tallyline_rejects_unbilled_units",
                    "Unbilled usage in open rejects, as far as its number could be read.",
                ),
                &["unit"],
            )?,
            oldest: Gauge::new(
                "tallyline_rejects_oldest_age_seconds",
                "Age of the oldest open reject; 0 without one.",
            )?,
            state: Mutex::default(),
        };
        telemetry.collectors().into_iter().try_for_each(|one| registry.register(one))?;
        Ok(telemetry)
    }

    /// Each metric, for its registration and for the reference.
    #[must_use]
    pub fn collectors(&self) -> Vec<Box<dyn Collector>> {
        vec![
            Box::new(self.open.clone()),
            Box::new(self.unbilled.clone()),
            Box::new(self.oldest.clone()),
        ]
    }

    /// Queries the ledger unless the pause is not over. Without an answer within the time, the
    /// shown values remain.
    pub(super) async fn look(&self, ledger: &Ledger, clock: &Clock, within: Duration) {
        let mut state = self.state.lock().await;
        let begun = Instant::now();
        if state.next_look.is_some_and(|next| begun < next) {
            return;
        }
        match tokio::time::timeout(within, ledger.run(reject_counts::open)).await {
            Ok(Ok(open)) => self.show(&open, clock, &mut state.shown),
            Ok(Err(error)) => {
                tracing::debug!(error = crate::cause::text(&error), "open rejects are not counted")
            }
            Err(_) => tracing::debug!("open rejects are not counted: no answer in time"),
        }
        state.next_look = Some(Instant::now() + begun.elapsed() * PAUSE);
    }

    fn show(
        &self,
        open: &[OpenRejects],
        clock: &Clock,
        shown: &mut BTreeSet<(Disposition, RejectCause)>,
    ) {
        let mut records: BTreeMap<(Disposition, RejectCause), i64> =
            shown.iter().map(|of| (*of, 0)).collect();
        let mut unbilled: BTreeMap<&str, f64> =
            UsageType::ALL.map(|usage_type| (usage_type.unit(), 0.0)).into();
        unbilled.insert("unknown", 0.0);
        for rejects in open {
            records.insert((rejects.disposition, rejects.cause), rejects.records);
            for (unit, number) in &rejects.units {
                *unbilled.entry(unit).or_default() += *number as f64;
            }
        }
        for ((disposition, cause), number) in &records {
            self.open.with_label_values(&[disposition.as_str(), cause.as_str()]).set(*number);
        }
        for (unit, number) in unbilled {
            self.unbilled.with_label_values(&[unit]).set(number);
        }
        let oldest = open.iter().map(|rejects| clock.now() - rejects.oldest).max();
        self.oldest.set(oldest.map_or(0.0, |age| age.as_seconds_f64().max(0.0)));
        *shown = records.into_keys().collect();
    }
}
