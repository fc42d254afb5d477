//! Reads and writes events as typed rows.

use std::collections::{HashMap, HashSet};

use chrono::{DateTime, Utc};
use sqlx::postgres::PgRow;
use sqlx::{PgConnection, Row};
use uuid::Uuid;

use crate::event::{Digest, Event, InputStage, Payload, PrebuildClaimed, PublishMarks, Usage, UsageQuantity, WorkspaceBuildCompleted};

/// An event to insert.
#[derive(Clone)]
pub(super) struct New<'a> {
    /// The index of its record in the batch.
    pub index: usize,
    pub source_id: i16,
    pub offset: i64,
    pub digest: Digest,
    pub event: &'a Event,
    /// Now, if a collector's valid signature came with the event.
    pub confirmed_at: Option<DateTime<Utc>>,
}

/// One column of the rows, as an array.
fn column<'a, T>(news: &[&'a New<'a>], value: impl Fn(&'a New<'a>) -> T) -> Vec<T> {
    news.iter().map(|new| value(new)).collect()
}

fn build<'a>(new: &'a New<'a>) -> &'a WorkspaceBuildCompleted {
    match &new.event.payload {
        Payload::Build(build) => build,
        _ => unreachable!("sorted by type"),
    }
}

fn claim<'a>(new: &'a New<'a>) -> &'a PrebuildClaimed {
    match &new.event.payload {
        Payload::Claim(claim) => claim,
        _ => unreachable!("sorted by type"),
    }
}

fn usage<'a>(new: &'a New<'a>) -> &'a Usage {
    match &new.event.payload {
        Payload::Usage(usage) => usage,
        _ => unreachable!("sorted by type"),
    }
}

/// Inserts builds and returns, by index, the digests of ids that already exist.
pub(super) async fn insert_builds(tx: &mut PgConnection, batch_id: i64, news: &[&New<'_>]) -> Result<HashMap<usize, Digest>, sqlx::Error> {
    if news.is_empty() {
        return Ok(HashMap::new());
    }
    let inserted = sqlx::query(
        "insert into workspace_build (batch_id, source_id, build_id, log_offset, digest, workspace_id, organization_id, template_id,
             template_version_id, preset_id, owner_id, initiator_id, transition, reason, status, build_number, stage,
             first_build_by_prebuilds_user, first_build_stage, first_successful_start, has_ai_task, has_external_agent, daily_cost,
             created_at, started_at, completed_at,
             organization_name, template_name, template_version_name, preset_name, workspace_name, owner_name, confirmed_at)
         select $1, * from unnest($2::smallint[], $3::uuid[], $4::bigint[], $5::bytea[], $6::uuid[], $7::uuid[], $8::uuid[],
             $9::uuid[], $10::uuid[], $11::uuid[], $12::uuid[], $13::text[], $14::text[], $15::text[], $16::integer[], $17::text[],
             $18::boolean[], $19::text[], $20::boolean[], $21::boolean[], $22::boolean[], $23::integer[],
             $24::timestamptz[], $25::timestamptz[], $26::timestamptz[],
             $27::text[], $28::text[], $29::text[], $30::text[], $31::text[], $32::text[],
             $33::timestamptz[])
         on conflict on constraint workspace_build_is_unique do nothing returning source_id, build_id",
    )
    .bind(batch_id)
    .bind(column(news, |new| new.source_id))
    .bind(column(news, |new| build(new).build_id))
    .bind(column(news, |new| new.offset))
    .bind(column(news, |new| new.digest.to_vec()))
    .bind(column(news, |new| build(new).workspace_id))
    .bind(column(news, |new| build(new).organization_id))
    .bind(column(news, |new| build(new).template_id))
    .bind(column(news, |new| build(new).template_version_id))
    .bind(column(news, |new| build(new).preset_id))
    .bind(column(news, |new| build(new).owner_id))
    .bind(column(news, |new| build(new).initiator_id))
    .bind(column(news, |new| build(new).transition.as_str()))
    .bind(column(news, |new| build(new).reason.as_str()))
    .bind(column(news, |new| build(new).status.as_str()))
    .bind(column(news, |new| build(new).build_number))
    .bind(column(news, |new| build(new).stage.map(InputStage::as_str)))
    .bind(column(news, |new| build(new).first_build_by_prebuilds_user))
    .bind(column(news, |new| build(new).first_build_stage.map(InputStage::as_str)))
    .bind(column(news, |new| build(new).first_successful_start))
    .bind(column(news, |new| build(new).has_ai_task))
    .bind(column(news, |new| build(new).has_external_agent))
    .bind(column(news, |new| build(new).daily_cost))
    .bind(column(news, |new| build(new).created_at))
    .bind(column(news, |new| build(new).started_at))
    .bind(column(news, |new| build(new).completed_at))
    .bind(column(news, |new| build(new).organization_name.as_str()))
    .bind(column(news, |new| build(new).template_name.as_str()))
    .bind(column(news, |new| build(new).template_version_name.as_str()))
    .bind(column(news, |new| build(new).preset_name.as_str()))
    .bind(column(news, |new| build(new).workspace_name.as_str()))
    .bind(column(news, |new| build(new).owner_name.as_str()))
    .bind(column(news, |new| new.confirmed_at))
    .fetch_all(&mut *tx)
    .await?;
    let inserted = keys::<Uuid>(&inserted)?;
    claim_first_starts(tx, news, &inserted).await?;
    if inserted.len() == news.len() {
        return Ok(HashMap::new());
    }
    all_known(known_builds(tx, news, &inserted).await?, news.len() - inserted.len())
}

