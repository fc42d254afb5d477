//! The log on Kafka.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use chrono::{DateTime, Utc};
use rdkafka::config::{FromClientConfigAndContext, RDKafkaLogLevel};
use rdkafka::consumer::{BaseConsumer, Consumer as _, ConsumerContext};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::{ClientConfig, ClientContext, Offset, TopicPartitionList};
use tracing::{debug, info, warn};

use super::LogError;
use super::kafka_append::Producer;
use super::kafka_properties::{SESSION_MS, by_canonical_name, property_faults, without_values};
use super::kafka_read::Readers;
use super::kafka_unreadable::{first_offset, unreadable};
use crate::event::{Signatures, Topic, TopicPartition};

/// Connection and client settings of Kafka.
#[derive(Clone, PartialEq, Eq)]
pub struct KafkaSettings {
    /// `bootstrap.servers`: host:port, separated by commas.
    pub brokers: String,
    /// Prefix of every topic name and every group name.
    pub topic_prefix: String,
    /// Replicas of a created topic; -1 uses the broker's default.
    pub replication: i32,
    /// How long an append waits for its acknowledgements.
    pub append_deadline: Duration,
    /// Deadline of any other request.
    pub request_deadline: Duration,
    /// Maximum number of records in a batch.
    pub batch_records: usize,
    /// How long a batch that is not full waits for more records.
    pub batch_linger: Duration,
    /// librdkafka's properties (TLS, SASL, `session.timeout.ms`, …). They take precedence over Tallyline's defaults.
    /// [`super::property_faults`] returns the refused ones.
    pub properties: BTreeMap<String, String>,
    pub signatures: Signatures,
}

impl KafkaSettings {
    /// The defaults for these brokers: no prefix, 30 s for an append, 10 s for a request, batches of 5,000 records or 100 ms.
    #[must_use]
    pub fn new(brokers: &str) -> KafkaSettings {
        KafkaSettings {
            brokers: brokers.to_owned(),
            topic_prefix: String::new(),
            replication: -1,
            append_deadline: Duration::from_secs(30),
            request_deadline: Duration::from_secs(10),
            batch_records: 5000,
            batch_linger: Duration::from_millis(100),
            properties: BTreeMap::new(),
            signatures: Signatures::default(),
        }
    }
}

/// Properties for members of a group only. With `client.rack` a broker may direct other clients to a replica that is behind. They would
/// take its end for the partition's end, and skip the records after it.
const OF_MEMBERS: [&str; 7] = [
    "client.rack",
    "group.protocol",
    "group.remote.assignor",
    "partition.assignment.strategy",
    "session.timeout.ms",
    "heartbeat.interval.ms",
    "max.poll.interval.ms",
];

/// Pause between requests for a partition's leader.
pub(super) const LEADER_PAUSE: Duration = Duration::from_millis(50);

/// A handle on the log, shared by clones. Clients are created on first use and then kept.
#[derive(Clone)]
pub struct KafkaLog {
    pub(super) settings: Arc<KafkaSettings>,
    pub(super) producer: Arc<Mutex<Option<Producer>>>,
    pub(super) readers: Arc<Readers>,
    /// Sees only committed records, as a member of a group does.
    asker: Asker,
    /// Sees records of open transactions too, to find the end of a partition.
    end_asker: Asker,
}

/// A client for requests, created on first use.
type Asker = Arc<Mutex<Option<Arc<BaseConsumer<Connection>>>>>;

impl fmt::Debug for KafkaLog {
    /// Omits the properties, which contain secrets.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KafkaLog")
            .field("brokers", &self.settings.brokers)
            .field("topic_prefix", &self.settings.topic_prefix)
            .finish_non_exhaustive()
    }
}

