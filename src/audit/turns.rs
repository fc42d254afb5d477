//! How far the continuous audit of a ledger joint has come.
//!
//! New batches are read in each step. Older ones are read again in turns: those of the last 35 days
//! once a day, all of them once in 30 days.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

use super::joint::{Audit, LOG, VENDOR};
use super::step::{Item, Step};
use super::turn::{Pace, RECENT_ROWS, RECENT_TURN, Turn, TurnTimes, WHOLE_TURN, all_ended};
use crate::ledger::checks::{self, BatchCursor, ChainName, ChainSums, CheckedPage, PublicationKey};
use crate::ledger::{Difference, audit_items};

/// The progress of a ledger joint.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct LedgerProgress {
    pub audited: BatchCursor,
    /// Sums of all audited batches, by chain.
    pub chains: BTreeMap<ChainName, ChainSums>,
    recent: Turn<BatchCursor>,
    whole: Turn<BatchCursor>,
    /// The sums of the batches that the turn over all of them has read, and of newer ones.
    recounted: BTreeMap<ChainName, ChainSums>,
    /// All publications in the order of their keys; for the joint of ledger and vendor.
    keys: Turn<PublicationKey>,
    #[serde(flatten)]
    times: TurnTimes,
}

impl LedgerProgress {
    /// The saved progress. One that this version cannot read begins again.
    pub fn of(saved: Option<serde_json::Value>) -> Self {
        saved.and_then(|saved| serde_json::from_value(saved).ok()).unwrap_or_default()
    }

    /// Moves behind the page of new batches, and returns its differences.
    pub fn advance(&mut self, new: &CheckedPage) -> Vec<Difference> {
        self.audited = new.until;
        add(&mut self.chains, &new.chains);
        if self.whole.is_running() {
            add(&mut self.recounted, &new.chains);
        }
        new.differences.clone()
    }

    /// Begins the turns that are due. Reads a page of each turn, and more pages of those that are
    /// behind their time. Returns their differences.
    pub async fn take_turns(
        &mut self,
        audit: &Audit,
        joint: &str,
        pace: &Pace,
    ) -> anyhow::Result<Vec<Difference>> {
        self.begin_turns(audit, joint, pace.now).await?;
        let mut found = Vec::new();
        let mut only_behind = false;
        while self.pages(audit, joint, pace, only_behind, &mut found).await? && pace.allows_more() {
            only_behind = true;
        }
        self.times = self.times(joint);
        Ok(found)
    }

    async fn begin_turns(
        &mut self,
        audit: &Audit,
        joint: &str,
        now: DateTime<Utc>,
    ) -> anyhow::Result<()> {
        let until = Some(self.audited);
        if self.recent.is_due(RECENT_TURN, now) {
            let since = now - RECENT_ROWS;
            let from =
                audit.ledger.run(async |conn| checks::recorded_since(conn, since).await).await?;
            self.recent.begin(from, until, now);
        }
        if self.whole.is_due(WHOLE_TURN, now) {
            self.whole.begin(BatchCursor::default(), until, now);
            self.recounted.clear();
        }
        if joint == VENDOR && self.keys.is_due(WHOLE_TURN, now) {
            self.keys.begin(PublicationKey::default(), None, now);
        }
        Ok(())
    }

    /// Reads one page of each turn; with `only_behind`, of each that is behind its time. Returns
    /// whether there was one.
    async fn pages(
        &mut self,
        audit: &Audit,
        joint: &str,
        pace: &Pace,
        only_behind: bool,
        found: &mut Vec<Difference>,
    ) -> anyhow::Result<bool> {
        let mut has_read = false;
        if !only_behind || self.recent.is_behind(RECENT_TURN, pace) {
            has_read |= page(audit, joint, &mut self.recent, pace, found).await?.is_some();
        }
        if (!only_behind || self.whole.is_behind(WHOLE_TURN, pace))
            && let Some(sums) = page(audit, joint, &mut self.whole, pace, found).await?
        {
            has_read = true;
            add(&mut self.recounted, &sums);
            if !self.whole.is_running() {
                self.chains = std::mem::take(&mut self.recounted);
            }
        }
        if (!only_behind || self.keys.is_behind(WHOLE_TURN, pace))
            && let Some((after, _)) = self.keys.rest()
        {
            has_read = true;
            let page = audit
                .ledger
                .run(async |conn| checks::publications_after(conn, &after).await)
                .await?;
            found.extend(page.differences);
            self.keys.advance(page.until, pace.now);
        }
        Ok(has_read)
    }

    fn times(&self, joint: &str) -> TurnTimes {
        let keys = (joint == VENDOR).then(|| self.keys.ended_at());
        let whole_due = [self.whole.due_at(WHOLE_TURN), self.keys.due_at(WHOLE_TURN)];
        TurnTimes {
            recent_turn_ended_at: self.recent.ended_at(),
            recent_turn_due_at: self.recent.due_at(RECENT_TURN),
            whole_turn_ended_at: all_ended([self.whole.ended_at()].into_iter().chain(keys)),
            whole_turn_due_at: whole_due.into_iter().flatten().min(),
        }
    }
}

/// Reads the next page of a running turn. Returns its sums.
async fn page(
    audit: &Audit,
    joint: &str,
    turn: &mut Turn<BatchCursor>,
    pace: &Pace,
    found: &mut Vec<Difference>,
) -> anyhow::Result<Option<BTreeMap<ChainName, ChainSums>>> {
    let Some((from, until)) = turn.rest() else { return Ok(None) };
    let until = until.unwrap_or_default();
    let read = async |conn: &mut _| match joint {
        LOG => checks::older_log(conn, from, until).await,
        _ => checks::older_usage(conn, from, until).await,
    };
    let page = audit.ledger.run(read).await?;
    found.extend(page.differences);
    turn.advance(Some(page.until).filter(|_| !page.is_last), pace.now);
    Ok(Some(page.chains))
}

fn add(sums: &mut BTreeMap<ChainName, ChainSums>, more: &BTreeMap<ChainName, ChainSums>) {
    for (chain, more) in more {
        *sums.entry(chain.clone()).or_default() += *more;
    }
}

/// The step with these differences. A known item that this step did not judge remains: `carried`
/// selects it, or only another kind of the same id was judged.
pub(super) async fn step(
    audit: &Audit,
    joint: &str,
    known: Vec<Item>,
    found: Vec<Difference>,
    progress: &LedgerProgress,
    carried: impl Fn(&Item) -> bool,
) -> anyhow::Result<Step> {
    let mut items: Vec<Item> = found.into_iter().map(Item::difference).collect();
    let judged: Vec<(String, String)> =
        known.iter().map(|item| (item.kind.clone(), item.id.clone())).collect();
    items.extend(known.into_iter().filter(&carried));
    let ids: Vec<String> = items.iter().map(|item| item.id.clone()).collect();
    let of_these =
        audit.ledger.run(async |conn| audit_items::of_ids(conn, joint, &ids).await).await?;
    items.extend(
        of_these.into_iter().filter(|other| {
            !judged.iter().any(|(kind, id)| *kind == other.kind && *id == other.id)
        }),
    );
    // of one kind and id, the newest detail comes first
    let mut seen = std::collections::BTreeSet::new();
    items.retain(|item| seen.insert((item.kind.clone(), item.id.clone())));
    Ok(Step {
        judged: judged.into_iter().map(|(_, id)| id).chain(ids).collect(),
        items,
        progress: serde_json::to_value(progress)?,
        gone: 0,
        behind: false,
        is_unsettled: false,
    })
}
