//! The handle on Kafka: its clients and their configuration.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rdkafka::config::FromClientConfigAndContext;
use rdkafka::consumer::BaseConsumer;
use rdkafka::error::KafkaError;
use rdkafka::{ClientConfig, ClientContext};

use super::connection::{Connection, blocking};
use super::producer::Producer;
use super::properties::{SESSION_MS, by_canonical_name, property_faults, without_values};
use super::readers::Readers;
use super::settings::KafkaSettings;
use crate::event::Topic;
use crate::log::LogError;

/// Properties for members of a group only. With `client.rack` a broker may direct other clients to
/// a replica that is behind. They would take its end for the partition's end, and skip the records
/// after it.
const MEMBER_PROPERTIES: [&str; 7] = [
    "client.rack",
    "group.protocol",
    "group.remote.assignor",
    "partition.assignment.strategy",
    "session.timeout.ms",
    "heartbeat.interval.ms",
    "max.poll.interval.ms",
];

/// A handle on the log, shared by clones. Clients are created on first use and then kept.
#[derive(Clone)]
pub struct KafkaLog {
    pub(in crate::log) settings: Arc<KafkaSettings>,
    pub(super) producer: Arc<Mutex<Option<Producer>>>,
    pub(super) readers: Arc<Readers>,
    /// Sees only committed records, as a member of a group does.
    pub(super) committed_client: SharedClient,
    /// Sees records of open transactions too, to find the end of a partition.
    pub(super) uncommitted_client: SharedClient,
}

