//! Records that are not accepted, for operators to work on. Rows are never deleted: the act that
//! ends a reject is recorded in its row. Retention removes headers and body later.

use std::ops::Range;

use chrono::{DateTime, Utc};
use sqlx::Connection as _;
use sqlx::PgConnection;
use sqlx::postgres::PgRow;
use sqlx::{FromRow, Row};
use uuid::Uuid;

use super::generations;
use super::known::digest;
use super::{ActKind, Disposition, NewAct, PartitionGenerations, RejectState, Sequence, acts};
use crate::event::{Digest, Message, Oversized, RejectCause, TopicPartition, UsageType};

/// A record that is not accepted, with its state.
#[derive(Clone, Debug, PartialEq)]
pub struct RejectRow {
    pub id: i64,
    pub topic: String,
    pub partition: i32,
    pub generation: i32,
    pub offset: i64,
    /// The disposition of the record.
    pub disposition: Disposition,
    pub cause: RejectCause,
    /// The fault in the record.
    pub detail: String,
    /// The event's deployment, where readable.
    pub deployment_id: Option<Uuid>,
    /// The event's id, where readable.
    pub event_id: Option<String>,
    /// The event's type, where readable.
    pub event_type: Option<String>,
    /// Unbilled usage in the type's unit.
    pub units: Option<u64>,
    pub state: RejectState,
    /// The act that ended the reject.
    pub act_id: Option<i64>,
    /// The timestamp that the log gave the record.
    pub record_timestamp: Option<DateTime<Utc>>,
    pub key: Option<Vec<u8>>,
    pub headers: Vec<(String, Option<Vec<u8>>)>,
    /// The record's body, up to the requested length.
    pub payload: Option<Vec<u8>>,
    /// The length of the whole body.
    pub payload_bytes: Option<i64>,
    /// Length and SHA-256 of the body, if only its first bytes are kept.
    pub oversized: Option<Oversized>,
    /// When retention removed headers and body; none: they are kept.
    pub payload_removed_at: Option<DateTime<Utc>>,
    pub recorded_at: DateTime<Utc>,
}

/// Filters for rejects; absent filters match all.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RejectFilter {
    pub state: Option<RejectState>,
    pub disposition: Option<Disposition>,
    pub cause: Option<RejectCause>,
    pub event_type: Option<String>,
}

/// An act on a reject, or an attempt.
#[derive(
    Clone, Debug, PartialEq, FromRow, serde::Serialize, serde::Deserialize, utoipa::ToSchema,
)]
pub struct RejectAct {
    /// The act's id in the audit log.
    pub id: i64,
    /// The reject.
    #[serde(skip)]
    pub reject_id: i64,
    /// The kind of act.
    pub act: ActKind,
    /// The actor.
    pub actor: String,
    /// When the act was done.
    pub acted_at: DateTime<Utc>,
    /// The reason.
    pub reason: String,
    /// More facts; for an edit the new body.
    pub detail: serde_json::Value,
    /// Whether this act ended the reject. An act that did not had no effect, was interrupted, or
    /// was followed by another.
    pub ended_it: bool,
}

/// A reject whose record was appended to the log again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PassedReject {
    pub id: i64,
    /// The act that ends the reject.
    pub act_id: i64,
    /// The place of the appended record; none where its event is already accepted.
    pub place: Option<(TopicPartition, i64)>,
}

/// Another record under the same event id.
#[derive(
    Clone, Debug, PartialEq, Eq, FromRow, serde::Serialize, serde::Deserialize, utoipa::ToSchema,
)]
pub struct SameEvent {
    /// The id of the reject.
    pub id: i64,
    /// The disposition of the record.
    pub disposition: Disposition,
    /// The cause, in one word.
    pub cause: RejectCause,
    /// The state of the reject.
    pub state: RejectState,
    /// When the reject was recorded.
    pub recorded_at: DateTime<Utc>,
}

/// A page of rejects by id, with at most `payload_bytes` of each body, and with headers of up to 16
/// KiB.
pub async fn list(
    conn: &mut PgConnection,
    filter: &RejectFilter,
    after: i64,
    limit: i64,
    payload_bytes: i32,
) -> Result<Vec<RejectRow>, sqlx::Error> {
    let rows = sqlx::query(
        "select id, topic, partition, generation, log_offset, disposition, cause, detail, deployment_id, event_id, event_type,
             units::text as units, state, act_id, record_timestamp, record_key,
             case when octet_length(headers) <= 16384 then headers else '[]' end as headers, payload_removed_at, substring(payload from 1 for $7) as payload,
             coalesce(whole_bytes, octet_length(payload)) as payload_bytes,
             whole_sha256, recorded_at
         from reject
         where ($1::text is null or state = $1) and ($2::text is null or disposition = $2) and ($3::text is null or cause = $3)
             and ($4::text is null or event_type = $4) and id > $5
         order by id limit $6",
    )
    .bind(filter.state)
    .bind(filter.disposition)
    .bind(filter.cause)
    .bind(&filter.event_type)
    .bind(after)
    .bind(limit)
    .bind(payload_bytes)
    .fetch_all(&mut *conn)
    .await?;
    rows.iter().map(reject).collect()
}

