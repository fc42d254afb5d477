//! The turns of the continuous audit through source and ledger. Each step compares the new rows, the
//! unconfirmed events of new batches, whatever their time, and pages of each turn. So a step costs
//! the same with any length of history, until a turn is behind its time.

use std::collections::BTreeMap;

use chrono::{DateTime, TimeDelta, Utc};
use serde::{Deserialize, Serialize};

use super::sides::Sides;
use super::slices::{END, FIRST, Found};
use super::turn::{Pace, RECENT_ROWS, RECENT_TURN, Turn, TurnTimes, WHOLE_TURN, all_ended};
use crate::coderd::UsageKey;
use crate::ledger::{passes, slices, snapshots};

/// Without completeness, rows of this time may be in flight.
const IN_FLIGHT: TimeDelta = TimeDelta::hours(1);
/// The most slices of new builds in one step.
const NEW_SLICES: usize = 20;
/// The longest time whose new rows one step compares.
const NEW_TIME: TimeDelta = TimeDelta::days(1);
/// The most pages of unconfirmed events in one step.
const UNCONFIRMED_PAGES: usize = 20;
/// With this number of differing rows, a step reads no further page.
const MOST_SUSPECTS: usize = 10_000;
/// Keys of new usage in one read.
const KEYS: i64 = 5_000;

/// A missing row that waits for a collector pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct InFlight {
    /// The newest pass when the row was seen to be missing.
    pub after_pass: i64,
    /// Whether it was resubmitted from the rejects before that.
    pub passed: bool,
}

/// How far the audit of source and ledger has come.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct Turns {
    /// Rows of earlier times were compared when they were new.
    new_until: Option<DateTime<Utc>>,
    /// Unconfirmed events of batches up to this sequence were compared when they were new.
    confirmed_to: i64,
    recent_builds: Turn<DateTime<Utc>>,
    older_builds: Turn<DateTime<Utc>>,
    recent_usage: Turn<(DateTime<Utc>, String)>,
    older_usage: Turn<(DateTime<Utc>, String)>,
    /// coderd's usage by id: it has no index by time.
    source_usage: Turn<String>,
    #[serde(flatten)]
    times: TurnTimes,
    /// Missing rows by event id. A step after a later pass judges them.
    pub in_flight: BTreeMap<String, InFlight>,
    /// The oldest pass among them.
    pub awaited_pass: Option<i64>,
    /// Whether more new rows remain than one step compares.
    pub is_behind: bool,
}

impl Turns {
    /// Begins the turns that are due. They end at the rows that were compared when they were new.
    fn begin(&mut self, now: DateTime<Utc>, has_usage: bool) {
        let recent = now - RECENT_ROWS;
        let until = self.new_until.unwrap_or(now);
        let at = |time: DateTime<Utc>| (time, String::new());
        if self.recent_builds.is_due(RECENT_TURN, now) {
            self.recent_builds.begin(recent, Some(until), now);
        }
        if self.older_builds.is_due(WHOLE_TURN, now) {
            self.older_builds.begin_before_all(FIRST, Some(recent), now);
        }
        if !has_usage {
            return;
        }
        if self.recent_usage.is_due(RECENT_TURN, now) {
            self.recent_usage.begin(at(recent), Some(at(until)), now);
        }
        if self.older_usage.is_due(WHOLE_TURN, now) {
            self.older_usage.begin_before_all(at(FIRST), Some(at(recent)), now);
        }
        if self.source_usage.is_due(RECENT_TURN, now) {
            self.source_usage.begin(String::new(), None, now);
        }
    }

    fn times(&self, has_usage: bool) -> TurnTimes {
        let mut recent_ended = vec![self.recent_builds.ended_at()];
        let mut older_ended = vec![self.older_builds.ended_at()];
        if has_usage {
            recent_ended.extend([self.recent_usage.ended_at(), self.source_usage.ended_at()]);
            older_ended.push(self.older_usage.ended_at());
        }
        let recent_due = [
            self.recent_builds.due_at(RECENT_TURN),
            self.recent_usage.due_at(RECENT_TURN),
            self.source_usage.due_at(RECENT_TURN),
        ];
        let older_due = [self.older_builds.due_at(WHOLE_TURN), self.older_usage.due_at(WHOLE_TURN)];
        TurnTimes {
            recent_turn_ended_at: all_ended(recent_ended),
            recent_turn_due_at: recent_due.into_iter().flatten().min(),
            whole_turn_ended_at: all_ended(older_ended),
            whole_turn_due_at: older_due.into_iter().flatten().min(),
        }
    }

