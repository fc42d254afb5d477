//! Pages of batches from which an audit recomputes the chain.

use std::collections::HashMap;

use sqlx::Connection as _;
use sqlx::{FromRow, PgConnection};

use super::kept::events_of;
use super::{BatchPart, Difference, KeptEvent};
use crate::event::Topic;

/// A batch with the digests that its chain needs.
#[derive(Clone, Debug, FromRow)]
pub struct ChainedBatch {
    pub id: i64,
    pub sequence: i64,
    /// None: it was removed by hand.
    pub chain: Option<Vec<u8>>,
    /// The digest of its columns and its stored parts.
    pub content: Vec<u8>,
    pub topic: Option<String>,
    pub partition: Option<i32>,
    pub first_offset: Option<i64>,
    /// The parts as recorded with the batch.
    #[sqlx(skip)]
    pub stored: HashMap<String, BatchPart>,
    /// The parts of the rows now, except of its events.
    #[sqlx(skip)]
    pub current: HashMap<String, BatchPart>,
    /// Its events now, in the part's order.
    #[sqlx(skip)]
    pub events: Vec<(Topic, KeptEvent)>,
}

/// A row of a part now.
#[derive(Clone, Debug, FromRow)]
pub struct NamedRow {
    pub name: String,
    pub place: Vec<u8>,
    pub digest: Vec<u8>,
}

/// A page ends once it has this many rows.
const PAGE_ROWS: i64 = 20_000;
/// Maximum number of batches in a page.
const PAGE_BATCHES: i64 = 500;

/// Number of statements of [`page`].
pub const STATEMENTS: u32 = 7;

/// The place of a batch in the walk: its sequence and its id. Batches with the same sequence, which
/// only a change by hand makes, have different places.
pub type BatchPlace = (i64, i64);

/// A batch that is outside the sequences of the chain.
#[derive(Clone, Debug, FromRow)]
pub struct OutsideBatch {
    pub id: i64,
    pub sequence: Option<i64>,
}

/// The batches after a place up to the sequence `until`, in order; empty at the end. Reads all rows of up to
/// 500 batches, by index: about 20,000 rows, or those of one batch.
pub async fn page(
    conn: &mut PgConnection,
    after: BatchPlace,
    until: i64,
) -> Result<Vec<ChainedBatch>, sqlx::Error> {
    let mut tx = conn.begin_with("begin isolation level repeatable read read only").await?;
    let mut batches: Vec<ChainedBatch> = sqlx::query_as(
        "select content.* from (
             select id, sum(rows) over (order by sequence, id) - rows as before
             from (select id, sequence, (select coalesce(sum(rows), 0) from batch_part where batch_id = batch.id) as rows
                   from batch where (sequence, id) > ($1, $5) and sequence <= $2 order by sequence, id limit $3) as next
         ) as counted join batch_content content using (id) where before < $4 order by sequence, id",
    )
    .bind(after.0)
    .bind(until)
    .bind(PAGE_BATCHES)
    .bind(PAGE_ROWS)
    .bind(after.1)
    .fetch_all(&mut *tx)
    .await?;
    let ids: Vec<i64> = batches.iter().map(|batch| batch.id).collect();
    let mut stored = parts(
        &mut tx,
        "select batch_id, part, rows, sha256 from batch_part where batch_id = any($1)",
        &ids,
    )
    .await?;
    let mut current = parts(
        &mut tx,
        r#"select batch_id, part, count(*)::integer as rows, sha256(string_agg(digest, '' order by name collate "C", digest)) as sha256
           from chained_row where batch_id = any($1) group by batch_id, part"#,
        &ids,
    )
    .await?;
    // of removed attempts, only the digest remains
    let removed: Vec<i64> = sqlx::query_scalar(
        "select batch_id from publication_request where batch_id = any($1) and attempts_removed_at is not null",
    )
    .bind(&ids)
    .fetch_all(&mut *tx)
    .await?;
    for id in removed {
        if let Some(attempts) = stored.get(&id).and_then(|parts| parts.get("attempts")) {
            let parts = current.entry(id).or_default();
            parts.entry("attempts".to_owned()).or_insert_with(|| attempts.clone());
        }
    }
    let mut events: HashMap<i64, Vec<(Topic, KeptEvent)>> = HashMap::new();
    for topic in Topic::ALL {
        for event in events_of(&mut tx, topic, &ids).await? {
            events.entry(event.batch_id).or_default().push((topic, event));
        }
    }
    tx.commit().await?;
    for batch in &mut batches {
        batch.stored = stored.remove(&batch.id).unwrap_or_default();
        batch.current = current.remove(&batch.id).unwrap_or_default();
        batch.events = events.remove(&batch.id).unwrap_or_default();
        batch.events.sort_by_key(|(_, event)| event.log_offset);
    }
    Ok(batches)
}

type Parts = HashMap<i64, HashMap<String, BatchPart>>;

async fn parts(
    tx: &mut PgConnection,
    query: &'static str,
    ids: &[i64],
) -> Result<Parts, sqlx::Error> {
    let mut parts = Parts::new();
    let rows: Vec<(i64, String, i32, Vec<u8>)> =
        sqlx::query_as(query).bind(ids).fetch_all(tx).await?;
    for (batch_id, part, rows, sha256) in rows {
        let found = BatchPart { rows, sha256, marks: Vec::new() };
        parts.entry(batch_id).or_default().insert(part, found);
    }
    Ok(parts)
}

/// The marks that were recorded with a part.
pub async fn marks(
    conn: &mut PgConnection,
    batch_id: i64,
    part: &str,
) -> Result<Option<BatchPart>, sqlx::Error> {
    sqlx::query_as("select rows, sha256, marks from batch_part where batch_id = $1 and part = $2")
        .bind(batch_id)
        .bind(part)
        .fetch_optional(conn)
        .await
}

/// The rows of a part other than the events, as they are now.
pub async fn rows(
    conn: &mut PgConnection,
    batch_id: i64,
    part: &str,
) -> Result<Vec<NamedRow>, sqlx::Error> {
    sqlx::query_as(
        r#"select name, place, digest from chained_row where batch_id = $1 and part = $2 order by name collate "C", digest"#,
    )
    .bind(batch_id)
    .bind(part)
    .fetch_all(conn)
    .await
}

/// Committed batches that the walk cannot reach: without a sequence, before the first one, or beyond
/// the ledger's last. Only a change by hand makes one. Reads only these, by index.
pub async fn outside(
    conn: &mut PgConnection,
    limit: i64,
) -> Result<Vec<OutsideBatch>, sqlx::Error> {
    sqlx::query_as(
        "(select id, sequence from batch where sequence is null limit $1)
         union all
         (select id, sequence from batch where sequence < 1 order by sequence limit $1)
         union all
         (select id, sequence from batch where sequence >= (select next_sequence from ledger) order by sequence limit $1)
         limit $1",
    )
    .bind(limit)
    .fetch_all(conn)
    .await
}

impl OutsideBatch {
    /// The batch as a difference.
    #[must_use]
    pub fn difference(&self) -> Difference {
        let detail = match self.sequence {
            None => "it has no sequence: it was added or changed by hand".to_owned(),
            Some(number) => format!(
                "its sequence {number} is outside the ledger's: it was added or changed by hand"
            ),
        };
        Difference {
            kind: "batch_outside_the_chain".into(),
            id: format!("batch {}", self.id),
            detail,
        }
    }
}
