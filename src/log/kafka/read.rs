//! Reads a partition of Kafka without a group, through a few readers that are kept and continue at
//! their last offset.

use std::time::{Duration, Instant};

use rdkafka::Message as _;
use rdkafka::consumer::Consumer as _;
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::{ClientConfig, Offset, TopicPartitionList};

use super::client::KafkaLog;
use super::connection::{Connection, blocking, refused};
use super::readers::Reader;
use super::records::record_of;
use super::unreadable::{self, unreadable};
use crate::event::TopicPartition;
use crate::log::{LogError, Record};

impl KafkaLog {
    pub(in crate::log) async fn read(
        &self,
        partition: TopicPartition,
        from: i64,
        limit: usize,
    ) -> Result<Vec<Record>, LogError> {
        let log = self.clone();
        blocking(move || log.read_now(partition, from, limit)).await
    }

    /// Blocks until the broker answers; only for threads that may block.
    pub(super) fn read_now(
        &self,
        partition: TopicPartition,
        from: i64,
        limit: usize,
    ) -> Result<Vec<Record>, LogError> {
        let (start, readable) = self.readable_now(partition)?;
        if from < start || from > readable {
            let (start, end) = self.watermarks_now(partition)?;
            if from < start || from > end {
                return Err(LogError::OutOfRange { partition, offset: from, start, end });
            }
        }
        if from >= readable || limit == 0 {
            return Ok(Vec::new());
        }
        let kept = self.readers.take(partition, from);
        let mut reader = kept.map_or_else(|| Reader::new(self), Ok)?;
        let records = reader.read(self, partition, from, limit, readable)?;
        self.readers.keep(reader);
        Ok(records)
    }
}

impl KafkaLog {
    /// The configuration of a reader. librdkafka requires a group name to assign partitions, but no
    /// offset is committed to that group.
    ///
    /// A reader at the end has an open request, and its next request waits for that answer. A
    /// reader therefore reads only where records exist, so that the broker need not wait for more.
    ///
    /// Checksums are verified: a batch that then cannot be unpacked was appended in that form.
    pub(super) fn reader_config(&self) -> ClientConfig {
        let defaults = [
            ("fetch.wait.max.ms", "5"),
            ("queued.max.messages.kbytes", "4096"),
            ("fetch.error.backoff.ms", "20"),
        ];
        let mut config = self.config(&defaults);
        config
            .set("check.crcs", "true")
            .set("group.id", format!("{}tallyline-reader", self.settings.topic_prefix))
            .set("enable.auto.commit", "false")
            .set("enable.auto.offset.store", "false")
            .set("auto.offset.reset", "error")
            .set("enable.partition.eof", "true");
        config
    }
}

impl Reader {
    fn new(log: &KafkaLog) -> Result<Reader, LogError> {
        Ok(Reader {
            consumer: log.client(&log.reader_config(), Connection::new("reader"))?,
            at: None,
        })
    }

    /// Reads records before `end`. After an error the reader is not used again.
    fn read(
        &mut self,
        log: &KafkaLog,
        partition: TopicPartition,
        from: i64,
        limit: usize,
        end: i64,
    ) -> Result<Vec<Record>, LogError> {
        let mut fresh = self.at != Some((partition, from));
        if fresh {
            self.assign(log, partition, from)?;
        }
        let (mut records, mut next) = (Vec::with_capacity(limit.min(5000)), from);
        let mut deadline = Instant::now() + log.settings.request_deadline;
        while records.len() < limit && next < end {
            match self.consumer.poll(Duration::from_millis(100)) {
                Some(Ok(found)) if found.offset() >= end => next = end,
                Some(Ok(found)) => {
                    next = found.offset() + 1;
                    records.push(record_of(&found));
                    if records.len() % 1000 == 0 {
                        deadline = Instant::now() + log.settings.request_deadline;
                    }
                }
                // Offsets can be missing before the end. A kept reader may have recorded an earlier
                // end, so that it must check again.
                Some(Err(KafkaError::PartitionEOF(_))) if fresh => next = end,
                Some(Err(KafkaError::PartitionEOF(_))) => {
                    self.assign(log, partition, next)?;
                    fresh = true;
                }
                Some(Err(KafkaError::MessageConsumption(
                    RDKafkaErrorCode::AutoOffsetReset | RDKafkaErrorCode::OffsetOutOfRange,
                ))) => {
                    let (start, end) = log.watermarks_now(partition)?;
                    return Err(LogError::OutOfRange { partition, offset: next, start, end });
                }
                Some(Err(error))
                    if error.rdkafka_error_code()
                        == Some(RDKafkaErrorCode::UnknownTopicOrPartition) =>
                {
                    return Err(LogError::NoTopic(partition.topic));
                }
                Some(Err(error)) if unreadable(&error) => {
                    match self.unreadable_batch(log, partition, next, end)? {
                        Some((first, last)) => {
                            records.push(unreadable::record(first, last));
                            next = last + 1;
                            self.seek(log, partition, next)?;
                        }
                        None => next = end,
                    }
                    (fresh, deadline) = (true, Instant::now() + log.settings.request_deadline);
                }
                Some(Err(_)) | None if Instant::now() < deadline => {}
                Some(Err(error)) => return Err(refused(partition.topic, &error)),
                None => {
                    return Err(LogError::Unreachable(format!(
                        "{partition}: no records within the deadline"
                    )));
                }
            }
        }
        self.rest(partition, next, end)?;
        Ok(records)
    }

