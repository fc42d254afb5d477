//! The loop that keeps a state at the ledger's end.

use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::fold::{fold_to_telling, next_page};
use super::{Folded, ProjectionError, View};
use crate::cause::{self, Lasting};
use crate::ledger::{Acquaintance, Entry, Landmark, Ledger, Restored, Sequence};
use crate::stages::Stage;

/// How long to wait before another try when the database is away.
const AWAY: Duration = Duration::from_secs(1);

/// How a projection goes along the ledger.
#[derive(Clone, Copy, Debug)]
pub struct ProjectionSettings {
    /// How often it asks for new batches.
    pub poll: Duration,
    /// How often a snapshot is kept, where there was something new; one more at the end.
    pub snapshot: Duration,
    /// The longest that the last snapshot may hold up the end.
    pub last_snapshot: Duration,
}

impl Default for ProjectionSettings {
    fn default() -> Self {
        Self { poll: Duration::from_millis(200), snapshot: Duration::from_secs(60), last_snapshot: Duration::from_secs(5) }
    }
}

/// A fold that follows the ledger.
pub struct Projection<S> {
    ledger: Ledger,
    settings: ProjectionSettings,
    view: View<S>,
    /// When a snapshot was last kept or found, and the sequence in it.
    saved: (Instant, i64),
    /// The last batch in the state: the ledger is the same as long as it has it.
    landmark: Option<Landmark>,
    /// The ledger's end when this state was begun from zero: all its rows were read after that. 0 for one begun from a snapshot.
    read_since: i64,
}

impl<S: Stage> Projection<S> {
    /// A fold that begins when it is run.
    #[must_use]
    pub fn new(ledger: Ledger, settings: ProjectionSettings) -> Self {
        Self { ledger, settings, view: View::empty(), saved: (Instant::now(), 0), landmark: None, read_since: 0 }
    }

    /// The state, for readers.
    #[must_use]
    pub fn view(&self) -> View<S> {
        self.view.clone()
    }

    /// Follows the ledger until `stop`. While the database is away the last state stays; its standing says how old it is.
    ///
    /// # Errors
    /// A broken promise of the ledger: nothing is shown any more, and the process should end.
    pub async fn run(mut self, stop: &CancellationToken) -> Result<(), ProjectionError> {
        let mut away = Lasting::default();
        while !stop.is_cancelled() {
            let wait = match stop.run_until_cancelled(self.catch_up()).await {
                None => break,
                Some(Ok(())) => {
                    if away.has_ended() {
                        info!(stage = S::NAME, "the ledger can be read again");
                    }
                    self.settings.poll
                }
                Some(Err(ProjectionError::Unavailable(error))) => {
                    let error = cause::text(&error);
                    if away.is_news(&error) {
                        warn!(stage = S::NAME, error, "the ledger cannot be read: the last state stays");
                    }
                    AWAY
                }
                Some(Err(broken)) => {
                    self.view.clear();
                    return Err(broken);
                }
            };
            tokio::select! {
                () = stop.cancelled() => {}
                () = tokio::time::sleep(wait) => {}
            }
        }
        if tokio::time::timeout(self.settings.last_snapshot, self.save()).await.is_err() {
            warn!(stage = S::NAME, "the last snapshot is not kept: the ledger does not answer in time");
        }
        Ok(())
    }

