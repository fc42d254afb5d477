//! Finds due rows of each kind, and removes them.

use chrono::{DateTime, Utc};
use sqlx::Connection as _;
use sqlx::PgConnection;

use super::counts::{self, RemovedPage};
use super::kinds::{Due, DuePage, PruneKind, PrunePlace};
use super::{attempts, plans, rejects, snapshots};
use crate::ledger::leases::hold;
use crate::ledger::{Lease, LeaseError};

/// The next page of rows of a kind that ended before `before`. Reads at most 500 rejects, 50
/// requests with their attempts, or 500 others, each by index.
pub async fn due(
    conn: &mut PgConnection,
    kind: PruneKind,
    before: DateTime<Utc>,
    after: Option<PrunePlace>,
    stages: &[&str],
) -> Result<DuePage, sqlx::Error> {
    match kind {
        PruneKind::RejectPayloads => rejects::due(conn, before, after).await,
        PruneKind::Attempts => attempts::due(conn, before, after).await,
        PruneKind::Plans => plans::due(conn, before).await,
        PruneKind::Snapshots => snapshots::due(conn, before, stages).await,
    }
}

/// Removes these rows and counts them, in one transaction. Rows that are not due any more stay, and
/// so do rows of a batch that does not match its digest. Reads all rejects, or all attempts, of the
/// rows' batches.
///
/// # Errors
/// [`LeaseError`]; nothing is removed.
pub async fn remove(
    conn: &mut PgConnection,
    lease: &Lease,
    kind: PruneKind,
    before: DateTime<Utc>,
    due: &[Due],
    now: DateTime<Utc>,
) -> Result<RemovedPage, LeaseError> {
    let mut tx = conn.begin().await?;
    hold(&mut tx, lease).await?;
    let page = match kind {
        PruneKind::RejectPayloads => rejects::remove(&mut tx, due, now).await?,
        PruneKind::Attempts => attempts::remove(&mut tx, before, due, now).await?,
        PruneKind::Plans => {
            RemovedPage { removed: plans::remove(&mut tx, before, due).await?, kept: 0 }
        }
        PruneKind::Snapshots => {
            RemovedPage { removed: snapshots::remove(&mut tx, due).await?, kept: 0 }
        }
    };
    counts::add(&mut tx, kind, page.removed, now).await?;
    tx.commit().await?;
    Ok(page)
}
