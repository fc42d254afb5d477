//! Settings of the log on Kafka.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::event::Signatures;

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
    /// librdkafka's properties (TLS, SASL, `session.timeout.ms`, …). They take precedence over
    /// Tallyline's defaults. [`super::property_faults`] returns the refused ones.
    pub properties: BTreeMap<String, String>,
    pub signatures: Signatures,
}

impl KafkaSettings {
    /// The defaults for these brokers: no prefix, 30 s for an append, 10 s for a request, batches
    /// of 5,000 records or 100 ms.
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