/// These rejects by id, with at most `payload_bytes` of each body. Missing ones are left out.
pub async fn by_id(
    conn: &mut PgConnection,
    ids: &[i64],
    payload_bytes: i32,
) -> Result<Vec<RejectRow>, sqlx::Error> {
    let rows = sqlx::query(
        "select id, topic, partition, generation, log_offset, disposition, cause, detail, deployment_id, event_id, event_type,
             units::text as units, state, act_id, record_timestamp, record_key,
             coalesce(headers, '[]') as headers, payload_removed_at, substring(payload from 1 for $2) as payload,
             coalesce(whole_bytes, octet_length(payload)) as payload_bytes,
             whole_sha256, recorded_at
         from reject where id = any($1) order by id",
    )
    .bind(ids)
    .bind(payload_bytes)
    .fetch_all(&mut *conn)
    .await?;
    rows.iter().map(reject).collect()
}

/// Open held records with ids above `after` that can be admitted: this version knows their type, or
/// their deployment is registered.
pub async fn admissible(
    conn: &mut PgConnection,
    after: i64,
    limit: i64,
) -> Result<Vec<i64>, sqlx::Error> {
    sqlx::query_scalar(
        "(select id from reject
          where state = 'open' and disposition = 'held' and cause <> $4 and event_type = any($1) and id > $2 order by id limit $3)
         union all
         (select reject.id from source join reject using (deployment_id)
          where state = 'open' and cause = 'unregistered_source' and reject.id > $2 order by reject.id limit $3)
         order by id limit $3",
    )
    .bind(UsageType::ALL.map(UsageType::as_str))
    .bind(after)
    .bind(limit)
    .bind(RejectCause::UnregisteredSource)
    .fetch_all(conn)
    .await
}

/// The acts on these rejects, in order.
pub async fn acts(conn: &mut PgConnection, ids: &[i64]) -> Result<Vec<RejectAct>, sqlx::Error> {
    sqlx::query_as(
        "select act.id, reject_id, act, actor, acted_at, reason, act.detail, reject.act_id is not distinct from act.id as ended_it
         from operator_act act join reject on reject.id = reject_id where reject_id = any($1) order by act.id",
    )
    .bind(ids)
    .fetch_all(conn)
    .await
}

/// The other rejects under this event id, in order, at most a hundred.
pub async fn of_event(
    conn: &mut PgConnection,
    deployment_id: Uuid,
    event_id: &str,
    except: i64,
) -> Result<Vec<SameEvent>, sqlx::Error> {
    sqlx::query_as(
        "select id, disposition, cause, state, recorded_at from reject where deployment_id = $1 and event_id = $2 and id <> $3
         order by id limit 100",
    )
    .bind(deployment_id)
    .bind(event_id)
    .bind(except)
    .fetch_all(conn)
    .await
}

/// The sequence that accepted the event of this id, and its digest; none if it is not accepted.
pub async fn accepted(
    conn: &mut PgConnection,
    deployment_id: Uuid,
    event_id: &str,
) -> Result<Option<(Sequence, Digest)>, sqlx::Error> {
    let build: Option<Uuid> = event_id.split_once(':').and_then(|(_, id)| id.parse().ok());
    let found: Option<(Sequence, Vec<u8>)> = sqlx::query_as(
        "select named_sequence(sequence), digest from source join lateral (
             select batch_id, digest from usage_event where source_id = source.id and usage_event.id = $2
             union all select batch_id, digest from workspace_build
                 where source_id = source.id and build_id = $3 and $2 like 'workspace_build_completed:%'
             union all select batch_id, digest from prebuild_claim
                 where source_id = source.id and build_id = $3 and $2 like 'prebuild_claimed:%') as event on true
         join batch on batch.id = event.batch_id where deployment_id = $1",
    )
    .bind(deployment_id)
    .bind(event_id)
    .bind(build)
    .fetch_optional(conn)
    .await?;
    found.map(|(sequence, bytes)| Ok((sequence, digest(bytes)?))).transpose()
}

