//! Slices of a source's accepted events, for the audit of source and ledger. The digest of many
//! rows is SHA-256 over their digests in order of their bytes, as coderd's database computes it.
//!
//! Rows that coderd no longer has are marked as gone and are in no slice. A corrected event is there
//! with its corrected content, or in no slice if it was corrected to nothing.

use chrono::{DateTime, Utc};
use sha2::{Digest as _, Sha256};
use sqlx::{FromRow, PgConnection};
use uuid::Uuid;

use crate::event::{Digest, Topic};

/// A range of time: from an instant, until before another.
pub type Range = (DateTime<Utc>, DateTime<Utc>);

/// The builds and claims of a slice of time.
#[derive(Clone, Debug, PartialEq, Eq, FromRow)]
pub struct EventSlice {
    pub builds: i64,
    pub builds_digest: Vec<u8>,
    pub claims: i64,
    pub claims_digest: Vec<u8>,
    /// Builds and claims that are not confirmed, by build.
    pub unconfirmed_builds: Vec<Uuid>,
    pub unconfirmed_claims: Vec<Uuid>,
}

/// A usage event by its place in time.
#[derive(Clone, Debug, PartialEq, Eq, FromRow)]
pub struct UsagePlace {
    pub created_at: DateTime<Utc>,
    pub id: String,
    pub digest: Digest,
    pub is_confirmed: bool,
}

/// Where a slice from the start of the range ends, so that it has about `rows` builds. Builds of
/// one instant are never divided. None: the whole range is one slice. Reads up to `rows` entries of
/// an index.
pub async fn end(
    conn: &mut PgConnection,
    source_id: i16,
    (from, until): Range,
    rows: i64,
) -> Result<Option<DateTime<Utc>>, sqlx::Error> {
    let query = "select completed_at from workspace_build where source_id = $1 and completed_at >= $2 and completed_at < $3
         order by completed_at offset $4 limit 1";
    let end: Option<DateTime<Utc>> = sqlx::query_scalar(query)
        .bind(source_id)
        .bind(from)
        .bind(until)
        .bind(rows)
        .fetch_optional(&mut *conn)
        .await?;
    if end != Some(from) {
        return Ok(end);
    }
    let query = "select min(completed_at) from workspace_build where source_id = $1 and completed_at > $2 and completed_at < $3";
    sqlx::query_scalar(query).bind(source_id).bind(from).bind(until).fetch_one(conn).await
}

/// The digests of the builds and claims of the range, without these builds.
pub async fn events(
    conn: &mut PgConnection,
    source_id: i16,
    (from, until): Range,
    except: &[Uuid],
) -> Result<EventSlice, sqlx::Error> {
    let query = "with build as (
             select build_id, digest, confirmed_at is not null as is_confirmed from workspace_build e
             where source_id = $1 and gone_at is null and build_id <> all($4) and completed_at >= $2 and completed_at < $3
                 and not exists (select from correction c where c.source_id = e.source_id and c.event_id = 'workspace_build_completed:' || e.build_id)
             union all
             select e.build_id, c.digest, true from corrected_event c join workspace_build e on e.source_id = c.source_id and e.build_id = c.build_id
             where c.source_id = $1 and c.topic = 'tallyline.workspace-builds.v1' and e.gone_at is null and e.build_id <> all($4)
                 and c.event_time >= $2 and c.event_time < $3
         ), claim as (
             select build_id, digest, confirmed_at is not null as is_confirmed from prebuild_claim e
             where source_id = $1 and gone_at is null and build_id <> all($4) and completed_at >= $2 and completed_at < $3
                 and not exists (select from correction c where c.source_id = e.source_id and c.event_id = 'prebuild_claimed:' || e.build_id)
             union all
             select e.build_id, c.digest, true from corrected_event c join prebuild_claim e on e.source_id = c.source_id and e.build_id = c.build_id
             where c.source_id = $1 and c.topic = 'tallyline.prebuild-claims.v1' and e.gone_at is null and e.build_id <> all($4)
                 and c.event_time >= $2 and c.event_time < $3
         )
         select builds, builds_digest, unconfirmed_builds, claims, claims_digest, unconfirmed_claims from
             (select count(*) as builds, sha256(coalesce(string_agg(digest, ''::bytea order by digest), ''::bytea)) as builds_digest,
                  coalesce(array_agg(build_id) filter (where not is_confirmed), '{}') as unconfirmed_builds from build) as builds,
             (select count(*) as claims, sha256(coalesce(string_agg(digest, ''::bytea order by digest), ''::bytea)) as claims_digest,
                  coalesce(array_agg(build_id) filter (where not is_confirmed), '{}') as unconfirmed_claims from claim) as claims";
    sqlx::query_as(query).bind(source_id).bind(from).bind(until).bind(except).fetch_one(conn).await
}

