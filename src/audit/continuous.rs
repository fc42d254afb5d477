//! The continuous audit. The lease `audit` allows one process at a time; the ledger keeps the
//! findings for all.
//!
//! A side that cannot be read changes no finding: the finding's age shows that. Missing rows alone
//! change none either, until a collector pass shows that they are not in flight.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::Context as _;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};
use uuid::Uuid;

use super::joint::{Audit, LOG, RECENT, SOURCE, VENDOR};
use super::step::{Item, Step};
use super::telemetry::AuditTelemetry;
use super::{log, source, vendor};
use crate::cause::LastingFault;
use crate::ledger::{
    AuditedJoint, Finding, LateAudit, Lease, LeaseError, Sequence, StatementError, audit_items,
    findings, holds, late_audits, lease_step, leases, retirements, snapshots,
};

const NAME: &str = "audit";
/// Another process can audit this long after the lease of a dead one was renewed.
const LEASE_LENGTH: Duration = Duration::from_secs(60);
/// The longest time between two reads of findings and due audits.
const POLL: Duration = Duration::from_secs(5);
/// The rest after an audit, in lengths of that audit: audits take at most a tenth of the time.
const REST: f64 = 9.0;
/// The time after which a failed audit is retried, or a shorter interval.
const RETRY: Duration = Duration::from_secs(10);
/// Known items that one step judges again.
const ITEMS: i64 = 1_000;

/// Runs audits in a loop.
pub struct Continuous {
    /// The parts to compare. Without a source, only the ledger with log and vendor: another process
    /// may have the source.
    pub audit: Audit,
    /// Time between two audits of a joint.
    pub every: Duration,
    /// Without an audit of a joint for this number of intervals, publishing is held.
    pub late_after: u32,
    /// The name of this process as holder of the lease; unique.
    pub holder: String,
    /// Where findings are shown.
    pub telemetry: AuditTelemetry,
}

