//! Coder deployments in the ledger. Each is introduced once, before its first event.

use chrono::{DateTime, Utc};
use sqlx::Connection as _;
use sqlx::FromRow;
use sqlx::PgConnection;
use uuid::Uuid;

/// Workspaces inserted by one statement.
const STARTED_AT_ONCE: usize = 10_000;

#[derive(Clone, Debug, PartialEq, Eq, FromRow)]
pub struct Source {
    /// The ledger's own id of the source.
    pub id: i16,
    pub deployment_id: Uuid,
    /// Histograms observe builds that completed at or after this instant.
    pub introduced_at: DateTime<Utc>,
    /// Builds completed before this are counted once in the baseline and are not collected. None:
    /// all history is collected.
    pub baseline_until: Option<DateTime<Utc>>,
    pub retired: bool,
}

/// Regular creations before a source's baseline, for one set of labels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BaselineRow {
    pub organization_name: String,
    pub template_name: String,
    /// Empty without a preset.
    pub preset_name: String,
    pub creations: i64,
}

/// The start of collection, and the initial values of the all-time counters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Baseline {
    /// Builds completed before this instant are not collected.
    pub until: DateTime<Utc>,
    /// coderd's count of creations before it.
    pub creations: Vec<BaselineRow>,
    /// The workspaces whose first successful start came before it. Their later builds are not
    /// creations.
    pub started: Vec<Uuid>,
}

macro_rules! source_columns {
    () => {
        "id, deployment_id, introduced_at, baseline_until, retired_act_id is not null as retired"
    };
}
pub(super) use source_columns;

/// Registers a source with its baseline, in one batch. A registered source is not changed, because
/// series that were already observed or counted never decrease.
pub async fn register(
    conn: &mut PgConnection,
    deployment_id: Uuid,
    introduced_at: DateTime<Utc>,
    baseline: Option<&Baseline>,
    now: DateTime<Utc>,
) -> Result<Source, sqlx::Error> {
    if let Some(source) = get(conn, deployment_id).await? {
        return Ok(source);
    }
    let mut tx = conn.begin().await?;
    let batch_id: i64 = sqlx::query_scalar(
        "insert into batch (kind, recorded_at) values ('source', $1) returning id",
    )
    .bind(now)
    .fetch_one(&mut *tx)
    .await?;
    // This waits for a concurrent introduction of the same deployment and blocks no other
    // transaction.
    let introduced: Option<Source> = sqlx::query_as(concat!(
        "insert into source (deployment_id, batch_id, introduced_at, baseline_until) values ($1, $2, $3, $4)
         on conflict (deployment_id) do nothing returning ",
        source_columns!()
    ))
    .bind(deployment_id)
    .bind(batch_id)
    .bind(introduced_at)
    .bind(baseline.map(|baseline| baseline.until))
    .fetch_optional(&mut *tx)
    .await?;
    let Some(source) = introduced else {
        tx.rollback().await?;
        return get(conn, deployment_id).await?.ok_or(sqlx::Error::RowNotFound);
    };
    sqlx::query("insert into collector_progress (source_id) values ($1)")
        .bind(source.id)
        .execute(&mut *tx)
        .await?;
    for row in baseline.into_iter().flat_map(|baseline| &baseline.creations) {
        sqlx::query(
            "insert into creation_baseline (source_id, batch_id, organization_name, template_name, preset_name, creations)
             values ($1, $2, $3, $4, $5, $6)",
        )
        .bind(source.id)
        .bind(batch_id)
        .bind(&row.organization_name)
        .bind(&row.template_name)
        .bind(&row.preset_name)
        .bind(row.creations)
        .execute(&mut *tx)
        .await?;
    }
    for started in
        baseline.into_iter().flat_map(|baseline| baseline.started.chunks(STARTED_AT_ONCE))
    {
        sqlx::query("insert into workspace_first_start (source_id, workspace_id) select $1, unnest($2::uuid[])")
            .bind(source.id)
            .bind(started)
            .execute(&mut *tx)
            .await?;
    }
    tx.commit().await?;
    Ok(source)
}

pub async fn get(
    conn: &mut PgConnection,
    deployment_id: Uuid,
) -> Result<Option<Source>, sqlx::Error> {
    sqlx::query_as(concat!("select ", source_columns!(), " from source where deployment_id = $1"))
        .bind(deployment_id)
        .fetch_optional(conn)
        .await
}

/// All sources, in the order of their introduction.
pub async fn list(conn: &mut PgConnection) -> Result<Vec<Source>, sqlx::Error> {
    sqlx::query_as(concat!("select ", source_columns!(), " from source order by id"))
        .fetch_all(conn)
        .await
}