/// A client for requests, created on first use.
pub(super) type SharedClient = Arc<Mutex<Option<Arc<BaseConsumer<Connection>>>>>;

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
    pub(in crate::log) fn new(mut settings: KafkaSettings) -> Result<KafkaLog, LogError> {
        let properties: Vec<(&str, Option<&str>)> = settings
            .properties
            .iter()
            .map(|(name, value)| (name.as_str(), Some(value.as_str())))
            .collect();
        let faults: Vec<String> = property_faults(&properties)
            .into_iter()
            .map(|(index, fault)| format!("kafka.properties.{} {fault}", properties[index].0))
            .collect();
        if !faults.is_empty() {
            return Err(LogError::Settings(faults.join("; ")));
        }
        settings.properties = by_canonical_name(&settings.properties);
        Ok(KafkaLog {
            settings: Arc::new(settings),
            producer: Arc::default(),
            readers: Arc::default(),
            committed_client: Arc::default(),
            uncommitted_client: Arc::default(),
        })
    }

    /// Creates a client of librdkafka. An error does not contain values of properties.
    pub(super) fn client<C: ClientContext, T: FromClientConfigAndContext<C>>(
        &self,
        config: &ClientConfig,
        context: C,
    ) -> Result<T, LogError> {
        config.create_with_context(context).map_err(|error| match error {
            KafkaError::ClientCreation(text) => {
                LogError::Settings(without_values(&text, &self.settings.properties))
            }
            _ => LogError::Settings("kafka.properties: librdkafka rejects them".to_owned()),
        })
    }

    pub(in crate::log) fn topic_name(&self, topic: Topic) -> String {
        format!("{}{}", self.settings.topic_prefix, topic.name())
    }

    /// The configuration of clients outside a group: Tallyline's defaults, then the given
    /// properties.
    pub(super) fn config(&self, defaults: &[(&str, &str)]) -> ClientConfig {
        let mut config = self.base();
        let properties =
            self.settings.properties.iter().map(|(name, value)| (name.as_str(), value.as_str()));
        let properties = properties.filter(|(name, _)| !MEMBER_PROPERTIES.contains(name));
        for (name, value) in defaults.iter().copied().chain(properties) {
            config.set(name, value);
        }
        config
    }

    /// The configuration of group members. The default is the classic protocol with
    /// cooperative-sticky assignment. Brokers since 2.4 support it, and a rebalance stops only
    /// partitions that move. The session is the shortest that brokers allow by default, so that a
    /// killed member is noticed early. `group.protocol=consumer` needs brokers of 4.0, which set
    /// the session: 45 s by default.
    pub(super) fn member_config(&self, group: &str) -> ClientConfig {
        let mut config = self.base();
        let properties = &self.settings.properties;
        // New topics and partitions are noticed within this time; the default is five minutes.
        config.set("topic.metadata.refresh.interval.ms", "5000");
        if properties
            .get("group.protocol")
            .is_none_or(|protocol| protocol.eq_ignore_ascii_case("classic"))
        {
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

    /// Limits prefetching, because a fetched batch is unpacked in memory and zstd packs Tallyline's
    /// batches to a tenth.
    ///
    /// - A zstd batch may unpack to at most `receive.message.max.bytes`. librdkafka estimates up to
    ///   three times the true size, so that 128 MiB always fit.
    /// - A full queue is checked again after 10 ms. With the default of a second, a consumer is
    ///   idle half of the time.
    fn base(&self) -> ClientConfig {
        let mut config = ClientConfig::new();
        config
            .set("bootstrap.servers", &self.settings.brokers)
            .set("client.id", "tallyline")
            .set("socket.keepalive.enable", "true")
            .set("reconnect.backoff.max.ms", "2000")
            // How long a topic that was requested too early is treated as missing; the default is
            // 30 s.
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
    pub(super) async fn request<T, F>(&self, question: F) -> Result<T, LogError>
    where
        T: Send + 'static,
        F: FnOnce(&KafkaLog, &BaseConsumer<Connection>) -> Result<T, LogError> + Send + 'static,
    {
        let log = self.clone();
        blocking(move || {
            question(&log, &*log.shared_client(&log.committed_client, "read_committed")?)
        })
        .await
    }

    pub(super) fn shared_client(
        &self,
        client: &SharedClient,
        isolation: &str,
    ) -> Result<Arc<BaseConsumer<Connection>>, LogError> {
        let mut client = client.lock().unwrap_or_else(PoisonError::into_inner);
        let client = match &*client {
            Some(client) => client.clone(),
            None => {
                let mut config = self.config(&[]);
                config.set("isolation.level", isolation);
                client.insert(Arc::new(self.client(&config, Connection::new("requests"))?)).clone()
            }
        };
        // Only empties the client's queue of log lines; it has no records.
        while client.poll(Duration::ZERO).is_some() {}
        Ok(client)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn log(properties: &[(&str, &str)]) -> KafkaLog {
        let properties = properties
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
            .collect();
        KafkaLog::new(KafkaSettings { properties, ..KafkaSettings::new("127.0.0.1:1") }).unwrap()
    }

    #[test]
    fn a_property_overrides_the_default_under_either_spelling() {
        for name in ["compression.codec", "compression.type"] {
            let config = log(&[(name, "gzip")]).config(&[("compression.type", "zstd")]);
            assert_eq!(
                (config.get("compression.type"), config.get("compression.codec")),
                (Some("gzip"), None)
            );
        }
        let member = log(&[("session.timeout.ms", "9000"), ("fetch.message.max.bytes", "1000")])
            .member_config("group");
        assert_eq!(
            (member.get("session.timeout.ms"), member.get("max.partition.fetch.bytes")),
            (Some("9000"), Some("1000"))
        );
    }

    /// A replica that is behind answers a fetch with its own end.
    #[test]
    fn only_group_members_read_from_a_replica_of_their_rack() {
        let log = log(&[("client.rack", "a")]);
        assert_eq!(log.member_config("group").get("client.rack"), Some("a"));
        assert_eq!(
            (log.config(&[]).get("client.rack"), log.reader_config().get("client.rack")),
            (None, None)
        );
    }

    #[test]
    fn the_session_is_the_shortest_allowed_unless_the_broker_sets_it() {
        let session =
            |log: KafkaLog| log.member_config("group").get("session.timeout.ms").map(str::to_owned);
        assert_eq!(session(log(&[])).as_deref(), Some("6000"));
        assert_eq!(session(log(&[("group.protocol", "consumer")])), None);
    }
}
