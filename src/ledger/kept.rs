//! Rows of events and rejects with their places in the log. `explain` shows them, and the deep
//! audit compares them with the log.

use chrono::{DateTime, Utc};
use sha2::{Digest as _, Sha256};
use sqlx::PgConnection;
use sqlx::postgres::PgRow;
use sqlx::types::Json;
use sqlx::{FromRow, Row};
use uuid::Uuid;

use super::entries::payload_of;
use super::parts::{event_digest, place_of};
use super::refused::RejectTraces;
use super::{Arrival, BatchKind, Disposition, PartRow, RejectState};
use crate::event::{Event, RejectCause, Topic, TopicPartition};

/// The row of an accepted event.
#[derive(Clone, Debug)]
pub struct KeptEvent {
    pub source_id: i16,
    /// The row's key: a build's id, or the usage event's own id.
    pub key: String,
    /// The event in the columns. An error means that they were changed by hand.
    pub event: Result<Event, String>,
    /// The digest of the event when it was accepted.
    pub digest: Vec<u8>,
    /// The offset of its record.
    pub log_offset: i64,
    pub batch_id: i64,
    /// The batch; none: it is missing.
    pub batch: Option<KeptBatch>,
}

/// A batch of the log, or of a replay.
#[derive(Clone, Debug, PartialEq, Eq, serde::Deserialize)]
pub struct KeptBatch {
    /// `log` or `replay`; other kinds contain no events.
    pub kind: BatchKind,
    pub topic: Option<String>,
    pub partition: Option<i32>,
    pub generation: Option<i32>,
    /// The lease epoch of the partition; none for a replay.
    pub epoch: Option<i64>,
    /// The first offset of its range.
    pub first_offset: Option<i64>,
    /// The offset after its range.
    pub next_offset: Option<i64>,
    pub sequence: Option<i64>,
    pub recorded_at: DateTime<Utc>,
}

/// The row of a record that is not accepted.
#[derive(Clone, Debug, FromRow)]
pub struct KeptReject {
    pub id: i64,
    /// The offset of the record.
    pub log_offset: i64,
    /// The disposition of the record.
    pub disposition: Disposition,
    pub cause: RejectCause,
    pub state: RejectState,
    /// Whether only a replay refused the record, and no live batch.
    pub by_a_replay: bool,
    record_timestamp: Option<DateTime<Utc>>,
    record_key: Option<Vec<u8>>,
    headers: Option<Vec<u8>>,
    payload: Option<Vec<u8>>,
    /// Retention has removed headers and body, and left their digests.
    is_removed: bool,
    headers_sha256: Option<Vec<u8>>,
    payload_sha256: Option<Vec<u8>>,
    whole_bytes: Option<i64>,
    whole_sha256: Option<Vec<u8>>,
    deployment_id: Option<Uuid>,
    event_id: Option<String>,
    event_type: Option<String>,
}

/// A range of offsets in one generation of a partition.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromRow)]
pub struct KeptRange {
    #[sqlx(flatten)]
    pub partition: TopicPartition,
    pub generation: i32,
    #[sqlx(rename = "start_offset")]
    pub from: i64,
    /// The offset after the last.
    #[sqlx(rename = "next_offset")]
    pub until: i64,
}

/// The ranges of the log between each position's start and the position.
pub async fn ranges(conn: &mut PgConnection) -> Result<Vec<KeptRange>, sqlx::Error> {
    sqlx::query_as("select * from position order by topic, partition").fetch_all(conn).await
}

