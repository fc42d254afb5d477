//! A workspace's first start after corrections of builds.
//!
//! `workspace_first_start` has the current build. A fold that reads the ledger as it was before a
//! correction finds the earlier build in `first_start_change`.

use std::collections::HashMap;

use sqlx::PgConnection;
use uuid::Uuid;

use super::known::first_start;
use crate::event::{Event, Payload, WorkspaceBuildCompleted};

/// The first starts at the sequence `at` of workspaces where a later correction has changed it, by
/// source and workspace. Reads one row for each such change: normally none.
pub(super) async fn before_changes(
    tx: &mut PgConnection,
    at: i64,
) -> Result<HashMap<(i16, Uuid), Option<Uuid>>, sqlx::Error> {
    let rows: Vec<(i16, Uuid, Option<Uuid>)> = sqlx::query_as(
        "select distinct on (source_id, workspace_id) source_id, workspace_id, previous_build_id
         from first_start_change join batch on batch.id = batch_id where sequence > $1
         order by source_id, workspace_id, sequence",
    )
    .bind(at)
    .fetch_all(tx)
    .await?;
    Ok(rows.into_iter().map(|(source, workspace, build)| ((source, workspace), build)).collect())
}

/// The workspace's first start at the sequence `at`, if any.
pub async fn at(
    conn: &mut PgConnection,
    source_id: i16,
    workspace_id: Uuid,
    at: i64,
) -> Result<Option<Uuid>, sqlx::Error> {
    let changed: Option<Option<Uuid>> = sqlx::query_scalar(
        "select previous_build_id from first_start_change join batch on batch.id = batch_id
         where source_id = $1 and workspace_id = $2 and sequence > $3 order by sequence limit 1",
    )
    .bind(source_id)
    .bind(workspace_id)
    .bind(at)
    .fetch_optional(&mut *conn)
    .await?;
    match changed {
        Some(previous) => Ok(previous),
        None => first_start(conn, source_id, workspace_id).await,
    }
}

/// Changes the first starts of the workspaces of these corrected events, whose rows are written. Each
/// is the event before and after. A
/// build that no longer is one is replaced by the earliest other build that coderd called one; if
/// there is none, the workspace's next such build becomes it. A build that now is one becomes the
/// first start of a workspace without one.
pub(super) async fn follow(
    tx: &mut PgConnection,
    source_id: i16,
    corrections: &[(Option<&Event>, Option<&Event>)],
    batch_id: i64,
) -> Result<(), sqlx::Error> {
    for (before, after) in corrections {
        let Some(build) = start(*before) else { continue };
        let remains = start(*after).is_some_and(|after| after.workspace_id == build.workspace_id);
        let kept = first_start(tx, source_id, build.workspace_id).await?;
        if !remains && kept == Some(build.build_id) {
            let next = replace(tx, source_id, build.workspace_id).await?;
            change(tx, source_id, build.workspace_id, batch_id, (kept, next)).await?;
        }
    }
    for build in corrections.iter().filter_map(|(_, after)| start(*after)) {
        let added = sqlx::query(
            "insert into workspace_first_start (source_id, workspace_id, build_id) values ($1, $2, $3) on conflict do nothing",
        )
        .bind(source_id)
        .bind(build.workspace_id)
        .bind(build.build_id)
        .execute(&mut *tx)
        .await?;
        if added.rows_affected() == 1 {
            change(tx, source_id, build.workspace_id, batch_id, (None, Some(build.build_id)))
                .await?;
        }
    }
    Ok(())
}

/// The build of an event that is called its workspace's first successful start.
fn start(event: Option<&Event>) -> Option<&WorkspaceBuildCompleted> {
    match event.map(|event| &event.payload) {
        Some(Payload::Build(build)) if build.first_successful_start => Some(build),
        _ => None,
    }
}

/// Sets the workspace's first start to its earliest other one, or removes it.
async fn replace(
    tx: &mut PgConnection,
    source_id: i16,
    workspace_id: Uuid,
) -> Result<Option<Uuid>, sqlx::Error> {
    let mut next = earliest(tx, source_id, workspace_id).await?;
    if next.is_none() {
        // A batch that is not committed may contain a start which the present row keeps out: wait
        // for it, and let none follow before this commit.
        sqlx::query("lock table workspace_first_start in share row exclusive mode")
            .execute(&mut *tx)
            .await?;
        next = earliest(tx, source_id, workspace_id).await?;
    }
    let query = match next {
        Some(_) => {
            "update workspace_first_start set build_id = $3 where source_id = $1 and workspace_id = $2"
        }
        None => {
            "delete from workspace_first_start where source_id = $1 and workspace_id = $2 and $3::uuid is null"
        }
    };
    sqlx::query(query).bind(source_id).bind(workspace_id).bind(next).execute(tx).await?;
    Ok(next)
}

/// The first build, in the ledger's order, that is called a first start of the workspace. Reads the
/// builds of the source: they have no index by workspace.
async fn earliest(
    tx: &mut PgConnection,
    source_id: i16,
    workspace_id: Uuid,
) -> Result<Option<Uuid>, sqlx::Error> {
    sqlx::query_scalar(
        "select build_id from (
             select e.build_id, e.batch_id, e.build_number from workspace_build e
             where e.source_id = $1 and e.workspace_id = $2 and e.first_successful_start
                 and not exists (select from correction c where c.source_id = e.source_id and c.event_id = 'workspace_build_completed:' || e.build_id)
             union all
             select c.build_id, c.accepted_batch_id, (c.after_event -> 'data' ->> 'build_number')::integer from current_correction c
             where c.source_id = $1 and c.event_id like 'workspace_build_completed:%' and c.digest is not null
                 and (c.after_event -> 'data' ->> 'workspace_id')::uuid = $2 and (c.after_event -> 'data' ->> 'first_successful_start')::boolean
         ) as start join batch on batch.id = start.batch_id order by sequence, build_number limit 1",
    )
    .bind(source_id)
    .bind(workspace_id)
    .fetch_optional(tx)
    .await
}

async fn change(
    tx: &mut PgConnection,
    source_id: i16,
    workspace_id: Uuid,
    batch_id: i64,
    (previous, next): (Option<Uuid>, Option<Uuid>),
) -> Result<(), sqlx::Error> {
    sqlx::query("insert into first_start_change (source_id, workspace_id, batch_id, previous_build_id, next_build_id) values ($1, $2, $3, $4, $5)
         on conflict on constraint first_start_change_is_unique do update set next_build_id = excluded.next_build_id")
        .bind(source_id)
        .bind(workspace_id)
        .bind(batch_id)
        .bind(previous)
        .bind(next)
        .execute(tx)
        .await?;
    Ok(())
}
