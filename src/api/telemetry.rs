//! Telemetry of the HTTP server, with or without domain series.

use prometheus::core::Collector;
use prometheus::{GaugeVec, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry};

use super::sources::Known;
use super::withheld::Withheld;
use crate::projection::Freshness;

/// Gauges and counters of the HTTP server, updated at each scrape.
#[derive(Clone)]
pub struct ApiTelemetry {
    shown: IntGauge,
    ledger: IntGauge,
    folded: IntGaugeVec,
    held: IntGauge,
    complete_until: GaugeVec,
    runtime_complete_until: GaugeVec,
    withheld: IntCounterVec,
    build_info: IntGaugeVec,
}

impl ApiTelemetry {
    /// Registers all of them in `registry`.
    pub fn register(registry: &Registry) -> prometheus::Result<Self> {
        let source = &["source"];
        let telemetry = Self {
            shown: IntGauge::new(
                "tallyline_shown_sequence",
                "Ledger sequence of the domain series that this process last showed; 0 before the first answer.",
            )?,
            ledger: IntGauge::new(
                "tallyline_ledger_sequence",
                "The ledger's last sequence when this process last asked for it.",
            )?,
            folded: IntGaugeVec::new(
                Opts::new(
                    "tallyline_folded_sequence",
                    "Ledger sequence up to which this process has folded the stage; 0 before its first state.",
                ),
                &["stage"],
            )?,
            held: IntGauge::new(
                "tallyline_metrics_lease_held",
                "1 if this process shows the domain series, 0 if not.",
            )?,
            complete_until: GaugeVec::new(
                Opts::new(
                    "tallyline_complete_until_timestamp_seconds",
                    "Everything that coderd committed before this instant is counted, in seconds since 1970. Absent: completeness is not known, or the source is retired.",
                ),
                source,
            )?,
            runtime_complete_until: GaugeVec::new(
                Opts::new(
                    "tallyline_runtime_complete_until_timestamp_seconds",
                    "Every hour before this instant has its agent runtime counted, or is over 7 days old, in seconds since 1970. Absent: not known, or the source is retired.",
                ),
                source,
            )?,
            withheld: IntCounterVec::new(
                Opts::new(
                    "tallyline_metrics_withheld_total",
                    "Answers of /metrics without the domain series, by reason.",
                ),
                &["reason"],
            )?,
            build_info: IntGaugeVec::new(
                Opts::new("tallyline_build_info", "Always 1, with the version of this binary."),
                &["version"],
            )?,
        };
        for reason in Withheld::REASONS {
            telemetry.withheld.with_label_values(&[reason]);
        }
        telemetry.build_info.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
        telemetry.collectors().into_iter().try_for_each(|one| registry.register(one))?;
        Ok(telemetry)
    }

    /// Each metric, for its registration and for the reference.
    #[must_use]
    pub fn collectors(&self) -> Vec<Box<dyn Collector>> {
        vec![
            Box::new(self.shown.clone()),
            Box::new(self.ledger.clone()),
            Box::new(self.folded.clone()),
            Box::new(self.held.clone()),
            Box::new(self.complete_until.clone()),
            Box::new(self.runtime_complete_until.clone()),
            Box::new(self.withheld.clone()),
            Box::new(self.build_info.clone()),
        ]
    }

    pub(super) fn shown(&self, sequence: i64) {
        // two concurrent scrapes may end in any order
        if sequence > self.shown.get() {
            self.shown.set(sequence);
        }
    }

    pub(super) fn withheld(&self, why: Withheld) {
        self.withheld.with_label_values(&[why.reason()]).inc();
    }

    /// Updates the gauges before a scrape. `held`: this process has the lease to show the domain
    /// series.
    pub(super) fn update(
        &self,
        held: bool,
        folded: [(&str, Option<Freshness>); 2],
        known: Option<&Known>,
    ) {
        self.held.set(i64::from(held));
        for (stage, freshness) in folded {
            let sequence = freshness.map_or(0, |freshness| freshness.sequence.number);
            self.folded.with_label_values(&[stage]).set(sequence);
        }
        if let Some(known) = known {
            self.sources(known);
        }
    }

    fn sources(&self, known: &Known) {
        self.ledger.set(known.head.number);
        for known in &known.sources {
            let source = known.source.deployment_id.to_string();
            for (gauge, until) in [
                (&self.complete_until, known.completeness.complete_until),
                (&self.runtime_complete_until, known.completeness.runtime_complete_until),
            ] {
                match until.filter(|_| !known.source.retired) {
                    Some(until) => gauge
                        .with_label_values(&[&source])
                        .set(until.timestamp_micros() as f64 / 1e6),
                    // ignore the error of a missing series
                    None => drop(gauge.remove_label_values(&[&source])),
                }
            }
        }
    }
}
