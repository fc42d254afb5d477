//! Processes of `tallyline run`, as they were last heard of, by the database's clock.

use chrono::{DateTime, Utc};
use sqlx::FromRow;
use uuid::Uuid;

use super::Ledger;

/// A process that has not been heard of for so many seconds is shown as gone; one that lives is heard of every 5.
pub const GONE_SECONDS: f64 = 30.0;
/// A process that was last seen this many seconds ago is not shown by default.
const LONG_GONE_SECONDS: f64 = 3600.0;
/// A process that is gone for so long is forgotten, in seconds.
const FORGOTTEN_SECONDS: f64 = 24.0 * 3600.0;

/// What a process is.
#[derive(Clone, Debug)]
pub struct Process {
    /// A new one with each start.
    pub id: Uuid,
    pub host: String,
    /// The system's number of it.
    pub pid: u32,
    /// This binary's version.
    pub version: &'static str,
    /// What it does.
    pub roles: Vec<&'static str>,
    /// When it began, by its own clock.
    pub started_at: DateTime<Utc>,
}

/// A process as it was last heard of.
#[derive(Clone, Debug, PartialEq, FromRow, serde::Serialize, serde::Deserialize, utoipa::ToSchema)]
pub struct ProcessRow {
    /// A new one with each start.
    pub id: Uuid,
    /// The machine's name.
    pub host: String,
    /// The system's number of it.
    pub pid: i32,
    /// Its binary's version.
    pub version: String,
    /// What it does: collect, consume, publish, serve.
    pub roles: Vec<String>,
    /// When it began, by its own clock.
    pub started_at: DateTime<Utc>,
    /// When it was last heard of, by the database's clock.
    pub seen_at: DateTime<Utc>,
    /// It has not been heard of for 30 seconds, and it did not end in good order.
    pub gone: bool,
    /// It has not been heard of for an hour.
    #[serde(default)]
    pub long_gone: bool,
    /// How each of its roles stood then.
    pub standing: serde_json::Value,
}

/// A publisher's refusal of the coderd or the license that it found.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct PublishRefusal {
    /// The source, where that is known.
    pub deployment_id: Option<Uuid>,
    /// Why, and what to do.
    pub why: String,
    /// Since when, by the process's clock.
    pub since: DateTime<Utc>,
}

impl ProcessRow {
    /// Why its publisher refuses to work. A process that ended of it is asked, too, for the hour in which it is shown.
    #[must_use]
    pub fn publish_refusal(&self) -> Option<PublishRefusal> {
        let refused = self.standing.get("publish")?.get("refused").filter(|_| !self.long_gone)?;
        serde_json::from_value(refused.clone()).ok()
    }

    /// The source whose usage it publishes, if the process lives and its publisher works.
    #[must_use]
    pub fn publishes(&self) -> Option<Uuid> {
        let publish = self.standing.get("publish").filter(|_| !self.gone)?;
        let publishes = publish.get("publishes")?.as_bool()?;
        serde_json::from_value(publish.get("deployment_id").filter(|_| publishes)?.clone()).ok()
    }
}

impl Ledger {
    /// Says that the process lives, and how it stands. Forgets those that are gone for a day.
    pub async fn process_lives(&self, process: &Process, standing: &serde_json::Value) -> Result<(), sqlx::Error> {
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
        .execute(&self.pool)
        .await
        .map(|_| ())
    }

    /// The process has ended in good order. After an error it is shown as gone for a day.
    pub async fn process_ends(&self, id: Uuid) -> Result<(), sqlx::Error> {
        sqlx::query("delete from process where id = $1").bind(id).execute(&self.pool).await.map(|_| ())
    }

    /// All processes of the last day that did not end in good order.
    pub async fn processes(&self) -> Result<Vec<ProcessRow>, sqlx::Error> {
        sqlx::query_as(
            "select id, host, pid, version, roles, started_at, seen_at, seen_at < clock_timestamp() - make_interval(secs => $1) as gone,
                 seen_at < clock_timestamp() - make_interval(secs => $2) as long_gone, standing
             from process order by host, started_at, id",
        )
        .bind(GONE_SECONDS)
        .bind(LONG_GONE_SECONDS)
        .fetch_all(&self.pool)
        .await
    }
}
