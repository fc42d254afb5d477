//! Drives a fold along the ledger: once up to a sequence, or in a loop that keeps a state at the
//! ledger's end.

use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::progress::ProgressLines;
use super::save::Saves;
use super::{Folded, ProjectionError, View};
use crate::cause::{self, LastingFault};
use crate::ledger::{
    Entry, Landmark, Ledger, LedgerIdentity, RestoreEvidence, Sequence, corrected, entries,
    landmarks, other_incarnation, restored, snapshots,
};
use crate::stages::Stage;

/// The wait before a retry while the database does not answer.
const AWAY: Duration = Duration::from_secs(1);

/// How a projection follows the ledger.
#[derive(Clone, Copy, Debug)]
pub struct ProjectionSettings {
    /// Time between reads of new batches.
    pub poll: Duration,
    /// Time between snapshots of a changed state, also by different processes; one more is saved at
    /// the end.
    pub snapshot: Duration,
    /// The longest time that the last snapshot may delay the end.
    pub last_snapshot: Duration,
    /// The shortest time between progress lines of a fold that is behind.
    pub progress: Duration,
}

impl Default for ProjectionSettings {
    fn default() -> Self {
        Self {
            poll: Duration::from_millis(200),
            snapshot: Duration::from_secs(60),
            last_snapshot: Duration::from_secs(5),
            progress: Duration::from_secs(5),
        }
    }
}

/// A fold that follows the ledger.
pub struct Projection<S> {
    ledger: Ledger,
    settings: ProjectionSettings,
    view: View<S>,
    saves: Saves,
    /// The last batch in the state: while the ledger has it, the ledger is the same.
    landmark: Option<Landmark>,
    /// The ledger's end when this state started from zero; its rows were read later. 0 if it
    /// started from a snapshot.
    read_since: i64,
    /// The events in the state are as corrected up to this sequence.
    corrected_to: i64,
}

impl<S: Stage> Projection<S> {
    /// Creates a fold; [`Projection::run`] starts it.
    #[must_use]
    pub fn new(ledger: Ledger, settings: ProjectionSettings) -> Self {
        Self {
            ledger,
            settings,
            view: View::empty(),
            saves: Saves::new(settings.snapshot),
            landmark: None,
            read_since: 0,
            corrected_to: 0,
        }
    }

    #[must_use]
    pub fn view(&self) -> View<S> {
        self.view.clone()
    }

