//! The pauses that a process last read from the ledger, for all its roles.

use tokio::sync::watch;

use crate::event::Topic;
use crate::ledger::{Pausable, Pause};

/// The pauses that this process last read, shared by all clones. They do not change while the
/// ledger cannot be read.
#[derive(Clone, Debug)]
pub struct Paused(watch::Receiver<Vec<Pause>>);

impl Paused {
    /// A sender of pauses and their receiver.
    #[must_use]
    pub fn channel() -> (watch::Sender<Vec<Pause>>, Paused) {
        let (sender, receiver) = watch::channel(Vec::new());
        (sender, Paused(receiver))
    }

    /// A receiver that never has a pause.
    #[must_use]
    pub fn never() -> Paused {
        Paused::channel().1
    }

    #[must_use]
    pub fn all(&self) -> Vec<Pause> {
        self.0.borrow().clone()
    }

    /// The pause of this operation for all topics.
    #[must_use]
    pub fn of(&self, operation: Pausable) -> Option<Pause> {
        self.0
            .borrow()
            .iter()
            .find(|pause| pause.operation == operation && pause.topic.is_none())
            .cloned()
    }

    /// The pause that stops reading this topic.
    #[must_use]
    pub fn of_topic(&self, topic: Topic) -> Option<Pause> {
        let is =
            |pause: &&Pause| pause.topic.as_deref().is_none_or(|paused| paused == topic.name());
        self.0
            .borrow()
            .iter()
            .filter(|pause| pause.operation == Pausable::Consume)
            .find(is)
            .cloned()
    }

    /// Waits until a pause has begun or ended since the last call on this clone.
    pub async fn changed(&mut self) {
        if self.0.changed().await.is_err() {
            // Without a sender the pauses cannot change any more.
            std::future::pending::<()>().await;
        }
    }

    pub async fn resumed(&mut self, operation: Pausable) {
        while self.of(operation).is_some() {
            self.changed().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use chrono::DateTime;

    use super::*;

    fn pause(operation: Pausable, topic: Option<Topic>) -> Pause {
        let topic = topic.map(|topic| topic.name().to_owned());
        Pause {
            operation,
            topic,
            actor: "user-001".into(),
            reason: "a test".into(),
            since: DateTime::UNIX_EPOCH,
        }
    }

    #[test]
    fn a_topic_is_paused_by_its_own_pause_and_by_that_of_all_topics() {
        let (sender, paused) = Paused::channel();
        assert_eq!(paused.of_topic(Topic::AgentUsage), None);
        sender.send_replace(vec![
            pause(Pausable::Publish, None),
            pause(Pausable::Consume, Some(Topic::AgentUsage)),
        ]);
        assert!(paused.of_topic(Topic::AgentUsage).is_some());
        assert_eq!(paused.of_topic(Topic::WorkspaceBuilds), None);
        assert_eq!(paused.of(Pausable::Consume), None, "only one topic is paused");
        assert!(paused.of(Pausable::Publish).is_some());
        sender.send_replace(vec![pause(Pausable::Consume, None)]);
        assert!(Topic::ALL.into_iter().all(|topic| paused.of_topic(topic).is_some()));
        assert_eq!(paused.of(Pausable::Publish), None);
    }
}
