//! A workspace's first start after corrections of builds.
//!
//! `workspace_first_start` has the current build. A fold that reads the ledger as it was before a
//! correction finds the earlier build in `first_start_change`.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use sqlx::PgConnection;
use uuid::Uuid;

use super::known::first_start;
use crate::event::{Event, Payload, WorkspaceBuildCompleted};

/// Whether a correction after the sequence `at` has changed a first start. Reads one row.
pub(super) async fn have_changed(tx: &mut PgConnection, at: i64) -> Result<bool, sqlx::Error> {
    // one correction is written at a time, so the newest batch has the highest sequence
    let query = "select exists (select from batch where id = (select max(batch_id) from first_start_change) and sequence > $1)";
    sqlx::query_scalar(query).bind(at).fetch_one(tx).await
}

/// The first starts at the sequence `at` of those of these workspaces where a later correction has
/// changed it, by source and workspace. Reads the changes of these workspaces by key.
pub(super) async fn before_changes(
    tx: &mut PgConnection,
    at: i64,
    workspaces: &HashSet<(i16, Uuid)>,
) -> Result<HashMap<(i16, Uuid), Option<Uuid>>, sqlx::Error> {
    let (sources, ids): (Vec<i16>, Vec<Uuid>) = workspaces.iter().copied().unzip();
    let rows: Vec<(i16, Uuid, Option<Uuid>)> = sqlx::query_as(
        "select distinct on (source_id, workspace_id) source_id, workspace_id, previous_build_id
         from unnest($2::smallint[], $3::uuid[]) as asked (source_id, workspace_id)
             join first_start_change using (source_id, workspace_id) join batch on batch.id = batch_id
         where sequence > $1 order by source_id, workspace_id, sequence",
    )
    .bind(at)
    .bind(sources)
    .bind(ids)
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

/// A corrected event.
#[derive(Clone, Copy, Debug)]
pub struct CorrectedEvent<'a> {
    pub before: Option<&'a Event>,
    pub after: Option<&'a Event>,
    /// The batch that accepted the event.
    pub accepted_batch_id: i64,
}