impl KafkaLog {
    pub(super) fn new(mut settings: KafkaSettings) -> Result<KafkaLog, LogError> {
        let given: Vec<(&str, Option<&str>)> =
            settings.properties.iter().map(|(name, value)| (name.as_str(), Some(value.as_str()))).collect();
        let faults: Vec<String> =
            property_faults(&given).into_iter().map(|(index, fault)| format!("kafka.properties.{} {fault}", given[index].0)).collect();
        if !faults.is_empty() {
            return Err(LogError::Settings(faults.join("; ")));
        }
        settings.properties = by_canonical_name(&settings.properties);
        Ok(KafkaLog {
            settings: Arc::new(settings),
            producer: Arc::default(),
            readers: Arc::default(),
            asker: Arc::default(),
            end_asker: Arc::default(),
        })
    }

    /// Creates a client of librdkafka. An error does not contain values of properties.
    pub(super) fn client<C: ClientContext, T: FromClientConfigAndContext<C>>(
        &self,
        config: &ClientConfig,
        context: C,
    ) -> Result<T, LogError> {
        config.create_with_context(context).map_err(|error| match error {
            KafkaError::ClientCreation(text) => LogError::Settings(without_values(&text, &self.settings.properties)),
            _ => LogError::Settings("librdkafka does not take kafka.properties".to_owned()),
        })
    }

    pub(super) fn topic_name(&self, topic: Topic) -> String {
        format!("{}{}", self.settings.topic_prefix, topic.name())
    }

    /// The configuration of clients outside a group: Tallyline's defaults, then the given properties.
    pub(super) fn config(&self, defaults: &[(&str, &str)]) -> ClientConfig {
        let mut config = self.base();
        let given = self.settings.properties.iter().map(|(name, value)| (name.as_str(), value.as_str()));
        let given = given.filter(|(name, _)| !OF_MEMBERS.contains(name));
        for (name, value) in defaults.iter().copied().chain(given) {
            config.set(name, value);
        }
        config
    }

    /// The configuration of group members. The default is the classic protocol with cooperative-sticky assignment. Brokers since 2.4
    /// support it, and a rebalance stops only partitions that move. The session is the shortest that brokers allow by default, so that a
    /// killed member is noticed early. `group.protocol=consumer` needs brokers of 4.0, which set the session: 45 s by default.
    pub(super) fn member_config(&self, group: &str) -> ClientConfig {
        let mut config = self.base();
        let properties = &self.settings.properties;
        // New topics and partitions are noticed within this time; the default is five minutes.
        config.set("topic.metadata.refresh.interval.ms", "5000");
        if properties.get("group.protocol").is_none_or(|protocol| protocol.eq_ignore_ascii_case("classic")) {
            config.set("partition.assignment.strategy", "cooperative-sticky");
            config.set("session.timeout.ms", SESSION_MS).set("heartbeat.interval.ms", "1500");
        }
        for (name, value) in properties {
            config.set(name, value);
        }
        config
            .set("group.id", format!("{}{group}", self.settings.topic_prefix))
            .set("enable.auto.commit", "false")
            .set("enable.auto.offset.store", "false")
            .set("auto.offset.reset", "error");
        config
    }

    /// Limits prefetching, because a fetched batch is unpacked in memory and zstd packs Tallyline's batches to a tenth.
    ///
    /// - A zstd batch may unpack to at most `receive.message.max.bytes`. librdkafka estimates up to three times the true size, so that
    ///   128 MiB always fit.
    /// - A full queue is checked again after 10 ms. With the default of a second, a consumer is idle half of the time.
    fn base(&self) -> ClientConfig {
        let mut config = ClientConfig::new();
        config
            .set("bootstrap.servers", &self.settings.brokers)
            .set("client.id", "tallyline")
            .set("socket.keepalive.enable", "true")
            .set("reconnect.backoff.max.ms", "2000")
            // How long a topic that was requested too early is treated as missing; the default is 30 s.
            .set("topic.metadata.propagation.max.ms", "100")
            .set("queued.max.messages.kbytes", "16384")
            .set("max.partition.fetch.bytes", "131072")
            .set("fetch.max.bytes", "4194304")
            .set("message.max.bytes", "1000000")
            .set("receive.message.max.bytes", "402653184")
            .set("fetch.queue.backoff.ms", "10");
        config
    }

