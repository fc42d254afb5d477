//! Headers and bodies of rejects that an act has ended.

use std::collections::BTreeSet;

use chrono::{DateTime, Utc};
use sqlx::{FromRow, PgConnection};

use super::counts::{Removed, RemovedPage};
use super::evidence;
use super::kinds::{Due, DueKey, DuePage, PruneKind, PrunePlace, ROWS_AT_ONCE};

#[derive(FromRow)]
struct Ended {
    id: i64,
    act_id: i64,
    ended_at: DateTime<Utc>,
    bytes: i64,
    /// Whether the ledger has the record that the act appended, if it appended one.
    arrived: bool,
    /// Whether its batch did not match its digest when it was last compared.
    is_evidence: bool,
}

/// Acts are in order of their ids, and nearly in order of time.
pub(super) async fn due(
    conn: &mut PgConnection,
    before: DateTime<Utc>,
    after: Option<PrunePlace>,
) -> Result<DuePage, sqlx::Error> {
    let (act_id, id) = match after {
        Some(PrunePlace::Reject { act_id, id }) => (act_id, id),
        _ => (0, 0),
    };
    // The appended record must be read, and be an accepted event or a reject: until then, this row
    // can be its only copy.
    let rows: Vec<Ended> = sqlx::query_as(
        "select r.id, r.act_id, a.acted_at as ended_at, (octet_length(r.headers) + coalesce(octet_length(r.payload), 0))::bigint as bytes,
             exists (select from prune_evidence e where e.batch_id = r.batch_id and e.part = 'rejects') as is_evidence,
             r.passed_offset is null or (
                 exists (select from (select topic, partition, generation, next_offset from position
                                      union all select topic, partition, generation, next_offset from past_position) life
                     where life.topic = r.passed_topic and life.partition = r.passed_partition and life.generation = r.passed_generation
                         and life.next_offset > r.passed_offset)
                 and (exists (select from reject other where other.topic = r.passed_topic and other.partition = r.passed_partition
                          and other.generation = r.passed_generation and other.log_offset = r.passed_offset)
                     or exists (select from source s,
                          lateral (select coalesce(a.detail->>'event_id', r.event_id) as id) event,
                          lateral (select substring(event.id from ':([0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12})$')::uuid as key) build
                          where s.deployment_id = coalesce((a.detail->>'deployment_id')::uuid, r.deployment_id) and (
                              exists (select from usage_event e where e.source_id = s.id and e.id = event.id)
                              or exists (select from workspace_build b where b.source_id = s.id and b.build_id = build.key)
                              or exists (select from prebuild_claim c where c.source_id = s.id and c.build_id = build.key))))) as arrived
         from (select * from reject where state <> 'open' and payload_removed_at is null and (act_id, id) > ($1, $2)
               order by act_id, id limit $3) r
             join operator_act a on a.id = r.act_id
         order by r.act_id, r.id",
    )
    .bind(act_id)
    .bind(id)
    .bind(ROWS_AT_ONCE)
    .fetch_all(conn)
    .await?;
    let is_full = rows.len() as i64 == ROWS_AT_ONCE;
    let is_last = rows.last().is_some_and(|row| row.ended_at >= before);
    let old: Vec<Ended> = rows.into_iter().take_while(|row| row.ended_at < before).collect();
    let place = |row: &Ended| PrunePlace::Reject { act_id: row.act_id, id: row.id };
    let next = old.last().filter(|_| is_full && !is_last).map(place);
    let arrived = old.iter().filter(|row| row.arrived);
    let (evidence, due): (Vec<&Ended>, Vec<&Ended>) = arrived.partition(|row| row.is_evidence);
    let due = due.into_iter().map(|row| Due {
        key: DueKey::Reject { id: row.id, act_id: row.act_id },
        place: Some(place(row)),
        rows: 1,
        bytes: row.bytes,
        ended_at: row.ended_at,
    });
    Ok(DuePage { due: due.collect(), kept: evidence.len() as i64, next })
}

/// A reject that another act has ended or reopened meanwhile stays. So does one whose batch does not
/// match the digest of its rejects: the payload would be lost together with its own digest.
pub(super) async fn remove(
    tx: &mut PgConnection,
    due: &[Due],
    now: DateTime<Utc>,
) -> Result<RemovedPage, sqlx::Error> {
    let (mut ids, mut act_ids, mut bytes) = (Vec::new(), Vec::new(), Vec::new());
    for one in due {
        if let DueKey::Reject { id, act_id } = one.key {
            ids.push(id);
            act_ids.push(act_id);
            bytes.push(one.bytes);
        }
    }
    let rows: Vec<(i64, i64, i64)> = sqlx::query_as(
        "select reject.id, batch_id, due.bytes
         from reject join unnest($1::bigint[], $2::bigint[], $3::bigint[]) as due (id, act_id, bytes) on due.id = reject.id
         where reject.act_id = due.act_id and state <> 'open' and payload_removed_at is null
         order by reject.id for update of reject",
    )
    .bind(ids)
    .bind(act_ids)
    .bind(bytes)
    .fetch_all(&mut *tx)
    .await?;
    let batches: BTreeSet<i64> = rows.iter().map(|(_, batch_id, _)| *batch_id).collect();
    let batches: Vec<i64> = batches.into_iter().collect();
    let matching = evidence::matching(tx, PruneKind::RejectPayloads, &batches, now).await?;
    let mut page = RemovedPage::default();
    let mut ids = Vec::new();
    for (id, batch_id, bytes) in rows {
        if matching.contains(&batch_id) {
            ids.push(id);
            page.removed += Removed { rows: 1, bytes };
        } else {
            page.kept += 1;
        }
    }
    sqlx::query(
        "update reject set payload_removed_at = $2, headers_sha256 = sha256(headers), payload_sha256 = sha256(payload),
             unsigned_headers_sha256 = unsigned_headers(headers), headers = null, payload = null
         where id = any($1)",
    )
    .bind(ids)
    .bind(now)
    .execute(tx)
    .await?;
    Ok(page)
}