    /// Follows the ledger until `stop`. While the database does not answer, the last state stays;
    /// its freshness shows its age.
    ///
    /// # Errors
    /// The ledger breaks a promise. The view shows nothing any more, and the process should end.
    pub async fn run(mut self, stop: &CancellationToken) -> Result<(), ProjectionError> {
        let mut away = LastingFault::default();
        while !stop.is_cancelled() {
            let wait = match stop.run_until_cancelled(self.catch_up()).await {
                None => break,
                Some(Ok(())) => {
                    if away.end() {
                        info!(stage = S::NAME, "ledger readable again");
                    }
                    self.settings.poll
                }
                Some(Err(ProjectionError::Unavailable(error))) => {
                    let error = cause::text(&error);
                    if away.is_new(&error) {
                        warn!(
                            stage = S::NAME,
                            error, "ledger not readable: the last state remains"
                        );
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
        let save = self.saves.at_end(&self.ledger, &self.view, self.landmark);
        match tokio::time::timeout(self.settings.last_snapshot, save).await {
            Ok(saved) => saved,
            Err(_) => {
                warn!(
                    stage = S::NAME,
                    "last snapshot not saved: the ledger did not answer in time"
                );
                Ok(())
            }
        }
    }

    /// Adds all batches committed before now. Reports a ledger that was restored from a backup. The
    /// old state stays until the ledger has another incarnation; then the fold restarts.
    async fn catch_up(&mut self) -> Result<(), ProjectionError> {
        let read_at = self.ledger.clock.now();
        let (head, identity) = self
            .ledger
            .run(async |conn| landmarks::head_and_identity(conn, self.landmark.as_ref()).await)
            .await?;
        if let (LedgerIdentity::Restored, Some(landmark)) = (identity, self.landmark) {
            self.ledger
                .run(async |conn| {
                    restored::record_detected(
                        conn,
                        &RestoreEvidence::Batch(landmark),
                        self.ledger.clock.now(),
                    )
                    .await
                })
                .await?;
            return Ok(());
        }
        let mut reached = self.view.freshness().map(|freshness| freshness.sequence);
        if reached.is_none_or(|reached| reached.incarnation != head.incarnation) {
            let begun = Folded::<S>::begin(&self.ledger, head.incarnation, head.number);
            let folded = begun.await?;
            let landmark = self
                .ledger
                .run(async |conn| landmarks::of_batch(conn, folded.sequence.number).await)
                .await?;
            if folded.sequence.incarnation != head.incarnation
                || landmark.is_some_and(|landmark| landmark.incarnation != head.incarnation)
            {
                return Ok(()); // replaced in this moment: the next round sees it
            }
            self.landmark = landmark;
            info!(
                stage = S::NAME,
                sequence = folded.sequence.number,
                end = head.number,
                "fold begins"
            );
            self.saves.begin(folded.sequence.number);
            self.read_since = if folded.sequence.number == 0 { head.number } else { 0 };
            let from = folded.sequence.number.max(self.read_since);
            self.correct_to(corrected_to::<S>(&self.ledger, from).await?);
            reached = Some(folded.sequence);
            self.view.begin(folded);
        }
        let Some(mut reached) = reached else { return Ok(()) };
        let lines = ProgressLines::new(self.settings.progress);
        while reached.number < head.number {
            let next = next_page(&self.ledger, reached, head.number, self.corrected_to);
            let Some(page) = next.await? else { return Ok(()) };
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
            if self.view.rebuild_progress_at().is_some() {
                self.view.set_rebuild(Some(Instant::now()));
            }
            lines.reached::<S>(reached.number, head.number);
            self.saves.if_due(&self.ledger, &self.view, self.landmark).await?;
        }
        self.view.caught_up(read_at)?;
        self.saves.if_due(&self.ledger, &self.view, self.landmark).await
    }

    /// The last batch of a page, if the page belongs to the state's ledger. The batch before it is
    /// checked afterwards: a lost batch does not come back.
    async fn end_of(&self, page: &[Entry]) -> Result<Option<Landmark>, ProjectionError> {
        let Some(last) = page.last() else { return Ok(None) };
        let landmark =
            self.ledger.run(async |conn| landmarks::of_batch(conn, last.sequence).await).await?;
        let (_, identity) = self
            .ledger
            .run(async |conn| landmarks::head_and_identity(conn, self.landmark.as_ref()).await)
            .await?;
        Ok(landmark.filter(|_| identity == LedgerIdentity::Same))
    }

    /// An operator requested a rebuild of this stage at this sequence. The old state stays until
    /// the new one is ready, so that every process switches at the same sequence. Readers see its
    /// progress: this process is behind the ledger's end until then.
    async fn rebuild(&mut self, at: Sequence) -> Result<(), ProjectionError> {
        info!(
            stage = S::NAME,
            sequence = at.number,
            "rebuilding from zero at an operator's request"
        );
        let lines = ProgressLines::new(self.settings.progress);
        let progress = |done, of| {
            self.view.set_rebuild(Some(Instant::now()));
            lines.reached::<S>(done, of);
        };
        self.view.set_rebuild(Some(Instant::now()));
        let folded = fold_to_with_progress::<S>(&self.ledger, at.number, progress).await?;
        if folded.sequence.incarnation != at.incarnation {
            return Err(other_incarnation().into());
        }
        // a rebuild during this one restarts the fold again: events may be corrected since
        self.read_since = at.number;
        self.saves.drop_running();
        self.correct_to(corrected_to::<S>(&self.ledger, at.number).await?);
        self.view.renew(folded);
        Ok(())
    }

    /// Events are read as corrected up to this sequence. Below it, the state is not the one of its
    /// sequence, and no snapshot is saved.
    fn correct_to(&mut self, sequence: i64) {
        self.corrected_to = sequence;
        self.saves.not_below(sequence);
    }
}

/// Folds the ledger from zero up to `limit`, or to its end if that comes first. For a rebuild or an
/// earlier state.
///
/// # Errors
/// [`ProjectionError`], also if the ledger changes its incarnation during the fold.
pub async fn fold_to<S: Stage>(ledger: &Ledger, limit: i64) -> Result<Folded<S>, ProjectionError> {
    fold_to_with_progress(ledger, limit, |_, _| ()).await
}

/// Like [`fold_to`]. Calls `progress` after each page with the folded batches and their total.
pub async fn fold_to_with_progress<S: Stage>(
    ledger: &Ledger,
    limit: i64,
    progress: impl Fn(i64, i64),
) -> Result<Folded<S>, ProjectionError> {
    let end = limit.min(ledger.run(snapshots::head).await?.number);
    let corrected_to = corrected_to::<S>(ledger, end).await?;
    fold_from_zero(ledger, end, corrected_to, progress).await
}

/// Like [`fold_to_with_progress`], but with all events as corrected now: the state that a rebuild
/// would give.
///
/// # Errors
/// Those of [`fold_to`].
pub async fn fold_as_rebuilt<S: Stage>(
    ledger: &Ledger,
    limit: i64,
    progress: impl Fn(i64, i64),
) -> Result<Folded<S>, ProjectionError> {
    let corrected_to = if S::CORRECTED_BY_REBUILD { i64::MAX } else { 0 };
    fold_from_zero(ledger, limit, corrected_to, progress).await
}

async fn fold_from_zero<S: Stage>(
    ledger: &Ledger,
    limit: i64,
    corrected_to: i64,
    progress: impl Fn(i64, i64),
) -> Result<Folded<S>, ProjectionError> {
    let head = ledger.run(snapshots::head).await?;
    let mut folded = Folded::zero(head.incarnation);
    let end = limit.min(head.number);
    while folded.sequence.number < end {
        for entry in page_of_one_ledger(ledger, &folded, end, corrected_to).await? {
            folded.add(entry)?;
        }
        progress(folded.sequence.number, end);
    }
    Ok(folded)
}

/// The sequence up to which the stage's state at `at` has its events corrected: its newest rebuild.
async fn corrected_to<S: Stage>(ledger: &Ledger, at: i64) -> Result<i64, ProjectionError> {
    if !S::CORRECTED_BY_REBUILD {
        return Ok(0);
    }
    Ok(ledger.run(async |conn| corrected::newest_rebuild(conn, S::NAME, at).await).await?)
}

/// The state at `limit` or at the ledger's end, whichever comes first. Starts from the newest
/// snapshot, as a serving process does.
pub async fn fold_on<S: Stage>(ledger: &Ledger, limit: i64) -> Result<Folded<S>, ProjectionError> {
    let head = ledger.run(snapshots::head).await?;
    let end = limit.min(head.number);
    let mut folded = Folded::<S>::begin(ledger, head.incarnation, end).await?;
    if folded.sequence.number == 0 {
        return fold_to(ledger, end).await;
    }
    let corrected_to = corrected_to::<S>(ledger, folded.sequence.number).await?;
    while folded.sequence.number < end {
        for entry in page_of_one_ledger(ledger, &folded, end, corrected_to).await? {
            if entry.rebuilt.as_deref() == Some(S::NAME) {
                return fold_to(ledger, end).await;
            }
            folded.add(entry)?;
        }
    }
    Ok(folded)
}

async fn page_of_one_ledger<S>(
    ledger: &Ledger,
    folded: &Folded<S>,
    end: i64,
    corrected_to: i64,
) -> Result<Vec<Entry>, ProjectionError> {
    let page = next_page(ledger, folded.sequence, end, corrected_to).await?;
    page.ok_or_else(|| other_incarnation().into())
}

/// A page of the batches after `after` up to `end`, which the ledger has reached. None: the ledger
/// has another incarnation.
async fn next_page(
    ledger: &Ledger,
    after: Sequence,
    end: i64,
    corrected_to: i64,
) -> Result<Option<Vec<Entry>>, ProjectionError> {
    let page = ledger.run(async |conn| entries::after(conn, after.number, end, corrected_to).await);
    let page = page.await?;
    // Read after the page: an incarnation never returns, so the page belongs to this one.
    if ledger.run(snapshots::head).await?.incarnation != after.incarnation {
        return Ok(None);
    }
    if page.is_empty() {
        return Err(ProjectionError::Hole { after: after.number, found: None });
    }
    Ok(Some(page))
}
