//! Creates coderd's tables as an outside reader sees them, in two versions (sections 1 and 4 of the
//! reference).
//!
//! It leaves out tables and columns that a reader of builds, usage and licenses does not need.
//! These are agents, resources, audit and connection logs, most chat columns, one-time passcodes
//! and the user status trigger.

use anyhow::{Context, ensure};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use sqlx::{Connection, PgConnection};

/// A version of coderd's schema.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum SchemaVersion {
    /// The last one with Tasks: `workspace_builds.has_ai_task`, `tasks`, task build reasons.
    /// Runtime hours are unique by id only.
    TasksEra,
    /// About 21 September 2026: no Tasks, `hb_agent_runtime_v1` rows with whole and unique hours.
    #[value(name = "sep-2026")]
    #[serde(rename = "sep-2026")]
    Sep2026,
}

impl SchemaVersion {
    /// Whether the schema has tasks and AI flags.
    #[must_use]
    pub fn has_tasks(self) -> bool {
        self == SchemaVersion::TasksEra
    }
}

/// Creates all tables in an empty schema, or none. Gives their owner the rights that an
/// administrator gives to a reader. The database must not have a table `provisioner_jobs`.
pub async fn create(connection: &mut PgConnection, version: SchemaVersion) -> anyhow::Result<()> {
    let mut tx = connection.begin().await?;
    let exists: bool = sqlx::query_scalar("select to_regclass('provisioner_jobs') is not null")
        .fetch_one(&mut *tx)
        .await
        .context("look for coderd's tables")?;
    ensure!(!exists, "the database already has coderd's tables: name an empty database");
    sqlx::raw_sql(include_str!("schema/common.sql"))
        .execute(&mut *tx)
        .await
        .context("create coderd's tables")?;
    let era = match version {
        SchemaVersion::TasksEra => include_str!("schema/tasks_era.sql"),
        SchemaVersion::Sep2026 => include_str!("schema/sep_2026.sql"),
    };
    sqlx::raw_sql(era).execute(&mut *tx).await.context("tables of this schema version")?;
    let owner: String = sqlx::query_scalar("select current_user::text")
        .fetch_one(&mut *tx)
        .await
        .context("ask for the owner")?;
    let grants = tallyline::coderd::grants(&owner);
    sqlx::raw_sql(sqlx::AssertSqlSafe(grants))
        .execute(&mut *tx)
        .await
        .context("grants of a reader")?;
    tx.commit().await?;
    Ok(())
}