    /// The first and the last offset of the unreadable batch at `next`. None if it begins at `end`
    /// or later.
    ///
    /// A broker answers a request for any offset of a batch with the whole batch. If librdkafka
    /// cannot unpack it, it reports the first offset. This tries later offsets to find the last
    /// one.
    fn unreadable_batch(
        &self,
        log: &KafkaLog,
        partition: TopicPartition,
        next: i64,
        end: i64,
    ) -> Result<Option<(i64, i64)>, LogError> {
        let damaged = |offset| LogError::Unreadable { partition, offset };
        let first = self.consumer.context().not_unpacked().ok_or_else(|| damaged(next))?;
        if first >= end {
            return Ok(None);
        }
        let last = unreadable::last_inside(first.max(next), end, |offset| {
            let found = self.batch_at(log, partition, offset)?;
            Ok(found == Some(first))
        })?;
        Ok(Some((first, last)))
    }

    /// The first offset of the batch at this offset if it cannot be unpacked; none if a record or
    /// the partition's end follows.
    fn batch_at(
        &self,
        log: &KafkaLog,
        partition: TopicPartition,
        offset: i64,
    ) -> Result<Option<i64>, LogError> {
        self.seek(log, partition, offset)?;
        let deadline = Instant::now() + log.settings.request_deadline;
        loop {
            match self.consumer.poll(Duration::from_millis(100)) {
                Some(Ok(_) | Err(KafkaError::PartitionEOF(_))) => return Ok(None),
                Some(Err(error)) if unreadable(&error) => {
                    let first = self.consumer.context().not_unpacked();
                    return first.map(Some).ok_or(LogError::Unreadable { partition, offset });
                }
                Some(Err(_)) | None if Instant::now() < deadline => {}
                Some(Err(error)) => return Err(refused(partition.topic, &error)),
                None => {
                    return Err(LogError::Unreachable(format!(
                        "{partition}: no records within the deadline"
                    )));
                }
            }
        }
    }

    fn assign(
        &mut self,
        log: &KafkaLog,
        partition: TopicPartition,
        from: i64,
    ) -> Result<(), LogError> {
        let mut list = TopicPartitionList::new();
        list.add_partition_offset(
            &log.topic_name(partition.topic),
            partition.partition,
            Offset::Offset(from),
        )
        .and_then(|()| self.consumer.assign(&list))
        .map_err(|error| refused(partition.topic, &error))
    }

    /// Moves a reader that has received an answer. librdkafka crashes if a partition is assigned
    /// twice before it has stopped.
    fn seek(&self, log: &KafkaLog, partition: TopicPartition, to: i64) -> Result<(), LogError> {
        let name = log.topic_name(partition.topic);
        self.consumer
            .seek(&name, partition.partition, Offset::Offset(to), log.settings.request_deadline)
            .map_err(|error| refused(partition.topic, &error))
    }

    /// At the end the reader stops fetching until the next read; before the end it prefetches
    /// the next records.
    fn rest(&mut self, partition: TopicPartition, next: i64, end: i64) -> Result<(), LogError> {
        self.at = (next < end).then_some((partition, next));
        if self.at.is_none() {
            self.consumer.unassign().map_err(|error| refused(partition.topic, &error))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::log::KafkaSettings;

    #[test]
    fn properties_override_the_defaults_of_a_reader() {
        let config = |properties: &[(&str, &str)]| {
            let properties = properties
                .iter()
                .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
                .collect();
            KafkaLog::new(KafkaSettings { properties, ..KafkaSettings::new("127.0.0.1:1") })
                .unwrap()
                .reader_config()
        };
        let (defaults, overridden) = (
            config(&[]),
            config(&[("fetch.wait.max.ms", "70"), ("queued.max.messages.kbytes", "900")]),
        );
        assert_eq!(
            (defaults.get("fetch.wait.max.ms"), defaults.get("queued.max.messages.kbytes")),
            (Some("5"), Some("4096"))
        );
        assert_eq!(
            (overridden.get("fetch.wait.max.ms"), overridden.get("queued.max.messages.kbytes")),
            (Some("70"), Some("900"))
        );
    }
}
