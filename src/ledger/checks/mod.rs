//! The audit's checks inside the ledger, of pages of batches. A page is read in one snapshot, by
//! indexes only, and has at most [`PAGE_BATCHES`] batches and [`PAGE_ROWS`] rows, or one larger
//! batch. So a statement costs the same at any size of the ledger.

mod chains;
mod checked;
mod events;
mod page;
mod publications;
mod query;

pub use chains::{ChainName, ChainSums, PositionBooks, positions, recount};
pub use checked::CheckedPage;
pub use page::{BatchCursor, BatchPage, PAGE_BATCHES, PAGE_ROWS};
pub use publications::{KeyPage, PublicationKey};

use chrono::{DateTime, Utc};
use sqlx::PgConnection;

pub(super) use self::page::snapshot;
use self::page::{newest, older};
use super::{AuditItem, Difference, Sequence};

/// The checks of one snapshot.
#[derive(Clone, Debug)]
pub struct Checked {
    /// The last sequence of the snapshot.
    pub sequence: Sequence,
    /// The page after the audited batches.
    pub new: CheckedPage,
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
    /// The end of the earlier page of publications.
    pub keys: Option<PublicationKey>,
    /// Items to judge again.
    pub known: &'a [AuditItem],
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
    let new = newest(&mut tx, request.audited, sequence.number).await?;
    let new = log_page(&mut tx, &new).await?;
    let mut known = chains::known(&mut tx, sequence.number, request.known).await?;
    known.extend(chains::outside(&mut tx).await?);
    known.extend(events::known(&mut tx, request.known).await?);
    if new.is_last {
        known.extend(events::passed_beyond_an_end(&mut tx).await?);
    }
    let positions = chains::positions(&mut tx).await?;
    tx.commit().await?;
    Ok(Checked { sequence, new, keys: None, known, positions })
}

/// Checks accepted usage with its publications, and their recorded answers.
pub async fn vendor_joint(
    conn: &mut PgConnection,
    request: &CheckRequest<'_>,
) -> Result<Checked, sqlx::Error> {
    let mut tx = snapshot(conn).await?;
    let sequence = head(&mut tx).await?;
    let new = newest(&mut tx, request.audited, sequence.number).await?;
    let new = publications::page(&mut tx, &new).await?;
    let keys = match &request.keys {
        Some(after) if new.is_last => Some(publications::key_page(&mut tx, after).await?),
        _ => None,
    };
    let known = publications::known(&mut tx, request.known).await?;
    tx.commit().await?;
    Ok(Checked { sequence, new, keys, known, positions: Vec::new() })
}

/// The same checks as [`log_joint`], of a page of older batches up to `until`.
pub async fn older_log(
    conn: &mut PgConnection,
    from: BatchCursor,
    until: BatchCursor,
) -> Result<CheckedPage, sqlx::Error> {
    let mut tx = snapshot(conn).await?;
    let page = older(&mut tx, from, until).await?;
    let checked = log_page(&mut tx, &page).await?;
    tx.commit().await?;
    Ok(checked)
}

/// The same checks as [`vendor_joint`], of a page of older batches up to `until`.
pub async fn older_usage(
    conn: &mut PgConnection,
    from: BatchCursor,
    until: BatchCursor,
) -> Result<CheckedPage, sqlx::Error> {
    let mut tx = snapshot(conn).await?;
    let page = older(&mut tx, from, until).await?;
    let checked = publications::page(&mut tx, &page).await?;
    tx.commit().await?;
    Ok(checked)
}

/// A page of the publications that follow this key.
pub async fn publications_after(
    conn: &mut PgConnection,
    after: &PublicationKey,
) -> Result<KeyPage, sqlx::Error> {
    let mut tx = snapshot(conn).await?;
    let page = publications::key_page(&mut tx, after).await?;
    tx.commit().await?;
    Ok(page)
}

/// Where the batches begin that were recorded at or after `since`.
pub async fn recorded_since(
    conn: &mut PgConnection,
    since: DateTime<Utc>,
) -> Result<BatchCursor, sqlx::Error> {
    let before: Option<(i64, i64)> = sqlx::query_as(
        "select sequence, id from batch where recorded_at < $1 and sequence > 0 order by recorded_at desc limit 1",
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
