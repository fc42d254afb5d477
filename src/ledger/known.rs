//! The ids of a source that the ledger already has.

use std::collections::{BTreeMap, HashMap, HashSet};

use chrono::{DateTime, Utc};
use sha2::{Digest as _, Sha256};
use sqlx::PgConnection;
use uuid::Uuid;

use super::RejectState;
use crate::event::{Digest, Message, unsigned_headers};

/// The state of an event id among the rejects.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RefusedState {
    /// `open` if any of the id's records is open; otherwise the state that the last act set:
    /// resubmitted, admitted or discarded.
    pub state: RejectState,
    /// Whether any of the id's records was appended to the log again.
    pub passed: bool,
}

/// Whether a reject is about the event of its id. A record in a foreign topic, or without a valid
/// signature, is not: the true event may still arrive.
macro_rules! of_the_event {
    () => {
        "cause not in ('foreign_topic', 'unsigned', 'bad_signature')"
    };
}

/// The builds among these that the ledger has, with their digests. As in all look-ups here, a
/// corrected event has its corrected content, and is left out if it was corrected to nothing.
pub async fn builds(
    conn: &mut PgConnection,
    source_id: i16,
    build_ids: &[Uuid],
) -> Result<HashMap<Uuid, Digest>, sqlx::Error> {
    let query = "select e.build_id, coalesce(c.digest, e.digest) from workspace_build e
         left join lateral newest_correction(e.source_id, 'workspace_build_completed:' || e.build_id) c on true
         where e.source_id = $1 and e.build_id = any($2) and (c.event_id is null or c.digest is not null)";
    let rows: Vec<(Uuid, Digest)> =
        sqlx::query_as(query).bind(source_id).bind(build_ids).fetch_all(conn).await?;
    Ok(rows.into_iter().collect())
}

/// The prebuild claims among these (by build) that the ledger has, with their digests.
pub async fn claims(
    conn: &mut PgConnection,
    source_id: i16,
    build_ids: &[Uuid],
) -> Result<HashMap<Uuid, Digest>, sqlx::Error> {
    let query = "select e.build_id, coalesce(c.digest, e.digest) from prebuild_claim e
         left join lateral newest_correction(e.source_id, 'prebuild_claimed:' || e.build_id) c on true
         where e.source_id = $1 and e.build_id = any($2) and (c.event_id is null or c.digest is not null)";
    let rows: Vec<(Uuid, Digest)> =
        sqlx::query_as(query).bind(source_id).bind(build_ids).fetch_all(conn).await?;
    Ok(rows.into_iter().collect())
}

/// The builds among these that the ledger has without a prebuild claim, although their stage or
/// number allows one.
pub async fn builds_without_claim(
    conn: &mut PgConnection,
    source_id: i16,
    build_ids: &[Uuid],
) -> Result<Vec<Uuid>, sqlx::Error> {
    sqlx::query_scalar(
        "select build_id from workspace_build build where source_id = $1 and build_id = any($2) and transition = 'start'
             and (stage = 'claim' or stage is null and build_number = 2 and first_build_by_prebuilds_user and first_build_stage is null)
             and not exists (select from prebuild_claim claim where claim.source_id = build.source_id and claim.build_id = build.build_id)",
    )
    .bind(source_id)
    .bind(build_ids)
    .fetch_all(conn)
    .await
}

/// The build that is kept as the workspace's first successful start. None: it has none, or it
/// started before the source's baseline.
pub async fn first_start(
    conn: &mut PgConnection,
    source_id: i16,
    workspace_id: Uuid,
) -> Result<Option<Uuid>, sqlx::Error> {
    let query =
        "select build_id from workspace_first_start where source_id = $1 and workspace_id = $2";
    let found: Option<Option<Uuid>> =
        sqlx::query_scalar(query).bind(source_id).bind(workspace_id).fetch_optional(conn).await?;
    Ok(found.flatten())
}

/// The accepted usage events among these, with their digests.
pub async fn usage(
    conn: &mut PgConnection,
    source_id: i16,
    ids: &[String],
) -> Result<HashMap<String, Digest>, sqlx::Error> {
    let query = "select e.id, coalesce(c.digest, e.digest) from usage_event e
         left join lateral newest_correction(e.source_id, e.id) c on true
         where e.source_id = $1 and e.id = any($2) and (c.event_id is null or c.digest is not null)";
    let rows: Vec<(String, Digest)> =
        sqlx::query_as(query).bind(source_id).bind(ids).fetch_all(conn).await?;
    Ok(rows.into_iter().collect())
}

