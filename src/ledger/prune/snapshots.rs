//! Snapshots of stages and rules versions that this version of the program does not write.

use chrono::{DateTime, Utc};
use sqlx::{FromRow, PgConnection};
use uuid::Uuid;

use super::counts::Removed;
use super::kinds::{Due, DueKey, DuePage, ROWS_AT_ONCE};
use crate::ledger::snapshots::lock_deletions;

#[derive(FromRow)]
struct Old {
    stage: String,
    rules_version: i32,
    incarnation: Uuid,
    sequence: i64,
    bytes: i64,
    taken_at: DateTime<Utc>,
}

/// Reads the table of snapshots, which has few rows. Saving a snapshot deletes the older ones of
/// the same rules version, so that only those of earlier versions remain. The pieces go with the
/// last snapshot that can need them.
pub(super) async fn due(
    conn: &mut PgConnection,
    before: DateTime<Utc>,
    stages: &[&str],
) -> Result<DuePage, sqlx::Error> {
    let rows: Vec<Old> = sqlx::query_as(
        "select stage, rules_version, incarnation, sequence, coalesce(piece.bytes, 0)::bigint as bytes, taken_at from snapshot old
         left join lateral (select sum(pg_column_size(content)) as bytes from snapshot_piece piece where piece.stage = old.stage
             and piece.rules_version = old.rules_version and piece.incarnation = old.incarnation and piece.sequence = old.sequence) piece on true
         where taken_at < $1 and (stage <> all($2)
             or exists (select from snapshot new where new.stage = old.stage and new.rules_version > old.rules_version))
         order by taken_at, stage, rules_version, incarnation, sequence limit $3",
    )
    .bind(before)
    .bind(stages)
    .bind(ROWS_AT_ONCE)
    .fetch_all(conn)
    .await?;
    let due = rows.into_iter().map(|row| Due {
        place: None,
        rows: 1,
        bytes: row.bytes,
        ended_at: row.taken_at,
        key: DueKey::Snapshot {
            stage: row.stage,
            rules_version: row.rules_version,
            incarnation: row.incarnation,
            sequence: row.sequence,
        },
    });
    Ok(DuePage { due: due.collect(), ..DuePage::default() })
}

pub(super) async fn remove(tx: &mut PgConnection, due: &[Due]) -> Result<Removed, sqlx::Error> {
    let mut removed = Removed::default();
    for one in due {
        let DueKey::Snapshot { stage, rules_version, incarnation, sequence } = &one.key else {
            continue;
        };
        lock_deletions(tx, stage).await?;
        let deleted = sqlx::query(
            "delete from snapshot where stage = $1 and rules_version = $2 and incarnation = $3 and sequence = $4",
        )
        .bind(stage)
        .bind(rules_version)
        .bind(incarnation)
        .bind(sequence)
        .execute(&mut *tx)
        .await?;
        sqlx::query(
            "delete from snapshot_piece where stage = $1 and rules_version = $2 and incarnation = $3 and not exists (
                 select from snapshot where stage = $1 and rules_version = $2 and incarnation = $3)",
        )
        .bind(stage)
        .bind(rules_version)
        .bind(incarnation)
        .execute(&mut *tx)
        .await?;
        if deleted.rows_affected() > 0 {
            removed += Removed { rows: 1, bytes: one.bytes };
        }
    }
    Ok(removed)
}