/// The events that were accepted from records of the range, according to their batches.
pub async fn events_in(
    conn: &mut PgConnection,
    range: &KeptRange,
) -> Result<Vec<KeptEvent>, sqlx::Error> {
    // Live batches follow each other: the batch that contains the range's first record is the
    // first. Replays can start at any offset.
    let batches: Vec<i64> = sqlx::query_scalar(
        "select id from batch
         where kind = 'log' and topic = $1 and partition = $2 and generation = $3 and first_offset < $5
             and first_offset >= coalesce((select max(first_offset) from batch
                 where kind = 'log' and topic = $1 and partition = $2 and generation = $3 and first_offset <= $4), $4)
         union all
         select id from batch
         where kind = 'replay' and topic = $1 and partition = $2 and generation = $3 and accepted > 0
             and first_offset < $5 and next_offset > $4",
    )
    .bind(range.partition.topic.name())
    .bind(range.partition.partition)
    .bind(range.generation)
    .bind(range.from)
    .bind(range.until)
    .fetch_all(&mut *conn)
    .await?;
    let query = match range.partition.topic {
        Topic::WorkspaceBuilds => {
            "select * from kept_build where batch_id = any($1) and log_offset >= $2 and log_offset < $3"
        }
        Topic::PrebuildClaims => {
            "select * from kept_claim where batch_id = any($1) and log_offset >= $2 and log_offset < $3"
        }
        Topic::AgentUsage => {
            "select * from kept_usage where batch_id = any($1) and log_offset >= $2 and log_offset < $3"
        }
    };
    let rows = sqlx::query(query)
        .bind(batches)
        .bind(range.from)
        .bind(range.until)
        .fetch_all(&mut *conn)
        .await?;
    rows.iter().map(|row| kept_event(range.partition.topic, row)).collect()
}

/// The accepted events with these keys, of all deployments.
pub async fn events_by_key(
    conn: &mut PgConnection,
    topic: Topic,
    keys: &[String],
) -> Result<Vec<KeptEvent>, sqlx::Error> {
    let ids: Vec<Uuid> = keys.iter().filter_map(|key| key.parse().ok()).collect();
    let query = match topic {
        Topic::WorkspaceBuilds => {
            sqlx::query("select * from kept_build where source_id in (select id from source) and build_id = any($1)").bind(ids)
        }
        Topic::PrebuildClaims => {
            sqlx::query("select * from kept_claim where source_id in (select id from source) and build_id = any($1)").bind(ids)
        }
        Topic::AgentUsage => sqlx::query("select * from kept_usage where source_id in (select id from source) and id = any($1)").bind(keys),
    };
    query.fetch_all(conn).await?.iter().map(|row| kept_event(topic, row)).collect()
}

/// A page of all accepted events of a topic that follow `after`, by source and key.
pub async fn events_after(
    conn: &mut PgConnection,
    topic: Topic,
    after: Option<(i16, String)>,
    limit: i64,
) -> Result<Vec<KeptEvent>, sqlx::Error> {
    let (source_id, key) = after.unwrap_or((i16::MIN, String::new()));
    let id: Uuid = key.parse().unwrap_or_default();
    let query = match topic {
        Topic::WorkspaceBuilds => {
            sqlx::query("select * from kept_build where (source_id, build_id) > ($1, $2) order by source_id, build_id limit $3")
                .bind(source_id)
                .bind(id)
        }
        Topic::PrebuildClaims => {
            sqlx::query("select * from kept_claim where (source_id, build_id) > ($1, $2) order by source_id, build_id limit $3")
                .bind(source_id)
                .bind(id)
        }
        Topic::AgentUsage => sqlx::query("select * from kept_usage where (source_id, id) > ($1, $2) order by source_id, id limit $3")
            .bind(source_id)
            .bind(key),
    };
    query.bind(limit).fetch_all(conn).await?.iter().map(|row| kept_event(topic, row)).collect()
}

/// The events of these batches, in the log's order.
pub(super) async fn events_of(
    conn: &mut PgConnection,
    topic: Topic,
    batches: &[i64],
) -> Result<Vec<KeptEvent>, sqlx::Error> {
    let query = match topic {
        Topic::WorkspaceBuilds => {
            "select e.build_id::text as key, e.*, s.deployment_id, null::jsonb as batch
             from workspace_build e left join source s on s.id = e.source_id where e.batch_id = any($1)
             order by e.log_offset, e.source_id, e.build_id"
        }
        Topic::PrebuildClaims => {
            "select e.build_id::text as key, e.*, s.deployment_id, null::jsonb as batch
             from prebuild_claim e left join source s on s.id = e.source_id where e.batch_id = any($1)
             order by e.log_offset, e.source_id, e.build_id"
        }
        Topic::AgentUsage => {
            "select e.id as key, e.id, e.source_id, e.batch_id, e.log_offset, e.digest, e.event_type, e.quantity::text as quantity,
                 e.created_at, e.publish_started_at, e.published_at, e.failure_message, s.deployment_id, null::jsonb as batch
             from usage_event e left join source s on s.id = e.source_id where e.batch_id = any($1)
             order by e.log_offset, e.source_id, e.id"
        }
    };
    let rows = sqlx::query(query).bind(batches).fetch_all(conn).await?;
    rows.iter().map(|row| kept_event(topic, row)).collect()
}

