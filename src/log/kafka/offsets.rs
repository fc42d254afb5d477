//! Requests for partitions and their offsets.

use std::time::{Duration, Instant};

use chrono::{DateTime, Utc};
use rdkafka::consumer::{BaseConsumer, Consumer as _, ConsumerContext};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::{Offset, TopicPartitionList};

use super::client::KafkaLog;
use super::connection::{blocking, refused};
use crate::event::{Topic, TopicPartition};
use crate::log::LogError;

/// Pause between requests for a partition's leader.
pub(super) const LEADER_PAUSE: Duration = Duration::from_millis(50);

impl KafkaLog {
    pub(in crate::log) async fn partitions(&self, topic: Topic) -> Result<Vec<i32>, LogError> {
        self.request(move |log, client| {
            let name = log.topic_name(topic);
            let metadata = client
                .fetch_metadata(Some(&name), log.settings.request_deadline)
                .map_err(|error| refused(topic, &error))?;
            let mut partitions: Vec<i32> = metadata
                .topics()
                .iter()
                .flat_map(|topic| topic.partitions())
                .map(|partition| partition.id())
                .collect();
            partitions.sort_unstable();
            if partitions.is_empty() { Err(LogError::NoTopic(topic)) } else { Ok(partitions) }
        })
        .await
    }

    pub(in crate::log) async fn watermarks(
        &self,
        partition: TopicPartition,
    ) -> Result<(i64, i64), LogError> {
        let log = self.clone();
        blocking(move || log.watermarks_now(partition)).await
    }

    /// Blocks until the broker answers; only for threads that may block.
    pub(super) fn watermarks_now(&self, partition: TopicPartition) -> Result<(i64, i64), LogError> {
        self.watermarks_by(
            &*self.shared_client(&self.uncommitted_client, "read_uncommitted")?,
            partition,
        )
    }

    pub(in crate::log) async fn readable_end(
        &self,
        partition: TopicPartition,
    ) -> Result<i64, LogError> {
        let log = self.clone();
        blocking(move || log.readable_now(partition).map(|(_, end)| end)).await
    }

    /// The watermarks for readers of committed records. Blocks until the broker answers; only for
    /// threads that may block.
    pub(super) fn readable_now(&self, partition: TopicPartition) -> Result<(i64, i64), LogError> {
        self.watermarks_by(
            &*self.shared_client(&self.committed_client, "read_committed")?,
            partition,
        )
    }

    /// The watermarks according to the client's isolation level.
    pub(super) fn watermarks_by<C: ConsumerContext>(
        &self,
        client: &BaseConsumer<C>,
        partition: TopicPartition,
    ) -> Result<(i64, i64), LogError> {
        let name = self.topic_name(partition.topic);
        self.request_from_leader(client, partition, || {
            client.fetch_watermarks(&name, partition.partition, self.settings.request_deadline)
        })
    }

    pub(in crate::log) async fn offset_at(
        &self,
        partition: TopicPartition,
        time: DateTime<Utc>,
    ) -> Result<i64, LogError> {
        self.request(move |log, client| {
            // Kafka uses whole milliseconds and treats negative ones as special values.
            let millis = time.timestamp_millis()
                + i64::from(!time.timestamp_subsec_nanos().is_multiple_of(1_000_000));
            let name = log.topic_name(partition.topic);
            let found = log.request_from_leader(client, partition, || {
                let mut times = TopicPartitionList::new();
                times.add_partition_offset(
                    &name,
                    partition.partition,
                    Offset::Offset(millis.max(0)),
                )?;
                let found = client.offsets_for_times(times, log.settings.request_deadline)?;
                let elements = found.elements();
                let element = elements
                    .first()
                    .ok_or(KafkaError::OffsetFetch(RDKafkaErrorCode::UnknownPartition))?;
                element.error().map(|()| element.offset())
            })?;
            match found {
                Offset::Offset(offset) => Ok(offset),
                _ => log.watermarks_by(client, partition).map(|(_, end)| end),
            }
        })
        .await
    }

    /// Retries while the brokers have not agreed on the partition's leader, as after the creation
    /// of a topic. For an unknown partition it refreshes the client's metadata once, because the
    /// client may long treat the topic as missing.
    fn request_from_leader<C: ConsumerContext, T>(
        &self,
        client: &BaseConsumer<C>,
        partition: TopicPartition,
        question: impl Fn() -> Result<T, KafkaError>,
    ) -> Result<T, LogError> {
        use RDKafkaErrorCode as Code;
        let (begun, deadline) = (Instant::now(), self.settings.request_deadline);
        let mut looked_up = false;
        loop {
            let error = match question() {
                Ok(answer) => return Ok(answer),
                Err(error) => error,
            };
            match error.rdkafka_error_code() {
                Some(Code::LeaderNotAvailable | Code::NotLeaderForPartition)
                    if begun.elapsed() < deadline =>
                {
                    std::thread::sleep(LEADER_PAUSE);
                }
                Some(
                    Code::UnknownTopic | Code::UnknownPartition | Code::UnknownTopicOrPartition,
                ) if !looked_up => {
                    looked_up = true;
                    client
                        .fetch_metadata(Some(&self.topic_name(partition.topic)), deadline)
                        .map_err(|error| refused(partition.topic, &error))?;
                }
                _ => return Err(refused(partition.topic, &error)),
            }
        }
    }
}
