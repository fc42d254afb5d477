//! Contradictions between rows of the ledger, which only a change by hand makes. Each table is read
//! in pages of its key, so that no statement reads a whole table.

mod builds;
mod facts;
mod page;
mod publications;
mod rejects;
mod requests;

use sqlx::PgConnection;

use self::page::{Page, Table, row};
use super::Difference;
use super::checks::snapshot;

const TABLES: [&Table; 11] = [
    &publications::PUBLICATIONS,
    &publications::SETTLEMENTS,
    &requests::BATCHES,
    &requests::REQUESTS,
    &builds::FIRST_STARTS,
    &builds::BUILDS,
    &rejects::REJECTS,
    &rejects::ACTS,
    &facts::GONE_USAGE,
    &facts::LOST,
    &facts::OTHERS,
];

/// Number of statements of one [`RowReading::read`], at most.
pub const STATEMENTS: u32 = 16;

/// A reading of all tables: its place.
#[derive(Clone, Debug, Default)]
pub struct RowReading {
    table: usize,
    /// The last key of the page before.
    after: Option<Vec<String>>,
    /// What retention had counted as removed when the reading began.
    counted: Option<Removed>,
    /// Removed rows until now.
    removed: Removed,
}

/// Rows that retention removed: attempts, and payloads of rejects.
type Removed = [i64; 2];

impl RowReading {
    /// The contradictions of the next page. None: all tables are read. Reads up to 5,000 rows of a
    /// table, and by index the rows to which they refer.
    pub async fn read(
        &mut self,
        conn: &mut PgConnection,
    ) -> Result<Option<Vec<Difference>>, sqlx::Error> {
        let mut tx = snapshot(conn).await?;
        let before = match self.counted {
            Some(counted) => counted,
            None => counted(&mut tx).await?,
        };
        let Some(table) = TABLES.get(self.table) else {
            let differences = self.uncounted(before, counted(&mut tx).await?);
            tx.commit().await?;
            // the counts are compared once
            let is_first = std::mem::replace(&mut self.table, usize::MAX) == TABLES.len();
            return Ok(Some(differences).filter(|_| is_first));
        };
        let Page { last, differences, removed } =
            table.read(&mut tx, self.after.as_deref()).await?;
        tx.commit().await?;
        self.counted = Some(before);
        for (sum, more) in self.removed.iter_mut().zip(removed) {
            *sum += more;
        }
        self.table += usize::from(last.is_none());
        self.after = last;
        Ok(Some(differences))
    }

    /// Retention may have removed more rows during the reading.
    fn uncounted(&self, before: Removed, after: Removed) -> Vec<Difference> {
        let mut found = Vec::new();
        for (at, kind) in ["attempts", "reject_payloads"].into_iter().enumerate() {
            let rows = self.removed[at];
            if rows < before[at] || rows > after[at] {
                let detail = format!("retention counts {} removed, rows {rows}", after[at]);
                found.push(row("removed_off_its_acts", kind.to_owned(), detail));
            }
        }
        found
    }
}

/// Each removal by retention is counted in the ledger: in an act, or since the newest one.
async fn counted(conn: &mut PgConnection) -> Result<Removed, sqlx::Error> {
    let (attempts, payloads) = sqlx::query_as(
        "with counted as (
             select kind, (rows + (select coalesce(sum((detail->'removed'->kind->>'rows')::bigint), 0) from operator_act
                 where act = 'prune' and reject_id is null))::bigint as rows from prune_kind)
         select coalesce((select rows from counted where kind = 'attempts'), 0),
             coalesce((select rows from counted where kind = 'reject_payloads'), 0)",
    )
    .fetch_one(conn)
    .await?;
    Ok([attempts, payloads])
}
