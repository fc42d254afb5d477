//! Saved states of folds, so that a process need not start from zero.
//!
//! A state is saved in pieces. A snapshot writes only the pieces that differ from the snapshot
//! before it, so its cost does not grow with history. Reading all pieces, or writing all of them,
//! takes many statements of seconds, each with a deadline of its own.

use chrono::{DateTime, Utc};
use futures::TryStreamExt as _;
use sqlx::{Connection as _, FromRow, PgConnection, Postgres, Transaction};
use uuid::Uuid;

use super::run::DEADLINE;
use super::{ActKind, NewAct, Sequence, Subject, acts};
use crate::pool;

/// Number of snapshots kept per stage and rules version. Saving a newer one deletes older ones.
const KEPT: i64 = 2;

/// Pieces that one statement reads.
const PAGE: i64 = 100;

/// Long statements of [`load`], and of a save, at most: an hour in all. Each has its own deadline.
pub const STATEMENTS: u32 = 48;

/// Long statements of [`rebuild`] at most.
pub const REBUILD_STATEMENTS: u32 = 4;

/// In the order of the database, every name of a piece is below.
const AFTER_ALL: &str = "\u{10ffff}";

/// A stage under a version of its rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StageRules {
    pub stage: &'static str,
    pub version: i32,
}

/// A version of a piece: its name and its content. None: the state has no such piece.
pub type PieceVersion = (String, Option<Vec<u8>>);

/// A saved snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromRow)]
pub struct SavedSnapshot {
    /// The last batch in the state.
    pub sequence: i64,
    pub taken_at: DateTime<Utc>,
}

/// A snapshot that was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReadSnapshot {
    /// The last batch in the state.
    pub sequence: Sequence,
    /// The number of pieces that were saved.
    pub pieces: i64,
    /// The number of pieces that were read. Another number than the saved one: the snapshot is not
    /// whole.
    pub read: i64,
}

/// The ledger's incarnation and highest sequence, in one snapshot.
pub async fn head(conn: &mut PgConnection) -> Result<Sequence, sqlx::Error> {
    sqlx::query_scalar("select named_sequence(next_sequence - 1) from ledger").fetch_one(conn).await
}

/// The ledger's head, and whether a recovery is open, in one snapshot.
pub async fn head_and_recovery(conn: &mut PgConnection) -> Result<(Sequence, bool), sqlx::Error> {
    let query = "select named_sequence(next_sequence - 1), exists (select from recovery where closed_at is null) from ledger";
    sqlx::query_as(query).fetch_one(conn).await
}

/// Reads the newest snapshot under these rules in this incarnation, at sequence `limit` or lower.
/// Calls `read` with the name and the content of each piece, in descending order of the names.
/// Has one piece in memory at a time. Reads 100 pieces in a statement.
pub async fn load(
    conn: &mut PgConnection,
    rules: StageRules,
    limit: i64,
    mut read: impl FnMut(&str, &[u8]) + Send,
) -> Result<Option<ReadSnapshot>, sqlx::Error> {
    // One snapshot of the database covers all statements, so that no piece is deleted in between.
    let begin = conn.begin_with("begin isolation level repeatable read read only");
    let mut tx = pool::within(DEADLINE, begin).await?;
    let newest = sqlx::query_as(
        "select named_sequence(snapshot.sequence), pieces from snapshot join ledger using (incarnation)
         where stage = $1 and rules_version = $2 and sequence <= $3 and sequence < next_sequence
         order by snapshot.sequence desc limit 1",
    )
    .bind(rules.stage)
    .bind(rules.version)
    .bind(limit)
    .fetch_optional(&mut *tx);
    let newest: Option<(Sequence, i64)> = pool::within(DEADLINE, newest).await?;
    let Some((sequence, pieces)) = newest else { return Ok(None) };
    let mut found = ReadSnapshot { sequence, pieces, read: 0 };
    let mut before = Some(AFTER_ALL.to_owned());
    while let Some(name) = before {
        let mut each = |name: &str, content: &[u8]| {
            found.read += 1;
            read(name, content);
        };
        let page = load_page(&mut tx, rules, sequence, &name, &mut each);
        before = pool::within(DEADLINE, page).await?;
    }
    tx.commit().await?;
    Ok(Some(found))
}

/// Reads the next pieces below this name. Returns the last name of a full page.
async fn load_page(
    tx: &mut PgConnection,
    rules: StageRules,
    at: Sequence,
    before: &str,
    read: &mut (impl FnMut(&str, &[u8]) + Send),
) -> Result<Option<String>, sqlx::Error> {
    let mut pieces = sqlx::query_as::<_, PieceVersion>(
        "select distinct on (piece) piece, content from snapshot_piece
         where stage = $1 and rules_version = $2 and incarnation = $3 and sequence <= $4 and piece < $5
         order by piece desc, sequence desc limit $6",
    )
    .bind(rules.stage)
    .bind(rules.version)
    .bind(at.incarnation)
    .bind(at.number)
    .bind(before)
    .bind(PAGE)
    .fetch(tx);
    let (mut rows, mut last) = (0, None);
    while let Some((name, content)) = pieces.try_next().await? {
        rows += 1;
        if let Some(content) = content {
            read(&name, &content);
        }
        last = Some(name);
    }
    Ok(last.filter(|_| rows == PAGE))
}