/// The number of accepted usage events in `[from, until)` by UTC day since 1970 and by type. Days
/// without events are left out.
pub async fn usage_days(
    conn: &mut PgConnection,
    source_id: i16,
    from: DateTime<Utc>,
    until: DateTime<Utc>,
) -> Result<BTreeMap<(i64, String), i64>, sqlx::Error> {
    let rows: Vec<(i64, String, i64)> = sqlx::query_as(
        "select floor(extract(epoch from created_at) / 86400)::bigint as day, event_type, count(*) from usage_as_of(9223372036854775807)
         where source_id = $1 and created_at >= $2 and created_at < $3 group by 1, 2",
    )
    .bind(source_id)
    .bind(from)
    .bind(until)
    .fetch_all(conn)
    .await?;
    Ok(rows.into_iter().map(|(day, event_type, events)| ((day, event_type), events)).collect())
}

/// The event ids among these that were refused or are held, so that they are known but not
/// accepted. Rejects that are not about the event are left out.
pub async fn refused_ids(
    conn: &mut PgConnection,
    deployment_id: Uuid,
    ids: &[String],
) -> Result<HashSet<String>, sqlx::Error> {
    let rows: Vec<String> = sqlx::query_scalar(concat!(
        "select distinct event_id from reject where deployment_id = $1 and event_id = any($2) and ",
        of_the_event!()
    ))
    .bind(deployment_id)
    .bind(ids)
    .fetch_all(conn)
    .await?;
    Ok(rows.into_iter().collect())
}

/// The event ids of these messages that must not be sent again, because the ledger has them among
/// its rejects. An id whose records are all discarded is sent again if this message is not one of
/// them. Those records were foreign, or the row has changed. Signatures are not compared.
pub async fn refused_messages(
    conn: &mut PgConnection,
    deployment_id: Uuid,
    messages: &HashMap<String, Message>,
) -> Result<HashSet<String>, sqlx::Error> {
    let ids: Vec<&String> = messages.keys().collect();
    let rows: Vec<(String, bool, Vec<u8>, Vec<u8>)> = sqlx::query_as(concat!(
        "select event_id, state = 'discarded', coalesce(unsigned_headers_sha256, unsigned_headers(headers)),
             coalesce(whole_sha256, payload_sha256, sha256(coalesce(payload, ''))) from reject
         where deployment_id = $1 and event_id = any($2) and ",
        of_the_event!()
    ))
    .bind(deployment_id)
    .bind(ids)
    .fetch_all(conn)
    .await?;
    let same = |id: &String, headers: &[u8], hash: &[u8]| {
        messages.get(id).is_some_and(|message| {
            let body = Sha256::digest(message.payload.as_deref().unwrap_or_default());
            body[..] == *hash && unsigned_headers(message)[..] == *headers
        })
    };
    let refused = rows
        .into_iter()
        .filter(|(id, discarded, headers, hash)| !discarded || same(id, headers, hash));
    Ok(refused.map(|(id, ..)| id).collect())
}

/// The states of the event ids among these that were refused or are held. Rejects that are not
/// about the event are left out.
pub async fn refused_states(
    conn: &mut PgConnection,
    deployment_id: Uuid,
    ids: &[String],
) -> Result<HashMap<String, RefusedState>, sqlx::Error> {
    let rows: Vec<(String, RejectState, bool)> = sqlx::query_as(concat!(
        "select event_id, case when bool_or(state = 'open') then 'open' else (array_agg(state order by act_id desc))[1] end,
             bool_or(state in ('resubmitted', 'admitted'))
         from reject where deployment_id = $1 and event_id = any($2) and ",
        of_the_event!(),
        " group by event_id"
    ))
    .bind(deployment_id)
    .bind(ids)
    .fetch_all(conn)
    .await?;
    Ok(rows.into_iter().map(|(id, state, passed)| (id, RefusedState { state, passed })).collect())
}

pub(super) fn digest(bytes: Vec<u8>) -> Result<Digest, sqlx::Error> {
    bytes.try_into().map_err(|_| sqlx::Error::Decode("a digest is not 32 bytes".into()))
}
