//! The continuous audit. The lease `audit` allows one process at a time; the ledger keeps the
//! findings for all.
//!
//! A side that cannot be read changes no finding: the finding's age shows that. Missing rows alone
//! change none either, until a collector pass shows that they are not in flight.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Context as _;
use prometheus::core::Collector;
use prometheus::{GaugeVec, IntGaugeVec, Opts, Registry};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};
use uuid::Uuid;

use super::LedgerJoints;
use super::joint::{
    Audit, Joint, LOG, RECENT_USAGE, RECENT_USAGE_DIFFERS, SOURCE, SOURCE_GONE, VENDOR,
};
use crate::cause::LastingFault;
use crate::ledger::{
    Finding, Lease, LeaseError, NewFinding, Sequence, StatementError, findings, holds, lease_step,
    leases, retirements, snapshots,
};

const NAME: &str = "audit";
/// Another process can audit this long after the lease of a dead one was renewed.
const LEASE_LENGTH: Duration = Duration::from_secs(60);
/// The longest time between two reads of findings and due audits.
const POLL: Duration = Duration::from_secs(5);
/// The rest after an audit, in lengths of that audit: audits take at most a tenth of the time.
const REST: f64 = 9.0;

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
    fn show(&self, findings: &[Finding], own: Option<Uuid>, retired: bool) {
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

/// Runs audits in a loop.
pub struct Continuous {
    /// The parts to compare. Without a source, only the ledger with log and vendor: another process
    /// may have the source.
    pub audit: Audit,
    /// Time between two audits of a joint.
    pub every: Duration,
    /// The name of this process as holder of the lease; unique.
    pub holder: String,
    /// Where findings are shown.
    pub telemetry: AuditTelemetry,
}

/// The joints whose audit is due.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct DueJoints {
    source: bool,
    ledger: bool,
}

impl DueJoints {
    fn any(self) -> bool {
        self.source || self.ledger
    }
}

/// The last messages in the log.
#[derive(Default)]
struct LastMessages {
    fault: LastingFault,
    imbalance: LastingFault,
    holds: LastingFault,
}

impl Continuous {
    /// Audits until `stop`.
    pub async fn run(&self, stop: &CancellationToken) {
        let mut logged = LastMessages::default();
        let mut failed_at: Option<Instant> = None;
        while !stop.is_cancelled() {
            let waits = failed_at.is_some_and(|at| at.elapsed() < self.every);
            match self.round(waits, &mut logged, stop).await {
                Ok(()) if waits => {}
                Ok(()) => {
                    logged.fault.end();
                }
                Err(fault) => {
                    failed_at = Some(Instant::now());
                    let fault = crate::cause::text(fault.as_ref());
                    if logged.fault.is_new(&fault) {
                        warn!(fault, "audit failed; the last findings remain");
                    }
                }
            }
            stop.run_until_cancelled(tokio::time::sleep(self.every.min(POLL))).await;
        }
    }

    /// Shows the last findings, and audits due joints unless an audit has just failed.
    async fn round(
        &self,
        waits: bool,
        logged: &mut LastMessages,
        stop: &CancellationToken,
    ) -> anyhow::Result<()> {
        let ledger = &self.audit.ledger;
        let due = stop.run_until_cancelled(self.show_findings(logged)).await.transpose()?;
        if waits || !due.is_some_and(DueJoints::any) {
            return Ok(());
        }
        let taken = lease_step(
            stop,
            ledger.run(async |conn| leases::take(conn, NAME, &self.holder, LEASE_LENGTH).await),
        )
        .await
        .transpose()?;
        let Some(lease) = taken.flatten() else { return Ok(()) };
        let audited = stop.run_until_cancelled(self.audit_if_due(&lease)).await;
        let released =
            lease_step(stop, ledger.run(async |conn| leases::release(conn, lease).await))
                .await
                .transpose();
        // the audit's own error takes precedence
        audited.transpose()?;
        released?;
        stop.run_until_cancelled(self.show_findings(logged)).await.transpose()?;
        Ok(())
    }

    /// Shows and logs the latest findings, and returns the joints that are due.
    async fn show_findings(&self, logged: &mut LastMessages) -> anyhow::Result<DueJoints> {
        let ledger = &self.audit.ledger;
        let findings =
            ledger.run(findings::list).await.context("reading findings from the ledger")?;
        let retired = self.is_retired().await.context("reading findings from the ledger")?;
        self.telemetry.show(&findings, self.own(), retired);
        log_changes(logged, &findings);
        Ok(self.due(&findings, retired))
    }

    /// Checks again: the last holder of the lease may have audited since.
    async fn audit_if_due(&self, lease: &Lease) -> anyhow::Result<()> {
        let ledger = &self.audit.ledger;
        let due = self.due(&ledger.run(findings::list).await?, self.is_retired().await?);
        if due.any() { self.audit_with_lease(lease, due).await } else { Ok(()) }
    }

    /// The deployment whose coderd this process can read.
    fn own(&self) -> Option<Uuid> {
        self.audit.source.as_ref().map(|(_, deployment)| *deployment)
    }

