//! A state with its sequence, and the changes since its snapshot.

use std::collections::{BTreeMap, BTreeSet};

use uuid::Uuid;

use super::ProjectionError;
use crate::ledger::{Entry, Ledger, Sequence, StageRules, StatementError, snapshots};
use crate::stages::{Piece, PieceError, Stage};

/// Readings of a snapshot before the fold starts from zero.
const LOADS: u32 = 2;

/// A state and its last batch.
#[derive(Clone, Debug)]
pub struct Folded<S> {
    pub sequence: Sequence,
    pub state: S,
    unsaved: Unsaved,
}

/// What a snapshot of a state must write.
#[derive(Clone, Debug, Default)]
struct Unsaved {
    /// The sequence of the snapshot that this state was read from or saved as. None: the state was
    /// folded from zero and not saved yet. Saved pieces are then not trusted: a rebuild or an
    /// unreadable piece may be the reason.
    base: Option<i64>,
    /// Pieces changed since then or since zero, with the last batch that changed them.
    changed: BTreeMap<Piece, i64>,
}

impl<S: PartialEq> PartialEq for Folded<S> {
    fn eq(&self, other: &Self) -> bool {
        self.sequence == other.sequence && self.state == other.state
    }
}

/// The stage under this version's rules.
pub(super) const fn rules<S: Stage>() -> StageRules {
    StageRules { stage: S::NAME, version: S::RULES_VERSION }
}

impl<S: Stage> Folded<S> {
    #[must_use]
    pub fn zero(incarnation: Uuid) -> Self {
        Self {
            sequence: Sequence { incarnation, number: 0 },
            state: S::default(),
            unsaved: Unsaved::default(),
        }
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
        let changed = self.state.take_changed();
        self.unsaved.changed.extend(changed.into_iter().map(|piece| (piece, sequence)));
        self.sequence.number = sequence;
        Ok(())
    }

    /// The newest snapshot at or before `limit` that this version can read, or zero. A ledger that
    /// answers, but not with the snapshot, does not keep the fold from its start.
    ///
    /// # Errors
    /// [`ProjectionError::Unavailable`] if the ledger does not answer at all.
    pub(super) async fn begin(
        ledger: &Ledger,
        incarnation: Uuid,
        limit: i64,
    ) -> Result<Self, ProjectionError> {
        for _ in 0..LOADS {
            let error = match Self::load(ledger, limit).await {
                Ok(Some(loaded)) => return Ok(loaded),
                Ok(None) => break,
                Err(error) => crate::cause::text(&error),
            };
            ledger.run(snapshots::head).await?;
            tracing::warn!(stage = S::NAME, error, "snapshot not read");
        }
        tracing::info!(stage = S::NAME, "no usable snapshot, folding from zero");
        Ok(Self::zero(incarnation))
    }

    /// Reads the newest snapshot. None: there is none that this version can read as a whole.
    async fn load(ledger: &Ledger, limit: i64) -> Result<Option<Self>, StatementError> {
        let mut read = Ok(S::default());
        let found = ledger
            .with_statements(snapshots::STATEMENTS)
            .run(async |conn| {
                snapshots::load(conn, rules::<S>(), limit, |name, content| {
                    if let Ok(state) = &mut read
                        && let Err(error) = decode(state, name, content)
                    {
                        read = Err(error);
                    }
                })
                .await
            })
            .await?;
        let Some(found) = found else { return Ok(None) };
        let sequence = found.sequence;
        match read {
            Ok(_) if found.read != found.pieces => {
                tracing::warn!(
                    stage = S::NAME,
                    sequence = sequence.number,
                    saved = found.pieces,
                    read = found.read,
                    "snapshot not whole"
                );
                Ok(None)
            }
            Ok(state) => {
                let unsaved = Unsaved { base: Some(sequence.number), ..Unsaved::default() };
                Ok(Some(Self { sequence, state, unsaved }))
            }
            Err(error) => {
                tracing::warn!(stage = S::NAME, sequence = sequence.number, %error, "snapshot not readable");
                Ok(None)
            }
        }
    }

    /// The pieces that a snapshot after `newest` must write. None: all pieces of the state, because
    /// a snapshot is missing, or this state does not know the changes since it.
    pub(super) fn changed_after(&self, newest: Option<i64>) -> Option<BTreeSet<Piece>> {
        let newest =
            newest.filter(|newest| self.unsaved.base.is_some_and(|base| *newest >= base))?;
        let changed = self.unsaved.changed.iter().filter(|(_, at)| **at > newest);
        Some(changed.map(|(piece, _)| *piece).collect())
    }

    /// Notes that a snapshot of this state was saved at an earlier or this sequence.
    pub(super) fn saved(&mut self, sequence: i64) {
        self.unsaved.base = Some(sequence);
        self.unsaved.changed.retain(|_, at| *at > sequence);
    }
}

fn decode<S: Stage>(state: &mut S, name: &str, content: &[u8]) -> Result<(), PieceError> {
    state.decode(name.parse()?, content)
}
