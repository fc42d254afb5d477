//! How far the continuous audit of a ledger joint has come.
//!
//! New batches are read in each round. Older ones are read again in turns: those of the last 35
//! days once a day, all of them once in 30 days. A round reads one page of each turn. If the pages
//! of that time do not suffice, the turn takes longer.

use std::collections::BTreeMap;

use chrono::{DateTime, TimeDelta, Utc};
use serde::{Deserialize, Serialize};

use super::joint::Audit;
use super::step::{Item, Step};
use crate::ledger::checks::{self, BatchCursor, ChainName, ChainSums, Checked, PublicationKey};
use crate::ledger::{Difference, audit_items};

/// Batches of this age are read again each day.
const RECENT_BATCHES: TimeDelta = TimeDelta::days(35);
const RECENT_TURN: TimeDelta = TimeDelta::hours(24);
const WHOLE_TURN: TimeDelta = TimeDelta::days(30);

/// The progress of a ledger joint. `status` shows when the turns ended.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct LedgerProgress {
    pub audited: BatchCursor,
    /// Sums of all audited batches, by chain.
    pub chains: BTreeMap<ChainName, ChainSums>,
    recent: Turn,
    whole: Turn,
    /// The same sums, as the turn over all batches counts them again.
    recounted: BTreeMap<ChainName, ChainSums>,
    /// The page of publications in the order of their keys, during the turn over all batches.
    keys: Option<PublicationKey>,
    pub recent_turn_ended_at: Option<DateTime<Utc>>,
    pub whole_turn_ended_at: Option<DateTime<Utc>>,
}

/// One turn over older batches.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Turn {
    begun_at: Option<DateTime<Utc>>,
    /// The end of the last page; None: the turn has ended.
    at: Option<BatchCursor>,
}

impl Turn {
    fn is_due(&self, every: TimeDelta, now: DateTime<Utc>) -> bool {
        self.at.is_none() && self.begun_at.is_none_or(|begun| now - begun >= every || begun > now)
    }

    fn begin(&mut self, at: BatchCursor, now: DateTime<Utc>) {
        *self = Turn { begun_at: Some(now), at: Some(at) };
    }
}

impl LedgerProgress {
    /// The saved progress. One that this version cannot read begins again.
    pub fn of(saved: Option<serde_json::Value>) -> Self {
        saved.and_then(|saved| serde_json::from_value(saved).ok()).unwrap_or_default()
    }

    /// Begins the turns that are due.
    pub async fn begin_turns(&mut self, audit: &Audit) -> anyhow::Result<()> {
        let now = audit.ledger.clock.now();
        if self.recent.is_due(RECENT_TURN, now) {
            let since = now - RECENT_BATCHES;
            let from =
                audit.ledger.run(async |conn| checks::recorded_since(conn, since).await).await?;
            self.recent.begin(from, now);
        }
        if self.whole.is_due(WHOLE_TURN, now) {
            self.whole.begin(BatchCursor::default(), now);
            self.recounted.clear();
            self.keys = Some(PublicationKey::default());
        }
        Ok(())
    }

    /// Where the next pages of the turns begin.
    pub fn slices(&self) -> Vec<BatchCursor> {
        [&self.recent, &self.whole].into_iter().filter_map(|turn| turn.at).collect()
    }

    pub fn keys(&self) -> Option<PublicationKey> {
        self.keys.clone()
    }

    /// Moves behind the checked pages, and returns their differences.
    pub fn advance(&mut self, checked: &Checked, now: DateTime<Utc>) -> Vec<Difference> {
        let mut found = checked.new.differences.clone();
        self.audited = checked.new.until;
        add(&mut self.chains, &checked.new.chains);
        let mut pages = checked.slices.iter();
        if self.recent.at.is_some()
            && let Some(page) = pages.next()
        {
            found.extend(page.differences.iter().cloned());
            self.recent.at = Some(page.until).filter(|_| !page.is_last);
            self.recent_turn_ended_at =
                self.recent.at.map_or(Some(now), |_| self.recent_turn_ended_at);
        }
        if self.whole.at.is_some()
            && let Some(page) = pages.next()
        {
            found.extend(page.differences.iter().cloned());
            self.whole.at = Some(page.until).filter(|_| !page.is_last);
            add(&mut self.recounted, &page.chains);
            if page.is_last {
                self.whole_turn_ended_at = Some(now);
                self.chains = std::mem::take(&mut self.recounted);
            }
        }
        if let Some(page) = &checked.keys {
            found.extend(page.differences.iter().cloned());
            self.keys = page.until.clone();
        }
        found
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_turn_begins_once_in_its_time_and_not_while_it_runs() {
        let (begun, mut turn) = (DateTime::UNIX_EPOCH, Turn::default());
        assert!(turn.is_due(RECENT_TURN, begun));
        turn.begin(BatchCursor::default(), begun);
        assert!(!turn.is_due(RECENT_TURN, begun + TimeDelta::days(9)), "it still runs");
        turn.at = None;
        assert!(!turn.is_due(RECENT_TURN, begun + TimeDelta::hours(23)));
        assert!(turn.is_due(RECENT_TURN, begun + TimeDelta::hours(24)));
        assert!(turn.is_due(RECENT_TURN, begun - TimeDelta::hours(1)), "the clock was ahead");
    }
}
