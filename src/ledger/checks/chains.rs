//! Chains of batches: each begins where the one before it ends, and the position is at the end.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use sqlx::{FromRow, PgConnection, Row};

use super::page::{gap, sequences, snapshot};
use super::query::{LISTED, check, known_of};
use crate::event::TopicPartition;
use crate::ledger::positions::last_record;
use crate::ledger::{AuditItem, Difference, LastRecord, OutsideBatch, chain};

/// Batches in one sum.
const SUMMED: i64 = 50_000;

/// The live batches of one generation of a partition: `TOPIC/PARTITION@GENERATION`.
pub type ChainName = String;

/// Sums over batches of a chain.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromRow, Serialize, Deserialize)]
pub struct ChainSums {
    pub records: i64,
    pub accepted: i64,
    pub duplicates: i64,
    pub conflicts: i64,
    pub rejects: i64,
    pub held: i64,
}

impl std::ops::AddAssign for ChainSums {
    fn add_assign(&mut self, more: ChainSums) {
        self.records += more.records;
        self.accepted += more.accepted;
        self.duplicates += more.duplicates;
        self.conflicts += more.conflicts;
        self.rejects += more.rejects;
        self.held += more.held;
    }
}

/// A position, and the newest batch of its chain.
#[derive(Clone, Debug)]
pub struct PositionBooks {
    pub partition: TopicPartition,
    pub generation: i32,
    /// The partition's position.
    pub next_offset: i64,
    /// Records read, according to the position.
    pub records: i64,
    /// Where the newest batch ends; without a batch, where reading began.
    pub chain_end: i64,
    /// The last record before the position.
    pub last: Option<LastRecord>,
}

impl PositionBooks {
    /// The name of the position's chain.
    #[must_use]
    pub fn chain(&self) -> ChainName {
        format!("{}@{}", self.partition, self.generation)
    }

    /// Compares the position with its chain, whose batches have `records` in all.
    #[must_use]
    pub fn difference(&self, records: i64) -> Option<Difference> {
        if self.next_offset == self.chain_end && self.records == records {
            return None;
        }
        Some(Difference {
            kind: "position_off_its_chain".into(),
            id: self.partition.to_string(),
            detail: format!(
                "position {} after {} records, batches end at {} after {records}",
                self.next_offset, self.records, self.chain_end
            ),
        })
    }
}

const BROKEN: &str = "select b.topic || '/' || b.partition || '@' || b.first_offset, 'the batch before it ends at ' || coalesce(before.next_offset::text, 'no batch')
     from batch b join (select topic, partition, generation, start_offset from position
                        union all select topic, partition, generation, start_offset from past_position) p
         using (topic, partition, generation)
     left join lateral (select next_offset from batch a where a.kind = 'log' and a.topic = b.topic and a.partition = b.partition
                            and a.generation = b.generation and a.sequence < b.sequence order by a.sequence desc limit 1) before on true
     where b.id = any($1) and b.kind = 'log' and b.first_offset <> coalesce(before.next_offset, p.start_offset) limit $2";

/// Batches that do not begin where the batch before them ends.
pub(super) async fn broken(
    tx: &mut PgConnection,
    ids: &[i64],
) -> Result<Vec<Difference>, sqlx::Error> {
    check(tx, "chain_broken", BROKEN, ids).await
}

pub(super) async fn sums(
    tx: &mut PgConnection,
    ids: &[i64],
) -> Result<BTreeMap<ChainName, ChainSums>, sqlx::Error> {
    let rows = sqlx::query(
        "select topic || '/' || partition || '@' || generation as chain, sum(records)::bigint as records, sum(accepted)::bigint as accepted,
             sum(duplicates)::bigint as duplicates, sum(conflicts)::bigint as conflicts, sum(rejects)::bigint as rejects, sum(held)::bigint as held
         from batch where id = any($1) and kind = 'log' group by topic, partition, generation",
    )
    .bind(ids)
    .fetch_all(tx)
    .await?;
    rows.iter().map(|row| Ok((row.try_get("chain")?, ChainSums::from_row(row)?))).collect()
}

const POSITIONS: &str = "select p.topic, p.partition, p.generation, p.next_offset, p.records, p.last_offset, p.last_record,
         coalesce((select next_offset from batch b where b.kind = 'log' and b.topic = p.topic and b.partition = p.partition
             and b.generation = p.generation and b.sequence is not null order by b.sequence desc limit 1), p.start_offset) as chain_end
     from position p where $1::text is null or p.topic || '/' || p.partition = $1 order by p.topic, p.partition";