/// A transaction that saves a snapshot, while other processes save none of the stage. Dropped
/// without [`Saver::finish`], it saves nothing.
pub struct Saver<'c> {
    tx: Transaction<'c, Postgres>,
    rules: StageRules,
    incarnation: Uuid,
    /// The newest snapshot of this incarnation.
    pub newest: Option<SavedSnapshot>,
}

/// Begins to save a snapshot. None: another process saves one of this stage, or the ledger has
/// another incarnation, where a state's sequence is another batch.
pub async fn begin(
    conn: &mut PgConnection,
    rules: StageRules,
    incarnation: Uuid,
) -> Result<Option<Saver<'_>>, sqlx::Error> {
    let mut tx = pool::within(DEADLINE, conn.begin()).await?;
    let begun = sqlx::query_scalar(
        "select incarnation = $2 and pg_try_advisory_xact_lock(hashtextextended('save of snapshot ' || $1, 0)) from ledger",
    )
    .bind(rules.stage)
    .bind(incarnation)
    .fetch_one(&mut *tx);
    let begun: bool = pool::within(DEADLINE, begun).await?;
    if !begun {
        tx.rollback().await?;
        return Ok(None);
    }
    let newest = sqlx::query_as(
        "select sequence, taken_at from snapshot where stage = $1 and rules_version = $2 and incarnation = $3
         order by sequence desc limit 1",
    )
    .bind(rules.stage)
    .bind(rules.version)
    .bind(incarnation)
    .fetch_optional(&mut *tx);
    let newest = pool::within(DEADLINE, newest).await?;
    Ok(Some(Saver { tx, rules, incarnation, newest }))
}