/// The workspaces whose first start these corrections change, with the new one. None: the
/// workspace's next first start becomes it.
pub async fn planned(
    conn: &mut PgConnection,
    source_id: i16,
    corrected: &[CorrectedEvent<'_>],
) -> Result<BTreeMap<Uuid, Option<Uuid>>, sqlx::Error> {
    let rows: Vec<(Uuid, Option<Uuid>)> = sqlx::query_as(
        "select workspace_id, build_id from workspace_first_start where source_id = $1 and workspace_id = any($2)",
    )
    .bind(source_id)
    .bind(workspaces(corrected))
    .fetch_all(&mut *conn)
    .await?;
    changed(conn, source_id, corrected, &rows.into_iter().collect()).await
}

/// Changes the first starts of the workspaces of these corrections, which the batch writes.
///
/// A first start that is corrected to another event is replaced by the earliest other build that
/// coderd called one, or else by the next such build. A build that becomes one is the first start of
/// a workspace without one. Reads, locks and writes rows by key, in a few statements.
pub(super) async fn follow(
    tx: &mut PgConnection,
    source_id: i16,
    corrected: &[CorrectedEvent<'_>],
    batch_id: i64,
) -> Result<(), sqlx::Error> {
    let workspaces = workspaces(corrected);
    if workspaces.is_empty() {
        return Ok(());
    }
    let kept = lock(tx, source_id, workspaces).await?;
    let changed = changed(tx, source_id, corrected, &kept).await?;
    let (ids, next): (Vec<Uuid>, Vec<Option<Uuid>>) = changed.into_iter().unzip();
    // a consumer may have added the first start of a workspace that had none
    let statement = "with new as (select * from unnest($3::uuid[], $4::uuid[], $5::uuid[]) as new (workspace_id, previous_build_id, build_id)),
         removed as (
             delete from workspace_first_start f using new
             where f.source_id = $1 and f.workspace_id = new.workspace_id and new.build_id is null returning f.workspace_id
         ), replaced as (
             update workspace_first_start f set build_id = new.build_id from new
             where f.source_id = $1 and f.workspace_id = new.workspace_id and new.previous_build_id is not null and new.build_id is not null
             returning f.workspace_id
         ), added as (
             insert into workspace_first_start (source_id, workspace_id, build_id)
             select $1, workspace_id, build_id from new where previous_build_id is null and build_id is not null on conflict do nothing returning workspace_id
         )
         insert into first_start_change (source_id, batch_id, workspace_id, previous_build_id, next_build_id)
         select $1, $2, * from new
         where workspace_id in (select * from removed union all select * from replaced union all select * from added)";
    sqlx::query(statement)
        .bind(source_id)
        .bind(batch_id)
        .bind(&ids)
        .bind(ids.iter().map(|id| kept.get(id).copied().flatten()).collect::<Vec<_>>())
        .bind(next)
        .execute(tx)
        .await
        .map(drop)
}

/// The workspaces of builds that are first starts before or after a correction, in order.
fn workspaces(corrected: &[CorrectedEvent<'_>]) -> Vec<Uuid> {
    let starts = corrected.iter().flat_map(|one| [start(one.before), start(one.after)]).flatten();
    starts.map(|build| build.workspace_id).collect::<BTreeSet<_>>().into_iter().collect()
}

/// The build of an event that is called its workspace's first successful start.
fn start(event: Option<&Event>) -> Option<&WorkspaceBuildCompleted> {
    match event.map(|event| &event.payload) {
        Some(Payload::Build(build)) if build.first_successful_start => Some(build),
        _ => None,
    }
}

/// The first starts of these workspaces, locked in order. A consumer that adds a first start of
/// such a workspace locks the row, too: each waits for the other's commit.
async fn lock(
    tx: &mut PgConnection,
    source_id: i16,
    workspaces: Vec<Uuid>,
) -> Result<HashMap<Uuid, Option<Uuid>>, sqlx::Error> {
    let rows: Vec<(Uuid, Option<Uuid>)> = sqlx::query_as(
        "select workspace_id, build_id from workspace_first_start where source_id = $1 and workspace_id = any($2)
         order by workspace_id for update",
    )
    .bind(source_id)
    .bind(workspaces)
    .fetch_all(tx)
    .await?;
    Ok(rows.into_iter().collect())
}

async fn changed(
    conn: &mut PgConnection,
    source_id: i16,
    corrected: &[CorrectedEvent<'_>],
    kept: &HashMap<Uuid, Option<Uuid>>,
) -> Result<BTreeMap<Uuid, Option<Uuid>>, sqlx::Error> {
    let mut changed = BTreeMap::new();
    for one in corrected {
        let (before, after) = (start(one.before), start(one.after));
        if let Some(build) = before
            && after.is_none_or(|after| after.workspace_id != build.workspace_id)
            && kept.get(&build.workspace_id) == Some(&Some(build.build_id))
        {
            changed.insert(build.workspace_id, None);
        }
        if let Some(build) = after
            && !kept.contains_key(&build.workspace_id)
        {
            changed.insert(build.workspace_id, None);
        }
    }
    for (workspace_id, build_id) in earliest(conn, source_id, &changed, corrected).await? {
        changed.insert(workspace_id, Some(build_id));
    }
    Ok(changed)
}

/// The first build, in the ledger's order, that is called a first start of each of these
/// workspaces. Of the corrected events, the content after the correction counts. Reads the first
/// starts of these workspaces by index.
async fn earliest(
    conn: &mut PgConnection,
    source_id: i16,
    workspaces: &BTreeMap<Uuid, Option<Uuid>>,
    corrected: &[CorrectedEvent<'_>],
) -> Result<Vec<(Uuid, Uuid)>, sqlx::Error> {
    let ids = corrected.iter().filter_map(|one| Some(one.before.or(one.after)?.id()));
    let after: Vec<_> = corrected
        .iter()
        .filter_map(|one| Some((start(one.after)?, one.accepted_batch_id)))
        .collect();
    sqlx::query_as(
        "select distinct on (workspace_id) workspace_id, build_id from (
             select e.workspace_id, e.build_id, e.batch_id, e.build_number from workspace_build e
             where e.source_id = $1 and e.workspace_id = any($2) and e.first_successful_start
                 and 'workspace_build_completed:' || e.build_id <> all($3)
                 and not exists (select from newest_correction(e.source_id, 'workspace_build_completed:' || e.build_id))
             union all
             select (c.after_event -> 'data' ->> 'workspace_id')::uuid, c.build_id, c.accepted_batch_id,
                 (c.after_event -> 'data' ->> 'build_number')::integer
             from corrected_event c
             where c.source_id = $1 and c.after_event -> 'data' ->> 'workspace_id' = any($2::uuid[]::text[])
                 and c.after_event -> 'data' ->> 'first_successful_start' = 'true' and c.event_id <> all($3)
             union all
             select * from unnest($4::uuid[], $5::uuid[], $6::bigint[], $7::integer[]) as after (workspace_id) where workspace_id = any($2)
         ) as start join batch on batch.id = start.batch_id order by workspace_id, sequence, build_number",
    )
    .bind(source_id)
    .bind(workspaces.keys().copied().collect::<Vec<_>>())
    .bind(ids.collect::<Vec<_>>())
    .bind(after.iter().map(|(build, _)| build.workspace_id).collect::<Vec<_>>())
    .bind(after.iter().map(|(build, _)| build.build_id).collect::<Vec<_>>())
    .bind(after.iter().map(|(_, batch_id)| *batch_id).collect::<Vec<_>>())
    .bind(after.iter().map(|(build, _)| build.build_number).collect::<Vec<_>>())
    .fetch_all(conn)
    .await
}
