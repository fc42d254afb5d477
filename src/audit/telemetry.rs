//! The audit's findings as metrics.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};

use prometheus::core::Collector;
use prometheus::{GaugeVec, IntGaugeVec, Opts, Registry};
use uuid::Uuid;

use super::joint::{LOG, SOURCE, VENDOR};
use crate::ledger::{Finding, LateAudit};

/// Findings as metrics, in every process that audits. Clones share them.
#[derive(Clone)]
pub struct AuditTelemetry {
    differences: IntGaugeVec,
    open: IntGaugeVec,
    gone: IntGaugeVec,
    holds: IntGaugeVec,
    audited_at: GaugeVec,
    late: IntGaugeVec,
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
                    "1 if the joint's last audit, or its lateness, holds the source's usage; with an empty source: all usage.",
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
            late: IntGaugeVec::new(
                opts(
                    "late",
                    "1 if no audit of the joint has reached the newest batch in the set time. It holds publishing, unless an operator has overridden it.",
                ),
                labels,
            )?,
            reads_source,
            shown: Arc::default(),
        };
        telemetry.collectors().into_iter().try_for_each(|one| registry.register(one))?;
        telemetry.show(&[], &[], None, false);
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
            Box::new(self.late.clone()),
        ]
    }

    /// Shows the findings, the late audits, and which joints of this process were never audited.
    /// `own` is its deployment, if known. A retired one is not audited.
    pub(super) fn show(
        &self,
        findings: &[Finding],
        late: &[LateAudit],
        own: Option<Uuid>,
        retired: bool,
    ) {
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
        for labels in &found {
            self.late.with_label_values(labels).set(0);
        }
        let mut late_ones = BTreeSet::new();
        for late in late {
            let labels = labels(&late.joint, late.deployment_id);
            self.late.with_label_values(&labels).set(1);
            let holds = self.holds.with_label_values(&labels);
            holds.set(holds.get().max(i64::from(late.hold().is_some())));
            late_ones.insert(labels);
        }
        for never in due.difference(&found) {
            self.audited_at.with_label_values(never).set(0.0);
        }
        let mut shown = self.shown.lock().unwrap_or_else(PoisonError::into_inner);
        for gone in shown.difference(&found) {
            // a series that was never set is not an error
            for gauge in [&self.differences, &self.open, &self.gone] {
                let _ = gauge.remove_label_values(gone);
            }
            if !late_ones.contains(gone) {
                let _ = self.holds.remove_label_values(gone);
                let _ = self.late.remove_label_values(gone);
            }
            if !due.contains(gone) {
                let _ = self.audited_at.remove_label_values(gone);
            }
        }
        *shown = found.into_iter().chain(due).chain(late_ones).collect();
    }
}

/// Labels `joint` and `source` of a series; a joint of the whole ledger has no source.
fn labels(joint: &str, deployment: Option<Uuid>) -> [String; 2] {
    [
        joint.replace(' ', "_"),
        deployment.map(|deployment| deployment.to_string()).unwrap_or_default(),
    ]
}
