//! Appending to Kafka: pipelined through one idempotent producer, every acknowledgement waited for.

use std::collections::VecDeque;
use std::sync::PoisonError;
use std::time::Duration;

use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::producer::{DeliveryFuture, FutureProducer, FutureRecord, Producer as _};
use tokio::time::{Instant, timeout_at};
use tracing::warn;

use super::kafka::{Connection, KafkaLog, refused};
use super::kafka_decode::owned_headers;
use super::{AppendError, LogError};
use crate::event::{Message, Topic};

/// The producer reports a message within the append deadline, failed at the latest; this is for the report to arrive.
const GRACE: Duration = Duration::from_secs(5);
/// How soon to look again when the producer's queue is full of other calls' messages.
const QUEUE_FULL_PAUSE: Duration = Duration::from_millis(10);

/// The one producer of a log.
#[derive(Clone)]
pub(super) struct Producer {
    client: FutureProducer<Connection>,
    connection: Connection,
}

impl KafkaLog {
    pub(super) async fn append(&self, topic: Topic, messages: Vec<Message>) -> Result<Vec<(i32, i64)>, AppendError> {
        let mut call = Call {
            topic,
            placed: vec![None; messages.len()],
            open: VecDeque::new(),
            cause: None,
            deadline: Instant::now() + self.settings.append_deadline + GRACE,
        };
        match self.producer() {
            Ok(producer) => {
                call.send_all(&producer, &self.topic_name(topic), &messages).await;
                while call.settle_oldest().await {}
                self.replace_if_fatal(&producer);
            }
            Err(cause) => call.cause = Some(cause),
        }
        match (call.cause, call.placed.iter().copied().collect::<Option<Vec<_>>>()) {
            (None, Some(placed)) => {
                if let Some(producer) = &*self.producer.lock().unwrap_or_else(PoisonError::into_inner) {
                    producer.connection.answered();
                }
                Ok(placed)
            }
            (cause, _) => {
                let cause = cause.unwrap_or_else(|| LogError::Unreachable("not every message was acknowledged".to_owned()));
                Err(AppendError { placed: call.placed, cause })
            }
        }
    }

    fn producer(&self) -> Result<Producer, LogError> {
        let mut producer = self.producer.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(producer) = &*producer {
            return Ok(producer.clone());
        }
        let mut config = self.config();
        // One key is one partition by Java's own rule, so that other producers of the topic agree. The queue bounds memory.
        config
            .set("enable.idempotence", "true")
            .set("acks", "all")
            .set("compression.type", "zstd")
            .set("partitioner", "murmur2_random")
            .set("queue.buffering.max.kbytes", "65536")
            // How long a topic that nobody has heard of may still turn out to be new.
            .set("topic.metadata.propagation.max.ms", "5000")
            .set("delivery.timeout.ms", self.settings.append_deadline.as_millis().to_string());
        for (name, value) in &self.settings.properties {
            if ["compression.type", "queue.buffering.max.kbytes", "queue.buffering.max.messages"].contains(&name.as_str()) {
                config.set(name, value);
            }
        }
        let connection = Connection::new("appends");
        let client = config.create_with_context(connection.clone()).map_err(|error| refused(Topic::WorkspaceBuilds, &error))?;
        Ok(producer.insert(Producer { client, connection }).clone())
    }

    /// An idempotent producer that has lost count of what the broker has never sends again; the next call gets a new one.
    fn replace_if_fatal(&self, used: &Producer) {
        if let Some((code, reason)) = used.client.client().fatal_error() {
            let mut producer = self.producer.lock().unwrap_or_else(PoisonError::into_inner);
            if producer.as_ref().is_some_and(|current| current.client.client().fatal_error().is_some()) {
                warn!(%code, reason, "Kafka producer has failed for good and is replaced");
                *producer = None;
            }
        }
    }
}

/// One append under way.
struct Call {
    topic: Topic,
    placed: Vec<Option<(i32, i64)>>,
    open: VecDeque<(usize, DeliveryFuture)>,
    cause: Option<LogError>,
    deadline: Instant,
}

impl Call {
    /// Hands the messages to the producer in order and stops at the first that fails: what comes later must not overtake it.
    async fn send_all(&mut self, producer: &Producer, name: &str, messages: &[Message]) {
        for (index, message) in messages.iter().enumerate() {
            let Some(headers) = owned_headers(message) else {
                self.cause = Some(LogError::Refused("a header name holds NUL".to_owned()));
                return;
            };
            let mut record = FutureRecord::<[u8], [u8]> {
                topic: name,
                partition: None,
                payload: message.payload.as_deref(),
                key: message.key.as_deref(),
                timestamp: None,
                headers: (!message.headers.is_empty()).then_some(headers),
            };
            // A full queue is worked off from its other end.
            let sent = loop {
                match producer.client.send_result(record) {
                    Ok(sent) => break Ok(sent),
                    Err((KafkaError::MessageProduction(RDKafkaErrorCode::QueueFull), again)) if Instant::now() < self.deadline => {
                        record = again;
                    }
                    Err((error, _)) => break Err(refused(self.topic, &error)),
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

    /// Waits for the oldest open acknowledgement. Says whether there was one.
    async fn settle_oldest(&mut self) -> bool {
        let Some((index, sent)) = self.open.pop_front() else { return false };
        let failure = match timeout_at(self.deadline, sent).await {
            Ok(Ok(Ok(delivered))) => {
                self.placed[index] = Some((delivered.partition, delivered.offset));
                return true;
            }
            Ok(Ok(Err((error, _)))) => refused(self.topic, &error),
            Ok(Err(_)) => LogError::Unreachable("the producer was closed".to_owned()),
            Err(_) => LogError::Unreachable("no acknowledgement in time".to_owned()),
        };
        self.cause.get_or_insert(failure);
        true
    }
}
