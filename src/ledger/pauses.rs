//! Operations that operators have paused: the rows of `pause`, and the pauses that a process last read.

use sqlx::Connection as _;
use std::fmt;

use chrono::{DateTime, Utc};
use sqlx::{FromRow, PgConnection};
use tokio::sync::watch;

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
#[derive(Clone, Debug, PartialEq, Eq, FromRow, serde::Serialize, serde::Deserialize, utoipa::ToSchema)]
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

impl fmt::Display for Pause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let of = self.topic.as_ref().map(|topic| format!(" of {topic}")).unwrap_or_default();
        let since = self.since.to_rfc3339_opts(chrono::SecondsFormat::Secs, true);
        write!(f, "{}{of} is paused by {} since {since}: {}", self.operation.as_str(), self.actor, self.reason)
    }
}

/// The pauses that this process last read, shared by all clones. They do not change while the ledger cannot be read.
#[derive(Clone, Debug)]
pub struct Paused(watch::Receiver<Vec<Pause>>);

impl Paused {
    /// A sender of pauses and their receiver.
    #[must_use]
    pub fn told() -> (watch::Sender<Vec<Pause>>, Paused) {
        let (tell, told) = watch::channel(Vec::new());
        (tell, Paused(told))
    }

    /// A receiver that never has a pause.
    #[must_use]
    pub fn never() -> Paused {
        Paused::told().1
    }

    #[must_use]
    pub fn all(&self) -> Vec<Pause> {
        self.0.borrow().clone()
    }

    /// The pause of this operation for all topics.
    #[must_use]
    pub fn of(&self, operation: Pausable) -> Option<Pause> {
        self.0.borrow().iter().find(|pause| pause.operation == operation && pause.topic.is_none()).cloned()
    }

    /// The pause that stops reading this topic.
    #[must_use]
    pub fn of_topic(&self, topic: Topic) -> Option<Pause> {
        let is = |pause: &&Pause| pause.topic.as_deref().is_none_or(|paused| paused == topic.name());
        self.0.borrow().iter().filter(|pause| pause.operation == Pausable::Consume).find(is).cloned()
    }

    /// Waits until a pause has begun or ended since the last call on this clone.
    pub async fn changed(&mut self) {
        if self.0.changed().await.is_err() {
            // The sender is gone: the pauses cannot change any more.
            std::future::pending::<()>().await;
        }
    }

    pub async fn resumed(&mut self, operation: Pausable) {
        while self.of(operation).is_some() {
            self.changed().await;
        }
    }
}

pub async fn list(conn: &mut PgConnection) -> Result<Vec<Pause>, sqlx::Error> {
    sqlx::query_as(
        "select operation, nullif(topic, '') as topic, actor, reason, acted_at as since
         from pause join operator_act on operator_act.id = act_id order by operation, topic",
    )
    .fetch_all(conn)
    .await
}

/// Writes a pause and its act. The inner [`Err`] is the pause that already exists; nothing is written.
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
    let covers = |pause: &&Pause| pause.topic.is_none() || pause.topic.as_deref() == topic.map(Topic::name);
    if let Some(pause) = held.into_iter().filter(|pause| pause.operation == operation).find(|pause| covers(&pause)) {
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
        sqlx::query_scalar("select acted_at from operator_act where id = $1").bind(act_id).fetch_one(&mut *tx).await?;
    tx.commit().await?;
    let topic = topic.map(|topic| topic.name().to_owned());
    Ok(Ok(Pause { operation, topic, actor: actor.to_owned(), reason: reason.to_owned(), since }))
}

/// Ends a pause and writes the act. The inner [`Err`] has the operation's other pauses, if this one does not exist; nothing is written.
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
    let Some(at) = held.iter().position(|pause| pause.topic.as_deref() == topic.map(Topic::name)) else { return Ok(Err(held)) };
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

fn act<'a>(act: ActKind, operation: Pausable, topic: Option<Topic>, actor: &'a str, reason: &'a str) -> NewAct<'a> {
    NewAct {
        actor,
        act,
        subject: Subject::Named(operation.as_str()),
        reason,
        detail: serde_json::json!({ "topic": topic.map(Topic::name) }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pause(operation: Pausable, topic: Option<Topic>) -> Pause {
        let topic = topic.map(|topic| topic.name().to_owned());
        Pause { operation, topic, actor: "user-001".into(), reason: "a test".into(), since: DateTime::UNIX_EPOCH }
    }

    #[test]
    fn a_topic_stands_still_with_its_own_pause_and_with_that_of_all() {
        let (tell, paused) = Paused::told();
        assert_eq!(paused.of_topic(Topic::AgentUsage), None);
        tell.send_replace(vec![pause(Pausable::Publish, None), pause(Pausable::Consume, Some(Topic::AgentUsage))]);
        assert!(paused.of_topic(Topic::AgentUsage).is_some());
        assert_eq!(paused.of_topic(Topic::WorkspaceBuilds), None);
        assert_eq!(paused.of(Pausable::Consume), None, "not all of it");
        assert!(paused.of(Pausable::Publish).is_some());
        tell.send_replace(vec![pause(Pausable::Consume, None)]);
        assert!(Topic::ALL.into_iter().all(|topic| paused.of_topic(topic).is_some()));
        assert_eq!(paused.of(Pausable::Publish), None);
    }

    #[test]
    fn a_pause_says_who_since_when_and_why() {
        let one = pause(Pausable::Consume, Some(Topic::AgentUsage));
        assert_eq!(one.to_string(), "consume of tallyline.agent-usage.v1 is paused by user-001 since 1970-01-01T00:00:00Z: a test");
    }
}
