//! What operators have stopped for now: rows of `pause`, and what a process last heard of them.

use std::fmt;

use chrono::{DateTime, Utc};
use sqlx::{FromRow, PgConnection};
use tokio::sync::watch;

use super::{ActKind, Ledger, NewAct, Subject};
use crate::event::Topic;
use crate::words::words;

words! {
    /// What can be paused.
    Pausable {
        /// Passes over coderd's database.
        Collect = "collect",
        /// Reading the log.
        Consume = "consume",
        /// Requests to the vendor.
        Publish = "publish",
        /// New files for finance.
        Export = "export",
    }
}

/// A pause that holds in all processes until somebody ends it.
#[derive(Clone, Debug, PartialEq, Eq, FromRow, serde::Serialize, serde::Deserialize, utoipa::ToSchema)]
pub struct Pause {
    /// What stands still.
    pub operation: Pausable,
    /// Of which topic; none: of all.
    pub topic: Option<String>,
    /// Who paused it.
    pub actor: String,
    /// Why, in the actor's words.
    pub reason: String,
    /// Since when.
    pub since: DateTime<Utc>,
}

impl fmt::Display for Pause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let of = self.topic.as_ref().map(|topic| format!(" of {topic}")).unwrap_or_default();
        let since = self.since.to_rfc3339_opts(chrono::SecondsFormat::Secs, true);
        write!(f, "{}{of} is paused by {} since {since}: {}", self.operation.as_str(), self.actor, self.reason)
    }
}

/// What is paused, as this process last heard. All clones hear the same. Where the ledger cannot be asked, nothing changes.
#[derive(Clone, Debug)]
pub struct Paused(watch::Receiver<Vec<Pause>>);

impl Paused {
    /// What is told to the sender.
    #[must_use]
    pub fn told() -> (watch::Sender<Vec<Pause>>, Paused) {
        let (tell, told) = watch::channel(Vec::new());
        (tell, Paused(told))
    }

    /// Nothing is paused, ever.
    #[must_use]
    pub fn never() -> Paused {
        Paused::told().1
    }

    /// All pauses.
    #[must_use]
    pub fn all(&self) -> Vec<Pause> {
        self.0.borrow().clone()
    }

    /// The pause of this operation, for all topics.
    #[must_use]
    pub fn of(&self, operation: Pausable) -> Option<Pause> {
        self.0.borrow().iter().find(|pause| pause.operation == operation && pause.topic.is_none()).cloned()
    }

    /// The pause that keeps this topic from being read.
    #[must_use]
    pub fn of_topic(&self, topic: Topic) -> Option<Pause> {
        let is = |pause: &&Pause| pause.topic.as_deref().is_none_or(|paused| paused == topic.name());
        self.0.borrow().iter().filter(|pause| pause.operation == Pausable::Consume).find(is).cloned()
    }

    /// Waits until something was paused or resumed since the last call on this clone.
    pub async fn changed(&mut self) {
        if self.0.changed().await.is_err() {
            // nobody tells any more: nothing changes
            std::future::pending::<()>().await;
        }
    }

    /// Waits until the operation is not paused.
    pub async fn resumed(&mut self, operation: Pausable) {
        while self.of(operation).is_some() {
            self.changed().await;
        }
    }
}

impl Ledger {
    /// All pauses.
    pub async fn pauses(&self) -> Result<Vec<Pause>, sqlx::Error> {
        pauses(&mut *self.pool.acquire().await?).await
    }

    /// Writes a pause and its act. [`Err`] inside: the pause that holds already; then nothing is written.
    pub async fn pause(
        &self,
        operation: Pausable,
        topic: Option<Topic>,
        actor: &str,
        reason: &str,
    ) -> Result<Result<Pause, Pause>, sqlx::Error> {
        let mut tx = self.pool.begin().await?;
        lock(&mut tx).await?;
        let held = pauses(&mut tx).await?;
        let covers = |pause: &&Pause| pause.topic.is_none() || pause.topic.as_deref() == topic.map(Topic::name);
        if let Some(pause) = held.into_iter().filter(|pause| pause.operation == operation).find(|pause| covers(&pause)) {
            return Ok(Err(pause));
        }
        let act = act(ActKind::Pause, operation, topic, actor, reason);
        let act_id = self.act(&mut tx, &act).await?;
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

    /// Ends a pause and writes the act. [`Err`] inside: it is not there, and these of the same operation are; then nothing is written.
    pub async fn resume(
        &self,
        operation: Pausable,
        topic: Option<Topic>,
        actor: &str,
        reason: &str,
    ) -> Result<Result<Pause, Vec<Pause>>, sqlx::Error> {
        let mut tx = self.pool.begin().await?;
        lock(&mut tx).await?;
        let mut held = pauses(&mut tx).await?;
        held.retain(|pause| pause.operation == operation);
        let Some(at) = held.iter().position(|pause| pause.topic.as_deref() == topic.map(Topic::name)) else { return Ok(Err(held)) };
        self.act(&mut tx, &act(ActKind::Resume, operation, topic, actor, reason)).await?;
        sqlx::query("delete from pause where operation = $1 and topic = $2")
            .bind(operation.as_str())
            .bind(topic.map_or("", Topic::name))
            .execute(&mut *tx)
            .await?;
        tx.commit().await?;
        Ok(Ok(held.swap_remove(at)))
    }
}

/// One change at a time; who only looks does not wait.
async fn lock(tx: &mut PgConnection) -> Result<(), sqlx::Error> {
    sqlx::query("lock table pause in share row exclusive mode").execute(tx).await.map(|_| ())
}

async fn pauses(connection: &mut PgConnection) -> Result<Vec<Pause>, sqlx::Error> {
    sqlx::query_as(
        "select operation, nullif(topic, '') as topic, actor, reason, acted_at as since
         from pause join operator_act on operator_act.id = act_id order by operation, topic",
    )
    .fetch_all(connection)
    .await
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