/// All positions. It reads one batch of each.
pub async fn positions(tx: &mut PgConnection) -> Result<Vec<PositionBooks>, sqlx::Error> {
    let rows = sqlx::query(POSITIONS).bind(None::<&str>).fetch_all(tx).await?;
    rows.iter().map(position).collect()
}

fn position(row: &sqlx::postgres::PgRow) -> Result<PositionBooks, sqlx::Error> {
    Ok(PositionBooks {
        partition: TopicPartition::from_row(row)?,
        generation: row.try_get("generation")?,
        next_offset: row.try_get("next_offset")?,
        records: row.try_get("records")?,
        chain_end: row.try_get("chain_end")?,
        last: last_record(row)?,
    })
}

/// The position, the sums of its batches up to the sequence `audited`, and those of all. It reads the
/// whole chain, in statements of 50,000 batches. So it is called only for a position that differs.
pub async fn recount(
    conn: &mut PgConnection,
    partition: TopicPartition,
    audited: i64,
) -> Result<Option<(PositionBooks, ChainSums, ChainSums)>, sqlx::Error> {
    let mut tx = snapshot(conn).await?;
    let found = sqlx::query(POSITIONS).bind(partition.to_string()).fetch_optional(&mut *tx).await?;
    let Some(row) = found else { return Ok(None) };
    let books = position(&row)?;
    let up_to_audited = sum(&mut tx, &books, 0, audited).await?;
    let mut all = up_to_audited;
    all += sum(&mut tx, &books, audited, i64::MAX).await?;
    tx.commit().await?;
    Ok(Some((books, up_to_audited, all)))
}

/// Sums of the chain's batches after the sequence `from`, up to `until`.
async fn sum(
    tx: &mut PgConnection,
    of: &PositionBooks,
    mut from: i64,
    until: i64,
) -> Result<ChainSums, sqlx::Error> {
    let mut sums = ChainSums::default();
    loop {
        let row = sqlx::query(
            "select max(sequence) as last, coalesce(sum(records), 0)::bigint as records, coalesce(sum(accepted), 0)::bigint as accepted,
                 coalesce(sum(duplicates), 0)::bigint as duplicates, coalesce(sum(conflicts), 0)::bigint as conflicts,
                 coalesce(sum(rejects), 0)::bigint as rejects, coalesce(sum(held), 0)::bigint as held
             from (select * from batch where kind = 'log' and topic = $1 and partition = $2 and generation = $3
                       and sequence > $4 and sequence <= $5 order by sequence limit $6) as page",
        )
        .bind(of.partition.topic.name())
        .bind(of.partition.partition)
        .bind(of.generation)
        .bind(from)
        .bind(until)
        .bind(SUMMED)
        .fetch_one(&mut *tx)
        .await?;
        let Some(last) = row.try_get("last")? else { return Ok(sums) };
        from = last;
        sums += ChainSums::from_row(&row)?;
    }
}

/// Batches without a sequence, or with one before the first: no page has them. Those beyond the
/// last sequence are in the newest page.
pub(super) async fn outside(tx: &mut PgConnection) -> Result<Vec<Difference>, sqlx::Error> {
    let mut found = chain::outside(tx, LISTED).await?;
    found.retain(|batch| batch.sequence.is_none_or(|sequence| sequence < 1));
    Ok(found.iter().map(OutsideBatch::difference).collect())
}

/// What still differs of the known gaps and broken chains.
pub(super) async fn known(
    tx: &mut PgConnection,
    head: i64,
    known: &[AuditItem],
) -> Result<Vec<Difference>, sqlx::Error> {
    let mut found = Vec::new();
    for item in known.iter().filter(|item| item.kind == "sequence_broken") {
        let Some((first, last)) = sequences(&item.id) else { continue };
        let batches: i64 =
            sqlx::query_scalar("select count(*) from batch where sequence between $1 and $2")
                .bind(first)
                .bind(last)
                .fetch_one(&mut *tx)
                .await?;
        if batches != (last.min(head) - first + 1).max(0) {
            let still =
                Difference { id: item.id.clone(), detail: item.detail.clone(), ..gap(first, last) };
            found.push(still);
        }
    }
    let places = known_of(known, "chain_broken", |item| Some(item.id.as_str()));
    let ids: Vec<i64> = sqlx::query_scalar(
        "select batch.id from unnest($1::text[]) as place (name)
         cross join lateral (select regexp_match(name, '^(.*)/([0-9]{1,9})@([0-9]{1,18})$') as part) as parts
         join batch on kind in ('log', 'replay') and topic = part[1] and partition = part[2]::integer and first_offset = part[3]::bigint",
    )
    .bind(places)
    .fetch_all(&mut *tx)
    .await?;
    found.extend(broken(tx, &ids).await?);
    Ok(found)
}