    async fn is_retired(&self) -> Result<bool, StatementError> {
        let ledger = &self.audit.ledger;
        match self.own() {
            Some(own) => Ok(ledger
                .run(async |conn| retirements::of_deployment(conn, own).await)
                .await?
                .is_some()),
            None => Ok(false),
        }
    }

    fn due(&self, findings: &[Finding], retired: bool) -> DueJoints {
        let due = |joint: &str, deployment: Option<Uuid>| {
            let last = findings
                .iter()
                .find(|finding| finding.joint == joint && finding.deployment_id == deployment);
            last.is_none_or(|last| {
                last.age_seconds >= self.every.as_secs_f64().max(last.seconds * REST)
            })
        };
        let source = self.own().is_some_and(|own| !retired && due(SOURCE, Some(own)));
        DueJoints { source, ledger: due(LOG, None) || due(VENDOR, None) }
    }

    /// Audits while it renews the lease.
    async fn audit_with_lease(&self, lease: &Lease, due: DueJoints) -> anyhow::Result<()> {
        let ledger = &self.audit.ledger;
        let keeping = async {
            loop {
                tokio::time::sleep(LEASE_LENGTH / 4).await;
                match ledger.run(async |conn| leases::renew(conn, lease, LEASE_LENGTH).await).await
                {
                    Ok(true) => {}
                    Ok(false) => return LeaseError::Lost(lease.name.clone()),
                    Err(error) => return error.into(),
                }
            }
        };
        tokio::select! {
            done = self.audit_joints(lease, due) => done,
            lost = keeping => Err(lost.into()),
        }
    }

    /// Audits the due joints. If one side cannot be read, the other joints are still audited.
    async fn audit_joints(&self, lease: &Lease, due: DueJoints) -> anyhow::Result<()> {
        let begun = Instant::now();
        let mut outcome = Ok(());
        if due.ledger {
            match self.ledger_joints().await {
                Ok(LedgerJoints { sequence, log, vendor }) => {
                    let joints: Vec<&Joint> = log.iter().chain([&vendor]).collect();
                    self.record(lease, None, &joints, sequence, begun).await?;
                    outcome = log.map(|_| ());
                }
                Err(fault) => outcome = Err(fault),
            }
        }
        if due.source {
            match self.audit.source_joint().await {
                Ok(mut joint) => {
                    let unsettled = joint.drop_unsettled();
                    if unsettled == 0 || !joint.differences.is_empty() {
                        let sequence = self.audit.ledger.run(snapshots::head).await?;
                        self.record(lease, self.own(), &[&joint], sequence, begun).await?;
                    }
                    if unsettled > 0 {
                        debug!(
                            unsettled,
                            "missing rows may be in flight: no collector pass in time"
                        );
                        let fault = anyhow::anyhow!(
                            "no collector pass ended in time, so missing rows may be in flight"
                        );
                        outcome = outcome.and(Err(fault));
                    }
                }
                Err(fault) => outcome = outcome.and(Err(fault)),
            }
        }
        outcome
    }

    /// Compares again if anything differs: the log may have changed during the first reading.
    async fn ledger_joints(&self) -> anyhow::Result<LedgerJoints> {
        let first = self.audit.ledger_joints().await?;
        if first.log.iter().chain([&first.vendor]).all(|joint| joint.differences.is_empty()) {
            Ok(first)
        } else {
            self.audit.ledger_joints().await
        }
    }

    /// Records findings. `deployment` is the joints' source; None for joints of the whole ledger.
    async fn record(
        &self,
        lease: &Lease,
        deployment: Option<Uuid>,
        joints: &[&Joint],
        sequence: Sequence,
        begun: Instant,
    ) -> anyhow::Result<()> {
        let found: Vec<NewFinding> = joints
            .iter()
            .map(|joint| NewFinding {
                joint: &joint.name,
                deployment,
                differences: &joint.differences,
                open: joint.open.len(),
                gone: joint.count(SOURCE_GONE),
                recent_usage_differs: joint.count(RECENT_USAGE_DIFFERS),
                recent_usage: joint.count(RECENT_USAGE),
            })
            .collect();
        let ledger = &self.audit.ledger;
        Ok(ledger
            .run(async |conn| {
                findings::record(conn, lease, &found, sequence, begun.elapsed().as_secs_f64()).await
            })
            .await?)
    }
}

/// Logs changes in every process, not only in the one that audits.
fn log_changes(logged: &mut LastMessages, findings: &[Finding]) {
    let joined = |words: Vec<String>| Some(words.join("; ")).filter(|words| !words.is_empty());
    let imbalance = joined(findings.iter().filter_map(Finding::imbalance).collect());
    let holds = joined(holds(findings).into_iter().map(|hold| hold.why).collect());
    match &imbalance {
        Some(differences) if logged.imbalance.is_new(differences) => {
            warn!(differences, "books differ; `tallyline audit` lists the differences")
        }
        None if logged.imbalance.end() => info!("books balance again"),
        _ => {}
    }
    match &holds {
        Some(why) if logged.holds.is_new(why) => {
            error!(why, "usage is held; `tallyline status` shows what ends the hold")
        }
        None if logged.holds.end() => info!("findings no longer hold usage"),
        _ => {}
    }
}
