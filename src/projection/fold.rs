//! A state with its sequence, and folds over the whole ledger.

use uuid::Uuid;

use super::ProjectionError;
use crate::ledger::{Entry, Ledger, Sequence, Snapshot, entries, other_incarnation, snapshots};
use crate::stages::Stage;

/// A state and its last batch.
#[derive(Clone, Debug, PartialEq)]
pub struct Folded<S> {
    pub sequence: Sequence,
    pub state: S,
}

impl<S: Stage> Folded<S> {
    #[must_use]
    pub fn zero(incarnation: Uuid) -> Self {
        Self { sequence: Sequence { incarnation, number: 0 }, state: S::default() }
    }

    /// Adds the next batch.
    ///
    /// # Errors
    /// [`ProjectionError::Hole`] or [`ProjectionError::LedgerFault`]. The state may then contain a
    /// part of the batch: drop it.
    pub(super) fn add(&mut self, entry: Entry) -> Result<(), ProjectionError> {
        let sequence = entry.sequence;
        if sequence != self.sequence.number + 1 {
            return Err(ProjectionError::Hole {
                after: self.sequence.number,
                found: Some(sequence),
            });
        }
        for fact in entry.facts {
            self.state
                .apply(&fact)
                .map_err(|source| ProjectionError::LedgerFault { sequence, source })?;
        }
        self.sequence.number = sequence;
        Ok(())
    }

    /// The newest snapshot at or before `limit` that this version can read, or zero.
    pub(super) async fn begin(
        ledger: &Ledger,
        incarnation: Uuid,
        limit: i64,
    ) -> Result<Self, ProjectionError> {
        let Some(found) = ledger
            .run(async |conn| snapshots::load(conn, S::NAME, S::RULES_VERSION, limit).await)
            .await?
        else {
            return Ok(Self::zero(incarnation));
        };
        match serde_json::from_slice(&found.state) {
            Ok(state) => Ok(Self { sequence: found.sequence, state }),
            Err(error) => {
                tracing::warn!(stage = S::NAME, sequence = found.sequence.number, %error, "snapshot not readable, folding from zero");
                Ok(Self::zero(incarnation))
            }
        }
    }

    pub(super) fn snapshot(&self) -> Result<Snapshot, ProjectionError> {
        let state = serde_json::to_vec(&self.state).map_err(ProjectionError::Unsaveable)?;
        Ok(Snapshot { sequence: self.sequence, state })
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
    let head = ledger.run(snapshots::head).await?;
    let mut folded = Folded::zero(head.incarnation);
    let end = limit.min(head.number);
    while folded.sequence.number < end {
        for entry in page_of_one_ledger(ledger, &folded, end).await? {
            folded.add(entry)?;
        }
        progress(folded.sequence.number, end);
    }
    Ok(folded)
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
    while folded.sequence.number < end {
        for entry in page_of_one_ledger(ledger, &folded, end).await? {
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
) -> Result<Vec<Entry>, ProjectionError> {
    let page = next_page(ledger, folded.sequence, end).await?;
    page.ok_or_else(|| other_incarnation().into())
}

/// A page of the batches after `after` up to `end`, which the ledger has reached. None: the ledger
/// has another incarnation.
pub(super) async fn next_page(
    ledger: &Ledger,
    after: Sequence,
    end: i64,
) -> Result<Option<Vec<Entry>>, ProjectionError> {
    let page = ledger.run(async |conn| entries::after(conn, after.number, end).await).await?;
    // Read after the page: an incarnation never returns, so the page belongs to this one.
    if ledger.run(snapshots::head).await?.incarnation != after.incarnation {
        return Ok(None);
    }
    if page.is_empty() {
        return Err(ProjectionError::Hole { after: after.number, found: None });
    }
    Ok(Some(page))
}