/// Writes the acts before they are done, all or none, and returns their ids in order.
pub async fn begin_acts(
    conn: &mut PgConnection,
    acts: &[NewAct<'_>],
    now: DateTime<Utc>,
) -> Result<Vec<i64>, sqlx::Error> {
    let mut tx = conn.begin().await?;
    let mut ids = Vec::with_capacity(acts.len());
    for act in acts {
        ids.push(acts::insert(&mut tx, act, now).await?);
    }
    tx.commit().await?;
    Ok(ids)
}

/// Ends each of these rejects by its act, if its state is in `from`, and returns the ended ones.
/// Returns none if a generation of any partition has ended since `expected` was read, because the
/// appended records may be in that generation.
pub async fn end(
    conn: &mut PgConnection,
    passed: &[PassedReject],
    from: &[RejectState],
    to: RejectState,
    expected: PartitionGenerations,
) -> Result<Vec<i64>, sqlx::Error> {
    let mut tx = conn.begin().await?;
    let topics: Vec<_> = passed.iter().map(|one| Some(one.place?.0.topic.name())).collect();
    let partitions: Vec<_> = passed.iter().map(|one| Some(one.place?.0.partition)).collect();
    let lock = "select from position where (topic, partition) in (select * from unnest($1::text[], $2::integer[]))
                order by topic, partition for share";
    sqlx::query(lock).bind(&topics).bind(&partitions).execute(&mut *tx).await?;
    if generations::all(&mut tx).await? != expected {
        return Ok(Vec::new());
    }
    let ended = sqlx::query_scalar(
        "update reject set state = $4, act_id = ended.act_id, passed_topic = ended.topic, passed_partition = ended.partition,
             passed_offset = ended.log_offset, passed_generation = current_generation(ended.topic, ended.partition)
         from unnest($1::bigint[], $2::bigint[], $5::text[], $6::integer[], $7::bigint[]) as ended (id, act_id, topic, partition, log_offset)
         where reject.id = ended.id and reject.state = any($3) returning reject.id",
    )
    .bind(passed.iter().map(|one| one.id).collect::<Vec<_>>())
    .bind(passed.iter().map(|one| one.act_id).collect::<Vec<_>>())
    .bind(from)
    .bind(to)
    .bind(&topics)
    .bind(&partitions)
    .bind(passed.iter().map(|one| Some(one.place?.1)).collect::<Vec<_>>())
    .fetch_all(&mut *tx)
    .await?;
    tx.commit().await?;
    Ok(ended)
}

/// The number of rejects that were appended again to these offsets of this generation of the
/// partition.
pub async fn passed_to(
    conn: &mut PgConnection,
    partition: TopicPartition,
    generation: i32,
    offsets: Range<i64>,
) -> Result<i64, sqlx::Error> {
    sqlx::query_scalar(
        "select count(*) from reject
         where passed_topic = $1 and passed_partition = $2 and passed_generation = $3 and passed_offset >= $4
             and passed_offset < $5",
    )
    .bind(partition.topic.name())
    .bind(partition.partition)
    .bind(generation)
    .bind(offsets.start)
    .bind(offsets.end)
    .fetch_one(conn)
    .await
}

/// Discards these open rejects, each with its act, all or none. Returns none where one is not open
/// any more; nothing is changed.
pub async fn discard(
    conn: &mut PgConnection,
    ids: &[i64],
    acts: &[NewAct<'_>],
    now: DateTime<Utc>,
) -> Result<Option<Vec<i64>>, sqlx::Error> {
    let mut tx = conn.begin().await?;
    let mut act_ids = Vec::with_capacity(ids.len());
    for (id, act) in ids.iter().zip(acts) {
        let act_id = acts::insert(&mut tx, act, now).await?;
        let ended = sqlx::query(
            "update reject set state = 'discarded', act_id = $2 where id = $1 and state = 'open'",
        )
        .bind(id)
        .bind(act_id)
        .execute(&mut *tx)
        .await?;
        if ended.rows_affected() != 1 {
            tx.rollback().await?;
            return Ok(None);
        }
        act_ids.push(act_id);
    }
    tx.commit().await?;
    Ok(Some(act_ids))
}

fn reject(row: &PgRow) -> Result<RejectRow, sqlx::Error> {
    Ok(RejectRow {
        id: row.try_get("id")?,
        topic: row.try_get("topic")?,
        partition: row.try_get("partition")?,
        generation: row.try_get("generation")?,
        offset: row.try_get("log_offset")?,
        disposition: row.try_get("disposition")?,
        cause: row.try_get("cause")?,
        detail: row.try_get("detail")?,
        deployment_id: row.try_get("deployment_id")?,
        event_id: row.try_get("event_id")?,
        event_type: row.try_get("event_type")?,
        units: units(row.try_get("units")?)?,
        state: row.try_get("state")?,
        act_id: row.try_get("act_id")?,
        record_timestamp: row.try_get("record_timestamp")?,
        key: row.try_get("record_key")?,
        headers: Message::headers_from_json(row.try_get("headers")?)
            .map_err(|error| sqlx::Error::Decode(error.into()))?,
        payload: row.try_get("payload")?,
        payload_bytes: row.try_get("payload_bytes")?,
        oversized: oversized(row)?,
        payload_removed_at: row.try_get("payload_removed_at")?,
        recorded_at: row.try_get("recorded_at")?,
    })
}

fn oversized(row: &PgRow) -> Result<Option<Oversized>, sqlx::Error> {
    let Some(sha256) = row.try_get::<Option<Vec<u8>>, _>("whole_sha256")? else { return Ok(None) };
    let (bytes, sha256) =
        (usize::try_from(row.try_get::<i64, _>("payload_bytes")?).ok(), digest(sha256)?);
    Ok(bytes.map(|bytes| Oversized { bytes, sha256 }))
}

/// Parses an unsigned 64-bit number in PostgreSQL's format.
pub(super) fn units(text: Option<&str>) -> Result<Option<u64>, sqlx::Error> {
    text.map(|text| text.parse().map_err(|_| sqlx::Error::Protocol("units out of range".into())))
        .transpose()
}
