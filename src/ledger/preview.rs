//! Computes what recording would do, without writing: the numbers of a plan.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};

use chrono::{DateTime, Utc};
use sqlx::Connection as _;
use sqlx::{PgConnection, Row as _};
use uuid::Uuid;

use super::record::{Dispositions, SortedEvents, judge};
use super::{Arrival, Counts, Disposition, Refusal, ReplayRange, rows};
use crate::event::{Digest, Event, Payload, RejectCause};

/// The new events that a plan has found in earlier batches, and the workspaces that they start for
/// the first time.
#[derive(Default)]
pub struct PlannedEvents {
    events: HashMap<(Uuid, String), Digest>,
    started: HashSet<(Uuid, Uuid)>,
}

/// The effect that recording some arrivals would have.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BatchPreview {
    pub counts: Counts,
    /// The arrivals that would become new events, by index, in the log's order.
    pub new: Vec<usize>,
    /// Conflicts, rejects and held records that the ledger does not have yet.
    pub new_refused: i32,
}

impl PlannedEvents {
    /// Adds the new events of earlier batches to the known digests, by index, and remembers the
    /// events that are new here.
    fn with_earlier_batches(
        &mut self,
        mut known: HashMap<usize, Digest>,
        news: &[&rows::NewRow<'_>],
    ) -> HashMap<usize, Digest> {
        for new in news {
            if known.contains_key(&new.index) {
                continue;
            }
            match self.events.entry((new.event.deployment, new.event.id())) {
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

/// Returns what [`super::record::batch`] would do with arrivals of this range, without writing.
/// `planned` has the new events of earlier batches. An arrival that PostgreSQL refused before keeps
/// that refusal. A new build is a first successful start only if the ledger would keep it as one.
pub async fn batch(
    conn: &mut PgConnection,
    range: &ReplayRange,
    arrivals: &mut [Arrival],
    planned: &mut PlannedEvents,
    now: DateTime<Utc>,
) -> Result<BatchPreview, sqlx::Error> {
    let mut tx = conn.begin().await?;
    let mut sources = HashMap::new();
    for row in &sqlx::query("select deployment_id, id from source").fetch_all(&mut *tx).await? {
        sources.insert(row.try_get(0)?, row.try_get(1)?);
    }
    let refused_before = refused_before(&mut tx, range, arrivals).await?;
    for arrival in arrivals.iter_mut() {
        if let Some(detail) = refused_before.get(&arrival.offset).and_then(Option::as_ref) {
            arrival.event = Err(Refusal {
                disposition: Disposition::Rejected,
                cause: RejectCause::Ledger,
                detail: detail.clone(),
            });
        }
    }
    let sorted = SortedEvents::of(arrivals, &sources, now);
    let (mut dispositions, mut new) = (Dispositions::default(), Vec::new());
    let (builds, claims, usage) = sorted.tables();
    let known_builds = rows::known_builds(&mut tx, &builds, &HashSet::new()).await?;
    let known_claims = rows::known_claims(&mut tx, &claims, &HashSet::new()).await?;
    let known_usage = rows::known_usage(&mut tx, &usage, &HashSet::new()).await?;
    for (news, known) in [(&builds, known_builds), (&claims, known_claims), (&usage, known_usage)] {
        let known = planned.with_earlier_batches(known, news);
        judge(&mut dispositions, news, &known);
        new.extend(news.iter().map(|new| new.index).filter(|index| !known.contains_key(index)));
    }
    new.sort_unstable();
    sorted.judge_the_rest(&mut dispositions);
    dispositions.admit_known_contents(&mut tx, arrivals, &sources).await?;
    let refused = arrivals.iter().enumerate().filter(|(index, arrival)| {
        arrival.event.is_err() || dispositions.refused().contains_key(index)
    });
    let new_refused =
        refused.filter(|(_, arrival)| !refused_before.contains_key(&arrival.offset)).count();
    let counts = dispositions.counts(arrivals);
    first_starts(&mut tx, arrivals, &new, planned).await?;
    Ok(BatchPreview { counts, new, new_refused: i32::try_from(new_refused).unwrap_or(i32::MAX) })
}

/// Clears `first_successful_start` of new builds, except of the one build per workspace that the
/// ledger would keep.
async fn first_starts(
    tx: &mut PgConnection,
    arrivals: &mut [Arrival],
    new: &[usize],
    planned: &mut PlannedEvents,
) -> Result<(), sqlx::Error> {
    let mut candidates = Vec::new();
    for index in new {
        if let Ok(Event { deployment, payload: Payload::Build(build) }) = &arrivals[*index].event
            && build.first_successful_start
        {
            candidates.push((build.build_number, *index, (*deployment, build.workspace_id)));
        }
    }
    candidates.sort_unstable();
    let (deployments, workspaces): (Vec<Uuid>, Vec<Uuid>) =
        candidates.iter().map(|(_, _, workspace)| *workspace).unzip();
    let started: Vec<(Uuid, Uuid)> = sqlx::query_as(
        "select s.deployment_id, f.workspace_id from unnest($1::uuid[], $2::uuid[]) as named (deployment_id, workspace_id)
             join source s using (deployment_id) join workspace_first_start f on f.source_id = s.id and f.workspace_id = named.workspace_id",
    )
    .bind(deployments)
    .bind(workspaces)
    .fetch_all(tx)
    .await?;
    planned.started.extend(started);
    for (_, index, workspace) in candidates {
        if !planned.started.insert(workspace)
            && let Ok(Event { payload: Payload::Build(build), .. }) = &mut arrivals[index].event
        {
            build.first_successful_start = false;
        }
    }
    Ok(())
}

/// The offsets that are recorded as refused; with the detail where PostgreSQL refused the data.
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
