//! Faults of a partition: an offset that is not in the log, and a batch that cannot be read.

use rdkafka::Offset;
use rdkafka::consumer::Consumer as _;
use rdkafka::error::KafkaError;
use tracing::warn;

use super::{Member, Run};
use crate::event::TopicPartition;
use crate::log::consumer::BackendEvent;
use crate::log::{LogError, Record};

impl Member {
    /// Finds the partition whose offset is not in the log, because librdkafka does not report which
    /// one it is.
    pub(super) fn find_out_of_range(&mut self) {
        let running = self.without_fault();
        let mut found = false;
        for (partition, run) in &running {
            let Ok((start, end)) = self.log.watermarks_now(*partition) else { continue };
            if !(start..=end).contains(&run.next) {
                found = true;
                let error =
                    LogError::OutOfRange { partition: *partition, offset: run.next, start, end };
                self.fault(*partition, *run, error);
            }
        }
        if !found {
            // librdkafka has stopped that partition nevertheless.
            warn!(
                "Kafka reported an offset out of range, but all are in range; restarting partitions"
            );
            self.assign(&running.iter().map(|(partition, _)| *partition).collect::<Vec<_>>());
        }
    }

    /// Finds the partition whose batch cannot be read, because librdkafka does not report it. A
    /// reader also finds the end of the batch.
    pub(super) fn find_unreadable(&mut self, error: &KafkaError) {
        let first = self.client.context().connection.not_unpacked();
        let mut running = self.without_fault();
        running.sort_by_key(|(_, run)| first.map(|first| first.abs_diff(run.next)));
        for (partition, run) in running {
            match self.log.read_now(partition, run.next, 1) {
                Ok(records) => {
                    if let Some(record) = records
                        .into_iter()
                        .find(|record| record.message.unreadable_batch().is_some())
                    {
                        return self.step_over(partition, run, record);
                    }
                }
                Err(error @ LogError::Unreadable { .. }) => {
                    self.fault(partition, run, error);
                    return self.release(&[partition]);
                }
                Err(_) => {}
            }
        }
        // librdkafka encounters the batch again.
        self.client.context().connection.faulted(error, "while polling");
    }

    fn without_fault(&self) -> Vec<(TopicPartition, Run)> {
        self.running
            .iter()
            .filter(|(_, run)| !run.faulted)
            .map(|(partition, run)| (*partition, *run))
            .collect()
    }

    fn fault(&mut self, partition: TopicPartition, run: Run, error: LogError) {
        self.running.insert(partition, Run { faulted: true, ..run });
        self.waiting.extend(self.batches.take(partition));
        self.waiting.push_back(BackendEvent::Fault { run: run.number, partition, error });
    }

    /// Continues after a batch that cannot be read.
    fn step_over(&mut self, partition: TopicPartition, run: Run, record: Record) {
        let (name, next) = (self.log.topic_name(partition.topic), record.offset + 1);
        if let Err(error) = self.client.seek(
            &name,
            partition.partition,
            Offset::Offset(next),
            self.log.settings.request_deadline,
        ) {
            // librdkafka encounters the batch again.
            return warn!(%partition, %error, "batch not stepped over");
        }
        let batch = record.message.unreadable_batch().unwrap_or_default();
        warn!(%partition, batch, "batch cannot be unpacked: it becomes one reject");
        self.running.insert(partition, Run { next, ..run });
        self.waiting.extend(self.batches.add(partition, run.number, record));
    }
}
