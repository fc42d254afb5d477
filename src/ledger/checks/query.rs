//! Queries of checks, and the known items that they judge again.

use sqlx::PgConnection;

use crate::ledger::{AuditItem, Difference};

/// The most listed differences of each kind and page.
pub(super) const LISTED: i64 = 1_000;

/// Ids of the known items of a kind, as `of` reads them.
pub(super) fn known_of<'a, T>(
    known: &'a [AuditItem],
    kind: &str,
    of: impl Fn(&'a AuditItem) -> Option<T>,
) -> Vec<T> {
    known.iter().filter(|item| item.kind == kind).filter_map(of).collect()
}

/// Runs a check: the query returns id and detail of each difference.
pub(super) async fn check(
    tx: &mut PgConnection,
    kind: &'static str,
    query: &'static str,
    ids: &[i64],
) -> Result<Vec<Difference>, sqlx::Error> {
    let rows: Vec<(String, String)> =
        sqlx::query_as(query).bind(ids).bind(LISTED).fetch_all(tx).await?;
    Ok(differences(kind, rows))
}

pub(super) fn differences(kind: &'static str, rows: Vec<(String, String)>) -> Vec<Difference> {
    let difference = |(id, detail)| Difference { kind: kind.into(), id, detail };
    rows.into_iter().map(difference).collect()
}
