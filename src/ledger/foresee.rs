//! What recording would do, without doing it: the numbers of a plan.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};

use sqlx::Row as _;
use uuid::Uuid;

use super::record::{Judged, Sorted, judge};
use super::{Arrival, Counts, Ledger, rows};
use crate::event::Digest;

/// The events that a plan has found to be new so far.
#[derive(Default)]
pub struct Foreseen(HashMap<(Uuid, String), Digest>);

impl Foreseen {
    /// What the ledger knows and what the batches before would have brought, by index; then remembers what is new here.
    fn and(&mut self, mut known: HashMap<usize, Digest>, news: &[&rows::New<'_>]) -> HashMap<usize, Digest> {
        for new in news {
            if known.contains_key(&new.index) {
                continue;
            }
            match self.0.entry((new.event.deployment, new.event.id())) {
                Entry::Occupied(earlier) => {
                    known.insert(new.index, *earlier.get());
                }
                Entry::Vacant(first) => {
                    first.insert(new.digest);
                }
            }
        }
        known
    }
}

impl Ledger {
    /// What [`Ledger::record`] would count, without writing. `foreseen` remembers the new events of the batches before this one.
    ///
    /// # Errors
    /// The database's.
    pub async fn foresee(&self, arrivals: &[Arrival], foreseen: &mut Foreseen) -> Result<Counts, sqlx::Error> {
        let mut tx = self.pool.begin().await?;
        let mut sources = HashMap::new();
        for row in &sqlx::query("select deployment_id, id from source").fetch_all(&mut *tx).await? {
            sources.insert(row.try_get(0)?, row.try_get(1)?);
        }
        // a deployment that is not known yet has no events: any id that no source has will do
        for arrival in arrivals {
            if let Ok(event) = &arrival.event {
                sources.entry(event.deployment).or_insert(0);
            }
        }
        let sorted = Sorted::of(arrivals, &sources);
        let mut judged = Judged::default();
        let (builds, claims, usage) = sorted.tables();
        let known = rows::known_builds(&mut tx, &builds, &HashSet::new()).await?;
        judge(&mut judged, &builds, &foreseen.and(known, &builds));
        let known = rows::known_claims(&mut tx, &claims, &HashSet::new()).await?;
        judge(&mut judged, &claims, &foreseen.and(known, &claims));
        let known = rows::known_usage(&mut tx, &usage, &HashSet::new()).await?;
        judge(&mut judged, &usage, &foreseen.and(known, &usage));
        sorted.judge_again(&mut judged);
        Ok(judged.counts(arrivals))
    }
}