/// A page of the builds and claims of the range after `after`, by completion and build.
pub async fn build_ids(
    conn: &mut PgConnection,
    source_id: i16,
    (from, until): Range,
    after: Option<(DateTime<Utc>, Uuid)>,
    limit: i64,
) -> Result<Vec<(DateTime<Utc>, Uuid)>, sqlx::Error> {
    let query = "select completed_at, build_id from (
             (select completed_at, build_id from workspace_build where source_id = $1 and gone_at is null
                  and completed_at >= $2 and completed_at < $3 and (completed_at, build_id) > ($2, $4)
              order by completed_at, build_id limit $5)
             union
             (select completed_at, build_id from prebuild_claim where source_id = $1 and gone_at is null
                  and completed_at >= $2 and completed_at < $3 and (completed_at, build_id) > ($2, $4)
              order by completed_at, build_id limit $5)
             union
             (select event_time, build_id from corrected_event where source_id = $1
                  and topic in ('tallyline.workspace-builds.v1', 'tallyline.prebuild-claims.v1')
                  and event_time >= $2 and event_time < $3 and (event_time, build_id) > ($2, $4)
              order by event_time, build_id limit $5)
         ) as events order by completed_at, build_id limit $5";
    // no build has the nil id
    let (from, after) = after.unwrap_or((from, Uuid::nil()));
    sqlx::query_as(query)
        .bind(source_id)
        .bind(from)
        .bind(until)
        .bind(after)
        .bind(limit)
        .fetch_all(conn)
        .await
}

/// A page of the usage of the range, by time and id. At the range's first instant, only ids after
/// `after`.
pub async fn usage(
    conn: &mut PgConnection,
    source_id: i16,
    (from, until): Range,
    after: &str,
    limit: i64,
) -> Result<Vec<UsagePlace>, sqlx::Error> {
    let query = "select * from (
             (select created_at, id, digest, confirmed_at is not null as is_confirmed from usage_event e
              where source_id = $1 and gone_at is null and created_at >= $2 and created_at < $3 and (created_at, id) > ($2, $4)
                  and not exists (select from correction c where c.source_id = e.source_id and c.event_id = e.id)
              order by created_at, id limit $5)
             union all
             (select event_time, event_id, digest, true from corrected_event c
              where source_id = $1 and topic = 'tallyline.agent-usage.v1' and event_time >= $2 and event_time < $3 and (event_time, event_id) > ($2, $4)
                  and not exists (select from usage_event e where e.source_id = c.source_id and e.id = c.event_id and e.gone_at is not null)
              order by event_time, event_id limit $5)
         ) as events order by created_at, id limit $5";
    sqlx::query_as(query)
        .bind(source_id)
        .bind(from)
        .bind(until)
        .bind(after)
        .bind(limit)
        .fetch_all(conn)
        .await
}

/// Events of a page of batches that neither a signature nor coderd has confirmed.
#[derive(Clone, Debug, PartialEq, Eq, FromRow)]
pub struct Unconfirmed {
    /// The last sequence of the page; none: no batch follows.
    pub sequence: Option<i64>,
    /// Builds with an unconfirmed event.
    pub builds: Vec<Uuid>,
    pub usage: Vec<String>,
}

