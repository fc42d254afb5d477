//! Compares source and ledger. The ledger has each completed build and usage row of coderd with its
//! id and digest, and no others.
//!
//! Both sides are compared in slices (`slices.rs`). With live traffic both sides are never at the
//! same instant. So ids that differ are kept until the ledger has a later collector pass. Then only
//! these ids are reread, ledger first, source last (`suspects.rs`).

use std::collections::{BTreeSet, HashSet};
use std::time::Duration;

use anyhow::Context as _;

use super::joint::{Audit, Joint, RECENT_USAGE, SOURCE};
use super::reading::Report;
use super::sides::{READ_AGAIN, Sides, Suspects, event_ids};
use super::slices::Found;
use super::source_turns::Turns;
use super::step::{Item, Step};
use crate::event::build_of;
use crate::ledger::{Difference, books, known, slices, sources};

/// The most second claimants of a first successful start in the list.
const CLAIMANTS_LISTED: i64 = 100;

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
    joint.number(
        RECENT_USAGE,
        audit
            .ledger
            .run(async |conn| books::recent_usage(conn, sides.source.id, sides.recent()).await)
            .await?,
    );
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

/// One step of the continuous audit: new rows, the next slice of each turn, and the known items
/// again. Its cost does not depend on the length of the history.
pub(super) async fn step(
    audit: &Audit,
    known: Vec<Item>,
    progress: Option<serde_json::Value>,
) -> anyhow::Result<Step> {
    let (database, deployment) =
        audit.source.as_ref().context("no coderd database is configured")?;
    let source =
        audit.ledger.run(async |conn| sources::get(conn, *deployment).await).await?.context(
            "the ledger does not know this deployment: no collector has registered it yet",
        )?;
    let mut sides = Sides::open(&audit.ledger, database, source).await?;
    sides.identify().await?;
    let before = progress.unwrap_or_default();
    // progress of another version: every turn begins again
    let mut turns: Turns = serde_json::from_value(before.clone()).unwrap_or_default();
    let mut found = Found::default();
    let behind = sides.take_turns(&mut turns, &mut found).await?;
    for item in known {
        match build_of(&item.id) {
            Some(build) => drop(found.suspects.builds.insert(build)),
            None => drop(found.suspects.usage.insert(item.id)),
        }
    }
    let mut joint = Joint::new(SOURCE);
    let mut recent = sides.judge(audit, &found.suspects, &mut joint).await?;
    let unsettled = joint.drop_unsettled();
    if !unsettled.is_empty() && joint.differences.is_empty() {
        anyhow::bail!("no collector pass ended in time, so missing rows may be in flight");
    }
    let builds = found.suspects.builds.iter().flat_map(event_ids);
    let mut judged: BTreeSet<String> = builds.chain(found.suspects.usage).collect();
    judged.retain(|id| !unsettled.contains(id));
    let differences = joint.differences.into_iter().map(|difference| Item {
        is_recent_usage: recent.remove(&difference.id),
        ..Item::difference(difference)
    });
    let open = joint.open.into_iter().map(|open| Item { is_open: true, ..Item::difference(open) });
    let items = differences.chain(open).collect();
    let gone = audit.ledger.run(async |conn| slices::gone(conn, sides.source.id).await).await?;
    sides.reader.close().await;
    // the slices of unsettled rows are compared again
    let progress = match unsettled.is_empty() {
        true => serde_json::to_value(&turns)?,
        false => before,
    };
    let is_unsettled = !unsettled.is_empty();
    Ok(Step { judged, items, progress, gone, behind: behind && !is_unsettled, is_unsettled })
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
    /// Rereads the suspects after a later collector pass, and requests missing rows from the
    /// collector. Returns the differing usage that can still be published.
    async fn judge(
        &mut self,
        audit: &Audit,
        suspects: &Suspects,
        joint: &mut Joint,
    ) -> anyhow::Result<HashSet<String>> {
        if suspects.builds.is_empty() && suspects.usage.is_empty() {
            return Ok(HashSet::new());
        }
        self.passed = self.passed(suspects).await?;
        // Read last: a pass that begins from now on covers all earlier reads, which may have taken
        // many passes.
        let newest_pass =
            self.ledger.run(async |conn| books::newest_pass(conn, self.source.id).await).await?;
        let fresh = wait_for_pass(audit, self.source.id, newest_pass).await?;
        joint.number("differed_at_first", suspects.builds.len() + suspects.usage.len());
        joint.number(READ_AGAIN, i64::from(fresh));
        self.judge_builds(&suspects.builds, joint).await?;
        let recent = self.judge_usage(&suspects.usage, joint).await?;
        if fresh {
            self.fetch_missing(joint).await?;
        }
        Ok(recent)
    }

    /// The suspects that were resubmitted from the rejects.
    async fn passed(&self, suspects: &Suspects) -> anyhow::Result<HashSet<String>> {
        let builds = suspects.builds.iter().flat_map(event_ids);
        let names: Vec<String> = builds.chain(suspects.usage.iter().cloned()).collect();
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

fn remark(kind: &'static str, id: &str, detail: &str) -> Difference {
    Difference { kind: kind.into(), id: id.to_owned(), detail: detail.to_owned() }
}
