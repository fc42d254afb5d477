//! The audit's checks inside the ledger, of pages of batches. A page is read in one snapshot, by
//! indexes only, and has at most [`PAGE_BATCHES`] batches and [`PAGE_ROWS`] rows, or one larger
//! batch. So a statement costs the same at any size of the ledger.

mod chains;
mod events;
mod publications;

pub use chains::{ChainName, ChainSums, PositionBooks, positions, recount};
pub use publications::{KeyPage, PublicationKey};

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use sqlx::{Connection as _, PgConnection, Postgres, Transaction};

use super::{AuditItem, Difference, Sequence};

/// The most batches of a page.
pub const PAGE_BATCHES: i64 = 200;
/// The most rows of a page: batches, events and rejects.
pub const PAGE_ROWS: i64 = 50_000;
/// The most listed differences of each kind and page.
const LISTED: i64 = 1_000;

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
    from: BatchCursor,
    pub until: BatchCursor,
    /// Whether the page ends at the last batch.
    pub is_last: bool,
    ids: Vec<i64>,
    gaps: Vec<Difference>,
}

/// What the checks of one page found.
#[derive(Clone, Debug)]
pub struct CheckedPage {
    pub until: BatchCursor,
    pub is_last: bool,
    /// Sums of the page's batches, by chain; for the joint of log and ledger.
    pub chains: BTreeMap<ChainName, ChainSums>,
    /// Accepted usage of the page; for the joint of ledger and vendor.
    pub usage: i64,
    pub differences: Vec<Difference>,
}

/// The checks of one snapshot.
#[derive(Clone, Debug)]
pub struct Checked {
    /// The last sequence of the snapshot.
    pub sequence: Sequence,
    /// The page after the audited batches.
    pub new: CheckedPage,
    /// The pages of older batches, in the order of the request; none while the new page is not the
    /// last.
    pub slices: Vec<CheckedPage>,
    /// A page of publications, if requested and the new page is the last.
    pub keys: Option<KeyPage>,
    /// What still differs of the known items.
    pub known: Vec<Difference>,
    /// Each position with the end of its chain; for the joint of log and ledger.
    pub positions: Vec<PositionBooks>,
}

/// What to check in one snapshot.
#[derive(Clone, Debug, Default)]
pub struct CheckRequest<'a> {
    /// The audited batches.
    pub audited: BatchCursor,
    /// The ends of the earlier pages of older batches.
    pub slices: Vec<BatchCursor>,
    /// The end of the earlier page of publications.
    pub keys: Option<PublicationKey>,
    /// Items to judge again.
    pub known: &'a [AuditItem],
}

/// A snapshot in which each statement uses an index: with old statistics the planner could read a
/// whole table for one page.
async fn snapshot(conn: &mut PgConnection) -> Result<Transaction<'_, Postgres>, sqlx::Error> {
    let mut tx = conn.begin_with("begin isolation level repeatable read read only").await?;
    sqlx::query("set local enable_seqscan = off").execute(&mut *tx).await?;
    Ok(tx)
}

async fn head(tx: &mut PgConnection) -> Result<Sequence, sqlx::Error> {
    sqlx::query_scalar("select named_sequence(next_sequence - 1) from ledger").fetch_one(tx).await
}

/// Checks the chains of batches, and each batch with its events and rejects.
pub async fn log_joint(
    conn: &mut PgConnection,
    request: &CheckRequest<'_>,
) -> Result<Checked, sqlx::Error> {
    let mut tx = snapshot(conn).await?;
    let sequence = head(&mut tx).await?;
    let page = page(&mut tx, request.audited, sequence.number, true).await?;
    let new = log_page(&mut tx, &page).await?;
    let mut slices = Vec::new();
    if new.is_last {
        for slice in &request.slices {
            let page = self::page(&mut tx, *slice, new.until.sequence, false).await?;
            slices.push(log_page(&mut tx, &page).await?);
        }
    }
    let mut known = chains::known(&mut tx, sequence.number, request.known).await?;
    known.extend(events::known(&mut tx, request.known).await?);
    if new.is_last {
        known.extend(events::passed_beyond_an_end(&mut tx).await?);
    }
    let positions = chains::positions(&mut tx).await?;
    tx.commit().await?;
    Ok(Checked { sequence, new, slices, keys: None, known, positions })
}