    /// Runs a request outside any group with the shared client, in a thread that may block.
    pub(super) async fn ask<T, F>(&self, question: F) -> Result<T, LogError>
    where
        T: Send + 'static,
        F: FnOnce(&KafkaLog, &BaseConsumer<Connection>) -> Result<T, LogError> + Send + 'static,
    {
        let log = self.clone();
        blocking(move || question(&log, &*log.asker(&log.asker, "read_committed")?)).await
    }

    fn asker(&self, asker: &Asker, isolation: &str) -> Result<Arc<BaseConsumer<Connection>>, LogError> {
        let mut asker = asker.lock().unwrap_or_else(PoisonError::into_inner);
        let asker = match &*asker {
            Some(asker) => asker.clone(),
            None => {
                let mut config = self.config(&[]);
                config.set("isolation.level", isolation);
                asker.insert(Arc::new(self.client(&config, Connection::new("asks"))?)).clone()
            }
        };
        // Only empties the client's queue of log lines; it has no records.
        while asker.poll(Duration::ZERO).is_some() {}
        Ok(asker)
    }

    pub(super) async fn partitions(&self, topic: Topic) -> Result<Vec<i32>, LogError> {
        self.ask(move |log, asker| {
            let name = log.topic_name(topic);
            let metadata = asker.fetch_metadata(Some(&name), log.settings.request_deadline).map_err(|error| refused(topic, &error))?;
            let mut partitions: Vec<i32> =
                metadata.topics().iter().flat_map(|topic| topic.partitions()).map(|partition| partition.id()).collect();
            partitions.sort_unstable();
            if partitions.is_empty() { Err(LogError::NoTopic(topic)) } else { Ok(partitions) }
        })
        .await
    }

    pub(super) async fn watermarks(&self, partition: TopicPartition) -> Result<(i64, i64), LogError> {
        let log = self.clone();
        blocking(move || log.watermarks_now(partition)).await
    }

    /// Blocks until the broker answers; only for threads that may block.
    pub(super) fn watermarks_now(&self, partition: TopicPartition) -> Result<(i64, i64), LogError> {
        self.watermarks_by(&*self.asker(&self.end_asker, "read_uncommitted")?, partition)
    }

    pub(super) async fn readable_end(&self, partition: TopicPartition) -> Result<i64, LogError> {
        let log = self.clone();
        blocking(move || log.readable_now(partition).map(|(_, end)| end)).await
    }

    /// The watermarks for readers of committed records. Blocks until the broker answers; only for threads that may block.
    pub(super) fn readable_now(&self, partition: TopicPartition) -> Result<(i64, i64), LogError> {
        self.watermarks_by(&*self.asker(&self.asker, "read_committed")?, partition)
    }

    /// The watermarks according to the client's isolation level.
    pub(super) fn watermarks_by<C: ConsumerContext>(
        &self,
        client: &BaseConsumer<C>,
        partition: TopicPartition,
    ) -> Result<(i64, i64), LogError> {
        let name = self.topic_name(partition.topic);
        self.ask_leader(client, partition, || client.fetch_watermarks(&name, partition.partition, self.settings.request_deadline))
    }

    pub(super) async fn offset_at(&self, partition: TopicPartition, time: DateTime<Utc>) -> Result<i64, LogError> {
        self.ask(move |log, asker| {
            // Kafka uses whole milliseconds and treats negative ones as special values.
            let millis = time.timestamp_millis() + i64::from(!time.timestamp_subsec_nanos().is_multiple_of(1_000_000));
            let name = log.topic_name(partition.topic);
            let found = log.ask_leader(asker, partition, || {
                let mut times = TopicPartitionList::new();
                times.add_partition_offset(&name, partition.partition, Offset::Offset(millis.max(0)))?;
                let found = asker.offsets_for_times(times, log.settings.request_deadline)?;
                let elements = found.elements();
                let element = elements.first().ok_or(KafkaError::OffsetFetch(RDKafkaErrorCode::UnknownPartition))?;
                element.error().map(|()| element.offset())
            })?;
            match found {
                Offset::Offset(offset) => Ok(offset),
                _ => log.watermarks_by(asker, partition).map(|(_, end)| end),
            }
        })
        .await
    }

