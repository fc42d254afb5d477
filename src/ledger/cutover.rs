//! The signature cutover: the offset from which the records of each partition need a valid
//! signature.
//!
//! The first consumer with keys records it for all partitions at once. A later partition or
//! generation has no row: all of its records need a signature.

use chrono::{DateTime, Utc};
use sqlx::Connection as _;
use sqlx::FromRow;
use sqlx::PgConnection;
use sqlx::types::Json;

use super::leases::{ALL_COLLECTORS, revoke_leases};
use super::passes::void_passes;
use super::{ActKind, NewAct, PROGRAM, Subject, acts};
use crate::event::{Signatures, TopicPartition};

/// The reason why a process without a signing key appends nothing.
pub const NO_SIGNING_KEY: &str = "log.signing_key is not set, but records of this log need a signature: set it, or use a process that has it";

/// The ledger's results for records at certain places of the log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromRow)]
pub struct SignatureResults {
    /// Records that were read and have a valid signature.
    pub verified: i64,
    /// Records that were rejected for their signature, including those whose reject has ended.
    pub rejected: i64,
    /// Records that are not read yet.
    pub unread: i64,
}

/// When the cutover was recorded; none: no consumer has had keys.
pub async fn signed_since(conn: &mut PgConnection) -> Result<Option<DateTime<Utc>>, sqlx::Error> {
    sqlx::query_scalar("select min(recorded_at) from signature_cutover").fetch_one(conn).await
}

/// Whether this process lacks the signing key that its records need. Without it the consumer would
/// reject them.
pub async fn needs_signing_key(
    conn: &mut PgConnection,
    signatures: &Signatures,
) -> Result<bool, sqlx::Error> {
    Ok(!signatures.sign() && signed_since(conn).await?.is_some())
}

/// The signature results of the records at these places.
pub async fn signature_results(
    conn: &mut PgConnection,
    places: &[(TopicPartition, i64)],
) -> Result<SignatureResults, sqlx::Error> {
    sqlx::query_as(
        "select count(*) filter (where log_offset < next_offset and log_offset >= signed_from(topic, partition, generation) and not refused)
                 as verified,
             count(*) filter (where refused) as rejected,
             count(*) filter (where next_offset is null or log_offset >= next_offset) as unread
         from unnest($1::text[], $2::integer[], $3::bigint[]) as appended (topic, partition, log_offset)
         left join position using (topic, partition)
         left join reject using (topic, partition, generation, log_offset)
         cross join lateral (select coalesce(cause in ('unsigned', 'bad_signature'), false) as refused) as judged",
    )
    .bind(places.iter().map(|(at, _)| at.topic.name()).collect::<Vec<_>>())
    .bind(places.iter().map(|(at, _)| at.partition).collect::<Vec<_>>())
    .bind(places.iter().map(|(_, offset)| *offset).collect::<Vec<_>>())
    .fetch_one(conn)
    .await
}

/// The first offset of this generation whose record needs a signature; none: no consumer has had
/// keys.
pub async fn signed_from(
    conn: &mut PgConnection,
    partition: TopicPartition,
    generation: i32,
) -> Result<Option<i64>, sqlx::Error> {
    sqlx::query_scalar("select signed_from($1, $2, $3)")
        .bind(partition.topic.name())
        .bind(partition.partition)
        .bind(generation)
        .fetch_one(conn)
        .await
}

/// Records the cutover of each partition: its log end, or its position if that is higher. A
/// partition without a position needs signatures from offset 0. While a restored ledger catches up,
/// each cutover is the position. An earlier cutover may be lost, and valid events arrive signed.
/// Passes that rely on records beyond the cutover become void, and each collector must open again.
/// A ledger keeps its first cutover, and its act has the offsets.
pub async fn begin(
    conn: &mut PgConnection,
    ends: &[(TopicPartition, i64)],
    now: DateTime<Utc>,
) -> Result<(), sqlx::Error> {
    let mut tx = conn.begin().await?;
    revoke_leases(&mut tx, ALL_COLLECTORS).await?;
    // Batches in flight commit before this transaction or fail after it. Meanwhile consumers cannot
    // take partition leases.
    sqlx::query("lock table position in share row exclusive mode").execute(&mut *tx).await?;
    if sqlx::query("select from signature_cutover limit 1")
        .fetch_optional(&mut *tx)
        .await?
        .is_some()
    {
        return Ok(());
    }
    let offsets: Json<Vec<serde_json::Value>> = sqlx::query_scalar(
        "with begun as (insert into signature_cutover (topic, partition, generation, first_offset, recorded_at)
         select log.topic, log.partition, current_generation(log.topic, log.partition),
             case when exists (select from recovery where closed_at is null) then coalesce(next_offset, 0)
                 when next_offset is null then 0 else greatest(log_end, next_offset) end, $4
         from unnest($1::text[], $2::integer[], $3::bigint[]) as log (topic, partition, log_end)
         left join position using (topic, partition)
         returning topic, partition, generation, first_offset)
         select coalesce(jsonb_agg(begun order by topic, partition), '[]') from begun",
    )
    .bind(ends.iter().map(|(at, _)| at.topic.name()).collect::<Vec<_>>())
    .bind(ends.iter().map(|(at, _)| at.partition).collect::<Vec<_>>())
    .bind(ends.iter().map(|(_, end)| *end).collect::<Vec<_>>())
    .bind(now)
    .fetch_one(&mut *tx)
    .await?;
    if offsets.is_empty() {
        return Ok(());
    }
    let act = NewAct {
        actor: PROGRAM,
        act: ActKind::Sign,
        subject: Subject::Named("log"),
        reason: "a consumer has keys for the first time",
        detail: serde_json::json!({ "offsets": offsets }),
    };
    acts::insert(&mut tx, &act, now).await?;
    sqlx::query(void_passes!(
        "select source_id, pass_id from collector_pass_offset noted left join signature_cutover using (topic, partition)
         where noted.next_offset > coalesce(first_offset, 0)"
    ))
    .execute(&mut *tx)
    .await?;
    tx.commit().await
}