/// The source's unconfirmed events in the batches after `sequence`: a page ends after 200 batches or
/// 5,000 events, or one larger batch.
pub async fn unconfirmed(
    conn: &mut PgConnection,
    source_id: i16,
    sequence: i64,
) -> Result<Unconfirmed, sqlx::Error> {
    let query = "with page as materialized (
             select id, sequence from (
                 select id, sequence, sum(accepted) over (order by sequence) - accepted as before
                 from (select id, sequence, accepted from batch where sequence > $2 order by sequence limit 200) as next
             ) as counted where before < 5000
         ), ids as materialized (select array(select id from page) as ids)
         select (select max(sequence) from page) as sequence,
             array(select build_id from ids, workspace_build where batch_id = any(ids) and source_id = $1 and confirmed_at is null
                 union select build_id from ids, prebuild_claim where batch_id = any(ids) and source_id = $1 and confirmed_at is null) as builds,
             array(select id from ids, usage_event where batch_id = any(ids) and source_id = $1 and confirmed_at is null) as usage";
    sqlx::query_as(query).bind(source_id).bind(sequence).fetch_one(conn).await
}

/// The ids of this list that the ledger does not have as usage, or has as gone or as corrected to
/// nothing.
pub async fn unknown_usage(
    conn: &mut PgConnection,
    source_id: i16,
    ids: &[String],
) -> Result<Vec<String>, sqlx::Error> {
    let query = "select id from unnest($2::text[]) as asked (id)
         where not exists (select from usage_event e where e.source_id = $1 and e.id = asked.id and e.gone_at is null)
             or exists (select from newest_correction($1, asked.id) c where c.digest is null)";
    sqlx::query_scalar(query).bind(source_id).bind(ids).fetch_all(conn).await
}

/// The digest of rows with these digests.
#[must_use]
pub fn digest_of(mut digests: Vec<Digest>) -> Vec<u8> {
    digests.sort_unstable();
    Sha256::digest(digests.concat()).to_vec()
}

/// Whether a row of coderd has gone or has come back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Presence {
    Gone,
    Back,
}

/// Marks accepted events by the keys of their rows, and counts the source's gone events.
pub async fn mark(
    conn: &mut PgConnection,
    topic: Topic,
    source_id: i16,
    keys: &[String],
    presence: Presence,
    now: DateTime<Utc>,
) -> Result<(), sqlx::Error> {
    if keys.is_empty() {
        return Ok(());
    }
    macro_rules! marking {
        ($table:literal, $key:literal) => {
            concat!(
                "with marked as (
                     update ",
                $table,
                " set gone_at = case when $3 then $4::timestamptz end
                     where source_id = $1 and ",
                $key,
                " and (gone_at is null) = $3 returning 1
                 )
                 update source set gone_events = gone_events + (case when $3 then 1 else -1 end) * (select count(*) from marked)
                 where id = $1 and exists (select from marked)"
            )
        };
    }
    let query = match topic {
        Topic::WorkspaceBuilds => marking!("workspace_build", "build_id = any($2::text[]::uuid[])"),
        Topic::PrebuildClaims => marking!("prebuild_claim", "build_id = any($2::text[]::uuid[])"),
        Topic::AgentUsage => marking!("usage_event", "id = any($2::text[])"),
    };
    sqlx::query(query)
        .bind(source_id)
        .bind(keys)
        .bind(presence == Presence::Gone)
        .bind(now)
        .execute(conn)
        .await
        .map(drop)
}

/// The number of the source's events that coderd no longer has.
pub async fn gone(conn: &mut PgConnection, source_id: i16) -> Result<i64, sqlx::Error> {
    let query = "select gone_events from source where id = $1";
    sqlx::query_scalar(query).bind(source_id).fetch_one(conn).await
}

/// At most `limit` ids of events that coderd no longer has, and whether they are usage.
pub async fn gone_ids(
    conn: &mut PgConnection,
    source_id: i16,
    limit: i64,
) -> Result<Vec<(String, bool)>, sqlx::Error> {
    let query = "(select 'workspace_build_completed:' || build_id, false from workspace_build where source_id = $1 and gone_at is not null order by build_id limit $2)
         union all
         (select 'prebuild_claimed:' || build_id, false from prebuild_claim where source_id = $1 and gone_at is not null order by build_id limit $2)
         union all
         (select id, true from usage_event where source_id = $1 and gone_at is not null order by id limit $2)
         limit $2";
    sqlx::query_as(query).bind(source_id).bind(limit).fetch_all(conn).await
}
