//! The audit's questions to the ledger: rows on both sides of each joint, counted and compared in
//! one snapshot.

use std::borrow::Cow;
use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use sqlx::Connection as _;
use sqlx::postgres::PgRow;
use sqlx::{FromRow, PgConnection, Row};
use uuid::Uuid;

use super::positions::last_record;
use super::{LastRecord, Sequence};
use crate::event::TopicPartition;

/// One partition according to the ledger's own rows.
#[derive(Clone, Debug)]
pub struct PartitionBooks {
    pub partition: TopicPartition,
    /// The partition's position.
    pub next_offset: i64,
    /// The last record before the position.
    pub last: Option<LastRecord>,
    /// Records read. The counts are the sums over the live chain's batches.
    pub records: i64,
    pub accepted: i64,
    pub duplicates: i64,
    /// Records in conflict with an accepted event.
    pub conflicts: i64,
    pub rejects: i64,
    pub held: i64,
}

/// One difference that an audit found.
#[derive(
    Clone,
    Debug,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    serde::Serialize,
    serde::Deserialize,
    utoipa::ToSchema,
)]
pub struct Difference {
    /// The kind of difference.
    pub kind: Cow<'static, str>,
    /// The event, batch or partition that differs.
    pub id: String,
    /// The values on both sides.
    pub detail: String,
}

/// The sums and differences inside the ledger, in one snapshot.
#[derive(Clone, Debug)]
pub struct LedgerBooks {
    /// The last sequence of the snapshot.
    pub sequence: Sequence,
    pub partitions: Vec<PartitionBooks>,
    /// The number of accepted usage events.
    pub usage: i64,
    /// The number of publications by state.
    pub publications: BTreeMap<String, i64>,
    /// Differences of chains, counts, sequences and publications.
    pub differences: Vec<Difference>,
}

/// Maximum number of listed differences of each kind.
const LISTED: i64 = 1_000;

/// Number of statements of [`add_up`].
pub const STATEMENTS: u32 = CHECKS.len() as u32 + 3;

/// Adds up the ledger's rows and compares them with each other. It runs [`STATEMENTS`] long
/// statements.
pub async fn add_up(conn: &mut PgConnection) -> Result<LedgerBooks, sqlx::Error> {
    let mut tx = conn.begin_with("begin isolation level repeatable read read only").await?;
    let sequence = sqlx::query_scalar("select named_sequence(next_sequence - 1) from ledger")
        .fetch_one(&mut *tx)
        .await?;
    let mut books = LedgerBooks {
        sequence,
        partitions: partitions(&mut tx).await?,
        usage: sqlx::query("select count(*) from usage_event")
            .fetch_one(&mut *tx)
            .await?
            .try_get(0)?,
        publications: BTreeMap::new(),
        differences: Vec::new(),
    };
    let states = sqlx::query("select state, count(*) from publication group by state")
        .fetch_all(&mut *tx)
        .await?;
    for row in &states {
        books.publications.insert(row.try_get(0)?, row.try_get(1)?);
    }
    for (kind, query) in CHECKS {
        let rows = sqlx::query(query).bind(LISTED).fetch_all(&mut *tx).await?;
        for row in &rows {
            books.differences.push(Difference {
                kind: kind.into(),
                id: row.try_get(0)?,
                detail: row.try_get(1)?,
            });
        }
    }
    tx.commit().await?;
    Ok(books)
}

/// Builds that the source calls the first successful start of a workspace which has another one, at
/// most `limit`. After coderd has removed old builds, it names the first remaining build. Each
/// difference contains the first start that the ledger has.
pub async fn second_first_starts(
    conn: &mut PgConnection,
    source_id: i16,
    limit: i64,
) -> Result<Vec<Difference>, sqlx::Error> {
    let rows: Vec<(String, String)> = sqlx::query_as(
        "select 'workspace_build_completed:' || b.build_id, 'not counted as a creation: workspace ' || b.workspace_id
                 || coalesce(' had its first successful start in build ' || f.build_id, ' was started before the baseline')
         from workspace_build b join workspace_first_start f using (source_id, workspace_id)
         where source_id = $1 and b.first_successful_start and b.build_id is distinct from f.build_id
         order by b.completed_at desc limit $2",
    )
    .bind(source_id)
    .bind(limit)
    .fetch_all(conn)
    .await?;
    Ok(rows
        .into_iter()
        .map(|(id, detail)| Difference { kind: "second_first_start".into(), id, detail })
        .collect())
}

/// A page of the build ids of the source's accepted builds and claims that follow `after`, in
/// order.
pub async fn build_ids(
    conn: &mut PgConnection,
    source_id: i16,
    after: Uuid,
    limit: i64,
) -> Result<Vec<Uuid>, sqlx::Error> {
    let query = "select build_id from (
            (select build_id from workspace_build where source_id = $1 and build_id > $2 order by build_id limit $3)
            union (select build_id from prebuild_claim where source_id = $1 and build_id > $2 order by build_id limit $3)
        ) as ids order by build_id limit $3";
    sqlx::query_scalar(query).bind(source_id).bind(after).bind(limit).fetch_all(conn).await
}

