//! The turns of the continuous audit through source and ledger. Each step compares the new rows, the
//! unconfirmed events of new batches, whatever their time, and one slice of each turn. So a step
//! costs the same with any length of history; a long history takes a longer turn.

use chrono::{DateTime, TimeDelta, Utc};
use serde::{Deserialize, Serialize};

use super::sides::Sides;
use super::slices::{END, FIRST, Found};
use crate::coderd::UsageKey;
use crate::ledger::{passes, slices, snapshots};

/// Rows that are compared again each day. Older ones wait for the long turn.
const RECENT: TimeDelta = TimeDelta::days(35);
/// The shortest time of a turn through recent rows.
const SHORT: TimeDelta = TimeDelta::days(1);
/// The shortest time of a turn through older rows.
const LONG: TimeDelta = TimeDelta::days(30);
/// Without completeness, rows of this time may be in flight.
const IN_FLIGHT: TimeDelta = TimeDelta::hours(1);
/// The most slices of new builds in one step.
const NEW_SLICES: usize = 20;
/// Keys of new usage in one read.
const KEYS: i64 = 5_000;

/// One pass through a range, in slices. It begins again when it is done and its time has passed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Turn<Place> {
    begun_at: DateTime<Utc>,
    /// Where the next slice begins; none: at the start of the range.
    next: Option<Place>,
    is_done: bool,
}

/// How far the audit of source and ledger has come.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct Turns {
    /// Rows of earlier times were compared when they were new.
    new_until: Option<DateTime<Utc>>,
    /// Unconfirmed events of batches up to this sequence were compared when they were new.
    confirmed_to: i64,
    recent_builds: Option<Turn<DateTime<Utc>>>,
    older_builds: Option<Turn<DateTime<Utc>>>,
    recent_usage: Option<Turn<(DateTime<Utc>, String)>>,
    older_usage: Option<Turn<(DateTime<Utc>, String)>>,
    /// coderd's usage by id: it has no index by time.
    source_usage: Option<Turn<String>>,
}

impl<Place> Turn<Place> {
    /// The turn, unless it is done and the next one is not due. A start far ahead of `now` comes
    /// from a wrong clock.
    fn due(turn: &mut Option<Self>, now: DateTime<Utc>, length: TimeDelta) -> Option<&mut Self> {
        let is_over = turn.as_ref().is_none_or(|turn| {
            turn.is_done && now.signed_duration_since(turn.begun_at).abs() >= length
        });
        if is_over {
            *turn = Some(Turn { begun_at: now, next: None, is_done: false });
        }
        turn.as_mut().filter(|turn| !turn.is_done)
    }

    fn advance(&mut self, next: Option<Place>) {
        self.is_done = next.is_none();
        self.next = next;
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

    /// Compares the new rows and the next slice of each turn. Returns whether there are more new
    /// rows than one step compares; the turns wait for them.
    pub(super) async fn take_turns(
        &mut self,
        turns: &mut Turns,
        found: &mut Found,
    ) -> anyhow::Result<bool> {
        let now = self.ledger.clock.now();
        let completeness =
            self.ledger.run(async |conn| passes::completeness(conn, self.source.id).await).await?;
        let until = completeness.complete_until.unwrap_or(now - IN_FLIGHT);
        let has_more = self.new_unconfirmed(turns, found).await?;
        if self.new_rows(turns, until, found).await? || has_more {
            return Ok(true);
        }
        if let Some(turn) = Turn::due(&mut turns.recent_builds, now, SHORT) {
            let from = turn.next.unwrap_or(turn.begun_at - RECENT);
            turn.advance(self.builds_from(from, until, found).await?);
        }
        if let Some(turn) = Turn::due(&mut turns.older_builds, now, LONG) {
            let from = turn.next.unwrap_or(FIRST);
            turn.advance(self.builds_from(from, turn.begun_at - RECENT, found).await?);
        }
        if !self.catalog.usage_events {
            return Ok(false);
        }
        if let Some(turn) = Turn::due(&mut turns.recent_usage, now, SHORT) {
            let place = turn.next.take().unwrap_or((turn.begun_at - RECENT, String::new()));
            turn.advance(self.usage_from(place, until, found).await?);
        }
        if let Some(turn) = Turn::due(&mut turns.older_usage, now, LONG) {
            let place = turn.next.take().unwrap_or((FIRST, String::new()));
            turn.advance(self.usage_from(place, turn.begun_at - RECENT, found).await?);
        }
        if let Some(turn) = Turn::due(&mut turns.source_usage, now, SHORT) {
            let after = turn.next.take().unwrap_or_default();
            turn.advance(self.source_usage_slice(&after, found).await?);
        }
        Ok(false)
    }

    /// Compares a page of the events that were accepted unconfirmed since the last step. Returns
    /// whether some remain.
    async fn new_unconfirmed(
        &mut self,
        turns: &mut Turns,
        found: &mut Found,
    ) -> anyhow::Result<bool> {
        let ledger = self.ledger;
        let head = ledger.run(snapshots::head).await?.number;
        // a restored ledger may end earlier
        let from = turns.confirmed_to.min(head);
        let source_id = self.source.id;
        let page =
            ledger.run(async |conn| slices::unconfirmed(conn, source_id, from).await).await?;
        self.ledger_builds(page.builds, found).await?;
        if self.catalog.usage_events {
            self.ledger_usage(&page.usage, found).await?;
        }
        // without a batch up to the head, the other joints report it
        let reached = page.sequence.unwrap_or(head);
        turns.confirmed_to = reached;
        Ok(reached < head)
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

    /// Compares rows from the last step until `until`. Returns whether some remain. Before the
    /// first step nothing is new: the turns compare everything.
    async fn new_rows(
        &mut self,
        turns: &mut Turns,
        until: DateTime<Utc>,
        found: &mut Found,
    ) -> anyhow::Result<bool> {
        let from = *turns.new_until.get_or_insert(until);
        let mut reached = from;
        for _ in 0..NEW_SLICES {
            if reached >= until {
                break;
            }
            reached = self.build_slice((reached, until), found).await?.unwrap_or(until);
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

    fn at(seconds: i64) -> DateTime<Utc> {
        DateTime::from_timestamp(seconds, 0).unwrap()
    }

    #[test]
    fn a_turn_goes_on_until_it_is_done_and_begins_again_when_due() {
        let length = TimeDelta::seconds(100);
        let mut turn: Option<Turn<i32>> = None;
        Turn::due(&mut turn, at(0), length).expect("the first turn").advance(Some(1));
        let later = Turn::due(&mut turn, at(500), length).expect("it is not done");
        assert_eq!((later.begun_at, later.next), (at(0), Some(1)));
        later.advance(None);
        assert!(Turn::due(&mut turn, at(99), length).is_none(), "done, and not due");
        let again = Turn::due(&mut turn, at(100), length).expect("due");
        assert_eq!((again.begun_at, again.next), (at(100), None));
        again.advance(None);
        assert!(Turn::due(&mut turn, at(-100), length).is_some(), "begun by a wrong clock");
    }

    #[test]
    fn progress_of_another_form_begins_every_turn_again() {
        let turns: Turns =
            serde_json::from_value(serde_json::json!({"recent_builds": 5})).unwrap_or_default();
        assert!(turns.recent_builds.is_none());
    }
}
