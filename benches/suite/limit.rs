//! The limit: the same rows by `COPY` into a staging table. Then one `insert … on conflict do
//! nothing` into the same indexed tables.

use std::fmt::Write as _;

use anyhow::Result;
use sqlx::{Connection as _, PgConnection};
use tallyline::event::{Event, InputStage, Payload};

/// Bytes in one piece for `COPY`.
const PIECE: usize = 1024 * 1024;

/// Events in the form of `COPY`, made before the measurement.
#[derive(Default)]
pub struct Rows(String);

impl Rows {
    /// Adds events with their partitions and offsets.
    pub fn add(&mut self, events: &[Event], placed: &[(i32, i64)]) {
        for (event, (_, offset)) in events.iter().zip(placed) {
            // writing to a String never fails
            let _ = self.add_one(event, *offset);
        }
    }

    fn add_one(&mut self, event: &Event, offset: i64) -> std::fmt::Result {
        let Payload::Build(build) = &event.payload else { return Ok(()) };
        let text = &mut self.0;
        write!(text, "1\t{}\t1\t{offset}\t\\\\x{}\t", build.build_id, hex::encode(event.digest()))?;
        write!(text, "{}\t{}\t{}\t", build.workspace_id, build.organization_id, build.template_id)?;
        write!(text, "{}\t{}\t", build.template_version_id, or_null(build.preset_id))?;
        write!(
            text,
            "{}\t{}\t{}\t",
            build.owner_id,
            build.initiator_id,
            build.transition.as_str()
        )?;
        write!(text, "{}\t{}\t{}\t", build.reason, build.status.as_str(), build.build_number)?;
        write!(text, "{}\t", or_null(build.stage.map(InputStage::as_str)))?;
        let first_build_stage = or_null(build.first_build_stage.map(InputStage::as_str));
        write!(
            text,
            "{}\t{first_build_stage}\t{}\t",
            build.first_build_by_prebuilds_user, build.first_successful_start
        )?;
        write!(
            text,
            "{}\t{}\t{}\t",
            or_null(build.has_ai_task),
            or_null(build.has_external_agent),
            build.daily_cost
        )?;
        let started_at = or_null(build.started_at.map(|at| at.to_rfc3339()));
        write!(
            text,
            "{}\t{started_at}\t{}\t",
            build.created_at.to_rfc3339(),
            build.completed_at.to_rfc3339()
        )?;
        write!(
            text,
            "{}\t{}\t{}\t",
            build.organization_name, build.template_name, build.template_version_name
        )?;
        // not confirmed
        writeln!(text, "{}\t{}\t{}\t\\N", build.preset_name, build.workspace_name, build.owner_name)
    }
}

fn or_null<T: ToString>(value: Option<T>) -> String {
    value.map_or_else(|| "\\N".to_owned(), |value| value.to_string())
}

/// Copies everything once in one transaction, with one row of `batch`. The staging table is
/// unlogged, the fastest possible.
pub async fn copy_then_insert(url: &str, rows: &Rows) -> Result<()> {
    let mut connection = PgConnection::connect(url).await?;
    let mut tx = connection.begin().await?;
    sqlx::query("create unlogged table staging (like workspace_build)").execute(&mut *tx).await?;
    let mut copy = tx.copy_in_raw("copy staging from stdin").await?;
    for piece in rows.0.as_bytes().chunks(PIECE) {
        copy.send(piece).await?;
    }
    copy.finish().await?;
    sqlx::query("insert into workspace_build select * from staging on conflict do nothing")
        .execute(&mut *tx)
        .await?;
    sqlx::query(
        "insert into workspace_first_start select source_id, workspace_id, build_id from staging where first_successful_start
         on conflict do nothing",
    )
    .execute(&mut *tx)
    .await?;
    sqlx::query("insert into batch (kind, recorded_at) values ('operator', now())")
        .execute(&mut *tx)
        .await?;
    tx.commit().await?;
    connection.close().await?;
    Ok(())
}
