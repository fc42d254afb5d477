//! Compares source and ledger. The ledger has each completed build and usage row of coderd with its
//! id and digest, and no others.
//!
//! Both sides are compared in slices (`slices.rs`). With live traffic both sides are never at the
//! same instant. So ids that differ are kept until the ledger has a later collector pass. Then only
//! these ids are reread, ledger first, source last (`suspects.rs`).

use std::collections::{BTreeSet, HashSet};
use std::time::Duration;

use anyhow::Context as _;
use chrono::TimeDelta;

use super::joint::{Audit, Joint, RECENT_USAGE, SOURCE};
use super::reading::Report;
use super::sides::{READ_AGAIN, Sides, Suspects};
use super::slices::Found;
use super::source_turns::{InFlight, Turns};
use super::step::{Item, Step};
use super::suspects::is_missing;
use super::turn::Pace;
use crate::ledger::{Difference, books, known, slices, sources};

/// The most second claimants of a first successful start in the list.
const CLAIMANTS_LISTED: usize = 100;
/// The time whose usage one statement counts.
const COUNTED: TimeDelta = TimeDelta::hours(6);
/// With this number of missing rows in flight, a step compares no others.
const MOST_IN_FLIGHT: usize = 1_000;

/// The work of one step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Work {
    Compare,
    /// Only missing rows whose awaited pass has come.
    Judge,
}

/// Compares all of both sides, or goes on with an audit that was interrupted (`whole.rs`).
pub(super) async fn compare(
    audit: &Audit,
    from_start: bool,
    report: Report<'_>,
) -> anyhow::Result<Joint> {
    let mut joint = Joint::new(SOURCE);
    let Some((database, deployment)) = &audit.source else {
        joint.remarks.push(remark("not_compared", "source", "no coderd database is configured"));
        return Ok(joint);
    };
    let Some(source) = audit.ledger.run(async |conn| sources::get(conn, *deployment).await).await?
    else {
        let detail = "the ledger does not know this deployment: no collector has registered it yet"
            .to_owned();
        joint.differences.push(Difference {
            kind: "source_unknown".into(),
            id: deployment.to_string(),
            detail,
        });
        return Ok(joint);
    };
    let mut sides = Sides::open(&audit.ledger, database, source).await?;
    sides.identify().await?;
    let found = sides.read_whole(from_start, report, &mut joint).await?;
    found.count(&mut joint);
    joint.number(RECENT_USAGE, sides.recent_usage().await?);
    sides.judge(audit, &found.suspects, &mut joint).await?;
    sides.list_gone(&mut joint).await?;
    joint.remarks.extend(
        audit
            .ledger
            .run(async |conn| {
                books::second_first_starts(conn, sides.source.id, CLAIMANTS_LISTED).await
            })
            .await?,
    );
    sides.reader.close().await;
    Ok(joint)
}

/// One step of the continuous audit: new rows, pages of the turns, and the known items again; or only
/// missing rows whose awaited pass has come. It waits for no pass: rows that may be in flight are
/// kept in the progress, for a later step. Its cost does not depend on the length of the history.
pub(super) async fn step(
    audit: &Audit,
    known: Vec<Item>,
    progress: Option<serde_json::Value>,
    pace: &Pace,
    work: Work,
) -> anyhow::Result<Step> {
    let (database, deployment) =
        audit.source.as_ref().context("no coderd database is configured")?;
    let source =
        audit.ledger.run(async |conn| sources::get(conn, *deployment).await).await?.context(
            "the ledger does not know this deployment: no collector has registered it yet",
        )?;
    let mut sides = Sides::open(&audit.ledger, database, source).await?;
    sides.identify().await?;
    // progress of another version: every turn begins again
    let mut turns: Turns = serde_json::from_value(progress.unwrap_or_default()).unwrap_or_default();
    let mut step = Step::default();
    sides.judge_settled(&mut turns, &known, &mut step).await?;
    if work == Work::Compare {
        let mut found = Found::default();
        // with many rows in flight, only these are looked at
        if turns.in_flight.len() < MOST_IN_FLIGHT {
            turns.is_behind = sides.take_turns(&mut turns, pace, &mut found).await?;
        }
        known.iter().for_each(|item| found.suspects.add(&item.id));
        turns.in_flight.keys().for_each(|id| found.suspects.add(id));
        sides.judge_first(&mut turns, found.suspects, &mut step).await?;
    }
    let source_id = sides.source.id;
    step.gone = audit.ledger.run(async |conn| slices::gone(conn, source_id).await).await?;
    sides.reader.close().await;
    step.is_unsettled = turns.settle();
    step.behind = turns.is_behind;
    step.progress = serde_json::to_value(&turns)?;
    Ok(step)
}

/// Whether the ledger has a pass that began after this one was recorded.
pub(super) async fn later_pass_is_in(audit: &Audit, after: i64) -> anyhow::Result<bool> {
    let Some((_, deployment)) = audit.source.as_ref() else { return Ok(false) };
    let source = audit.ledger.run(async |conn| sources::get(conn, *deployment).await).await?;
    let Some(source) = source else { return Ok(false) };
    Ok(audit.ledger.run(async |conn| books::later_pass_is_in(conn, source.id, after).await).await?)
}

