//! One turn of the continuous audit: it compares older rows again, page by page.
//!
//! Its end is set when it begins: newer rows are compared when they are new. It reads at least one
//! page in each step. A turn that is behind its time reads more, but no step reads them for longer
//! than a tenth of the interval. So a turn that has not ended in its length is overdue: the history
//! is too large for the interval and the databases.

use chrono::{DateTime, TimeDelta, Utc};
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use crate::ledger::checks::{BatchCursor, PublicationKey};

/// Rows of this age are compared again in each short turn.
pub(super) const RECENT_ROWS: TimeDelta = TimeDelta::days(35);
/// The length of a turn over recent rows.
pub(super) const RECENT_TURN: TimeDelta = TimeDelta::hours(24);
/// The length of a turn over all older rows.
pub(super) const WHOLE_TURN: TimeDelta = TimeDelta::days(30);
/// A turn aims to end after this share of its length.
const AIM: f64 = 0.75;
/// A turn without a measure reads more pages after this share of its aimed time.
const UNMEASURED: f64 = 0.5;

/// A place between two rows of a turn.
pub(super) trait Place: Clone {
    /// Sequences or microseconds from the first possible row. None: the order of keys does not show
    /// how many remain.
    fn position(&self) -> Option<i64>;
}

/// The time of a step.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pace {
    pub now: DateTime<Utc>,
    /// The time until the next step.
    pub every: TimeDelta,
    /// No further page is read from then on.
    pub ends_at: Instant,
}

/// One turn, or the time of the last one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct Turn<P> {
    begun_at: Option<DateTime<Utc>>,
    /// Where the next page begins; None: no turn is running.
    next: Option<P>,
    /// Where the turn ends; None: at the last key.
    until: Option<P>,
    /// The place from which the read share is measured; None: the end of the first page.
    measured_from: Option<P>,
    ended_at: Option<DateTime<Utc>>,
}

/// When the turns of a joint ended, and until when the running ones should end. `status` shows it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct TurnTimes {
    pub recent_turn_ended_at: Option<DateTime<Utc>>,
    pub recent_turn_due_at: Option<DateTime<Utc>>,
    pub whole_turn_ended_at: Option<DateTime<Utc>>,
    pub whole_turn_due_at: Option<DateTime<Utc>>,
}

impl Place for BatchCursor {
    fn position(&self) -> Option<i64> {
        Some(self.sequence)
    }
}

impl Place for PublicationKey {
    fn position(&self) -> Option<i64> {
        None
    }
}

impl Place for DateTime<Utc> {
    fn position(&self) -> Option<i64> {
        Some(self.timestamp_micros())
    }
}

/// A usage event of the ledger, by its time.
impl Place for (DateTime<Utc>, String) {
    fn position(&self) -> Option<i64> {
        self.0.position()
    }
}

/// A usage row of coderd, by its id.
impl Place for String {
    fn position(&self) -> Option<i64> {
        None
    }
}

impl Pace {
    pub fn allows_more(&self) -> bool {
        Instant::now() < self.ends_at
    }
}

impl<P> Default for Turn<P> {
    fn default() -> Self {
        Turn { begun_at: None, next: None, until: None, measured_from: None, ended_at: None }
    }
}

impl<P: Place> Turn<P> {
    /// Whether the next turn begins now. A begin ahead of `now` comes from a wrong clock.
    pub fn is_due(&self, length: TimeDelta, now: DateTime<Utc>) -> bool {
        let is_over = |begun| self.next.is_none() && now - begun >= length;
        self.begun_at.is_none_or(|begun| begun > now || is_over(begun))
    }

    pub fn begin(&mut self, from: P, until: Option<P>, now: DateTime<Utc>) {
        *self = Turn {
            begun_at: Some(now),
            next: Some(from.clone()),
            until,
            measured_from: Some(from),
            ended_at: self.ended_at,
        };
    }

    /// Begins at a place that can be long before the first row: the share is measured from the end
    /// of the first page.
    pub fn begin_before_all(&mut self, from: P, until: Option<P>, now: DateTime<Utc>) {
        self.begin(from, until, now);
        self.measured_from = None;
    }

    pub fn is_running(&self) -> bool {
        self.next.is_some()
    }

    /// The rest of a running turn: where its next page begins, and where it ends.
    pub fn rest(&self) -> Option<(P, Option<P>)> {
        self.next.clone().map(|next| (next, self.until.clone()))
    }

    /// Moves to the end of a page; None: the turn has ended.
    pub fn advance(&mut self, next: Option<P>, now: DateTime<Utc>) {
        self.measured_from = self.measured_from.take().or_else(|| next.clone());
        self.ended_at = if next.is_none() { Some(now) } else { self.ended_at };
        self.next = next;
    }

    /// Whether a running turn should read more before the next step.
    pub fn is_behind(&self, length: TimeDelta, pace: &Pace) -> bool {
        let Some(begun) = self.begun_at.filter(|_| self.is_running()) else { return false };
        let elapsed = (pace.now - begun + pace.every).as_seconds_f64();
        let due = elapsed / (length.as_seconds_f64() * AIM);
        due >= 1.0 || self.read_share().unwrap_or(UNMEASURED) < due
    }

