//! Confirmed events: a collector's valid signature came with the event, or the audit found it equal
//! in coderd. A corrected event is confirmed: its content is coderd's. One that was corrected to
//! nothing is left out.

use std::collections::{HashMap, HashSet};

use chrono::{DateTime, Utc};
use sqlx::PgConnection;
use uuid::Uuid;

use super::rows;
use crate::event::{Payload, Topic};

/// Confirms accepted events that have a signed duplicate.
pub(super) async fn confirm(
    tx: &mut PgConnection,
    duplicates: &[&rows::NewRow<'_>],
    now: DateTime<Utc>,
) -> Result<(), sqlx::Error> {
    for topic in Topic::ALL {
        let signed = duplicates
            .iter()
            .filter(|new| new.confirmed_at.is_some() && new.event.topic() == topic);
        let (sources, keys): (Vec<i16>, Vec<String>) =
            signed.map(|new| (new.source_id, row_key(&new.event.payload))).unzip();
        if !keys.is_empty() {
            confirm_rows(tx, topic, &sources, &keys, now).await?;
        }
    }
    Ok(())
}

/// The key of an event's row. A build or claim has the build's id.
fn row_key(payload: &Payload) -> String {
    match payload {
        Payload::Build(build) => build.build_id.to_string(),
        Payload::Claim(claim) => claim.build_id.to_string(),
        Payload::Usage(usage) => usage.id.clone(),
    }
}

async fn confirm_rows(
    tx: &mut PgConnection,
    topic: Topic,
    sources: &[i16],
    keys: &[String],
    now: DateTime<Utc>,
) -> Result<(), sqlx::Error> {
    let query = match topic {
        Topic::WorkspaceBuilds => {
            "update workspace_build set confirmed_at = $3
             where (source_id, build_id) in (select * from unnest($1::smallint[], $2::text[]::uuid[])) and confirmed_at is null"
        }
        Topic::PrebuildClaims => {
            "update prebuild_claim set confirmed_at = $3
             where (source_id, build_id) in (select * from unnest($1::smallint[], $2::text[]::uuid[])) and confirmed_at is null"
        }
        Topic::AgentUsage => {
            "update usage_event set confirmed_at = $3
             where (source_id, id) in (select * from unnest($1::smallint[], $2::text[])) and confirmed_at is null"
        }
    };
    sqlx::query(query).bind(sources).bind(keys).bind(now).execute(tx).await.map(drop)
}

/// Confirms events of a topic that are equal in coderd, by the keys of their rows.
pub async fn record(
    conn: &mut PgConnection,
    topic: Topic,
    source_id: i16,
    keys: &[String],
    now: DateTime<Utc>,
) -> Result<(), sqlx::Error> {
    confirm_rows(conn, topic, &vec![source_id; keys.len()], keys, now).await
}

/// Whether each build and its prebuild claim are confirmed, in that order; none for an event that
/// is missing.
pub async fn builds(
    conn: &mut PgConnection,
    source_id: i16,
    ids: &[Uuid],
) -> Result<HashMap<Uuid, [Option<bool>; 2]>, sqlx::Error> {
    let rows: Vec<(Uuid, bool, bool)> = sqlx::query_as(
        "select e.build_id, false, confirmed_at is not null or c.event_id is not null from workspace_build e
             left join lateral newest_correction(e.source_id, 'workspace_build_completed:' || e.build_id) c on true
         where e.source_id = $1 and e.build_id = any($2) and (c.event_id is null or c.digest is not null)
         union all
         select e.build_id, true, confirmed_at is not null or c.event_id is not null from prebuild_claim e
             left join lateral newest_correction(e.source_id, 'prebuild_claimed:' || e.build_id) c on true
         where e.source_id = $1 and e.build_id = any($2) and (c.event_id is null or c.digest is not null)",
    )
    .bind(source_id)
    .bind(ids)
    .fetch_all(&mut *conn)
    .await?;
    let mut confirmed: HashMap<Uuid, [Option<bool>; 2]> = HashMap::new();
    for (id, is_claim, is_confirmed) in rows {
        confirmed.entry(id).or_default()[usize::from(is_claim)] = Some(is_confirmed);
    }
    Ok(confirmed)
}

/// The confirmed events among these usage events.
pub async fn usage(
    conn: &mut PgConnection,
    source_id: i16,
    ids: &[String],
) -> Result<HashSet<String>, sqlx::Error> {
    let query = "select e.id from usage_event e left join lateral newest_correction(e.source_id, e.id) c on true
         where e.source_id = $1 and e.id = any($2)
             and (confirmed_at is not null and c.event_id is null or c.digest is not null)";
    let rows: Vec<String> =
        sqlx::query_scalar(query).bind(source_id).bind(ids).fetch_all(conn).await?;
    Ok(rows.into_iter().collect())
}
