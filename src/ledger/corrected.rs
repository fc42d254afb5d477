//! Corrected events, as folds, audits and explanations read them.

use std::collections::{HashMap, HashSet};

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use sqlx::{FromRow, PgConnection};
use utoipa::ToSchema;
use uuid::Uuid;

use super::Sequence;
use super::corrections::event_of;
use super::known::digest;
use crate::event::{Digest, Event, Fact};

/// A correction of one event.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, FromRow, ToSchema)]
pub struct CorrectionHistory {
    /// The ledger sequence of the correction. From it on the event has the corrected content.
    pub sequence: Option<Sequence>,
    /// When it was made.
    pub acted_at: DateTime<Utc>,
    /// The operator.
    pub actor: String,
    /// The reason.
    pub reason: String,
    /// SHA-256 of the refused content, in hexadecimal; absent if the event was corrected to nothing
    /// before. A record with this content changes nothing any more.
    pub refused_digest: Option<String>,
    /// The corrected event, a CloudEvent in structured form; absent: coderd does not have it.
    #[schema(value_type = Option<Object>)]
    pub corrected: Option<serde_json::Value>,
}

/// The sequence of the stage's newest rebuild up to `limit`; 0 if there is none.
pub async fn newest_rebuild(
    conn: &mut PgConnection,
    stage: &str,
    limit: i64,
) -> Result<i64, sqlx::Error> {
    sqlx::query_scalar(
        "select coalesce(max(sequence), 0) from operator_act join batch on batch.id = batch_id
         where act = 'rebuild' and subject = $1 and sequence <= $2",
    )
    .bind(stage)
    .bind(limit)
    .fetch_one(conn)
    .await
}

/// The events accepted by these batches that were corrected up to the sequence `at`, by source and
/// id, with their content at it; none: corrected to nothing. It reads the corrections of these
/// batches by index: normally none.
pub(super) async fn of_batches(
    tx: &mut PgConnection,
    batch_ids: &[i64],
    at: i64,
) -> Result<HashMap<(i16, String), Option<Event>>, sqlx::Error> {
    let rows: Vec<(i16, String, Option<serde_json::Value>)> = sqlx::query_as(
        "select distinct on (source_id, event_id) source_id, event_id, after_event from correction c join batch b on b.id = c.batch_id
         where accepted_batch_id = any($1) and b.sequence <= $2 order by source_id, event_id, b.sequence desc",
    )
    .bind(batch_ids)
    .bind(at)
    .fetch_all(tx)
    .await?;
    let content = |(source, id, event): (i16, String, Option<serde_json::Value>)| {
        Ok(((source, id), event.as_ref().map(event_of).transpose()?))
    };
    rows.into_iter().map(content).collect()
}

/// The corrections in these batches as facts, with their batch, in the order of the ids.
pub(super) async fn facts(
    tx: &mut PgConnection,
    batch_ids: &[i64],
) -> Result<Vec<(i64, Fact)>, sqlx::Error> {
    let rows: Vec<(i64, Uuid, Option<serde_json::Value>, Option<serde_json::Value>)> =
        sqlx::query_as(
            "select c.batch_id, s.deployment_id, before_event, after_event from correction c join source s on s.id = c.source_id
             where c.batch_id = any($1) order by c.batch_id, event_id",
        )
        .bind(batch_ids)
        .fetch_all(tx)
        .await?;
    let event = |column: Option<serde_json::Value>| {
        column.as_ref().map(event_of).transpose().map(|event| event.map(Box::new))
    };
    rows.into_iter()
        .map(|(batch_id, deployment, before, after)| {
            let (before, after) = (event(before)?, event(after)?);
            Ok((batch_id, Fact::Corrected { deployment, before, after }))
        })
        .collect()
}

/// The contents that the corrected events among these ids have or had, by deployment and id.
pub async fn contents(
    conn: &mut PgConnection,
    ids: &[String],
) -> Result<HashSet<(Uuid, String, Digest)>, sqlx::Error> {
    let rows: Vec<(Uuid, String, Vec<u8>)> = sqlx::query_as(
        "select s.deployment_id, c.event_id, content.digest
         from source s join correction c on c.source_id = s.id cross join lateral (values (c.before_digest), (c.digest)) as content (digest)
         where c.event_id = any($1) and content.digest is not null",
    )
    .bind(ids)
    .fetch_all(conn)
    .await?;
    let content = |(deployment, id, bytes)| Ok((deployment, id, digest(bytes)?));
    rows.into_iter().map(content).collect()
}

/// The corrections of an event, in order.
pub async fn history(
    conn: &mut PgConnection,
    source_id: i16,
    event_id: &str,
) -> Result<Vec<CorrectionHistory>, sqlx::Error> {
    sqlx::query_as(
        "select named_sequence(b.sequence) as sequence, a.acted_at, a.actor, a.reason, encode(c.before_digest, 'hex') as refused_digest,
             c.after_event as corrected
         from correction c join operator_act a on a.id = c.act_id left join batch b on b.id = c.batch_id
         where c.source_id = $1 and c.event_id = $2 order by c.batch_id",
    )
    .bind(source_id)
    .bind(event_id)
    .fetch_all(conn)
    .await
}

/// The event's content at the sequence `at`. None: it was not corrected up to it; `Some(None)`: it
/// was corrected to nothing.
pub async fn content_at(
    conn: &mut PgConnection,
    source_id: i16,
    event_id: &str,
    at: i64,
) -> Result<Option<Option<Event>>, sqlx::Error> {
    let found: Option<Option<serde_json::Value>> = sqlx::query_scalar(
        "select after_event from correction c join batch b on b.id = c.batch_id
         where source_id = $1 and event_id = $2 and b.sequence <= $3 order by b.sequence desc limit 1",
    )
    .bind(source_id)
    .bind(event_id)
    .bind(at)
    .fetch_optional(conn)
    .await?;
    found.map(|event| event.as_ref().map(event_of).transpose()).transpose()
}
