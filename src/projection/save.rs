//! Saves snapshots of a state while its fold goes on.

use std::time::Duration;

use chrono::TimeDelta;
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;
use tracing::warn;

use super::folded::rules;
use super::{Folded, ProjectionError, View};
use crate::ledger::snapshots::{self, Saver};
use crate::ledger::{Landmark, Ledger, LedgerIdentity, StatementError, landmarks};
use crate::stages::{Piece, Stage};

/// A save writes its pieces in groups. A group ends when it has this many bytes, so memory is
/// bounded by this number or by one piece.
const GROUP_BYTES: usize = 1 << 20;

/// The snapshots of one projection.
pub(super) struct Saves {
    interval: Duration,
    /// When a snapshot was last saved, read or found.
    last: Instant,
    /// The sequence of the last snapshot that is known to be saved; nothing up to it is saved.
    sequence: i64,
    running: Option<AbortOnDropHandle<Result<Outcome, ProjectionError>>>,
}

/// The result of one save.
enum Outcome {
    Saved(i64),
    /// There is a snapshot at this sequence, which is not lower.
    NotNewer(i64),
    /// A snapshot was saved this long ago.
    Recent(Duration),
    /// Another process saves one now, the snapshot before it was deleted, or the ledger was
    /// restored.
    Skipped,
}

impl Saves {
    pub(super) fn new(interval: Duration) -> Self {
        Self { interval, last: Instant::now(), sequence: 0, running: None }
    }

    /// A state begins at this sequence. A running save of an earlier state is dropped.
    pub(super) fn begin(&mut self, sequence: i64) {
        *self = Self { sequence, ..Self::new(self.interval) };
    }

    /// Saves nothing below this sequence.
    pub(super) fn not_below(&mut self, sequence: i64) {
        self.sequence = self.sequence.max(sequence - 1);
    }

    /// Drops a running save: its state is replaced.
    pub(super) fn drop_running(&mut self) {
        self.running = None;
    }

    /// Starts to save a changed state if its interval has passed, and notes the end of a save.
    pub(super) async fn if_due<S: Stage>(
        &mut self,
        ledger: &Ledger,
        view: &View<S>,
        landmark: Option<Landmark>,
    ) -> Result<(), ProjectionError> {
        if self.running.as_ref().is_some_and(|running| running.is_finished()) {
            self.wait(view).await?;
        }
        if self.running.is_none() && self.last.elapsed() >= self.interval && self.has_unsaved(view)
        {
            self.last = Instant::now();
            let save = save(ledger.clone(), view.clone(), landmark, Some(self.interval));
            self.running = Some(AbortOnDropHandle::new(tokio::spawn(save)));
        }
        Ok(())
    }

    /// Saves a changed state at the end, also soon after another snapshot.
    pub(super) async fn at_end<S: Stage>(
        &mut self,
        ledger: &Ledger,
        view: &View<S>,
        landmark: Option<Landmark>,
    ) -> Result<(), ProjectionError> {
        self.wait(view).await?;
        if self.has_unsaved(view) {
            let save = save(ledger.clone(), view.clone(), landmark, None);
            self.running = Some(AbortOnDropHandle::new(tokio::spawn(save)));
            self.wait(view).await?;
        }
        Ok(())
    }

    fn has_unsaved<S: Stage>(&self, view: &View<S>) -> bool {
        view.freshness().is_some_and(|freshness| freshness.sequence.number > self.sequence)
    }