    /// Adds all that was committed before now. A ledger that was restored from a backup is said to be one; the state before stays until it is
    /// another incarnation, then the fold begins again.
    async fn catch_up(&mut self) -> Result<(), ProjectionError> {
        let asked_at = self.ledger.clock.now();
        let (head, acquaintance) = self.ledger.in_time(self.ledger.head_seen_from(self.landmark.as_ref())).await?;
        if let (Acquaintance::WentBack, Some(landmark)) = (acquaintance, self.landmark) {
            self.ledger.in_time(self.ledger.note_went_back(&Restored::Batch(landmark))).await?;
            return Ok(());
        }
        let mut reached = self.view.standing().map(|standing| standing.sequence);
        if reached.is_none_or(|reached| reached.incarnation != head.incarnation) {
            let begun = Folded::<S>::begin(&self.ledger, head.incarnation, head.number);
            let folded = self.ledger.in_time(begun).await?;
            let landmark = self.ledger.in_time(self.ledger.landmark(folded.sequence.number)).await?;
            if folded.sequence.incarnation != head.incarnation || landmark.is_some_and(|landmark| landmark.incarnation != head.incarnation)
            {
                return Ok(()); // replaced just now: the next round sees it
            }
            self.landmark = landmark;
            info!(stage = S::NAME, sequence = folded.sequence.number, end = head.number, "the fold begins");
            self.saved = (Instant::now(), folded.sequence.number);
            self.read_since = if folded.sequence.number == 0 { head.number } else { 0 };
            reached = Some(folded.sequence);
            self.view.begin(folded);
        }
        let Some(mut reached) = reached else { return Ok(()) };
        while reached.number < head.number {
            let next = next_page(&self.ledger, reached, head.number);
            let Some(page) = self.ledger.in_time(next).await? else { return Ok(()) };
            let Some(landmark) = self.end_of(&page).await? else { return Ok(()) };
            self.landmark = Some(landmark);
            for entry in page {
                reached.number = entry.sequence;
                if entry.rebuilt.as_deref() == Some(S::NAME) && reached.number > self.read_since {
                    self.rebuild(reached).await?;
                } else {
                    self.view.add(entry)?;
                }
            }
            if self.view.rebuild_went_on().is_some() {
                self.view.set_rebuild(Some(Instant::now()));
            }
            self.save_if_due().await;
        }
        self.view.caught_up(asked_at)?;
        self.save_if_due().await;
        Ok(())
    }

    /// The last batch of a page, if the page is of the ledger that the state is of: the batch before is asked for afterwards, and one that was lost
    /// does not come back.
    async fn end_of(&self, page: &[Entry]) -> Result<Option<Landmark>, ProjectionError> {
        let Some(last) = page.last() else { return Ok(None) };
        let landmark = self.ledger.in_time(self.ledger.landmark(last.sequence)).await?;
        let (_, acquaintance) = self.ledger.in_time(self.ledger.head_seen_from(self.landmark.as_ref())).await?;
        Ok(landmark.filter(|_| acquaintance == Acquaintance::Same))
    }

    /// An operator had this stage folded anew at this sequence. The state before stays shown until the new one is there, so that every process
    /// changes over at the same sequence. Readers are told that it goes on, for that one is not at the ledger's end meanwhile.
    async fn rebuild(&mut self, at: Sequence) -> Result<(), ProjectionError> {
        info!(stage = S::NAME, sequence = at.number, "an operator has it folded anew from zero");
        let head = self.ledger.in_time(self.ledger.head()).await?;
        let goes_on = |_, _| self.view.set_rebuild(Some(Instant::now()));
        goes_on(0, at.number);
        let folded = fold_to_telling::<S>(&self.ledger, at.number, goes_on).await?;
        if folded.sequence.incarnation != at.incarnation {
            return Err(sqlx::Error::Protocol("the ledger became another incarnation while it was folded".into()).into());
        }
        self.read_since = head.number;
        self.view.renew(folded);
        Ok(())
    }

    async fn save_if_due(&mut self) {
        if self.saved.0.elapsed() >= self.settings.snapshot {
            self.save().await;
        }
    }

    /// Keeps a snapshot if there is something new. One that cannot be kept only makes the next start slower.
    async fn save(&mut self) {
        let unsaved = self.view.standing().filter(|standing| standing.sequence.number > self.saved.1);
        self.saved.0 = Instant::now();
        if unsaved.is_none() {
            return;
        }
        // Of a ledger that was restored meanwhile this would be a state of another.
        match self.ledger.in_time(self.ledger.head_seen_from(self.landmark.as_ref())).await {
            Ok((_, Acquaintance::Same)) => {}
            Ok(_) | Err(_) => return,
        }
        // A large state takes a while to write out; readers are not held up, and no other task of this thread.
        let view = self.view();
        let Ok(Some(snapshot)) = tokio::task::spawn_blocking(move || view.folded(Folded::snapshot)).await else { return };
        let kept = match snapshot {
            Ok(snapshot) => match self.ledger.in_time(self.ledger.save_snapshot(S::NAME, S::RULES_VERSION, &snapshot)).await {
                Ok(()) => Ok(snapshot.sequence.number),
                Err(error) => Err(ProjectionError::from(error)),
            },
            Err(error) => Err(error),
        };
        match kept {
            Ok(sequence) => self.saved.1 = sequence,
            Err(error) => warn!(stage = S::NAME, %error, "a snapshot is not kept"),
        }
    }
}