/// The number of the source's usage events that happened at or after `since`.
pub async fn recent_usage(
    conn: &mut PgConnection,
    source_id: i16,
    since: DateTime<Utc>,
) -> Result<i64, sqlx::Error> {
    let query = "select count(*) from usage_event where source_id = $1 and created_at >= $2";
    sqlx::query_scalar(query).bind(source_id).bind(since).fetch_one(conn).await
}

/// The number of these usage events that happened at or after `since`.
pub async fn recent_usage_of(
    conn: &mut PgConnection,
    source_id: i16,
    ids: &[String],
    since: DateTime<Utc>,
) -> Result<i64, sqlx::Error> {
    let query = "select count(*) from usage_event where source_id = $1 and id = any($2) and created_at >= $3";
    sqlx::query_scalar(query).bind(source_id).bind(ids).bind(since).fetch_one(conn).await
}

/// A page of the source's accepted usage ids that follow `after`, in order.
pub async fn usage_ids(
    conn: &mut PgConnection,
    source_id: i16,
    after: &str,
    limit: i64,
) -> Result<Vec<String>, sqlx::Error> {
    let query = "select id from usage_event where source_id = $1 and id > $2 order by id limit $3";
    sqlx::query_scalar(query).bind(source_id).bind(after).bind(limit).fetch_all(conn).await
}

/// Whether the ledger has a pass of the source that began after `pass_id` was recorded. The first
/// later pass may have begun before.
pub async fn later_pass_is_in(
    conn: &mut PgConnection,
    source_id: i16,
    pass_id: i64,
) -> Result<bool, sqlx::Error> {
    sqlx::query_scalar(
        "select exists (select from collector_progress where source_id = $1
             and least(pass_id, (select min(pass_id) - 1 from unreached_offset where source_id = $1)) > greatest($2 + 1, void_pass_id))",
    )
    .bind(source_id)
    .bind(pass_id)
    .fetch_one(conn)
    .await
}

/// The id of the source's newest pass; 0 before the first pass.
pub async fn newest_pass(conn: &mut PgConnection, source_id: i16) -> Result<i64, sqlx::Error> {
    let query = "select pass_id from collector_progress where source_id = $1";
    sqlx::query_scalar(query).bind(source_id).fetch_one(conn).await
}

async fn partitions(tx: &mut PgConnection) -> Result<Vec<PartitionBooks>, sqlx::Error> {
    let rows = sqlx::query(
        "select p.topic, p.partition, p.next_offset, p.last_offset, p.last_record,
             coalesce(sum(b.records), 0)::bigint, coalesce(sum(b.accepted), 0)::bigint, coalesce(sum(b.duplicates), 0)::bigint,
             coalesce(sum(b.conflicts), 0)::bigint, coalesce(sum(b.rejects), 0)::bigint, coalesce(sum(b.held), 0)::bigint
         from position p left join batch b on b.kind = 'log' and b.topic = p.topic and b.partition = p.partition and b.generation = p.generation
         group by p.topic, p.partition order by p.topic, p.partition",
    )
    .fetch_all(tx)
    .await?;
    let books = |row: &PgRow| {
        Ok(PartitionBooks {
            partition: TopicPartition::from_row(row)?,
            next_offset: row.try_get(2)?,
            last: last_record(row)?,
            records: row.try_get(5)?,
            accepted: row.try_get(6)?,
            duplicates: row.try_get(7)?,
            conflicts: row.try_get(8)?,
            rejects: row.try_get(9)?,
            held: row.try_get(10)?,
        })
    };
    rows.iter().map(books).collect()
}

