//! The audit's findings as metrics.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};

use prometheus::core::Collector;
use prometheus::{GaugeVec, IntGaugeVec, Opts, Registry};
use uuid::Uuid;

use super::joint::{LOG, SOURCE, VENDOR};
use crate::ledger::Finding;

/// Findings as metrics, in every process with the role `serve`. Clones share them.
#[derive(Clone)]
pub struct AuditTelemetry {
    differences: IntGaugeVec,
    open: IntGaugeVec,
    gone: IntGaugeVec,
    holds: IntGaugeVec,
    audited_at: GaugeVec,
    reads_source: bool,
    /// Joint and source of the series that are shown.
    shown: Arc<Mutex<BTreeSet<[String; 2]>>>,
}

impl AuditTelemetry {
    /// Registers the gauges. A joint that this process should audit has the time 0 until its first
    /// audit by any process. A joint that other processes audit appears with its first audit.
    pub fn register(registry: &Registry, reads_source: bool) -> prometheus::Result<Self> {
        let opts = |name: &str, help: &str| Opts::new(format!("tallyline_audit_{name}"), help);
        let labels = &["joint", "source"];
        let telemetry = AuditTelemetry {
            differences: IntGaugeVec::new(
                opts("difference", "Differences that the joint's last audit found."),
                labels,
            )?,
            gone: IntGaugeVec::new(
                opts(
                    "source_gone",
                    "Confirmed builds and claims that coderd has removed since. They remain counted.",
                ),
                labels,
            )?,
            holds: IntGaugeVec::new(
                opts(
                    "holds_publishing",
                    "1 if findings of the joint's last audit hold the source's usage; with an empty source: all usage.",
                ),
                labels,
            )?,
            open: IntGaugeVec::new(
                opts(
                    "open",
                    "Open items that the joint's last audit found for an operator. They are not differences.",
                ),
                labels,
            )?,
            audited_at: GaugeVec::new(
                opts(
                    "timestamp_seconds",
                    "End of the joint's last audit, in seconds since 1970; 0 before the first audit.",
                ),
                labels,
            )?,
            reads_source,
            shown: Arc::default(),
        };
        telemetry.collectors().into_iter().try_for_each(|one| registry.register(one))?;
        telemetry.show(&[], None, false);
        Ok(telemetry)
    }

    /// Each metric, for its registration and for the reference.
    #[must_use]
    pub fn collectors(&self) -> Vec<Box<dyn Collector>> {
        vec![
            Box::new(self.differences.clone()),
            Box::new(self.open.clone()),
            Box::new(self.gone.clone()),
            Box::new(self.holds.clone()),
            Box::new(self.audited_at.clone()),
        ]
    }

    /// Shows the findings, and which joints of this process were never audited. `own` is its
    /// deployment, if known. A retired one is not audited.
    pub(super) fn show(&self, findings: &[Finding], own: Option<Uuid>, retired: bool) {
        let source = (self.reads_source && !retired).then_some((SOURCE, own));
        let due: BTreeSet<_> = [(LOG, None), (VENDOR, None)]
            .into_iter()
            .chain(source)
            .map(|(joint, of)| labels(joint, of))
            .collect();
        let found: BTreeSet<_> =
            findings.iter().map(|finding| labels(&finding.joint, finding.deployment_id)).collect();
        for finding in findings {
            let labels = labels(&finding.joint, finding.deployment_id);
            self.differences.with_label_values(&labels).set(finding.differences);
            self.open.with_label_values(&labels).set(finding.open);
            self.gone.with_label_values(&labels).set(finding.gone);
            self.holds.with_label_values(&labels).set(i64::from(finding.hold().is_some()));
            self.audited_at
                .with_label_values(&labels)
                .set(finding.audited_at.timestamp_micros() as f64 / 1e6);
        }
        for never in due.difference(&found) {
            self.audited_at.with_label_values(never).set(0.0);
        }
        let mut shown = self.shown.lock().unwrap_or_else(PoisonError::into_inner);
        for gone in shown.difference(&found) {
            // a series that was never set is not an error
            for gauge in [&self.differences, &self.open, &self.gone, &self.holds] {
                let _ = gauge.remove_label_values(gone);
            }
            if !due.contains(gone) {
                let _ = self.audited_at.remove_label_values(gone);
            }
        }
        *shown = found.into_iter().chain(due).collect();
    }
}

/// Labels `joint` and `source` of a series; a joint of the whole ledger has no source.
fn labels(joint: &str, deployment: Option<Uuid>) -> [String; 2] {
    [
        joint.replace(' ', "_"),
        deployment.map(|deployment| deployment.to_string()).unwrap_or_default(),
    ]
}
