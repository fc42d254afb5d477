//! The names of what builds belong to. Many builds share a name, so it is read once for all of
//! them.

use std::collections::{BTreeSet, HashMap};

use sqlx::FromRow;
use uuid::Uuid;

use super::connect::within;
use super::{BuildRow, CoderdError, Reader};

/// The tables of the names.
const ORGANIZATION: i32 = 1;
const TEMPLATE: i32 = 2;
const VERSION: i32 = 3;
const PRESET: i32 = 4;
const OWNER: i32 = 5;

#[derive(FromRow)]
struct NameRow {
    of_table: i32,
    id: Uuid,
    name: String,
}

impl Reader {
    /// The rows with their current names. It leaves out a row whose organization, template, version
    /// or owner coderd has removed since.
    pub(super) async fn with_names(
        &mut self,
        rows: Vec<BuildRow>,
    ) -> Result<Vec<BuildRow>, CoderdError> {
        if rows.is_empty() {
            return Ok(rows);
        }
        let ids = |id: fn(&BuildRow) -> Option<Uuid>| -> Vec<Uuid> {
            let ids: BTreeSet<Uuid> = rows.iter().filter_map(id).collect();
            ids.into_iter().collect()
        };
        let query = sqlx::query_as(
            "select 1 as of_table, id, name from organizations where id = any($1)
             union all select 2, id, name from templates where id = any($2)
             union all select 3, id, name from template_versions where id = any($3)
             union all select 4, id, name from template_version_presets where id = any($4)
             union all select 5, id, username from users where id = any($5)",
        )
        .bind(ids(|row| Some(row.organization_id)))
        .bind(ids(|row| Some(row.template_id)))
        .bind(ids(|row| Some(row.template_version_id)))
        .bind(ids(|row| row.preset_id))
        .bind(ids(|row| Some(row.owner_id)));
        let names: Vec<NameRow> =
            within(self.deadline, query.fetch_all(&mut self.connection)).await?;
        let names: HashMap<(i32, Uuid), String> =
            names.into_iter().map(|row| ((row.of_table, row.id), row.name)).collect();
        Ok(rows.into_iter().filter_map(|row| named(row, &names)).collect())
    }
}

fn named(mut row: BuildRow, names: &HashMap<(i32, Uuid), String>) -> Option<BuildRow> {
    let name = |of_table, id| names.get(&(of_table, id)).cloned();
    row.organization_name = name(ORGANIZATION, row.organization_id)?;
    row.template_name = name(TEMPLATE, row.template_id)?;
    row.template_version_name = name(VERSION, row.template_version_id)?;
    row.preset_name = row.preset_id.and_then(|id| name(PRESET, id)).unwrap_or_default();
    row.owner_name = name(OWNER, row.owner_id)?;
    Some(row)
}
