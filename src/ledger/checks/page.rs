//! Pages of batches, and sequences without a batch.

use sqlx::{Connection as _, PgConnection, Postgres, Transaction};

use crate::ledger::Difference;

/// The most batches of a page.
pub const PAGE_BATCHES: i64 = 200;
/// The most rows of a page: batches, events and rejects.
pub const PAGE_ROWS: i64 = 50_000;

/// The end of a page: later pages begin there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct BatchCursor {
    /// The last sequence of the page.
    pub sequence: i64,
    /// The largest batch id up to there. Ids are taken before sequences.
    pub batch_id: i64,
}

/// A page of batches in sequence order.
#[derive(Clone, Debug)]
pub struct BatchPage {
    pub(super) from: BatchCursor,
    pub until: BatchCursor,
    /// Whether the page ends at the last batch.
    pub is_last: bool,
    /// The largest batch id that belongs to the page.
    pub(super) last_id: i64,
    pub(super) ids: Vec<i64>,
    pub(super) gaps: Vec<Difference>,
}

/// A snapshot in which each statement uses an index: with old statistics the planner could read a
/// whole table for one page.
pub(in crate::ledger) async fn snapshot(
    conn: &mut PgConnection,
) -> Result<Transaction<'_, Postgres>, sqlx::Error> {
    let mut tx = conn.begin_with("begin isolation level repeatable read read only").await?;
    sqlx::query("set local enable_seqscan = off").execute(&mut *tx).await?;
    Ok(tx)
}

/// The page after `from`, up to the ledger's last sequence. No batch may be beyond.
pub(super) async fn newest(
    tx: &mut PgConnection,
    from: BatchCursor,
    head: i64,
) -> Result<BatchPage, sqlx::Error> {
    page(tx, from, BatchCursor { sequence: head, batch_id: i64::MAX }, i64::MAX).await
}

/// The page after `from`, up to `until`.
pub(super) async fn older(
    tx: &mut PgConnection,
    from: BatchCursor,
    until: BatchCursor,
) -> Result<BatchPage, sqlx::Error> {
    page(tx, from, until, until.sequence).await
}

/// The batches after `from`, up to the sequence `limit`. Those beyond `end` are differences.
async fn page(
    tx: &mut PgConnection,
    from: BatchCursor,
    end: BatchCursor,
    limit: i64,
) -> Result<BatchPage, sqlx::Error> {
    let target = end.sequence;
    let batches: Vec<(i64, i64, i64)> = sqlx::query_as(
        "select id, sequence, 1::bigint + accepted + rejects + conflicts + held + settled as rows
         from batch where sequence > $1 and sequence <= $2 order by sequence limit $3",
    )
    .bind(from.sequence)
    .bind(limit)
    .bind(PAGE_BATCHES)
    .fetch_all(tx)
    .await?;
    let mut rows = 0;
    let fit = batches.iter().take_while(|(_, _, more)| {
        let is_first = rows == 0;
        rows += more;
        is_first || rows <= PAGE_ROWS
    });
    let taken: Vec<(i64, i64)> = fit.map(|(id, sequence, _)| (*id, *sequence)).collect();
    let is_last = taken.len() == batches.len() && batches.len() < PAGE_BATCHES as usize;
    let last = taken.last().map_or(from.sequence, |(_, sequence)| *sequence);
    let gaps = gaps(from.sequence, target, is_last, &taken);
    // a batch beyond the end is a difference, and belongs to no page
    let inside = taken.iter().filter(|(_, sequence)| *sequence <= target);
    let ids: Vec<i64> = inside.map(|(id, _)| *id).collect();
    let sequence = if is_last { target } else { last.min(target) };
    let until = BatchCursor {
        sequence: sequence.max(from.sequence),
        batch_id: ids.iter().copied().fold(from.batch_id, i64::max),
    };
    let is_last = is_last || last >= target;
    let last_id = if is_last { end.batch_id } else { until.batch_id };
    Ok(BatchPage { from, until, is_last, last_id, ids, gaps })
}

/// Sequences without a batch, and batches beyond the last sequence.
fn gaps(from: i64, target: i64, is_last: bool, taken: &[(i64, i64)]) -> Vec<Difference> {
    let (mut gaps, mut before) = (Vec::new(), from);
    if target < from {
        let detail = format!("batches had them, the last sequence is {target}");
        gaps.push(broken_sequence(target + 1, from, detail));
    }
    for (id, sequence) in taken {
        if *sequence > target {
            let detail = format!("batch {id} has it, the last sequence is {target}");
            gaps.push(broken_sequence(*sequence, *sequence, detail));
            continue;
        }
        if *sequence > before + 1 {
            gaps.push(gap(before + 1, *sequence - 1));
        }
        before = *sequence;
    }
    if is_last && before < target {
        gaps.push(gap(before + 1, target));
    }
    gaps
}

pub(super) fn gap(first: i64, last: i64) -> Difference {
    broken_sequence(first, last, "no batch has it".to_owned())
}

fn broken_sequence(first: i64, last: i64, detail: String) -> Difference {
    let id = if first == last {
        format!("sequence {first}")
    } else {
        format!("sequence {first} to {last}")
    };
    Difference { kind: "sequence_broken".into(), id, detail }
}

/// The first and the last sequence of an item's id.
pub(super) fn sequences(id: &str) -> Option<(i64, i64)> {
    let numbers = id.strip_prefix("sequence ")?;
    let (first, last) = numbers.split_once(" to ").unwrap_or((numbers, numbers));
    Some((first.parse().ok()?, last.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_missing_sequence_is_in_one_gap_and_can_be_read_back() {
        let found = |is_last, taken: &[(i64, i64)]| -> Vec<String> {
            gaps(10, 20, is_last, taken).into_iter().map(|gap| gap.id).collect()
        };
        assert_eq!(found(false, &[(1, 11), (2, 12)]), [""; 0]);
        assert_eq!(
            found(true, &[(1, 12), (2, 15)]),
            ["sequence 11", "sequence 13 to 14", "sequence 16 to 20"]
        );
        assert_eq!(found(true, &[]), ["sequence 11 to 20"]);
        assert_eq!(found(true, &[(1, 30)]), ["sequence 30", "sequence 11 to 20"]);
        assert_eq!(gaps(10, 8, true, &[])[0].id, "sequence 9 to 10");
        assert_eq!(sequences("sequence 13 to 14"), Some((13, 14)));
        assert_eq!(sequences("sequence 11"), Some((11, 11)));
        assert_eq!(sequences("batch 11"), None);
    }
}