    /// Takes over the oldest awaited pass. Returns whether the step does not count as an audit: rows
    /// wait for a pass, and those of no earlier step have all been judged.
    pub fn settle(&mut self) -> bool {
        let before = self.awaited_pass;
        self.awaited_pass = self.in_flight.values().map(|row| row.after_pass).min();
        self.awaited_pass.is_some_and(|now| before.is_none_or(|before| now <= before))
    }
}

impl Sides<'_> {
    /// Compares the next slice of all rows of both sides.
    pub(super) async fn next_slice(
        &mut self,
        reading: &mut super::whole::WholeReading,
    ) -> anyhow::Result<()> {
        use super::whole::WholePlace::{Builds, End, LedgerUsage, SourceUsage};
        let found = &mut reading.found;
        let next = match &reading.next {
            Builds(from) => self.build_slice((*from, END), found).await?.map(Builds),
            SourceUsage(after) => self.source_usage_slice(after, found).await?.map(SourceUsage),
            LedgerUsage(from, after) => {
                let next = self.usage_slice((*from, END), after, found).await?;
                next.map(|(from, after)| LedgerUsage(from, after))
            }
            End => None,
        };
        reading.next = match (next, &reading.next) {
            (Some(next), _) => next,
            (None, Builds(_)) if self.catalog.usage_events => SourceUsage(String::new()),
            (None, SourceUsage(_)) => LedgerUsage(FIRST, String::new()),
            (None, _) => End,
        };
        Ok(())
    }

    /// Compares the new rows and a page of each turn, and more pages of turns that are behind their
    /// time. Returns whether there are more new rows than one step compares; the turns wait for
    /// them.
    pub(super) async fn take_turns(
        &mut self,
        turns: &mut Turns,
        pace: &Pace,
        found: &mut Found,
    ) -> anyhow::Result<bool> {
        let completeness =
            self.ledger.run(async |conn| passes::completeness(conn, self.source.id).await).await?;
        let until = completeness.complete_until.unwrap_or(pace.now - IN_FLIGHT);
        let has_more = self.new_unconfirmed(turns, pace, found).await?;
        if self.new_rows(turns, until, found).await? || has_more {
            return Ok(true);
        }
        turns.begin(pace.now, self.catalog.usage_events);
        let mut only_behind = false;
        while found.suspects.len() < MOST_SUSPECTS
            && self.pages(turns, pace, only_behind, found).await?
            && pace.allows_more()
        {
            only_behind = true;
        }
        turns.times = turns.times(self.catalog.usage_events);
        Ok(false)
    }

    /// Reads one page of each turn; with `only_behind`, of each that is behind its time. Returns
    /// whether there was one.
    async fn pages(
        &mut self,
        turns: &mut Turns,
        pace: &Pace,
        only_behind: bool,
        found: &mut Found,
    ) -> anyhow::Result<bool> {
        let mut has_read = false;
        for (turn, length) in
            [(&mut turns.recent_builds, RECENT_TURN), (&mut turns.older_builds, WHOLE_TURN)]
        {
            if (!only_behind || turn.is_behind(length, pace))
                && let Some((from, until)) = turn.rest()
            {
                let next = self.builds_from(from, until.unwrap_or(END), found).await?;
                turn.advance(next, pace.now);
                has_read = true;
            }
        }
        if !self.catalog.usage_events {
            return Ok(has_read);
        }
        for (turn, length) in
            [(&mut turns.recent_usage, RECENT_TURN), (&mut turns.older_usage, WHOLE_TURN)]
        {
            if (!only_behind || turn.is_behind(length, pace))
                && let Some((from, until)) = turn.rest()
            {
                let until = until.map_or(END, |(until, _)| until);
                turn.advance(self.usage_from(from, until, found).await?, pace.now);
                has_read = true;
            }
        }
        let turn = &mut turns.source_usage;
        if (!only_behind || turn.is_behind(RECENT_TURN, pace))
            && let Some((after, _)) = turn.rest()
        {
            turn.advance(self.source_usage_slice(&after, found).await?, pace.now);
            has_read = true;
        }
        Ok(has_read)
    }

    /// Compares pages of the events that were accepted unconfirmed since the last step. Returns
    /// whether some remain.
    async fn new_unconfirmed(
        &mut self,
        turns: &mut Turns,
        pace: &Pace,
        found: &mut Found,
    ) -> anyhow::Result<bool> {
        let ledger = self.ledger;
        let head = ledger.run(snapshots::head).await?.number;
        // a restored ledger may end earlier
        turns.confirmed_to = turns.confirmed_to.min(head);
        let source_id = self.source.id;
        for _ in 0..UNCONFIRMED_PAGES {
            let from = turns.confirmed_to;
            let page =
                ledger.run(async |conn| slices::unconfirmed(conn, source_id, from).await).await?;
            self.ledger_builds(page.builds, found).await?;
            if self.catalog.usage_events {
                self.ledger_usage(&page.usage, found).await?;
            }
            // without a batch up to the head, the other joints report it
            turns.confirmed_to = page.sequence.unwrap_or(head);
            if turns.confirmed_to >= head
                || found.suspects.len() >= MOST_SUSPECTS
                || !pace.allows_more()
            {
                break;
            }
        }
        Ok(turns.confirmed_to < head)
    }

    async fn builds_from(
        &mut self,
        from: DateTime<Utc>,
        until: DateTime<Utc>,
        found: &mut Found,
    ) -> anyhow::Result<Option<DateTime<Utc>>> {
        if from >= until {
            return Ok(None);
        }
        self.build_slice((from, until), found).await
    }

    async fn usage_from(
        &mut self,
        (from, after): (DateTime<Utc>, String),
        until: DateTime<Utc>,
        found: &mut Found,
    ) -> anyhow::Result<Option<(DateTime<Utc>, String)>> {
        self.usage_slice((from, until), &after, found).await
    }

    /// Compares rows from the last step until `until`. Returns whether some remain: one step
    /// compares at most a day and 20 slices of builds. Before the first step nothing is new: the
    /// turns compare everything.
    async fn new_rows(
        &mut self,
        turns: &mut Turns,
        until: DateTime<Utc>,
        found: &mut Found,
    ) -> anyhow::Result<bool> {
        let from = *turns.new_until.get_or_insert(until);
        let end = until.min(from + NEW_TIME);
        let mut reached = from;
        for _ in 0..NEW_SLICES {
            if reached >= end || found.suspects.len() >= MOST_SUSPECTS {
                break;
            }
            reached = self.build_slice((reached, end), found).await?.unwrap_or(end);
        }
        if from < reached && self.catalog.usage_events {
            let mut next = Some((from, String::new()));
            while let Some(place) = next {
                next = self.usage_from(place, reached, found).await?;
            }
            self.new_source_usage(from, reached, found).await?;
        }
        turns.new_until = Some(reached);
        Ok(reached < until)
    }

    /// Looks up coderd's usage that is dated, reserved or published in this time.
    async fn new_source_usage(
        &mut self,
        from: DateTime<Utc>,
        until: DateTime<Utc>,
        found: &mut Found,
    ) -> anyhow::Result<()> {
        let mut last: Option<UsageKey> = None;
        loop {
            let keys = self.reader.recent_usage_keys(from, from, last.as_ref(), KEYS).await?;
            let ids: Vec<String> = keys
                .iter()
                .filter(|key| key.created_at < until.into())
                .map(|key| key.id.clone())
                .collect();
            self.look_up_usage(&ids, found).await?;
            match keys.into_iter().next_back() {
                Some(key) if key.created_at < until.into() => last = Some(key),
                _ => return Ok(()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_of_another_form_begins_every_turn_again() {
        let turns: Turns =
            serde_json::from_value(serde_json::json!({"recent_builds": 5})).unwrap_or_default();
        assert_eq!(turns.recent_builds, Turn::default());
    }

    #[test]
    fn a_step_counts_as_an_audit_when_the_rows_in_flight_of_an_earlier_one_are_judged() {
        let mut turns = Turns::default();
        let wait = |turns: &mut Turns, id: &str, after_pass| {
            turns.in_flight.insert(id.to_owned(), InFlight { after_pass, passed: false });
        };
        assert!(!turns.settle(), "no row is in flight");
        wait(&mut turns, "a", 5);
        assert!(turns.settle(), "the first step waits for a pass after 5");
        wait(&mut turns, "b", 6);
        assert!(turns.settle(), "no such pass has come");
        turns.in_flight.remove("a");
        assert!(!turns.settle(), "the rows of the first step are judged");
        assert!(turns.settle(), "those of the second one are not");
        turns.in_flight.clear();
        assert!(!turns.settle());
    }

    #[test]
    fn a_turn_of_the_source_has_ended_when_builds_and_usage_have() {
        let at = |days: i64| DateTime::UNIX_EPOCH + TimeDelta::days(days);
        let mut turns = Turns { new_until: Some(at(100)), ..Turns::default() };
        turns.begin(at(100), true);
        turns.recent_builds.advance(None, at(100));
        let times = turns.times(true);
        assert_eq!((times.recent_turn_ended_at, times.recent_turn_due_at), (None, Some(at(101))));
        assert_eq!((times.whole_turn_ended_at, times.whole_turn_due_at), (None, Some(at(130))));
        turns.recent_usage.advance(None, at(101));
        turns.source_usage.advance(None, at(101));
        let times = turns.times(true);
        assert_eq!((times.recent_turn_ended_at, times.recent_turn_due_at), (Some(at(100)), None));
    }
}
