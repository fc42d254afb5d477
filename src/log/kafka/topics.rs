//! Creates missing topics on Kafka, and compares existing ones with the required settings.

use std::time::{Duration, Instant};

use rdkafka::admin::{
    AdminClient, AdminOptions, ConfigResource, NewTopic, ResourceSpecifier, TopicReplication,
};
use rdkafka::consumer::Consumer as _;
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use tracing::info;

use super::client::KafkaLog;
use super::connection::{Connection, refused};
use super::offsets::LEADER_PAUSE;
use crate::event::{Topic, TopicPartition};
use crate::log::{LogError, RETENTION_DAYS};

const DAY_MS: i64 = 24 * 60 * 60 * 1000;

impl KafkaLog {
    pub(in crate::log) async fn create_topics(
        &self,
        partitions: i32,
    ) -> Result<Vec<String>, LogError> {
        let counts = self.partition_counts().await?;
        let admin = self.admin("topic creation")?;
        let mut drift = Vec::new();
        for (topic, count) in counts {
            match count {
                None if self.create_topic(&admin, topic, partitions).await? => {}
                None => {
                    // Another process created the topic first. Different settings are reported as
                    // drift.
                    self.await_leaders(topic, 1).await?;
                    let count = self.partitions(topic).await?.len();
                    drift.extend(self.drift(&admin, topic, count, partitions).await?);
                }
                Some(count) => drift.extend(self.drift(&admin, topic, count, partitions).await?),
            }
        }
        Ok(drift)
    }

    /// The number of partitions of each topic; none if it does not exist. It lists all topics,
    /// because a request by name may create one.
    async fn partition_counts(&self) -> Result<Vec<(Topic, Option<usize>)>, LogError> {
        self.request(|log, client| {
            let metadata = client
                .fetch_metadata(None, log.settings.request_deadline)
                .map_err(|error| refused(Topic::WorkspaceBuilds, &error))?;
            let count = |topic: Topic| {
                let name = log.topic_name(topic);
                metadata
                    .topics()
                    .iter()
                    .find(|found| found.name() == name)
                    .map(|found| found.partitions().len())
            };
            Ok(Topic::ALL.map(|topic| (topic, count(topic))).into())
        })
        .await
    }

    /// Creates the topic. Record times are the broker's, so that a producer's wrong clock does not
    /// affect retention. False: the topic already exists.
    async fn create_topic(
        &self,
        admin: &AdminClient<Connection>,
        topic: Topic,
        partitions: i32,
    ) -> Result<bool, LogError> {
        let (name, retention) = (self.topic_name(topic), (RETENTION_DAYS * DAY_MS).to_string());
        let wanted =
            NewTopic::new(&name, partitions, TopicReplication::Fixed(self.settings.replication))
                .set("retention.ms", &retention)
                .set("retention.bytes", "-1")
                .set("cleanup.policy", "delete")
                .set("message.timestamp.type", "LogAppendTime");
        let answers = admin
            .create_topics(&[wanted], &self.admin_options())
            .await
            .map_err(|error| refused(topic, &error))?;
        match answers.into_iter().next() {
            Some(Err((_, RDKafkaErrorCode::TopicAlreadyExists))) => Ok(false),
            Some(Ok(_)) => {
                info!(topic = name, partitions, retention_days = RETENTION_DAYS, "topic created");
                self.await_leaders(topic, partitions).await.map(|()| true)
            }
            Some(Err((_, code))) => Err(refused(topic, &KafkaError::AdminOp(code))),
            None => Err(LogError::Refused(format!("Kafka returned no result for topic {name}"))),
        }
    }

    /// Waits until each partition of a new topic has a leader that knows the partition. Then the
    /// topic is usable.
    async fn await_leaders(&self, topic: Topic, partitions: i32) -> Result<(), LogError> {
        self.request(move |log, client| {
            let begun = Instant::now();
            for partition in 0..partitions {
                while let Err(error) =
                    log.watermarks_by(client, TopicPartition { topic, partition })
                {
                    if error != LogError::NoTopic(topic)
                        || begun.elapsed() >= log.settings.request_deadline
                    {
                        return Err(error);
                    }
                    std::thread::sleep(LEADER_PAUSE);
                }
            }
            Ok(())
        })
        .await
    }

    /// Reads the topic's own settings. Compaction alone has no time limit.
    pub(in crate::log) async fn keeps_unread(
        &self,
        topic: Topic,
    ) -> Result<Option<Duration>, LogError> {
        let config = self.topic_config(&self.admin("topic retention")?, topic).await?;
        let value = |key: &str| config.get(key).and_then(|entry| entry.value.clone());
        if !value("cleanup.policy").is_none_or(|policy| policy.contains("delete")) {
            return Ok(None);
        }
        // -1 means unlimited.
        Ok(value("retention.ms").and_then(|millis| millis.parse().ok()).map(Duration::from_millis))
    }

    fn admin(&self, role: &'static str) -> Result<AdminClient<Connection>, LogError> {
        self.client(&self.config(&[]), Connection::new(role))
    }

    async fn topic_config(
        &self,
        admin: &AdminClient<Connection>,
        topic: Topic,
    ) -> Result<ConfigResource, LogError> {
        let name = self.topic_name(topic);
        let answers = admin
            .describe_configs(&[ResourceSpecifier::Topic(&name)], &self.admin_options())
            .await
            .map_err(|error| refused(topic, &error))?;
        match answers.into_iter().next() {
            Some(Ok(config)) => Ok(config),
            Some(Err(code)) => Err(refused(topic, &KafkaError::AdminOp(code))),
            None => Err(LogError::Refused(format!("Kafka returned no result for topic {name}"))),
        }
    }

    async fn drift(
        &self,
        admin: &AdminClient<Connection>,
        topic: Topic,
        count: usize,
        wanted: i32,
    ) -> Result<Vec<String>, LogError> {
        let (name, config) = (self.topic_name(topic), self.topic_config(admin, topic).await?);
        let mut lines = Vec::new();
        if i64::try_from(count) != Ok(i64::from(wanted)) {
            lines.push(format!("{name}: {count} partitions, expected {wanted}"));
        }
        lines.extend(retention_drift(&name, &config));
        Ok(lines)
    }

    fn admin_options(&self) -> AdminOptions {
        let deadline = self.settings.request_deadline;
        AdminOptions::new().request_timeout(Some(deadline)).operation_timeout(Some(deadline))
    }
}

/// The settings with which the topic may lose records earlier than required. Unlimited (-1) is
/// longer than any limit.
fn retention_drift(name: &str, config: &ConfigResource) -> Vec<String> {
    let value = |key: &str| config.get(key).and_then(|entry| entry.value.clone());
    let number = |key: &str| value(key).and_then(|text| text.parse::<i64>().ok());
    let mut lines = Vec::new();
    if let Some(millis) =
        number("retention.ms").filter(|millis| (0..RETENTION_DAYS * DAY_MS).contains(millis))
    {
        lines.push(format!(
            "{name}: retention.ms is {millis}, expected at least {} ({RETENTION_DAYS} days)",
            RETENTION_DAYS * DAY_MS
        ));
    }
    if let Some(bytes) = number("retention.bytes").filter(|bytes| *bytes >= 0) {
        lines.push(format!("{name}: retention.bytes is {bytes}, which can remove records before {RETENTION_DAYS} days; expected -1"));
    }
    if let Some(policy) = value("cleanup.policy").filter(|policy| policy != "delete") {
        lines.push(format!("{name}: cleanup.policy is {policy}, expected delete"));
    }
    lines
}
