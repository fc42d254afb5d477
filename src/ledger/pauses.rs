//! Operations that operators have paused.

use sqlx::Connection as _;

use chrono::{DateTime, Utc};
use sqlx::{FromRow, PgConnection};

use super::{ActKind, NewAct, Subject, acts};
use crate::event::Topic;
use crate::words::words;

words! {
    /// The operations that can be paused.
    Pausable {
        /// Passes over coderd's database.
        Collect = "collect",
        /// Reading the log.
        Consume = "consume",
        /// Requests to the vendor.
        Publish = "publish",
        /// New export files for finance.
        Export = "export",
    }
}

/// A pause of an operation in all processes, until an operator resumes it.
#[derive(
    Clone, Debug, PartialEq, Eq, FromRow, serde::Serialize, serde::Deserialize, utoipa::ToSchema,
)]
pub struct Pause {
    /// The paused operation.
    pub operation: Pausable,
    /// The paused topic; absent: all topics.
    pub topic: Option<String>,
    /// The operator who paused it.
    pub actor: String,
    /// The reason, in the operator's words.
    pub reason: String,
    /// When the pause began.
    pub since: DateTime<Utc>,
}

pub async fn list(conn: &mut PgConnection) -> Result<Vec<Pause>, sqlx::Error> {
    sqlx::query_as(
        "select operation, nullif(topic, '') as topic, actor, reason, acted_at as since
         from pause join operator_act on operator_act.id = act_id order by operation, topic",
    )
    .fetch_all(conn)
    .await
}

/// Writes a pause and its act. The inner [`Err`] is the pause that already exists; nothing is
/// written.
pub async fn begin(
    conn: &mut PgConnection,
    operation: Pausable,
    topic: Option<Topic>,
    actor: &str,
    reason: &str,
    now: DateTime<Utc>,
) -> Result<Result<Pause, Pause>, sqlx::Error> {
    let mut tx = conn.begin().await?;
    lock(&mut tx).await?;
    let held = list(&mut tx).await?;
    let covers =
        |pause: &&Pause| pause.topic.is_none() || pause.topic.as_deref() == topic.map(Topic::name);
    if let Some(pause) =
        held.into_iter().filter(|pause| pause.operation == operation).find(|pause| covers(&pause))
    {
        return Ok(Err(pause));
    }
    let act = act(ActKind::Pause, operation, topic, actor, reason);
    let act_id = acts::insert(&mut tx, &act, now).await?;
    sqlx::query("insert into pause (operation, topic, act_id) values ($1, $2, $3)")
        .bind(operation.as_str())
        .bind(topic.map_or("", Topic::name))
        .bind(act_id)
        .execute(&mut *tx)
        .await?;
    let since: DateTime<Utc> =
        sqlx::query_scalar("select acted_at from operator_act where id = $1")
            .bind(act_id)
            .fetch_one(&mut *tx)
            .await?;
    tx.commit().await?;
    let topic = topic.map(|topic| topic.name().to_owned());
    Ok(Ok(Pause { operation, topic, actor: actor.to_owned(), reason: reason.to_owned(), since }))
}

/// Ends a pause and writes the act. The inner [`Err`] has the operation's other pauses, if this one
/// does not exist; nothing is written.
pub async fn end(
    conn: &mut PgConnection,
    operation: Pausable,
    topic: Option<Topic>,
    actor: &str,
    reason: &str,
    now: DateTime<Utc>,
) -> Result<Result<Pause, Vec<Pause>>, sqlx::Error> {
    let mut tx = conn.begin().await?;
    lock(&mut tx).await?;
    let mut held = list(&mut tx).await?;
    held.retain(|pause| pause.operation == operation);
    let Some(at) = held.iter().position(|pause| pause.topic.as_deref() == topic.map(Topic::name))
    else {
        return Ok(Err(held));
    };
    acts::insert(&mut tx, &act(ActKind::Resume, operation, topic, actor, reason), now).await?;
    sqlx::query("delete from pause where operation = $1 and topic = $2")
        .bind(operation.as_str())
        .bind(topic.map_or("", Topic::name))
        .execute(&mut *tx)
        .await?;
    tx.commit().await?;
    Ok(Ok(held.swap_remove(at)))
}

/// Allows one change at a time. Readers do not wait.
async fn lock(tx: &mut PgConnection) -> Result<(), sqlx::Error> {
    sqlx::query("lock table pause in share row exclusive mode").execute(tx).await.map(|_| ())
}

fn act<'a>(
    act: ActKind,
    operation: Pausable,
    topic: Option<Topic>,
    actor: &'a str,
    reason: &'a str,
) -> NewAct<'a> {
    NewAct {
        actor,
        act,
        subject: Subject::Named(operation.as_str()),
        reason,
        detail: serde_json::json!({ "topic": topic.map(Topic::name) }),
    }
}