/// The ledger's digests of builds other than `inserted`, by index.
pub(super) async fn known_builds(
    tx: &mut PgConnection,
    news: &[&New<'_>],
    inserted: &HashSet<(i16, Uuid)>,
) -> Result<HashMap<usize, Digest>, sqlx::Error> {
    let known = sqlx::query(
        "select source_id, build_id, digest from workspace_build
         where (source_id, build_id) in (select * from unnest($1::smallint[], $2::uuid[]))",
    );
    known_digests(tx, known, news, inserted, |new| build(new).build_id).await
}

/// Records the first build that a workspace names as its first successful start. Folds count only this build as a creation.
async fn claim_first_starts(tx: &mut PgConnection, news: &[&New<'_>], inserted: &HashSet<(i16, Uuid)>) -> Result<(), sqlx::Error> {
    let mut first: Vec<&New> = news
        .iter()
        .copied()
        .filter(|new| build(new).first_successful_start && inserted.contains(&(new.source_id, build(new).build_id)))
        .collect();
    if first.is_empty() {
        return Ok(());
    }
    first.sort_by_key(|new| (new.source_id, build(new).workspace_id, build(new).build_number));
    sqlx::query(
        "insert into workspace_first_start (source_id, workspace_id, build_id)
         select * from unnest($1::smallint[], $2::uuid[], $3::uuid[]) on conflict do nothing",
    )
    .bind(column(&first, |new| new.source_id))
    .bind(column(&first, |new| build(new).workspace_id))
    .bind(column(&first, |new| build(new).build_id))
    .execute(tx)
    .await?;
    Ok(())
}

/// Does the same as [`insert_builds`] for prebuild claims.
pub(super) async fn insert_claims(tx: &mut PgConnection, batch_id: i64, news: &[&New<'_>]) -> Result<HashMap<usize, Digest>, sqlx::Error> {
    if news.is_empty() {
        return Ok(HashMap::new());
    }
    let inserted = sqlx::query(
        "insert into prebuild_claim (batch_id, source_id, build_id, log_offset, digest, workspace_id, organization_id, template_id,
             template_version_id, preset_id, claimed_by, initiator_id, build_number, stage, status,
             created_at, started_at, completed_at, organization_name, template_name, preset_name, confirmed_at)
         select $1, * from unnest($2::smallint[], $3::uuid[], $4::bigint[], $5::bytea[], $6::uuid[], $7::uuid[], $8::uuid[],
             $9::uuid[], $10::uuid[], $11::uuid[], $12::uuid[], $13::integer[], $14::text[], $15::text[],
             $16::timestamptz[], $17::timestamptz[], $18::timestamptz[], $19::text[], $20::text[], $21::text[],
             $22::timestamptz[])
         on conflict on constraint prebuild_claim_is_unique do nothing returning source_id, build_id",
    )
    .bind(batch_id)
    .bind(column(news, |new| new.source_id))
    .bind(column(news, |new| claim(new).build_id))
    .bind(column(news, |new| new.offset))
    .bind(column(news, |new| new.digest.to_vec()))
    .bind(column(news, |new| claim(new).workspace_id))
    .bind(column(news, |new| claim(new).organization_id))
    .bind(column(news, |new| claim(new).template_id))
    .bind(column(news, |new| claim(new).template_version_id))
    .bind(column(news, |new| claim(new).preset_id))
    .bind(column(news, |new| claim(new).claimed_by))
    .bind(column(news, |new| claim(new).initiator_id))
    .bind(column(news, |new| claim(new).build_number))
    .bind(column(news, |new| claim(new).stage.map(InputStage::as_str)))
    .bind(column(news, |new| claim(new).status.as_str()))
    .bind(column(news, |new| claim(new).created_at))
    .bind(column(news, |new| claim(new).started_at))
    .bind(column(news, |new| claim(new).completed_at))
    .bind(column(news, |new| claim(new).organization_name.as_str()))
    .bind(column(news, |new| claim(new).template_name.as_str()))
    .bind(column(news, |new| claim(new).preset_name.as_str()))
    .bind(column(news, |new| new.confirmed_at))
    .fetch_all(&mut *tx)
    .await?;
    let inserted = keys::<Uuid>(&inserted)?;
    if inserted.len() == news.len() {
        return Ok(HashMap::new());
    }
    all_known(known_claims(tx, news, &inserted).await?, news.len() - inserted.len())
}

/// Does the same as [`known_builds`] for prebuild claims.
pub(super) async fn known_claims(
    tx: &mut PgConnection,
    news: &[&New<'_>],
    inserted: &HashSet<(i16, Uuid)>,
) -> Result<HashMap<usize, Digest>, sqlx::Error> {
    let known = sqlx::query(
        "select source_id, build_id, digest from prebuild_claim
         where (source_id, build_id) in (select * from unnest($1::smallint[], $2::uuid[]))",
    );
    known_digests(tx, known, news, inserted, |new| claim(new).build_id).await
}

/// Does the same as [`insert_builds`] for usage, and queues publications. They are due at once, even if this process's clock is ahead.
pub(super) async fn insert_usage(
    tx: &mut PgConnection,
    batch_id: i64,
    news: &[&New<'_>],
    now: DateTime<Utc>,
) -> Result<HashMap<usize, Digest>, sqlx::Error> {
    if news.is_empty() {
        return Ok(HashMap::new());
    }
    let inserted = sqlx::query(
        "with accepted as (
             insert into usage_event (batch_id, source_id, id, log_offset, digest, event_type, quantity, created_at,
                 publish_started_at, published_at, failure_message, confirmed_at)
             select $1, source_id, id, log_offset, digest, event_type, quantity::numeric, created_at, started, published, failure, confirmed
             from unnest($2::smallint[], $3::text[], $4::bigint[], $5::bytea[], $6::text[], $7::text[], $8::timestamptz[],
                 $9::timestamptz[], $10::timestamptz[], $11::text[], $13::timestamptz[])
                 as new (source_id, id, log_offset, digest, event_type, quantity, created_at, started, published, failure, confirmed)
             on conflict on constraint usage_event_is_unique do nothing returning source_id, id, created_at
         ), queued as (
             insert into publication (source_id, event_id, event_created_at, queued_batch_id, next_attempt_at)
             select source_id, id, created_at, $1, least(created_at, $12) from accepted
         )
         select source_id, id from accepted",
    )
    .bind(batch_id)
    .bind(column(news, |new| new.source_id))
    .bind(column(news, |new| usage(new).id.as_str()))
    .bind(column(news, |new| new.offset))
    .bind(column(news, |new| new.digest.to_vec()))
    .bind(column(news, |new| usage(new).quantity.usage_type().as_str()))
    .bind(column(news, |new| usage(new).quantity.number().to_string()))
    .bind(column(news, |new| usage(new).created_at))
    .bind(column(news, |new| usage(new).marks.publish_started_at))
    .bind(column(news, |new| usage(new).marks.published_at))
    .bind(column(news, |new| usage(new).marks.failure_message.as_deref()))
    .bind(now)
    .bind(column(news, |new| new.confirmed_at))
    .fetch_all(&mut *tx)
    .await?;
    let inserted = keys::<String>(&inserted)?;
    if inserted.len() == news.len() {
        return Ok(HashMap::new());
    }
    all_known(known_usage(tx, news, &inserted).await?, news.len() - inserted.len())
}

/// Does the same as [`known_builds`] for usage.
pub(super) async fn known_usage(
    tx: &mut PgConnection,
    news: &[&New<'_>],
    inserted: &HashSet<(i16, String)>,
) -> Result<HashMap<usize, Digest>, sqlx::Error> {
    let known = sqlx::query(
        "select source_id, id, digest from usage_event where (source_id, id) in (select * from unnest($1::smallint[], $2::text[]))",
    );
    known_digests(tx, known, news, inserted, |new| usage(new).id.clone()).await
}

/// Checks that each id that was not inserted exists and is committed: an insert waits for a concurrent insert's commit.
fn all_known(known: HashMap<usize, Digest>, expected: usize) -> Result<HashMap<usize, Digest>, sqlx::Error> {
    if known.len() == expected { Ok(known) } else { Err(sqlx::Error::Protocol("an id that could not be inserted is not there".into())) }
}

fn keys<'r, K>(rows: &'r [PgRow]) -> Result<HashSet<(i16, K)>, sqlx::Error>
where
    K: std::hash::Hash + Eq + sqlx::Decode<'r, sqlx::Postgres> + sqlx::Type<sqlx::Postgres>,
{
    rows.iter().map(|row| Ok((row.try_get(0)?, row.try_get(1)?))).collect()
}

/// The digests of the existing ids that were not inserted, by index.
async fn known_digests<'q, K>(
    tx: &mut PgConnection,
    query: sqlx::query::Query<'q, sqlx::Postgres, sqlx::postgres::PgArguments>,
    news: &[&New<'_>],
    inserted: &HashSet<(i16, K)>,
    key: impl Fn(&New<'_>) -> K,
) -> Result<HashMap<usize, Digest>, sqlx::Error>
where
    K: std::hash::Hash + Eq + Clone + Send + sqlx::postgres::PgHasArrayType,
    K: for<'r> sqlx::Decode<'r, sqlx::Postgres> + for<'e> sqlx::Encode<'e, sqlx::Postgres> + sqlx::Type<sqlx::Postgres> + 'q,
{
    let there: HashMap<(i16, K), usize> =
        news.iter().map(|new| ((new.source_id, key(new)), new.index)).filter(|(key, _)| !inserted.contains(key)).collect();
    let (sources, ids): (Vec<i16>, Vec<K>) = there.keys().cloned().unzip();
    let rows = query.bind(sources).bind(ids).fetch_all(tx).await?;
    let mut digests = HashMap::with_capacity(rows.len());
    for row in &rows {
        let digest: Vec<u8> = row.try_get(2)?;
        let digest = Digest::try_from(digest).map_err(|_| sqlx::Error::Protocol("a digest has 32 bytes".into()))?;
        if let Some(index) = there.get(&(row.try_get(0)?, row.try_get(1)?)) {
            digests.insert(*index, digest);
        }
    }
    Ok(digests)
}

/// Reads a row of `usage_event`. The query must select the quantity as `quantity::text`.
pub(super) fn usage_of(row: &PgRow) -> Result<Usage, sqlx::Error> {
    let usage_type = row.try_get("event_type")?;
    let number: u64 = row.try_get::<&str, _>("quantity")?.parse().map_err(|_| sqlx::Error::Protocol("quantity out of range".into()))?;
    Ok(Usage {
        id: row.try_get("id")?,
        quantity: UsageQuantity::new(usage_type, number).map_err(|error| sqlx::Error::Protocol(error.to_string()))?,
        created_at: row.try_get("created_at")?,
        marks: PublishMarks {
            publish_started_at: row.try_get("publish_started_at")?,
            published_at: row.try_get("published_at")?,
            failure_message: row.try_get("failure_message")?,
        },
    })
}