/// Waits until the ledger has a pass newer than `after`. False: none came in time.
async fn wait_for_pass(audit: &Audit, source_id: i16, after: i64) -> anyhow::Result<bool> {
    let deadline = tokio::time::Instant::now() + audit.patience;
    loop {
        if audit
            .ledger
            .run(async |conn| books::later_pass_is_in(conn, source_id, after).await)
            .await?
        {
            return Ok(true);
        }
        if tokio::time::Instant::now() >= deadline {
            return Ok(false);
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

impl Sides<'_> {
    /// The number of recent usage events, counted in statements of a few hours.
    async fn recent_usage(&self) -> anyhow::Result<i64> {
        let (mut since, now) = (self.recent(), self.ledger.clock.now());
        let mut count = 0;
        while since < now {
            let until = Some(since + COUNTED).filter(|until| *until < now);
            count += self
                .ledger
                .run(async |conn| books::usage_between(conn, self.source.id, since, until).await)
                .await?;
            since = until.unwrap_or(now);
        }
        Ok(count)
    }

    /// Rereads the suspects after a later collector pass, and requests missing rows from the
    /// collector.
    async fn judge(
        &mut self,
        audit: &Audit,
        suspects: &Suspects,
        joint: &mut Joint,
    ) -> anyhow::Result<()> {
        if suspects.len() == 0 {
            return Ok(());
        }
        self.passed = self.passed(suspects).await?;
        // Read last: a pass that begins from now on covers all earlier reads, which may have taken
        // many passes.
        let newest_pass =
            self.ledger.run(async |conn| books::newest_pass(conn, self.source.id).await).await?;
        let fresh = wait_for_pass(audit, self.source.id, newest_pass).await?;
        joint.number("differed_at_first", suspects.len());
        self.reread(suspects, fresh, joint).await?;
        Ok(())
    }

    /// Rereads the suspects. `fresh`: a later pass has ended, so missing rows are not in flight.
    /// Returns the differing usage that can still be published.
    async fn reread(
        &mut self,
        suspects: &Suspects,
        fresh: bool,
        joint: &mut Joint,
    ) -> anyhow::Result<HashSet<String>> {
        joint.number(READ_AGAIN, i64::from(fresh));
        self.judge_builds(&suspects.builds, joint).await?;
        let recent = self.judge_usage(&suspects.usage, joint).await?;
        if fresh {
            self.fetch_missing(joint).await?;
        }
        Ok(recent)
    }

    /// Judges the missing rows whose awaited pass has come, and those that were found to be missing
    /// before.
    async fn judge_settled(
        &mut self,
        turns: &mut Turns,
        known: &[Item],
        step: &mut Step,
    ) -> anyhow::Result<()> {
        let (mut suspects, mut settled) = (Suspects::default(), Vec::new());
        let passes: BTreeSet<i64> = turns.in_flight.values().map(|row| row.after_pass).collect();
        for after in passes {
            let source_id = self.source.id;
            if self
                .ledger
                .run(async |conn| books::later_pass_is_in(conn, source_id, after).await)
                .await?
            {
                settled.push(after);
            }
        }
        self.passed.clear();
        for (id, row) in turns.in_flight.extract_if(.., |_, row| settled.contains(&row.after_pass))
        {
            suspects.add(&id);
            self.passed.extend(row.passed.then_some(id));
        }
        for item in known.iter().filter(|item| is_missing(&item.kind) && !item.is_open) {
            suspects.add(&item.id);
            self.passed.extend((item.kind == "resubmitted").then(|| item.id.clone()));
        }
        let mut joint = Joint::new(SOURCE);
        let recent = self.reread(&suspects, true, &mut joint).await?;
        add_items(step, &suspects, joint, recent);
        Ok(())
    }

    /// Judges the suspects of this step. Rows that may be in flight wait for a later pass, except
    /// those that the step has already judged.
    async fn judge_first(
        &mut self,
        turns: &mut Turns,
        suspects: Suspects,
        step: &mut Step,
    ) -> anyhow::Result<()> {
        let suspects = suspects.without(&step.judged);
        self.passed = self.passed(&suspects).await?;
        let mut joint = Joint::new(SOURCE);
        let recent = self.reread(&suspects, false, &mut joint).await?;
        let unsettled = joint.drop_unsettled();
        // Read last: a pass that begins from now on covers all reads.
        let source_id = self.source.id;
        let after_pass =
            self.ledger.run(async |conn| books::newest_pass(conn, source_id).await).await?;
        turns.in_flight.retain(|id, _| unsettled.contains(id));
        for id in &unsettled {
            let passed = self.passed.contains(id);
            turns.in_flight.entry(id.clone()).or_insert(InFlight { after_pass, passed });
        }
        add_items(step, &suspects, joint, recent);
        step.judged.retain(|id| !unsettled.contains(id));
        Ok(())
    }

    /// The suspects that were resubmitted from the rejects.
    async fn passed(&self, suspects: &Suspects) -> anyhow::Result<HashSet<String>> {
        let names: Vec<String> = suspects.event_ids().collect();
        let mut passed = HashSet::new();
        for names in names.chunks(4_000) {
            let refused = self
                .ledger
                .run(async |conn| {
                    known::refused_states(conn, self.source.deployment_id, names).await
                })
                .await?;
            passed.extend(
                refused.into_iter().filter(|(_, refused)| refused.passed).map(|(name, _)| name),
            );
        }
        Ok(passed)
    }
}

/// Adds the judged suspects to the step, and what differs of them.
fn add_items(step: &mut Step, suspects: &Suspects, joint: Joint, mut recent: HashSet<String>) {
    step.judged.extend(suspects.event_ids());
    step.items.extend(joint.differences.into_iter().map(|difference| Item {
        is_recent_usage: recent.remove(&difference.id),
        ..Item::difference(difference)
    }));
    let open = joint.open.into_iter().map(|open| Item { is_open: true, ..Item::difference(open) });
    step.items.extend(open);
}

fn remark(kind: &'static str, id: &str, detail: &str) -> Difference {
    Difference { kind: kind.into(), id: id.to_owned(), detail: detail.to_owned() }
}
