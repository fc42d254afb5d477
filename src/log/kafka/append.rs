//! Appends to Kafka through one idempotent producer: messages are pipelined, and every
//! acknowledgement is awaited.

use std::collections::VecDeque;
use std::sync::PoisonError;
use std::time::Duration;

use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::{Header, OwnedHeaders};
use rdkafka::producer::{DeliveryFuture, FutureRecord, Producer as _};
use tokio::time::{Instant, timeout_at};
use tracing::warn;

use super::client::KafkaLog;
use super::connection::{Connection, refused};
use super::producer::Producer;
use super::records::message_size;
use crate::event::{Message, Topic};
use crate::log::{AppendError, LogError};

/// Extra time for a delivery report to arrive. The producer reports each message within the append
/// deadline, at the latest as failed.
const GRACE: Duration = Duration::from_secs(5);
/// Pause before a retry while messages of other calls fill the producer's queue.
const QUEUE_FULL_PAUSE: Duration = Duration::from_millis(10);

impl KafkaLog {
    pub(in crate::log) async fn append(
        &self,
        topic: Topic,
        messages: Vec<Message>,
    ) -> Result<Vec<(i32, i64)>, AppendError> {
        let mut call = Call {
            topic,
            name: self.topic_name(topic),
            largest: messages.iter().map(message_size).max().unwrap_or_default(),
            placed: vec![None; messages.len()],
            open: VecDeque::new(),
            cause: None,
            deadline: Instant::now() + self.settings.append_deadline + GRACE,
        };
        match self.producer() {
            Ok(producer) => {
                call.send_all(&producer, &messages).await;
                while call.settle_oldest().await {}
                self.replace_if_fatal(&producer);
            }
            Err(cause) => call.cause = Some(cause),
        }
        match (call.cause, call.placed.iter().copied().collect::<Option<Vec<_>>>()) {
            (None, Some(placed)) => {
                if let Some(producer) =
                    &*self.producer.lock().unwrap_or_else(PoisonError::into_inner)
                {
                    producer.connection.answered();
                }
                Ok(placed)
            }
            (cause, _) => {
                let cause = cause.unwrap_or_else(|| {
                    LogError::Unreachable("not every message was acknowledged".to_owned())
                });
                Err(AppendError { placed: call.placed, cause })
            }
        }
    }

    fn producer(&self) -> Result<Producer, LogError> {
        let mut producer = self.producer.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(producer) = &*producer {
            return Ok(producer.clone());
        }
        // The queue limits memory. For a while after its creation a new topic may be unknown to
        // brokers.
        let mut config = self.config(&[
            ("compression.type", "zstd"),
            ("queue.buffering.max.kbytes", "65536"),
            ("topic.metadata.propagation.max.ms", "5000"),
        ]);
        // Java's rule maps keys to partitions, so that other producers of the topic use the same
        // partition.
        config
            .set("enable.idempotence", "true")
            .set("acks", "all")
            .set("partitioner", "murmur2_random")
            .set("delivery.timeout.ms", self.settings.append_deadline.as_millis().to_string());
        let connection = Connection::new("producer");
        let client = self.client(&config, connection.clone())?;
        Ok(producer.insert(Producer { client, connection }).clone())
    }

    /// Replaces a producer with a fatal error: an idempotent producer that lost its sequence never
    /// sends again.
    fn replace_if_fatal(&self, used: &Producer) {
        if let Some((code, reason)) = used.client.client().fatal_error() {
            let mut producer = self.producer.lock().unwrap_or_else(PoisonError::into_inner);
            if producer
                .as_ref()
                .is_some_and(|current| current.client.client().fatal_error().is_some())
            {
                warn!(%code, reason, "Kafka producer failed permanently, replacing it");
                *producer = None;
            }
        }
    }
}

/// One append in progress.
struct Call {
    topic: Topic,
    name: String,
    largest: usize,
    placed: Vec<Option<(i32, i64)>>,
    open: VecDeque<(usize, DeliveryFuture)>,
    cause: Option<LogError>,
    deadline: Instant,
}

impl Call {
    /// Passes the messages to the producer in order and stops at the first failure, because later
    /// messages must not overtake it.
    async fn send_all(&mut self, producer: &Producer, messages: &[Message]) {
        let name = self.name.clone();
        for (index, message) in messages.iter().enumerate() {
            let Some(headers) = owned_headers(message) else {
                self.cause = Some(LogError::Refused("a header name contains NUL".to_owned()));
                return;
            };
            let mut record = FutureRecord::<[u8], [u8]> {
                topic: &name,
                partition: None,
                payload: message.payload.as_deref(),
                key: message.key.as_deref(),
                timestamp: None,
                headers: (!message.headers.is_empty()).then_some(headers),
            };
            // Settling the oldest messages makes room in a full queue.
            let sent = loop {
                match producer.client.send_result(record) {
                    Ok(sent) => break Ok(sent),
                    Err((KafkaError::MessageProduction(RDKafkaErrorCode::QueueFull), unsent))
                        if Instant::now() < self.deadline =>
                    {
                        record = unsent;
                    }
                    Err((error, _)) => break Err(self.failure(&error)),
                }
                if !self.settle_oldest().await {
                    tokio::time::sleep(QUEUE_FULL_PAUSE).await;
                }
            };
            match sent {
                Ok(sent) => self.open.push_back((index, sent)),
                Err(cause) => self.cause = self.cause.take().or(Some(cause)),
            }
            if self.cause.is_some() {
                return;
            }
        }
    }

    fn failure(&self, error: &KafkaError) -> LogError {
        use RDKafkaErrorCode as Code;
        match error.rdkafka_error_code() {
            Some(Code::MessageSizeTooLarge | Code::MessageBatchTooLarge) => {
                LogError::TooLarge { topic: self.name.clone(), bytes: self.largest }
            }
            _ => refused(self.topic, error),
        }
    }

    /// Waits for the oldest open acknowledgement. Returns false if none is open.
    async fn settle_oldest(&mut self) -> bool {
        let Some((index, sent)) = self.open.pop_front() else { return false };
        let failure = match timeout_at(self.deadline, sent).await {
            Ok(Ok(Ok(delivered))) => {
                self.placed[index] = Some((delivered.partition, delivered.offset));
                return true;
            }
            Ok(Ok(Err((error, _)))) => self.failure(&error),
            Ok(Err(_)) => LogError::Unreachable("the producer was closed".to_owned()),
            Err(_) => LogError::Unreachable("no acknowledgement within the deadline".to_owned()),
        };
        self.cause.get_or_insert(failure);
        true
    }
}

/// A message's headers for the producer. None if a name contains NUL, which Kafka's client cannot
/// send.
fn owned_headers(message: &Message) -> Option<OwnedHeaders> {
    let mut owned = OwnedHeaders::new_with_capacity(message.headers.len());
    for (key, value) in &message.headers {
        if key.contains('\0') {
            return None;
        }
        owned = owned.insert(Header { key, value: value.as_ref() });
    }
    Some(owned)
}
