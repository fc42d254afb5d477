//! The continuous audit. The lease `audit` allows one process at a time; the ledger keeps the
//! findings for all.
//!
//! A side that cannot be read changes no finding: the finding's age shows that. Missing rows alone
//! change none either, until a collector pass shows that they are not in flight.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::Context as _;
use chrono::TimeDelta;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};
use uuid::Uuid;

use super::joint::{Audit, LOG, RECENT, SOURCE, VENDOR};
use super::source::Work;
use super::step::{Item, Step};
use super::telemetry::AuditTelemetry;
use super::turn::Pace;
use super::{log, source, vendor};
use crate::cause::LastingFault;
use crate::ledger::{
    AuditedJoint, Finding, LastStep, LateAudit, Lease, LeaseError, Sequence, StatementError,
    audit_items, findings, holds, late_audits, lease_step, leases, retirements, snapshots,
};

const NAME: &str = "audit";
/// Another process can audit this long after the lease of a dead one was renewed.
const LEASE_LENGTH: Duration = Duration::from_secs(30);
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

/// A joint whose next step is due.
struct DueStep {
    joint: JointName,
    work: Work,
    /// The duration of the earlier step whose rows this one judges.
    earlier_seconds: f64,
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
        let mut failed: BTreeMap<JointName, Instant> = BTreeMap::new();
        while !stop.is_cancelled() {
            failed.retain(|_, at| at.elapsed() < self.every.min(RETRY));
            match self.round(&mut failed, &mut logged, stop).await {
                Ok(is_behind) => {
                    if failed.is_empty() {
                        logged.fault.end();
                    }
                    if is_behind {
                        continue;
                    }
                }
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

    /// Shows the last findings, and does a step of each due joint, except those whose audit has just
    /// failed. Returns whether a joint of the ledger is behind: then the next round begins at once.
    async fn round(
        &self,
        failed: &mut BTreeMap<JointName, Instant>,
        logged: &mut LastMessages,
        stop: &CancellationToken,
    ) -> anyhow::Result<bool> {
        let ledger = &self.audit.ledger;
        let due = stop.run_until_cancelled(self.show_findings(logged)).await.transpose()?;
        if !due.is_some_and(|due| due.iter().any(|due| !failed.contains_key(&due.joint))) {
            return Ok(false);
        }
        let taken = lease_step(
            stop,
            ledger.run(async |conn| leases::take(conn, NAME, &self.holder, LEASE_LENGTH).await),
        )
        .await
        .transpose()?;
        let Some(lease) = taken.flatten() else { return Ok(false) };
        let audited = stop.run_until_cancelled(self.audit_if_due(&lease, failed)).await;
        let released =
            lease_step(stop, ledger.run(async |conn| leases::release(conn, lease).await))
                .await
                .transpose();
        // the audit's own error takes precedence
        let is_behind = audited.transpose()?.unwrap_or(false);
        released?;
        stop.run_until_cancelled(self.show_findings(logged)).await.transpose()?;
        Ok(is_behind)
    }

    /// Shows and logs the latest findings, and returns the joints that are due.
    async fn show_findings(&self, logged: &mut LastMessages) -> anyhow::Result<Vec<DueStep>> {
        let ledger = &self.audit.ledger;
        let late =
            ledger.run(late_audits::list).await.context("reading findings from the ledger")?;
        let findings =
            ledger.run(findings::list).await.context("reading findings from the ledger")?;
        let retired = self.is_retired().await.context("reading findings from the ledger")?;
        self.telemetry.show(&findings, &late, self.own(), retired);
        log_changes(logged, &findings, &late);
        self.due(retired).await
    }

    /// Checks again: the last holder of the lease may have audited since.
    async fn audit_if_due(
        &self,
        lease: &Lease,
        failed: &mut BTreeMap<JointName, Instant>,
    ) -> anyhow::Result<bool> {
        let mut due = self.due(self.is_retired().await?).await?;
        due.retain(|due| !failed.contains_key(&due.joint));
        if due.is_empty() { Ok(false) } else { self.audit_with_lease(lease, due, failed).await }
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

    /// The joints whose next step is due.
    async fn due(&self, retired: bool) -> anyhow::Result<Vec<DueStep>> {
        let steps = self.audit.ledger.run(audit_items::last_steps).await?;
        let source = self.own().filter(|_| !retired).map(|own| (SOURCE, Some(own)));
        let mut due = Vec::new();
        for joint in [(LOG, None), (VENDOR, None)].into_iter().chain(source) {
            let of_joint = |step: &&LastStep| (step.joint.as_str(), step.deployment_id) == joint;
            let last = steps.iter().find(of_joint);
            if last.is_none_or(|last| last.age_seconds >= self.pause(last).as_secs_f64()) {
                due.push(DueStep { joint, work: Work::Compare, earlier_seconds: 0.0 });
            } else if let Some(last) = last
                && let Some(pass) = last.awaited_pass
                && source::later_pass_is_in(&self.audit, pass).await?
            {
                due.push(DueStep { joint, work: Work::Judge, earlier_seconds: last.seconds });
            }
        }
        Ok(due)
    }

    /// Audits while it renews the lease.
    async fn audit_with_lease(
        &self,
        lease: &Lease,
        due: Vec<DueStep>,
        failed: &mut BTreeMap<JointName, Instant>,
    ) -> anyhow::Result<bool> {
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

    /// Does one step of each due joint: none delays another for longer than a step. If one side
    /// cannot be read, the other joints are still audited. Returns whether a joint of the ledger is
    /// behind.
    async fn audit_joints(
        &self,
        lease: &Lease,
        due: Vec<DueStep>,
        failed: &mut BTreeMap<JointName, Instant>,
    ) -> anyhow::Result<bool> {
        let (mut outcome, mut is_behind) = (Ok(()), false);
        for due in due {
            match self.audit_joint(lease, &due).await {
                Ok(step_is_behind) => is_behind |= step_is_behind && due.joint.0 != SOURCE,
                Err(fault) => {
                    failed.insert(due.joint, Instant::now());
                    outcome = outcome.and(Err(fault));
                }
            }
        }
        outcome.map(|()| is_behind)
    }

    /// The time until the next audit of a joint whose last step took `seconds`.
    fn rest(&self, seconds: f64) -> Duration {
        self.every.max(Duration::try_from_secs_f64(seconds * REST).unwrap_or(self.every))
    }

    /// The time between the joint's last step and its next one. New batches are read at once. coderd
    /// always rests.
    fn pause(&self, last: &LastStep) -> Duration {
        match last.is_behind {
            true if last.joint != SOURCE => Duration::ZERO,
            true => Duration::try_from_secs_f64(last.seconds * REST).unwrap_or(self.every),
            false => self.rest(last.seconds),
        }
    }

    /// Does one step. Returns whether the joint is behind.
    async fn audit_joint(&self, lease: &Lease, due: &DueStep) -> anyhow::Result<bool> {
        let (ledger, begun) = (&self.audit.ledger, Instant::now());
        let (joint, deployment) = due.joint;
        let known =
            ledger.run(async |conn| audit_items::due(conn, joint, deployment, ITEMS).await).await?;
        let progress =
            ledger.run(async |conn| audit_items::progress(conn, joint, deployment).await).await?;
        let head = ledger.run(snapshots::head).await?;
        let pace = Pace {
            now: ledger.clock.now(),
            every: TimeDelta::from_std(self.every)?,
            ends_at: begun + self.every.div_f64(REST + 1.0),
        };
        let step = self.step(due, known, progress, &pace).await?;
        // a joint that is behind, or whose rows wait for a pass, has its own progress
        let audited = ["/audited/sequence", "/confirmed_to"]
            .iter()
            .find_map(|place| step.progress.pointer(place)?.as_i64());
        let sequence = Sequence { number: audited.unwrap_or(head.number), ..head };
        let seconds = due.earlier_seconds + begun.elapsed().as_secs_f64();
        let of = AuditedJoint {
            joint,
            deployment,
            sequence,
            seconds,
            good_for: self.rest(seconds) * self.late_after,
            recent_since: pace.now - RECENT,
        };
        ledger.run(async |conn| audit_items::record(conn, lease, &of, &step).await).await?;
        Ok(step.behind)
    }

    async fn step(
        &self,
        due: &DueStep,
        known: Vec<Item>,
        progress: Option<serde_json::Value>,
        pace: &Pace,
    ) -> anyhow::Result<Step> {
        match due.joint.0 {
            SOURCE => source::step(&self.audit, known, progress, pace, due.work).await,
            LOG => log::step(&self.audit, known, progress, pace).await,
            _ => vendor::step(&self.audit, known, progress, pace).await,
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
