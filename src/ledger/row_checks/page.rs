//! Pages of a table in the order of its key.

use sqlx::{PgConnection, Row as _};

use crate::ledger::Difference;

/// Rows of one page.
const PAGE: i64 = 5_000;

/// A table, and the statements that check one page of it. Keys are passed as text, column by column.
pub(super) struct Table {
    /// The least key.
    pub(super) first: &'static [&'static str],
    /// The last key of the page that follows `$1`, or begins with it if `$2`, and its number of
    /// rows, at most `$3`.
    pub(super) end: &'static str,
    /// The removed rows of the page, as in `Removed`.
    pub(super) removed: Option<(usize, &'static str)>,
    /// By kind: (id, detail) of the page's rows that disagree, normally none. The page follows `$1`,
    /// or begins with it if `$2`, and ends with `$3`.
    pub(super) checks: &'static [(&'static str, &'static str)],
}

/// A page that was read.
pub(super) struct Page {
    /// Its last key; none: no row follows.
    pub(super) last: Option<Vec<String>>,
    pub(super) differences: Vec<Difference>,
    pub(super) removed: [i64; 2],
}

/// The statement for a page's end. `$keys`: the key as text.
macro_rules! end {
    ($from:literal, $key:literal, $keys:literal, $bounds:literal) => {
        concat!(
            "select last, number from (
                 select array[",
            $keys,
            "]::text[] as last, row_number() over (order by ",
            $key,
            ") as number
                 from (select ",
            $key,
            " from ",
            $from,
            " where (",
            $key,
            ") >= (",
            $bounds,
            ") and ($2 or (",
            $key,
            ") > (",
            $bounds,
            "))
                       order by ",
            $key,
            " limit $3) as rows
             ) as numbered order by number desc limit 1"
        )
    };
}

/// The page `page` of a table, for a check. `$bounds` and `$until`: `$1` and `$3` in the key's types.
macro_rules! page {
    ($columns:literal, $from:literal, $key:literal, $bounds:literal, $until:literal) => {
        concat!(
            "with page as materialized (select ",
            $columns,
            " from ",
            $from,
            " where (",
            $key,
            ") >= (",
            $bounds,
            ")
                 and ($2 or (",
            $key,
            ") > (",
            $bounds,
            ")) and (",
            $key,
            ") <= (",
            $until,
            ")) "
        )
    };
}

pub(super) use {end, page};

impl Table {
    /// Reads the page after a key; none: the first page.
    pub(super) async fn read(
        &self,
        tx: &mut PgConnection,
        after: Option<&[String]>,
    ) -> Result<Page, sqlx::Error> {
        let is_first = after.is_none();
        let first: Vec<String> = self.first.iter().map(|&key| key.to_owned()).collect();
        let after = after.unwrap_or(&first);
        let end = sqlx::query(self.end).bind(after).bind(is_first).bind(PAGE);
        let mut page = Page { last: None, differences: Vec::new(), removed: [0; 2] };
        let Some(end) = end.fetch_optional(&mut *tx).await? else { return Ok(page) };
        let (last, rows): (Vec<String>, i64) = (end.try_get(0)?, end.try_get(1)?);
        for &(kind, query) in self.checks {
            let found: Vec<(String, String)> = sqlx::query_as(query)
                .bind(after)
                .bind(is_first)
                .bind(&last)
                .fetch_all(&mut *tx)
                .await?;
            page.differences.extend(found.into_iter().map(|(id, detail)| row(kind, id, detail)));
        }
        if let Some((at, query)) = self.removed {
            let removed = sqlx::query_scalar(query).bind(after).bind(is_first).bind(&last);
            page.removed[at] = removed.fetch_one(&mut *tx).await?;
        }
        page.last = Some(last).filter(|_| rows == PAGE);
        Ok(page)
    }
}

pub(super) fn row(kind: &'static str, id: String, detail: String) -> Difference {
    Difference { kind: kind.into(), id, detail }
}
