//! coderd's own publish marks in mode `sole`: the newest one at the start, and a later one, which
//! stops publishing.

use chrono::{DateTime, Utc};
use sqlx::Connection as _;
use sqlx::PgConnection;
use uuid::Uuid;

use super::{NewAct, acts};

/// coderd's publish mark; none before its first.
type Mark = Option<DateTime<Utc>>;

/// A source whose publishing has stopped because coderd published by itself.
#[derive(
    Clone,
    Debug,
    PartialEq,
    Eq,
    sqlx::FromRow,
    serde::Serialize,
    serde::Deserialize,
    utoipa::ToSchema,
)]
pub struct PublishStop {
    /// The deployment id of the source.
    pub deployment_id: Uuid,
    /// coderd's newest publish mark.
    pub later_mark: DateTime<Utc>,
    /// When a later mark than the first was first read, by the database's clock.
    pub seen_at: DateTime<Utc>,
}

/// Compares coderd's newest mark with the first one read for this source, which is kept over
/// restarts. Returns the newest mark if it stops publishing.
pub async fn record(
    conn: &mut PgConnection,
    source_id: i16,
    newest: Mark,
) -> Result<Mark, sqlx::Error> {
    let known =
        sqlx::query_as("select first_mark, later_mark from publish_mark where source_id = $1")
            .bind(source_id);
    if let Some((first, later)) = known.fetch_optional(&mut *conn).await?
        && (newest <= first || newest <= later)
    {
        return Ok(later);
    }
    sqlx::query_scalar(
        "insert into publish_mark as known (source_id, first_mark) values ($1, $2)
         on conflict (source_id) do update set
             later_mark = case when $2 > coalesce(known.first_mark, '-infinity') then greatest(known.later_mark, $2) else known.later_mark end,
             seen_at = case when $2 > coalesce(known.first_mark, '-infinity') then coalesce(known.seen_at, clock_timestamp()) else known.seen_at end
         returning later_mark",
    )
    .bind(source_id)
    .bind(newest)
    .fetch_one(&mut *conn)
    .await
}

/// The sources whose publishing has stopped because coderd published by itself.
pub async fn stops(conn: &mut PgConnection) -> Result<Vec<PublishStop>, sqlx::Error> {
    let query = "select deployment_id, later_mark, seen_at from publish_mark join source on source.id = source_id
                 where later_mark is not null order by source_id";
    sqlx::query_as(query).fetch_all(conn).await
}

/// Resumes publishing this deployment's usage. An operator has cut off coderd's own publishing, so
/// its newest mark is the last one. Returns the stop that it ends. None: the deployment has no
/// stop, and nothing is written.
pub async fn end_stop(
    conn: &mut PgConnection,
    deployment: Uuid,
    act: &NewAct<'_>,
    now: DateTime<Utc>,
) -> Result<Option<PublishStop>, sqlx::Error> {
    let mut tx = conn.begin().await?;
    let stop: Option<PublishStop> = sqlx::query_as(
        "select deployment_id, later_mark, seen_at from publish_mark join source on source.id = source_id
         where deployment_id = $1 and later_mark is not null for update of publish_mark",
    )
    .bind(deployment)
    .fetch_optional(&mut *tx)
    .await?;
    let Some(stop) = stop else { return Ok(None) };
    sqlx::query(
        "update publish_mark set first_mark = later_mark, later_mark = null, seen_at = null
         where source_id = (select id from source where deployment_id = $1)",
    )
    .bind(deployment)
    .execute(&mut *tx)
    .await?;
    let act = NewAct { detail: serde_json::json!({ "coderd_cut_off": stop }), ..act.clone() };
    acts::insert(&mut tx, &act, now).await?;
    tx.commit().await?;
    Ok(Some(stop))
}
