//! Requests to brokers: their threads, their errors, and librdkafka's own messages.

use std::sync::{Arc, Mutex, PoisonError};

use rdkafka::ClientContext;
use rdkafka::config::RDKafkaLogLevel;
use rdkafka::consumer::ConsumerContext;
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use tracing::{debug, info, warn};

use super::unreadable::{first_offset, unreadable};
use crate::event::Topic;
use crate::log::LogError;

/// Runs blocking work for a broker outside the async threads. The work has its own deadlines.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, LogError> + Send + 'static,
) -> Result<T, LogError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(answer) => answer,
        Err(ended) => match ended.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            Err(_) => Err(LogError::Stopped),
        },
    }
}

/// Maps librdkafka's error to one that a caller can act on. `topic` is the topic of the request.
pub(super) fn refused(topic: Topic, error: &KafkaError) -> LogError {
    use RDKafkaErrorCode as Code;
    let code = match error {
        KafkaError::AdminOp(code) => Some(*code),
        _ => error.rdkafka_error_code(),
    };
    match code {
        Some(Code::UnknownTopic | Code::UnknownPartition | Code::UnknownTopicOrPartition) => {
            LogError::NoTopic(topic)
        }
        Some(
            Code::AllBrokersDown
            | Code::BrokerTransportFailure
            | Code::Resolve
            | Code::OperationTimedOut
            | Code::MessageTimedOut
            | Code::RequestTimedOut
            | Code::QueueFull
            | Code::LeaderNotAvailable
            | Code::NotLeaderForPartition
            | Code::BrokerNotAvailable
            | Code::ReplicaNotAvailable
            | Code::NetworkException
            | Code::NotEnoughReplicas
            | Code::NotEnoughReplicasAfterAppend
            | Code::CoordinatorLoadInProgress
            | Code::CoordinatorNotAvailable
            | Code::NotCoordinator
            | Code::PurgeQueue
            | Code::PurgeInflight
            | Code::Fatal,
        ) => LogError::Unreachable(error.to_string()),
        _ => LogError::Refused(error.to_string()),
    }
}

/// Receives librdkafka's own messages. It repeats a fault while the fault lasts; this logs it once.
#[derive(Clone)]
pub(super) struct Connection {
    role: &'static str,
    fault: Arc<Mutex<Option<RDKafkaErrorCode>>>,
    not_unpacked: Arc<Mutex<Option<i64>>>,
}

impl Connection {
    pub fn new(role: &'static str) -> Connection {
        Connection { role, fault: Arc::default(), not_unpacked: Arc::default() }
    }

    /// The first offset of the batch that the last poll could not unpack, after it failed as
    /// [`unreadable`]. None: it is damaged otherwise.
    pub fn not_unpacked(&self) -> Option<i64> {
        self.not_unpacked.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Records an answer of the broker, so that the next fault is logged.
    pub fn answered(&self) {
        let mut fault = self.fault.lock().unwrap_or_else(PoisonError::into_inner);
        if fault.take().is_some() {
            info!(role = self.role, "Kafka answers again");
        }
    }

    /// Logs a fault unless it lasts already. The end of a partition is not a fault. librdkafka
    /// reports it here if the reader has moved to another partition meanwhile.
    pub fn faulted(&self, error: &KafkaError, reason: &str) {
        let code = error.rdkafka_error_code();
        if code == Some(RDKafkaErrorCode::PartitionEOF) {
            return;
        }
        let mut fault = self.fault.lock().unwrap_or_else(PoisonError::into_inner);
        if fault.is_none() || code == Some(RDKafkaErrorCode::Fatal) {
            warn!(role = self.role, %error, reason, "Kafka fault, retrying");
        } else {
            debug!(role = self.role, %error, reason, "Kafka fault");
        }
        *fault = code;
    }
}

impl ClientContext for Connection {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        debug!(role = self.role, ?level, facility, message, "librdkafka");
    }

    fn error(&self, error: KafkaError, reason: &str) {
        if unreadable(&error) {
            *self.not_unpacked.lock().unwrap_or_else(PoisonError::into_inner) =
                first_offset(reason);
        } else {
            self.faulted(&error, reason);
        }
    }
}

impl ConsumerContext for Connection {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_a_partition_is_not_a_fault_and_hides_none() {
        let connection = Connection::new("reader");
        connection.error(KafkaError::Global(RDKafkaErrorCode::PartitionEOF), "reached end");
        assert_eq!(*connection.fault.lock().unwrap(), None, "the next fault is logged");
        connection.error(KafkaError::Global(RDKafkaErrorCode::AllBrokersDown), "gone");
        connection.error(KafkaError::Global(RDKafkaErrorCode::PartitionEOF), "reached end");
        assert_eq!(*connection.fault.lock().unwrap(), Some(RDKafkaErrorCode::AllBrokersDown));
    }
}
