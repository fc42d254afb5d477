//! Settings that operators have chosen in the ledger. They take precedence over the pipeline file.

use chrono::{DateTime, Utc};
use sqlx::Connection as _;
use sqlx::PgConnection;

use super::{NewAct, acts};

/// The choice of the license rules. Its values are names of rule sets.
pub const LICENSE_RULES: &str = "license.rules";

/// The value chosen under that name, if any.
pub async fn get(conn: &mut PgConnection, name: &str) -> Result<Option<String>, sqlx::Error> {
    sqlx::query_scalar("select value from choice where name = $1")
        .bind(name)
        .fetch_optional(conn)
        .await
}

/// Chooses that value and writes the act.
pub async fn set(
    conn: &mut PgConnection,
    name: &str,
    value: &str,
    act: &NewAct<'_>,
    now: DateTime<Utc>,
) -> Result<(), sqlx::Error> {
    let mut tx = conn.begin().await?;
    let act_id = acts::insert(&mut tx, act, now).await?;
    sqlx::query(
        "insert into choice (name, value, act_id) values ($1, $2, $3)
         on conflict (name) do update set value = excluded.value, act_id = excluded.act_id",
    )
    .bind(name)
    .bind(value)
    .bind(act_id)
    .execute(&mut *tx)
    .await?;
    tx.commit().await
}