    /// Retries while the brokers have not agreed on the partition's leader, as after the creation of a topic. For an unknown partition it
    /// refreshes the client's metadata once, because the client may long treat the topic as missing.
    fn ask_leader<C: ConsumerContext, T>(
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
                Some(Code::LeaderNotAvailable | Code::NotLeaderForPartition) if begun.elapsed() < deadline => {
                    std::thread::sleep(LEADER_PAUSE);
                }
                Some(Code::UnknownTopic | Code::UnknownPartition | Code::UnknownTopicOrPartition) if !looked_up => {
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

/// Runs blocking work for a broker outside the async threads. The work has its own deadlines.
pub(super) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T, LogError> + Send + 'static) -> Result<T, LogError> {
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
        Some(Code::UnknownTopic | Code::UnknownPartition | Code::UnknownTopicOrPartition) => LogError::NoTopic(topic),
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

    /// The first offset of the batch that the last poll could not unpack, after it failed as [`unreadable`]. None: it is damaged otherwise.
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

    /// Logs a fault unless it lasts already. The end of a partition is not a fault. librdkafka reports it here if the reader has moved to
    /// another partition meanwhile.
    pub fn faulted(&self, error: &KafkaError, reason: &str) {
        let code = error.rdkafka_error_code();
        if code == Some(RDKafkaErrorCode::PartitionEOF) {
            return;
        }
        let mut fault = self.fault.lock().unwrap_or_else(PoisonError::into_inner);
        if fault.is_none() || code == Some(RDKafkaErrorCode::Fatal) {
            warn!(role = self.role, %error, reason, "Kafka fault; going on");
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
            *self.not_unpacked.lock().unwrap_or_else(PoisonError::into_inner) = first_offset(reason);
        } else {
            self.faulted(&error, reason);
        }
    }
}

impl ConsumerContext for Connection {}

#[cfg(test)]
mod tests {
    use super::*;

    fn log(properties: &[(&str, &str)]) -> KafkaLog {
        let properties = properties.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        KafkaLog::new(KafkaSettings { properties, ..KafkaSettings::new("127.0.0.1:1") }).unwrap()
    }

    #[test]
    fn a_given_property_takes_the_place_of_ours_under_either_spelling() {
        for name in ["compression.codec", "compression.type"] {
            let config = log(&[(name, "gzip")]).config(&[("compression.type", "zstd")]);
            assert_eq!((config.get("compression.type"), config.get("compression.codec")), (Some("gzip"), None));
        }
        let member = log(&[("session.timeout.ms", "9000"), ("fetch.message.max.bytes", "1000")]).member_config("group");
        assert_eq!((member.get("session.timeout.ms"), member.get("max.partition.fetch.bytes")), (Some("9000"), Some("1000")));
    }

    /// A replica that is behind answers a fetch with its own end.
    #[test]
    fn only_members_read_from_a_replica_of_their_rack() {
        let log = log(&[("client.rack", "a")]);
        assert_eq!(log.member_config("group").get("client.rack"), Some("a"));
        assert_eq!((log.config(&[]).get("client.rack"), log.reader_config().get("client.rack")), (None, None));
    }

    #[test]
    fn a_killed_member_is_missed_as_soon_as_brokers_allow_unless_the_broker_decides() {
        let session = |log: KafkaLog| log.member_config("group").get("session.timeout.ms").map(str::to_owned);
        assert_eq!(session(log(&[])).as_deref(), Some("6000"));
        assert_eq!(session(log(&[("group.protocol", "consumer")])), None);
    }

    #[test]
    fn the_end_of_a_partition_is_no_fault_and_hides_none() {
        let connection = Connection::new("reads");
        connection.error(KafkaError::Global(RDKafkaErrorCode::PartitionEOF), "reached end");
        assert_eq!(*connection.fault.lock().unwrap(), None, "the next fault is news");
        connection.error(KafkaError::Global(RDKafkaErrorCode::AllBrokersDown), "gone");
        connection.error(KafkaError::Global(RDKafkaErrorCode::PartitionEOF), "reached end");
        assert_eq!(*connection.fault.lock().unwrap(), Some(RDKafkaErrorCode::AllBrokersDown));
    }
}