/// Each query returns (id, detail) for at most `$1` rows that differ. It normally returns none and
/// reads all rows. A planner that counts on an early `limit` may look up rows one by one;
/// `materialized` makes it plan for all rows.
const CHECKS: [(&str, &str); 9] = [
    (
        "chain_broken",
        "select topic || '/' || partition || '@' || first_offset, 'the batch before it ends at ' || coalesce(before::text, 'no batch')
         from (select b.topic, b.partition, b.first_offset, p.start_offset,
                   lag(b.next_offset) over (partition by b.topic, b.partition, b.generation order by b.sequence) as before
               from batch b join (select topic, partition, generation, start_offset from position
                                  union all select topic, partition, generation, start_offset from past_position) p
                   using (topic, partition, generation)
               where b.kind = 'log') as chain
         where first_offset <> coalesce(before, start_offset) limit $1",
    ),
    (
        "position_off_its_chain",
        "select p.topic || '/' || p.partition, 'position ' || p.next_offset || ' after ' || p.records || ' records, batches end at '
                 || coalesce(max(b.next_offset), p.start_offset) || ' after ' || coalesce(sum(b.records), 0)
         from position p left join batch b on b.kind = 'log' and b.topic = p.topic and b.partition = p.partition and b.generation = p.generation
         group by p.topic, p.partition
         having p.next_offset <> coalesce(max(b.next_offset), p.start_offset) or p.records <> coalesce(sum(b.records), 0) limit $1",
    ),
    (
        "batch_without_its_events",
        "select 'batch ' || b.id, 'accepted ' || b.accepted || ', rows ' || coalesce(rows.n, 0)
         from batch b left join (
             select batch_id, count(*) as n from (
                 select batch_id from workspace_build union all select batch_id from prebuild_claim union all select batch_id from usage_event
             ) as events group by batch_id) as rows on rows.batch_id = b.id
         where b.accepted <> coalesce(rows.n, 0) limit $1",
    ),
    (
        "event_without_its_batch",
        "select id, 'names batch ' || batch_id || ', which does not exist' from (
             select batch_id, build_id::text as id from workspace_build union all select batch_id, build_id::text from prebuild_claim
             union all select batch_id, id from usage_event) as events
         where not exists (select from batch where batch.id = events.batch_id) limit $1",
    ),
    (
        "batch_without_its_rejects",
        "select 'batch ' || b.id, 'refused ' || (b.rejects + b.conflicts + b.held) || ', rows ' || coalesce(rows.n, 0)
         from batch b left join (select batch_id, count(*) as n from reject group by batch_id) as rows on rows.batch_id = b.id
         where b.kind = 'log' and b.rejects + b.conflicts + b.held <> coalesce(rows.n, 0) limit $1",
    ),
    // The partition is read beyond the place, or its generation has ended. The record must be an
    // accepted event or a reject.
    (
        "passed_and_gone",
        "select coalesce(event_id, 'reject ' || id), 'reject ' || id || ' is ' || state || ' and was appended again at ' || topic || '/'
                 || partition || '@' || log_offset || ', but the ledger has no event or reject from there; run `tallyline rejects resubmit --force`'
         from (select r.id, r.state, r.passed_topic as topic, r.passed_partition as partition, r.passed_generation as generation,
                   r.passed_offset as log_offset, coalesce(a.detail->>'event_id', r.event_id) as event_id,
                   coalesce((a.detail->>'deployment_id')::uuid, r.deployment_id) as deployment_id
               from reject r join operator_act a on a.id = r.act_id where r.passed_offset is not null) as passed
         join (select topic, partition, generation, next_offset, false as is_over from position
               union all select topic, partition, generation, next_offset, true from past_position) as life using (topic, partition, generation)
         cross join lateral (select substring(event_id from ':([0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12})$')::uuid) as build (key)
         where (is_over or next_offset > log_offset)
             and not exists (select from reject r where r.topic = passed.topic and r.partition = passed.partition
                 and r.generation = passed.generation and r.log_offset = passed.log_offset)
             and not exists (select from source s where s.deployment_id = passed.deployment_id and (
                 exists (select from usage_event e where e.source_id = s.id and e.id = passed.event_id)
                 or event_id like 'workspace_build_completed:%'
                     and exists (select from workspace_build b where b.source_id = s.id and b.build_id = build.key)
                 or event_id like 'prebuild_claimed:%'
                     and exists (select from prebuild_claim c where c.source_id = s.id and c.build_id = build.key))) limit $1",
    ),
    (
        "sequence_broken",
        "select 'sequence', count(*) || ' batches, ' || count(sequence) || ' sequences up to ' || coalesce(max(sequence), 0)
                 || ', next is ' || min(next_sequence)
         from ledger left join batch on true
         having count(batch.id) <> min(next_sequence) - 1 or count(sequence) <> min(next_sequence) - 1
             or coalesce(max(sequence), 0) <> min(next_sequence) - 1 limit $1",
    ),
    (
        "usage_without_publication",
        "select coalesce(u.id, p.event_id), case when p.event_id is null then 'accepted, but not queued' else 'queued, but not accepted' end
         from usage_event u full join publication p on p.source_id = u.source_id and p.event_id = u.id
         where u.id is null or p.event_id is null limit $1",
    ),
    (
        "publication_without_its_answer",
        "with found as materialized (
             select event_id, state from publication p where state = 'published' and not exists (select from publication_attempt a
                 where a.source_id = p.source_id and a.event_id = p.event_id and a.verdict = 'accepted')
                 and not exists (select from removed_answer a where (a.source_id, a.event_id, a.state) = (p.source_id, p.event_id, p.state))
             union all
             select event_id, state from publication p where state = 'refused' and not exists (select from publication_attempt a
                 where a.source_id = p.source_id and a.event_id = p.event_id and a.verdict = 'refused')
                 and not exists (select from removed_answer a where (a.source_id, a.event_id, a.state) = (p.source_id, p.event_id, p.state))
             union all
             select event_id, state from publication p where state not in ('published', 'refused') and exists (select from publication_attempt a
                 where a.source_id = p.source_id and a.event_id = p.event_id and a.verdict in ('accepted', 'refused')))
         select event_id, 'state is ' || state || ', but no recorded answer has this verdict' from found limit $1",
    ),
];
