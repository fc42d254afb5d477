//! The fold of the stage `metrics`, and the pieces of its state.

use std::collections::BTreeSet;
use std::collections::btree_map::Entry;

use chrono::{DateTime, Utc};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::metrics::{
    CLAIM_SECONDS, CREATION_SECONDS, DeploymentMetrics, Effect, MetricsState, effects_of,
};
use super::pieces::{self, Part, Piece, PieceError};
use super::{LedgerFault, Stage};
use crate::event::Fact;
use crate::metrics::{Counter, Series, Tally};

/// Pieces of a family of one deployment. A piece has the series whose labels have its hash.
const SHARDS: u64 = 64;

impl Stage for MetricsState {
    const NAME: &'static str = "metrics";
    // 2: a success that ends when it starts is observed as 0; a workspace is one creation
    // 3: buckets without resets, zero threshold and negative values
    // 4: pieces
    const RULES_VERSION: i32 = 4;
    const CORRECTED_BY_REBUILD: bool = true;

    fn apply(&mut self, fact: &Fact) -> Result<(), LedgerFault> {
        let deployment = fact.deployment();
        let mut change = |part, number| self.changed.insert(Piece { deployment, part, number });
        match (self.deployments.entry(deployment), fact) {
            (Entry::Vacant(new), Fact::Introduced { introduced_at, .. }) => {
                new.insert(DeploymentMetrics::introduced(*introduced_at));
                change(Part::Source, 0);
            }
            (Entry::Occupied(known), Fact::Introduced { .. }) => {
                return Err(LedgerFault::IntroducedTwice(*known.key()));
            }
            (Entry::Vacant(unknown), _) => return Err(LedgerFault::NotIntroduced(*unknown.key())),
            // The time of these creations is not known. A server ignores the epoch as a timestamp.
            // So it does not show years of history as one increase from zero.
            (Entry::Occupied(mut known), Fact::Baseline { series, creations, .. }) => {
                change(Part::Creations, shard(series));
                known.get_mut().creations.add(series.clone(), *creations, DateTime::UNIX_EPOCH);
            }
            (Entry::Occupied(mut known), Fact::Event(event)) => {
                let known = known.get_mut();
                for effect in effects_of(event, known.introduced_at).added {
                    let (part, number) = place_of(&effect);
                    change(part, number);
                    known.add(effect, event.time());
                }
            }
            // series do not fall by themselves
            (Entry::Occupied(_), Fact::License { .. } | Fact::Corrected { .. }) => {}
        }
        Ok(())
    }

    fn take_changed(&mut self) -> BTreeSet<Piece> {
        self.changed.take()
    }

    /// One piece for the introduction of a deployment, and up to [`SHARDS`] for each family.
    fn pieces(&self) -> BTreeSet<Piece> {
        let mut pieces = BTreeSet::new();
        for (&deployment, known) in &self.deployments {
            let mut add = |part, number| pieces.insert(Piece { deployment, part, number });
            add(Part::Source, 0);
            known.creations.iter().for_each(|(labels, _)| {
                add(Part::Creations, shard(labels));
            });
            known.creation_seconds.iter().for_each(|(labels, _)| {
                add(Part::CreationSeconds, shard(labels));
            });
            known.claim_seconds.iter().for_each(|(labels, _)| {
                add(Part::ClaimSeconds, shard(labels));
            });
            known.negative_durations.iter().for_each(|(labels, _)| {
                add(Part::NegativeDurations, shard(labels));
            });
        }
        pieces
    }

    /// Reads the labels of all series of the family.
    fn encode(&self, piece: Piece) -> Option<Vec<u8>> {
        let known = self.deployments.get(&piece.deployment)?;
        match piece.part {
            Part::Source => Some(pieces::to_json(&known.introduced_at)),
            Part::Creations => of_shard(&known.creations, piece.number),
            Part::CreationSeconds => of_shard(&known.creation_seconds, piece.number),
            Part::ClaimSeconds => of_shard(&known.claim_seconds, piece.number),
            Part::NegativeDurations => of_shard(&known.negative_durations, piece.number),
            Part::Agents | Part::Licenses => None,
        }
    }

    fn decode(&mut self, piece: Piece, content: &[u8]) -> Result<(), PieceError> {
        match (piece.part, self.deployments.entry(piece.deployment)) {
            (Part::Source, Entry::Vacant(new)) => {
                let introduced_at: DateTime<Utc> = pieces::from_json(piece, content)?;
                new.insert(DeploymentMetrics::introduced(introduced_at));
                Ok(())
            }
            (part, Entry::Occupied(mut known)) => {
                let known = known.get_mut();
                let any = |_: &Counter| true;
                let creation = |tally: &Tally| tally.buckets.fit(&CREATION_SECONDS.buckets);
                let claim = |tally: &Tally| tally.buckets.fit(&CLAIM_SECONDS.buckets);
                match part {
                    Part::Creations => add_shard(&mut known.creations, piece, content, any),
                    Part::CreationSeconds => {
                        add_shard(&mut known.creation_seconds, piece, content, creation)
                    }
                    Part::ClaimSeconds => {
                        add_shard(&mut known.claim_seconds, piece, content, claim)
                    }
                    Part::NegativeDurations => {
                        add_shard(&mut known.negative_durations, piece, content, any)
                    }
                    _ => Err(piece.unreadable("it does not belong here")),
                }
            }
            _ => Err(piece.unreadable("it does not belong here")),
        }
    }
}

fn place_of(effect: &Effect) -> (Part, i64) {
    match effect {
        Effect::Creation(labels) => (Part::Creations, shard(labels)),
        Effect::CreationSeconds(labels, _) => (Part::CreationSeconds, shard(labels)),
        Effect::ClaimSeconds(labels, _) => (Part::ClaimSeconds, shard(labels)),
        Effect::NegativeDuration(labels) => (Part::NegativeDurations, shard(labels)),
    }
}

/// FNV-1a of the labels, each with a byte after it that UTF-8 does not have.
fn shard(labels: &[String]) -> i64 {
    let bytes = labels.iter().flat_map(|label| label.bytes().chain([0xff]));
    let hash = bytes.fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    (hash % SHARDS).cast_signed()
}

/// The series of a shard in JSON: `[[labels, state], ...]`, ordered by labels.
fn of_shard<T: Serialize, const N: usize>(series: &Series<T, N>, number: i64) -> Option<Vec<u8>> {
    let own: Vec<_> = series
        .iter()
        .filter(|(labels, _)| shard(*labels) == number)
        .map(|(labels, state)| (labels.as_slice(), state))
        .collect();
    (!own.is_empty()).then(|| pieces::to_json(&own))
}

fn add_shard<T: DeserializeOwned, const N: usize>(
    series: &mut Series<T, N>,
    piece: Piece,
    content: &[u8],
    fits: impl Fn(&T) -> bool,
) -> Result<(), PieceError> {
    let read: Series<T, N> = pieces::from_json(piece, content)?;
    if read.iter().next().is_none() || read.iter().any(|(labels, _)| shard(labels) != piece.number)
    {
        return Err(piece.unreadable("it has series of another piece, or none"));
    }
    if !read.iter().all(|(_, state)| fits(state)) {
        return Err(piece.unreadable("a series has other buckets than its family"));
    }
    series.extend(read);
    Ok(())
}