    /// Waits for a running save. Without the snapshot, the next start is only slower.
    async fn wait<S: Stage>(&mut self, view: &View<S>) -> Result<(), ProjectionError> {
        let Some(running) = &mut self.running else { return Ok(()) };
        let ended = running.await;
        self.running = None;
        match ended {
            Ok(Ok(Outcome::Saved(sequence))) => {
                self.sequence = sequence;
                view.saved(sequence)?;
            }
            Ok(Ok(Outcome::NotNewer(sequence))) => self.sequence = sequence,
            // the next one is due when that one is an interval old
            Ok(Ok(Outcome::Recent(age))) => {
                self.last = Instant::now().checked_sub(age).unwrap_or(self.last);
            }
            Ok(Ok(Outcome::Skipped)) => {}
            Ok(Err(error)) => warn!(stage = S::NAME, %error, "snapshot not saved"),
            Err(error) => warn!(stage = S::NAME, %error, "snapshot not saved"),
        }
        Ok(())
    }
}

/// Saves a snapshot of the view's state. The view is locked only while its state is copied, which
/// costs a pointer for each of its parts.
async fn save<S: Stage>(
    ledger: Ledger,
    view: View<S>,
    landmark: Option<Landmark>,
    interval: Option<Duration>,
) -> Result<Outcome, ProjectionError> {
    // If the ledger was restored since, this state belongs to another incarnation.
    let (_, identity) = ledger
        .run(async |conn| landmarks::head_and_identity(conn, landmark.as_ref()).await)
        .await?;
    let (LedgerIdentity::Same, Some(shown)) = (identity, view.freshness()) else {
        return Ok(Outcome::Skipped);
    };
    let now = ledger.clock.now();
    let saving = ledger.with_statements(snapshots::STATEMENTS);
    let saved = saving.run(async |conn| {
        let begun = snapshots::begin(conn, rules::<S>(), shown.sequence.incarnation).await?;
        let Some(saver) = begun else { return Ok(Outcome::Skipped) };
        if let (Some(newest), Some(interval)) = (saver.newest, interval)
            && let Some(age) = younger_than(interval, now - newest.taken_at)
        {
            return Ok(Outcome::Recent(age));
        }
        let Some(folded) = view.folded() else { return Ok(Outcome::Skipped) };
        if folded.sequence.incarnation != shown.sequence.incarnation {
            return Ok(Outcome::Skipped);
        }
        match saver.newest {
            Some(newest) if newest.sequence >= folded.sequence.number => {
                Ok(Outcome::NotNewer(newest.sequence))
            }
            _ if write(saver, &folded, now).await? => Ok(Outcome::Saved(folded.sequence.number)),
            _ => Ok(Outcome::Skipped),
        }
    });
    let saved: Result<Outcome, StatementError> = saved.await;
    Ok(saved?)
}

/// A snapshot's age if it is within the interval. A clock that steps back does not delay the next
/// snapshot.
fn younger_than(interval: Duration, age: TimeDelta) -> Option<Duration> {
    age.to_std().ok().filter(|age| *age < interval)
}

/// Writes the pieces that differ from the newest snapshot; all of them if this state does not know
/// the difference. Lists the names of all pieces in memory, to count them. False: nothing is saved.
async fn write<S: Stage>(
    mut saver: Saver<'_>,
    folded: &Folded<S>,
    now: chrono::DateTime<chrono::Utc>,
) -> Result<bool, StatementError> {
    let sequence = folded.sequence.number;
    let all = folded.state.pieces();
    let number = i64::try_from(all.len()).unwrap_or(i64::MAX);
    let changed = folded.changed_after(saver.newest.map(|newest| newest.sequence));
    let is_whole = changed.is_none();
    let mut pieces: std::collections::btree_set::IntoIter<Piece> =
        changed.unwrap_or(all).into_iter();
    loop {
        let (mut group, mut bytes) = (Vec::new(), 0);
        while bytes < GROUP_BYTES
            && let Some(piece) = pieces.next()
        {
            let content = folded.state.encode(piece);
            // a name and a row cost some bytes, too
            bytes += 100 + content.as_ref().map_or(0, Vec::len);
            group.push((piece.to_string(), content));
        }
        if group.is_empty() {
            break;
        }
        saver.write(sequence, group).await?;
    }
    if is_whole {
        saver.remove_others(sequence).await?;
    }
    saver.finish(sequence, number, now).await
}