impl Saver<'_> {
    /// Writes versions of pieces at a sequence above the newest snapshot's.
    pub async fn write(
        &mut self,
        sequence: i64,
        pieces: Vec<PieceVersion>,
    ) -> Result<(), sqlx::Error> {
        let (names, contents): (Vec<String>, Vec<Option<Vec<u8>>>) = pieces.into_iter().unzip();
        let insert = sqlx::query(
            "insert into snapshot_piece (stage, rules_version, incarnation, piece, sequence, content)
             select $1, $2, $3, piece, $4, content from unnest($5::text[], $6::bytea[]) as version (piece, content)",
        )
        .bind(self.rules.stage)
        .bind(self.rules.version)
        .bind(self.incarnation)
        .bind(sequence)
        .bind(names)
        .bind(contents)
        .execute(&mut *self.tx);
        pool::within(DEADLINE, insert).await.map(drop)
    }

    /// Marks all pieces as removed that have no version at this sequence. For a state whose every
    /// piece was written.
    pub async fn remove_others(&mut self, sequence: i64) -> Result<(), sqlx::Error> {
        let insert = sqlx::query(
            "insert into snapshot_piece (stage, rules_version, incarnation, piece, sequence)
             select $1, $2, $3, piece, $4 from (
                 select distinct on (piece) piece, sequence, content from snapshot_piece
                 where stage = $1 and rules_version = $2 and incarnation = $3 order by piece desc, sequence desc
             ) as newest where sequence <> $4 and content is not null",
        )
        .bind(self.rules.stage)
        .bind(self.rules.version)
        .bind(self.incarnation)
        .bind(sequence)
        .execute(&mut *self.tx);
        pool::within(DEADLINE, insert).await.map(drop)
    }

    /// Makes the written pieces a snapshot of a state of this number of pieces, and deletes the
    /// versions that no kept snapshot needs. False: the snapshot that it continues was deleted
    /// meanwhile, as by a rebuild, and nothing is saved.
    pub async fn finish(
        mut self,
        sequence: i64,
        pieces: i64,
        now: DateTime<Utc>,
    ) -> Result<bool, sqlx::Error> {
        if !pool::within(DEADLINE, self.insert(sequence, pieces, now)).await? {
            pool::within(DEADLINE, self.tx.rollback()).await?;
            return Ok(false);
        }
        pool::within(DEADLINE, self.delete_other_incarnations()).await?;
        pool::within(2 * DEADLINE, self.delete_older()).await?;
        pool::within(DEADLINE, self.tx.commit()).await?;
        Ok(true)
    }

    async fn insert(
        &mut self,
        sequence: i64,
        pieces: i64,
        now: DateTime<Utc>,
    ) -> Result<bool, sqlx::Error> {
        lock_deletions(&mut self.tx, self.rules.stage).await?;
        let inserted = sqlx::query(
            "insert into snapshot (stage, rules_version, incarnation, sequence, taken_at, pieces)
             select $1, $2, $3, $4, $5, $6 where $7::bigint is null or exists (
                 select from snapshot where stage = $1 and rules_version = $2 and incarnation = $3 and sequence = $7)",
        )
        .bind(self.rules.stage)
        .bind(self.rules.version)
        .bind(self.incarnation)
        .bind(sequence)
        .bind(now)
        .bind(pieces)
        .bind(self.newest.map(|newest| newest.sequence))
        .execute(&mut *self.tx)
        .await?;
        Ok(inserted.rows_affected() > 0)
    }

    async fn delete_other_incarnations(&mut self) -> Result<(), sqlx::Error> {
        sqlx::query(
            "with ended as (
                 delete from snapshot where stage = $1 and rules_version = $2 and incarnation <> $3 returning incarnation
             )
             delete from snapshot_piece
             where stage = $1 and rules_version = $2 and incarnation in (select incarnation from ended)",
        )
        .bind(self.rules.stage)
        .bind(self.rules.version)
        .bind(self.incarnation)
        .execute(&mut *self.tx)
        .await
        .map(drop)
    }

    /// A version is needed until a newer one belongs to the oldest kept snapshot. So only the
    /// pieces written since the last oldest one are read, whatever the number of pieces.
    async fn delete_older(&mut self) -> Result<(), sqlx::Error> {
        let kept: Option<(i64, Option<i64>)> = sqlx::query_as(
            "with newest as (
                 select sequence from snapshot where stage = $1 and rules_version = $2 and incarnation = $3
                 order by sequence desc limit $4
             ), deleted as (
                 delete from snapshot where stage = $1 and rules_version = $2 and incarnation = $3
                     and sequence < (select min(sequence) from newest) returning sequence
             )
             select (select min(sequence) from newest), (select min(sequence) from deleted)",
        )
        .bind(self.rules.stage)
        .bind(self.rules.version)
        .bind(self.incarnation)
        .bind(KEPT)
        .fetch_optional(&mut *self.tx)
        .await?;
        let Some((oldest, Some(deleted))) = kept else { return Ok(()) };
        for statement in [
            "delete from snapshot_piece older using snapshot_piece newer
             where newer.stage = $1 and newer.rules_version = $2 and newer.incarnation = $3 and newer.sequence between $5 and $4
                 and older.stage = $1 and older.rules_version = $2 and older.incarnation = $3
                 and older.piece = newer.piece and older.sequence < newer.sequence",
            // nothing older is left that a removed piece would show
            "delete from snapshot_piece where stage = $1 and rules_version = $2 and incarnation = $3
                 and sequence between $5 and $4 and content is null",
        ] {
            sqlx::query(statement)
                .bind(self.rules.stage)
                .bind(self.rules.version)
                .bind(self.incarnation)
                .bind(oldest)
                .bind(deleted)
                .execute(&mut *self.tx)
                .await?;
        }
        Ok(())
    }
}

/// Waits for the end of a deletion of snapshots of this stage, and allows no other until the
/// transaction ends. A save takes it only at its end: without the snapshot before it, it would lack
/// the pieces that it did not write.
pub(super) async fn lock_deletions(tx: &mut PgConnection, stage: &str) -> Result<(), sqlx::Error> {
    sqlx::query("select pg_advisory_xact_lock(hashtextextended('snapshots of ' || $1, 0))")
        .bind(stage)
        .execute(tx)
        .await
        .map(drop)
}

/// Deletes every snapshot of the stage and writes the act that requests it. The act's subject is
/// the stage. Every fold that reaches the act's batch restarts from zero there, even one that began
/// at a snapshot saved meanwhile. Does not wait while pieces are written, which can take minutes.
pub async fn rebuild(
    conn: &mut PgConnection,
    stage: &str,
    act: &NewAct<'_>,
    now: DateTime<Utc>,
) -> Result<(), sqlx::Error> {
    let mut tx = conn.begin().await?;
    // a save that ends now may delete all pieces of an earlier snapshot first
    sqlx::query("set local lock_timeout = '50s'").execute(&mut *tx).await?;
    lock_deletions(&mut tx, stage).await?;
    for statement in
        ["delete from snapshot where stage = $1", "delete from snapshot_piece where stage = $1"]
    {
        sqlx::query(statement).bind(stage).execute(&mut *tx).await?;
    }
    acts::insert(
        &mut tx,
        &NewAct { act: ActKind::Rebuild, subject: Subject::Named(stage), ..act.clone() },
        now,
    )
    .await?;
    tx.commit().await
}