/// A joint that this process can audit: its name and its deployment.
type JointName = (&'static str, Option<Uuid>);

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
        let mut failed: BTreeMap<JointName, Instant> = BTreeMap::new();
        while !stop.is_cancelled() {
            failed.retain(|_, at| at.elapsed() < self.every.min(RETRY));
            match self.round(&mut failed, &mut logged, stop).await {
                Ok(()) if failed.is_empty() => {
                    logged.fault.end();
                }
                Ok(()) => {}
                Err(fault) => {
                    let fault = crate::cause::text(fault.as_ref());
                    if logged.fault.is_new(&fault) {
                        warn!(fault, "audit failed; the last findings remain");
                    }
                }
            }
            stop.run_until_cancelled(tokio::time::sleep(self.every.min(POLL))).await;
        }
    }

    /// Shows the last findings, and audits due joints, except those whose audit has just failed.
    async fn round(
        &self,
        failed: &mut BTreeMap<JointName, Instant>,
        logged: &mut LastMessages,
        stop: &CancellationToken,
    ) -> anyhow::Result<()> {
        let ledger = &self.audit.ledger;
        let due = stop.run_until_cancelled(self.show_findings(logged)).await.transpose()?;
        if !due.is_some_and(|due| due.iter().any(|joint| !failed.contains_key(joint))) {
            return Ok(());
        }
        let taken = lease_step(
            stop,
            ledger.run(async |conn| leases::take(conn, NAME, &self.holder, LEASE_LENGTH).await),
        )
        .await
        .transpose()?;
        let Some(lease) = taken.flatten() else { return Ok(()) };
        let audited = stop.run_until_cancelled(self.audit_if_due(&lease, failed)).await;
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
    async fn show_findings(&self, logged: &mut LastMessages) -> anyhow::Result<Vec<JointName>> {
        let ledger = &self.audit.ledger;
        let late =
            ledger.run(late_audits::list).await.context("reading findings from the ledger")?;
        let findings =
            ledger.run(findings::list).await.context("reading findings from the ledger")?;
        let retired = self.is_retired().await.context("reading findings from the ledger")?;
        self.telemetry.show(&findings, &late, self.own(), retired);
        log_changes(logged, &findings, &late);
        Ok(self.due(&findings, retired))
    }

    /// Checks again: the last holder of the lease may have audited since.
    async fn audit_if_due(
        &self,
        lease: &Lease,
        failed: &mut BTreeMap<JointName, Instant>,
    ) -> anyhow::Result<()> {
        let ledger = &self.audit.ledger;
        let mut due = self.due(&ledger.run(findings::list).await?, self.is_retired().await?);
        due.retain(|joint| !failed.contains_key(joint));
        if due.is_empty() { Ok(()) } else { self.audit_with_lease(lease, due, failed).await }
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

    fn due(&self, findings: &[Finding], retired: bool) -> Vec<JointName> {
        let is_due = |(joint, deployment): &JointName| {
            let last = findings
                .iter()
                .find(|finding| finding.joint == *joint && finding.deployment_id == *deployment);
            last.is_none_or(|last| last.age_seconds >= self.rest(last.seconds).as_secs_f64())
        };
        let source = self.own().filter(|_| !retired).map(|own| (SOURCE, Some(own)));
        [(LOG, None), (VENDOR, None)].into_iter().chain(source).filter(is_due).collect()
    }

    /// Audits while it renews the lease.
    async fn audit_with_lease(
        &self,
        lease: &Lease,
        due: Vec<JointName>,
        failed: &mut BTreeMap<JointName, Instant>,
    ) -> anyhow::Result<()> {
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
            done = self.audit_joints(lease, due, failed) => done,
            lost = keeping => Err(lost.into()),
        }
    }

    /// Audits the due joints, in steps by turns, until each has read the newest batch. If one side
    /// cannot be read, the other joints are still audited.
    async fn audit_joints(
        &self,
        lease: &Lease,
        mut due: Vec<JointName>,
        failed: &mut BTreeMap<JointName, Instant>,
    ) -> anyhow::Result<()> {
        let mut outcome = Ok(());
        while !due.is_empty() {
            let mut behind = Vec::new();
            for joint in due {
                match self.audit_joint(lease, joint).await {
                    Ok(true) => behind.push(joint),
                    Ok(false) => {}
                    Err(fault) => {
                        failed.insert(joint, Instant::now());
                        outcome = outcome.and(Err(fault));
                    }
                }
            }
            due = behind;
        }
        outcome
    }

    /// The time until the next audit of a joint whose last step took `seconds`.
    fn rest(&self, seconds: f64) -> Duration {
        self.every.max(Duration::try_from_secs_f64(seconds * REST).unwrap_or(self.every))
    }

    /// Does one step. Returns whether the joint is behind.
    async fn audit_joint(
        &self,
        lease: &Lease,
        (joint, deployment): JointName,
    ) -> anyhow::Result<bool> {
        let (ledger, begun) = (&self.audit.ledger, Instant::now());
        let known =
            ledger.run(async |conn| audit_items::due(conn, joint, deployment, ITEMS).await).await?;
        let progress =
            ledger.run(async |conn| audit_items::progress(conn, joint, deployment).await).await?;
        let head = ledger.run(snapshots::head).await?;
        let step = self.step(joint, known, progress).await?;
        // a joint that is behind has its own progress
        let audited = step.progress.pointer("/audited/sequence").and_then(|number| number.as_i64());
        let number = audited.filter(|_| step.behind).unwrap_or(head.number);
        let sequence = Sequence { number, ..head };
        let seconds = begun.elapsed().as_secs_f64();
        let of = AuditedJoint {
            joint,
            deployment,
            sequence,
            seconds,
            good_for: self.rest(seconds) * self.late_after,
            recent_since: ledger.clock.now() - RECENT,
        };
        ledger.run(async |conn| audit_items::record(conn, lease, &of, &step).await).await?;
        Ok(step.behind)
    }

    async fn step(
        &self,
        joint: &str,
        known: Vec<Item>,
        progress: Option<serde_json::Value>,
    ) -> anyhow::Result<Step> {
        match joint {
            SOURCE => source::step(&self.audit, known, progress).await,
            LOG => log::step(&self.audit, known, progress).await,
            _ => vendor::step(&self.audit, known, progress).await,
        }
    }
}

/// Logs changes in every process, not only in the one that audits.
fn log_changes(logged: &mut LastMessages, findings: &[Finding], late: &[LateAudit]) {
    let joined = |words: Vec<String>| Some(words.join("; ")).filter(|words| !words.is_empty());
    let imbalance = joined(findings.iter().filter_map(Finding::imbalance).collect());
    let holds = joined(holds(findings, late).into_iter().map(|hold| hold.why).collect());
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
        None if logged.holds.end() => info!("audits no longer hold usage"),
        _ => {}
    }
}