    /// The share of the range that is read; None: unknown.
    fn read_share(&self) -> Option<f64> {
        let next = self.next.as_ref()?.position()?;
        let until = self.until.as_ref()?.position()?;
        let from = self.measured_from.as_ref().and_then(P::position).unwrap_or(next);
        Some((next - from) as f64 / (until - from).max(1) as f64)
    }

    pub fn ended_at(&self) -> Option<DateTime<Utc>> {
        self.ended_at
    }

    /// Until when a running turn should end.
    pub fn due_at(&self, length: TimeDelta) -> Option<DateTime<Utc>> {
        self.begun_at.filter(|_| self.is_running()).map(|begun| begun + length)
    }
}

/// The earliest of the last ends of these turns; None: one has not ended yet.
pub(super) fn all_ended(
    turns: impl IntoIterator<Item = Option<DateTime<Utc>>>,
) -> Option<DateTime<Utc>> {
    turns.into_iter().collect::<Option<Vec<_>>>()?.into_iter().min()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const EVERY: TimeDelta = TimeDelta::minutes(5);

    fn pace(now: DateTime<Utc>) -> Pace {
        Pace { now, every: EVERY, ends_at: Instant::now() + Duration::from_secs(3600) }
    }

    /// The pages that a turn of `pages` reads in each step, until it ends.
    fn steps(pages: i64, has_measure: bool) -> Vec<i64> {
        let (mut now, mut turn) = (DateTime::UNIX_EPOCH, Turn::<BatchCursor>::default());
        let at = |sequence| BatchCursor { sequence, batch_id: 0 };
        assert!(turn.is_due(RECENT_TURN, now));
        turn.begin(at(0), has_measure.then(|| at(pages)), now);
        let mut read = Vec::new();
        while turn.is_running() {
            let mut of_step = 0;
            while turn.is_running() && (of_step == 0 || turn.is_behind(RECENT_TURN, &pace(now))) {
                of_step += 1;
                let next = turn.rest().expect("it runs").0.sequence + 1;
                turn.advance(Some(at(next)).filter(|_| next < pages), now);
            }
            read.push(of_step);
            now += EVERY;
        }
        assert_eq!(turn.ended_at(), Some(now - EVERY));
        read
    }

    #[test]
    fn a_turn_with_more_pages_than_steps_ends_in_its_time() {
        for (pages, most) in [(1, 1), (200, 1), (288, 2), (1_000, 5), (100_000, 470)] {
            let read = steps(pages, true);
            assert!(EVERY * read.len() as i32 <= RECENT_TURN, "{pages}: {} steps", read.len());
            assert!(read.iter().all(|of_step| *of_step <= most), "{pages}: {read:?}");
        }
    }

    #[test]
    fn a_turn_without_a_measure_reads_a_page_a_step_until_half_of_its_aimed_time() {
        let read = steps(1_000, false);
        assert!(EVERY * read.len() as i32 <= RECENT_TURN, "{} steps", read.len());
        let (last, before) = read.split_last().expect("steps");
        assert_eq!((before.len(), before.iter().max(), *last), (108, Some(&1), 892));
    }

    #[test]
    fn a_share_is_measured_from_the_end_of_the_first_page_where_the_range_begins_long_before() {
        let at = |days: i64| DateTime::UNIX_EPOCH + TimeDelta::days(days);
        let (begun, mut turn) = (at(20_000), Turn::default());
        turn.begin_before_all(at(0), Some(at(20_000)), begun);
        turn.advance(Some(at(19_900)), begun);
        assert!(turn.is_behind(WHOLE_TURN, &pace(begun)), "nothing is read yet");
        turn.advance(Some(at(19_950)), begun);
        assert!(!turn.is_behind(WHOLE_TURN, &pace(begun + TimeDelta::days(11))));
        assert!(turn.is_behind(WHOLE_TURN, &pace(begun + TimeDelta::days(12))));
    }

    #[test]
    fn a_turn_begins_once_in_its_time_and_not_while_it_runs() {
        let begun = DateTime::UNIX_EPOCH;
        let mut turn = Turn::<DateTime<Utc>>::default();
        assert!(turn.is_due(RECENT_TURN, begun));
        turn.begin(begun, None, begun);
        assert!(!turn.is_due(RECENT_TURN, begun + TimeDelta::days(9)), "it still runs");
        turn.advance(None, begun);
        assert!(!turn.is_due(RECENT_TURN, begun + TimeDelta::hours(23)));
        assert!(turn.is_due(RECENT_TURN, begun + TimeDelta::hours(24)));
        assert!(turn.is_due(RECENT_TURN, begun - TimeDelta::hours(1)), "the clock was ahead");
    }

    #[test]
    fn only_a_running_turn_has_a_time_until_which_it_should_end() {
        let begun = DateTime::UNIX_EPOCH;
        let mut turn = Turn::<DateTime<Utc>>::default();
        assert_eq!(turn.due_at(RECENT_TURN), None);
        turn.begin(begun, None, begun);
        assert_eq!(turn.due_at(RECENT_TURN), Some(begun + TimeDelta::hours(24)));
        turn.advance(None, begun);
        assert_eq!((turn.due_at(RECENT_TURN), turn.ended_at()), (None, Some(begun)));
    }

    #[test]
    fn turns_have_ended_when_each_has() {
        let at = |seconds| DateTime::from_timestamp(seconds, 0);
        assert_eq!(all_ended([at(5), at(3)]), at(3));
        assert_eq!(all_ended([at(5), None]), None);
    }
}
