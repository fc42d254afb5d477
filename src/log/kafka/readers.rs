//! The idle readers of the log, which continue at their last offsets.

use std::sync::{Mutex, PoisonError};

use rdkafka::consumer::BaseConsumer;

use super::connection::Connection;
use crate::event::TopicPartition;

/// Maximum number of idle readers kept. Each has up to a full fetch queue.
const KEPT_READERS: usize = 4;

#[derive(Default)]
pub(super) struct Readers(Mutex<Vec<Reader>>);

/// A consumer without a group, and its position.
pub(super) struct Reader {
    pub consumer: BaseConsumer<Connection>,
    /// The partition and offset of its next record; none without a partition.
    pub at: Option<(TopicPartition, i64)>,
}

impl Readers {
    /// Returns the reader at this offset, otherwise one without a partition. Without either, one of
    /// too many readers is closed to make room for a new one. It cannot be reused: librdkafka
    /// crashes if a partition is assigned again before it has stopped, and its queue is stale.
    pub fn take(&self, partition: TopicPartition, from: i64) -> Option<Reader> {
        let mut readers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let fitting = readers.iter().position(|reader| reader.at == Some((partition, from)));
        if let Some(index) =
            fitting.or_else(|| readers.iter().position(|reader| reader.at.is_none()))
        {
            return Some(readers.swap_remove(index));
        }
        let closed = (readers.len() >= KEPT_READERS).then(|| readers.remove(0));
        drop(readers);
        drop(closed);
        None
    }

    pub fn keep(&self, reader: Reader) {
        let mut readers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if readers.len() < KEPT_READERS {
            readers.push(reader);
        }
    }
}