/// The rejects, conflicts and held records of the range.
pub async fn rejects_in(
    conn: &mut PgConnection,
    range: &KeptRange,
) -> Result<Vec<KeptReject>, sqlx::Error> {
    sqlx::query_as(
        "select id, log_offset, disposition, cause, state, record_timestamp, record_key, headers, payload, payload_removed_at is not null as is_removed,
             headers_sha256, payload_sha256, whole_bytes, whole_sha256, deployment_id, event_id, event_type, exists (select from batch where batch.id = batch_id and kind = 'replay') as by_a_replay
         from reject where topic = $1 and partition = $2 and generation = $3 and log_offset >= $4 and log_offset < $5",
    )
    .bind(range.partition.topic.name())
    .bind(range.partition.partition)
    .bind(range.generation)
    .bind(range.from)
    .bind(range.until)
    .fetch_all(conn)
    .await
}

impl KeptEvent {
    /// The row as its batch's content contains it; none if it is not a valid event any more.
    #[must_use]
    pub fn part_row(&self) -> Option<PartRow> {
        let event = self.event.as_ref().ok()?;
        let digest = self.digest.as_slice().try_into().ok()?;
        Some(PartRow {
            place: place_of(self.log_offset),
            digest: event_digest(self.source_id, self.log_offset, digest, event),
        })
    }

    /// The event's id, from the row's key.
    #[must_use]
    pub fn id(&self, topic: Topic) -> String {
        match topic {
            Topic::WorkspaceBuilds => format!("workspace_build_completed:{}", self.key),
            Topic::PrebuildClaims => format!("prebuild_claimed:{}", self.key),
            Topic::AgentUsage => self.key.clone(),
        }
    }
}

impl KeptReject {
    /// Whether a value of the record is the kept one, or has the digest of the removed one.
    fn is(
        &self,
        value: Option<&[u8]>,
        kept: &Option<Vec<u8>>,
        removed_sha256: &Option<Vec<u8>>,
    ) -> bool {
        if self.is_removed {
            value.map(|value| Sha256::digest(value).to_vec()) == *removed_sha256
        } else {
            value == kept.as_deref()
        }
    }

    /// The names of the columns that differ from this record.
    #[must_use]
    pub fn differs_from(&self, arrival: &Arrival) -> Vec<&'static str> {
        let traces = RejectTraces::of(arrival);
        let message = &arrival.message;
        let same = [
            ("record_timestamp", self.record_timestamp == Some(arrival.timestamp)),
            ("record_key", self.record_key == message.key),
            (
                "headers",
                self.is(Some(&message.headers_json()), &self.headers, &self.headers_sha256),
            ),
            ("payload", self.is(message.payload.as_deref(), &self.payload, &self.payload_sha256)),
            (
                "whole_bytes",
                self.whole_bytes
                    == message.oversized.and_then(|whole| i64::try_from(whole.bytes).ok()),
            ),
            (
                "whole_sha256",
                self.whole_sha256.as_deref()
                    == message.oversized.as_ref().map(|whole| whole.sha256.as_slice()),
            ),
            ("deployment_id", self.deployment_id == traces.deployment),
            ("event_id", self.event_id == traces.event_id),
            ("event_type", self.event_type == traces.event_type),
        ];
        same.into_iter().filter(|(_, same)| !same).map(|(name, _)| name).collect()
    }
}

fn kept_event(topic: Topic, row: &PgRow) -> Result<KeptEvent, sqlx::Error> {
    let source_id: i16 = row.try_get("source_id")?;
    let deployment: Option<Uuid> = row.try_get("deployment_id")?;
    let event = match (deployment, payload_of(topic, row)) {
        (Some(deployment), Ok(payload)) => Ok(Event { deployment, payload }),
        (None, _) => Err(format!("it names source {source_id}, which does not exist")),
        (_, Err(error)) => Err(error.to_string()),
    };
    Ok(KeptEvent {
        source_id,
        key: row.try_get("key")?,
        event,
        digest: row.try_get("digest")?,
        log_offset: row.try_get("log_offset")?,
        batch_id: row.try_get("batch_id")?,
        batch: row.try_get::<Option<Json<KeptBatch>>, _>("batch")?.map(|Json(batch)| batch),
    })
}
