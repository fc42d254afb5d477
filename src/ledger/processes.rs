//! Processes of `tallyline run` at their last heartbeat, by the database's clock.

use chrono::{DateTime, Utc};
use sqlx::FromRow;
use sqlx::PgConnection;
use uuid::Uuid;

/// Seconds without a heartbeat after which a process is shown as gone. A living process sends one
/// every 5 s.
pub const GONE_SECONDS: f64 = 30.0;
/// Seconds without a heartbeat after which a process is hidden by default.
const LONG_GONE_SECONDS: f64 = 3600.0;
/// Seconds without a heartbeat after which a process is deleted.
const FORGOTTEN_SECONDS: f64 = 24.0 * 3600.0;

/// A process of `tallyline run`.
#[derive(Clone, Debug)]
pub struct Process {
    /// A new id with each start.
    pub id: Uuid,
    pub host: String,
    /// The operating system's process id.
    pub pid: u32,
    pub version: &'static str,
    pub roles: Vec<&'static str>,
    /// When the process began, by its own clock.
    pub started_at: DateTime<Utc>,
}

/// A process at its last heartbeat.
#[derive(
    Clone, Debug, PartialEq, FromRow, serde::Serialize, serde::Deserialize, utoipa::ToSchema,
)]
pub struct ProcessRow {
    /// The process's id, a new one with each start.
    pub id: Uuid,
    /// The name of the machine.
    pub host: String,
    /// The operating system's process id.
    pub pid: i32,
    /// The version of its binary.
    pub version: String,
    /// The roles that it runs: collect, consume, publish, serve.
    pub roles: Vec<String>,
    /// When the process began, by its own clock.
    pub started_at: DateTime<Utc>,
    /// Its last heartbeat, by the database's clock.
    pub seen_at: DateTime<Utc>,
    /// Whether its last heartbeat is over 30 seconds old and it did not shut down in an orderly
    /// way.
    pub gone: bool,
    /// Whether its last heartbeat is over an hour old.
    #[serde(default)]
    pub long_gone: bool,
    /// The state of each of its roles at that time.
    pub standing: serde_json::Value,
}

/// A publisher's refusal of the coderd or the license that it read.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct PublishRefusal {
    /// The source, if known.
    pub deployment_id: Option<Uuid>,
    /// The reason, and the next step for an operator.
    pub why: String,
    /// When the refusal began, by the process's clock.
    pub since: DateTime<Utc>,
}

impl ProcessRow {
    /// The reason why its publisher refuses to work. A process that ended because of it reports it
    /// too, for the hour in which it is shown.
    #[must_use]
    pub fn publish_refusal(&self) -> Option<PublishRefusal> {
        let refused = self.standing.get("publish")?.get("refused").filter(|_| !self.long_gone)?;
        serde_json::from_value(refused.clone()).ok()
    }

    /// The source whose usage it publishes, if the process is alive and its publisher works.
    #[must_use]
    pub fn publishes(&self) -> Option<Uuid> {
        let publish = self.standing.get("publish").filter(|_| !self.gone)?;
        let publishes = publish.get("publishes")?.as_bool()?;
        serde_json::from_value(publish.get("deployment_id").filter(|_| publishes)?.clone()).ok()
    }
}

/// Records a heartbeat and the state of the roles. Deletes processes that have been gone for a day.
pub async fn record_heartbeat(
    conn: &mut PgConnection,
    process: &Process,
    standing: &serde_json::Value,
) -> Result<(), sqlx::Error> {
    sqlx::query(
        "with forgotten as (delete from process where seen_at < clock_timestamp() - make_interval(secs => $8))
         insert into process as known (id, host, pid, version, roles, started_at, seen_at, standing)
         values ($1, $2, $3, $4, $5, $6, clock_timestamp(), $7)
         on conflict (id) do update set seen_at = greatest(known.seen_at, excluded.seen_at), standing = excluded.standing",
    )
    .bind(process.id)
    .bind(&process.host)
    .bind(i32::try_from(process.pid).unwrap_or_default())
    .bind(process.version)
    .bind(&process.roles)
    .bind(process.started_at)
    .bind(standing)
    .bind(FORGOTTEN_SECONDS)
    .execute(conn)
    .await
    .map(|_| ())
}

/// Deletes the row of a process that shuts down in an orderly way. After an error it is shown as
/// gone for a day.
pub async fn end(conn: &mut PgConnection, id: Uuid) -> Result<(), sqlx::Error> {
    sqlx::query("delete from process where id = $1").bind(id).execute(conn).await.map(|_| ())
}

/// All processes of the last day that did not shut down in an orderly way.
pub async fn list(conn: &mut PgConnection) -> Result<Vec<ProcessRow>, sqlx::Error> {
    sqlx::query_as(
        "select id, host, pid, version, roles, started_at, seen_at, seen_at < clock_timestamp() - make_interval(secs => $1) as gone,
             seen_at < clock_timestamp() - make_interval(secs => $2) as long_gone, standing
         from process order by host, started_at, id",
    )
    .bind(GONE_SECONDS)
    .bind(LONG_GONE_SECONDS)
    .fetch_all(conn)
    .await
}
