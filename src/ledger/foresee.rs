//! What recording would do, without doing it: the numbers of a plan.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};

use sqlx::{PgConnection, Row as _};
use uuid::Uuid;

use super::record::{Judged, Sorted, judge};
use super::{Arrival, Counts, Ledger, Refusal, ReplayRange, Verdict, rows};
use crate::event::Digest;

/// The events that a plan has found to be new so far.
#[derive(Default)]
pub struct Foreseen(HashMap<(Uuid, String), Digest>);

/// What recording some arrivals would do.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Foresight {
    /// What it would count.
    pub counts: Counts,
    /// The arrivals that would become new events, by index, in the log's order.
    pub new: Vec<usize>,
    /// Conflicts, rejects and held records that the ledger does not have yet.
    pub new_refused: i32,
}

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
    /// What [`Ledger::record`] would do with arrivals of this range, without writing. `foreseen` remembers the new events of the batches before
    /// this one. An arrival that PostgreSQL itself refused before is taken as it was recorded then.
    ///
    /// # Errors
    /// The database's.
    pub async fn foresee(&self, range: &ReplayRange, arrivals: &mut [Arrival], foreseen: &mut Foreseen) -> Result<Foresight, sqlx::Error> {
        let mut tx = self.pool.begin().await?;
        let mut sources = HashMap::new();
        for row in &sqlx::query("select deployment_id, id from source").fetch_all(&mut *tx).await? {
            sources.insert(row.try_get(0)?, row.try_get(1)?);
        }
        let refused_before = refused_before(&mut tx, range, arrivals).await?;
        for arrival in arrivals.iter_mut() {
            if let Some(detail) = refused_before.get(&arrival.offset).and_then(Option::as_ref) {
                arrival.event = Err(Refusal { verdict: Verdict::Rejected, cause: "ledger".into(), detail: detail.clone() });
            }
            // a deployment that is not known yet has no events: any id that no source has will do
            if let Ok(event) = &arrival.event {
                sources.entry(event.deployment).or_insert(0);
            }
        }
        let sorted = Sorted::of(arrivals, &sources);
        let (mut judged, mut new) = (Judged::default(), Vec::new());
        let (builds, claims, usage) = sorted.tables();
        let known_builds = rows::known_builds(&mut tx, &builds, &HashSet::new()).await?;
        let known_claims = rows::known_claims(&mut tx, &claims, &HashSet::new()).await?;
        let known_usage = rows::known_usage(&mut tx, &usage, &HashSet::new()).await?;
        for (news, known) in [(&builds, known_builds), (&claims, known_claims), (&usage, known_usage)] {
            let known = foreseen.and(known, news);
            judge(&mut judged, news, &known);
            new.extend(news.iter().map(|new| new.index).filter(|index| !known.contains_key(index)));
        }
        new.sort_unstable();
        sorted.judge_again(&mut judged);
        let refused = arrivals.iter().enumerate().filter(|(index, arrival)| arrival.event.is_err() || judged.conflicts().contains(index));
        let new_refused = refused.filter(|(_, arrival)| !refused_before.contains_key(&arrival.offset)).count();
        Ok(Foresight { counts: judged.counts(arrivals), new, new_refused: i32::try_from(new_refused).unwrap_or(i32::MAX) })
    }
}

/// The offsets that are recorded as refused; with its detail where PostgreSQL was who refused.
async fn refused_before(
    tx: &mut PgConnection,
    range: &ReplayRange,
    arrivals: &[Arrival],
) -> Result<HashMap<i64, Option<String>>, sqlx::Error> {
    let offsets: Vec<i64> = arrivals.iter().map(|arrival| arrival.offset).collect();
    let rows: Vec<(i64, Option<String>)> = sqlx::query_as(
        "select log_offset, case when cause = 'ledger' then detail end from reject
         where topic = $1 and partition = $2 and generation = $3 and log_offset = any($4)",
    )
    .bind(range.partition.topic.name())
    .bind(range.partition.partition)
    .bind(range.generation)
    .bind(offsets)
    .fetch_all(tx)
    .await?;
    Ok(rows.into_iter().collect())
}
