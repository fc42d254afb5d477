//! Attempts of requests whose events are all settled, and the errors of these requests.

use chrono::{DateTime, TimeDelta, Utc};
use sqlx::{FromRow, PgConnection};
use uuid::Uuid;

use super::counts::{Removed, RemovedPage};
use super::evidence;
use super::kinds::{Due, DueKey, DuePage, PruneKind, PrunePlace};

/// Requests that a page examines.
const REQUESTS: i64 = 50;
/// A request without a recorded answer is kept at least this long: its publisher may still have the
/// answer.
const UNANSWERED_DAYS: i64 = 35;

#[derive(FromRow)]
struct Sent {
    id: Uuid,
    sent_at: DateTime<Utc>,
    /// The batch of its answer; none: its answer is not recorded.
    batch_id: Option<i64>,
    /// Whether its batch did not match its digest when it was last compared.
    is_evidence: bool,
    /// Whether its answer is recorded, or cannot come any more.
    is_over: bool,
    /// Whether it has a row for each of its events.
    is_whole: bool,
    attempts: i64,
    bytes: i64,
    /// When the last of its events was settled; none: one of them is not settled.
    settled_at: Option<DateTime<Utc>>,
}

impl Sent {
    fn is_due(&self, before: DateTime<Utc>) -> bool {
        self.is_over && self.is_whole && self.settled_at.is_some_and(|at| at < before)
    }
}

/// Requests of the subquery `r`, with their attempts. `$1`: unanswered requests are over if they
/// were sent before.
macro_rules! sent {
    ($requests:literal) => {
        concat!(
            "select r.id, r.sent_at, r.batch_id, exists (select from prune_evidence e where e.batch_id = r.batch_id and e.part = 'attempts') as is_evidence,
                 r.batch_id is not null or r.sent_at < $1 as is_over, life.attempts = r.events as is_whole, life.attempts,
                 life.bytes, case when life.settled = life.attempts then life.settled_at end as settled_at
             from (", $requests, ") r cross join lateral (
                 select count(*) as attempts, coalesce(sum(pg_column_size(a.*)), 0)::bigint as bytes,
                     count(*) filter (where p.state <> 'pending' and s.settled_at is not null) as settled, max(s.settled_at) as settled_at
                 from publication_attempt a left join publication p using (source_id, event_id)
                 left join lateral (select max(b.recorded_at) as settled_at from settlement t join batch b on b.id = t.batch_id
                     where t.source_id = a.source_id and t.event_id = a.event_id) s on true
                 where a.request_id = r.id
             ) life order by r.sent_at, r.id"
        )
    };
}

pub(super) async fn due(
    conn: &mut PgConnection,
    before: DateTime<Utc>,
    after: Option<PrunePlace>,
) -> Result<DuePage, sqlx::Error> {
    let (after, id) = match after {
        Some(PrunePlace::Request(at, id)) => (at, id),
        _ => (DateTime::UNIX_EPOCH, Uuid::nil()),
    };
    // an event is settled after its request was sent
    let rows: Vec<Sent> = sqlx::query_as(sent!(
        "select * from publication_request where attempts_removed_at is null and sent_at < $2 and (sent_at, id) > ($3, $4)
         order by sent_at, id limit $5"
    ))
    .bind(over_before(before))
    .bind(before)
    .bind(after)
    .bind(id)
    .bind(REQUESTS)
    .fetch_all(conn)
    .await?;
    let is_full = rows.len() as i64 == REQUESTS;
    let place = |row: &Sent| PrunePlace::Request(row.sent_at, row.id);
    let next = rows.last().filter(|_| is_full).map(place);
    let mut page = DuePage { next, ..DuePage::default() };
    for row in rows.iter().filter(|row| row.is_due(before)) {
        let Some(ended_at) = row.settled_at else { continue };
        if row.is_evidence {
            page.kept += row.attempts;
            continue;
        }
        let (key, place) = (DueKey::Request(row.id), Some(place(row)));
        page.due.push(Due { key, place, rows: row.attempts, bytes: row.bytes, ended_at });
    }
    Ok(page)
}

fn over_before(before: DateTime<Utc>) -> DateTime<Utc> {
    before - TimeDelta::days(UNANSWERED_DAYS)
}

/// Locks the publications first, and then looks whether they are still settled. A changed attempt is
/// evidence, and stays.
pub(super) async fn remove(
    tx: &mut PgConnection,
    before: DateTime<Utc>,
    due: &[Due],
    now: DateTime<Utc>,
) -> Result<RemovedPage, sqlx::Error> {
    let ids: Vec<Uuid> = due
        .iter()
        .filter_map(|one| match one.key {
            DueKey::Request(id) => Some(id),
            _ => None,
        })
        .collect();
    sqlx::query(
        "select from publication where (source_id, event_id) in (select source_id, event_id from publication_attempt where request_id = any($1))
         order by source_id, event_id for update",
    )
    .bind(&ids)
    .execute(&mut *tx)
    .await?;
    let rows: Vec<Sent> = sqlx::query_as(sent!(
        "select * from publication_request where id = any($2) and attempts_removed_at is null for update"
    ))
    .bind(over_before(before))
    .bind(&ids)
    .fetch_all(&mut *tx)
    .await?;
    let due: Vec<&Sent> = rows.iter().filter(|row| row.is_due(before)).collect();
    let batches: Vec<i64> = due.iter().filter_map(|row| row.batch_id).collect();
    let matching = evidence::matching(tx, PruneKind::Attempts, &batches, now).await?;
    let (mut ids, mut page) = (Vec::new(), RemovedPage::default());
    for row in due {
        if row.batch_id.is_none_or(|batch| matching.contains(&batch)) {
            ids.push(row.id);
            page.removed += Removed { rows: row.attempts, bytes: row.bytes };
        } else {
            page.kept += row.attempts;
        }
    }
    delete(tx, &ids, now).await?;
    Ok(page)
}

async fn delete(
    tx: &mut PgConnection,
    ids: &[Uuid],
    now: DateTime<Utc>,
) -> Result<(), sqlx::Error> {
    // the counts are those of the attempts, so they are set before these are deleted
    sqlx::query(
        "update publication_request r set attempts_removed_at = $2, verdicts = c.covered_verdicts, error_sha256 = c.covered_error, error = null
         from covered_request c where c.id = r.id and r.id = any($1)",
    )
    .bind(ids)
    .bind(now)
    .execute(&mut *tx)
    .await?;
    sqlx::query(
        "update publication p set removed_attempts = removed_attempts + a.attempts
         from (select source_id, event_id, count(*) as attempts from publication_attempt where request_id = any($1) group by source_id, event_id) a
         where p.source_id = a.source_id and p.event_id = a.event_id",
    )
    .bind(ids)
    .execute(&mut *tx)
    .await?;
    sqlx::query("delete from publication_attempt where request_id = any($1)")
        .bind(ids)
        .execute(tx)
        .await?;
    Ok(())
}