/// Checks accepted usage with its publications, and their recorded answers.
pub async fn vendor_joint(
    conn: &mut PgConnection,
    request: &CheckRequest<'_>,
) -> Result<Checked, sqlx::Error> {
    let mut tx = snapshot(conn).await?;
    let sequence = head(&mut tx).await?;
    let page = page(&mut tx, request.audited, sequence.number, true).await?;
    let new = publications::page(&mut tx, &page).await?;
    let (mut slices, mut keys) = (Vec::new(), None);
    if new.is_last {
        for slice in &request.slices {
            let page = self::page(&mut tx, *slice, new.until.sequence, false).await?;
            slices.push(publications::page(&mut tx, &page).await?);
        }
        if let Some(after) = &request.keys {
            keys = Some(publications::key_page(&mut tx, after).await?);
        }
    }
    let known = publications::known(&mut tx, request.known).await?;
    tx.commit().await?;
    Ok(Checked { sequence, new, slices, keys, known, positions: Vec::new() })
}

/// Where the batches begin that were recorded at or after `since`.
pub async fn recorded_since(
    conn: &mut PgConnection,
    since: DateTime<Utc>,
) -> Result<BatchCursor, sqlx::Error> {
    let before: Option<(i64, i64)> = sqlx::query_as(
        "select sequence, id from batch where recorded_at < $1 order by recorded_at desc limit 1",
    )
    .bind(since)
    .fetch_optional(conn)
    .await?;
    let (sequence, batch_id) = before.unwrap_or_default();
    Ok(BatchCursor { sequence, batch_id })
}

async fn log_page(tx: &mut PgConnection, page: &BatchPage) -> Result<CheckedPage, sqlx::Error> {
    let mut differences = page.gaps.clone();
    differences.extend(chains::broken(tx, &page.ids).await?);
    differences.extend(events::of_batches(tx, page).await?);
    Ok(CheckedPage {
        until: page.until,
        is_last: page.is_last,
        chains: chains::sums(tx, &page.ids).await?,
        usage: 0,
        differences,
    })
}

/// The batches after `from`, up to the sequence `target`. With `to_the_end`, `target` is the
/// ledger's last sequence, and no batch may be beyond.
async fn page(
    tx: &mut PgConnection,
    from: BatchCursor,
    target: i64,
    to_the_end: bool,
) -> Result<BatchPage, sqlx::Error> {
    let limit = if to_the_end { i64::MAX } else { target };
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
    Ok(BatchPage { from, until, is_last: is_last || last >= target, ids, gaps })
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

fn gap(first: i64, last: i64) -> Difference {
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
fn sequences(id: &str) -> Option<(i64, i64)> {
    let numbers = id.strip_prefix("sequence ")?;
    let (first, last) = numbers.split_once(" to ").unwrap_or((numbers, numbers));
    Some((first.parse().ok()?, last.parse().ok()?))
}

/// Ids of the known items of a kind, as `of` reads them.
fn known_of<'a, T>(
    known: &'a [AuditItem],
    kind: &str,
    of: impl Fn(&'a AuditItem) -> Option<T>,
) -> Vec<T> {
    known.iter().filter(|item| item.kind == kind).filter_map(of).collect()
}

/// Runs a check: the query returns id and detail of each difference.
async fn check(
    tx: &mut PgConnection,
    kind: &'static str,
    query: &'static str,
    ids: &[i64],
) -> Result<Vec<Difference>, sqlx::Error> {
    let rows: Vec<(String, String)> =
        sqlx::query_as(query).bind(ids).bind(LISTED).fetch_all(tx).await?;
    Ok(differences(kind, rows))
}

fn differences(kind: &'static str, rows: Vec<(String, String)>) -> Vec<Difference> {
    let difference = |(id, detail)| Difference { kind: kind.into(), id, detail };
    rows.into_iter().map(difference).collect()
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
