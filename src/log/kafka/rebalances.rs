//! A group's decisions about a member's partitions.

use std::sync::{Mutex, PoisonError};

use rdkafka::config::RDKafkaLogLevel;
use rdkafka::consumer::{BaseConsumer, Consumer as _, ConsumerContext, RebalanceProtocol};
use rdkafka::error::{KafkaError, KafkaResult};
use rdkafka::types::RDKafkaRespErr;
use rdkafka::{ClientContext, TopicPartitionList};
use tracing::{debug, warn};

use super::connection::Connection;

/// Collects the group's decisions during a poll.
pub(super) struct Rebalances {
    pub connection: Connection,
    pub changes: Mutex<Vec<AssignmentChange>>,
}

pub(super) enum AssignmentChange {
    Assigned(Vec<(String, i32)>),
    Revoked(Vec<(String, i32)>),
}

impl ClientContext for Rebalances {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        self.connection.log(level, facility, message);
    }

    fn error(&self, error: KafkaError, reason: &str) {
        self.connection.error(error, reason);
    }
}

impl ConsumerContext for Rebalances {
    /// Answers the group at once: assigned partitions are not read yet, and revoked ones are not
    /// read any more.
    fn rebalance(
        &self,
        client: &BaseConsumer<Self>,
        what: RDKafkaRespErr,
        list: &mut TopicPartitionList,
    ) {
        let partitions = list
            .elements()
            .iter()
            .map(|element| (element.topic().to_owned(), element.partition()))
            .collect();
        let cooperative = matches!(client.rebalance_protocol(), RebalanceProtocol::Cooperative);
        let (change, answered) = match what {
            RDKafkaRespErr::RD_KAFKA_RESP_ERR__ASSIGN_PARTITIONS => {
                let nothing = TopicPartitionList::new();
                let answered = if cooperative {
                    client.incremental_assign(&nothing)
                } else {
                    client.assign(&nothing)
                };
                (AssignmentChange::Assigned(partitions), answered)
            }
            _ => {
                let answered =
                    if cooperative { unassign(client, &partitions) } else { client.unassign() };
                (AssignmentChange::Revoked(partitions), answered)
            }
        };
        if let Err(error) = answered {
            warn!(%error, "Kafka rejected the answer to a rebalance");
        }
        self.changes.lock().unwrap_or_else(PoisonError::into_inner).push(change);
    }

    fn commit_callback(&self, result: KafkaResult<()>, _offsets: &TopicPartitionList) {
        if let Err(error) = result {
            debug!(%error, "group offsets not committed");
        }
    }
}

/// Removes those of the partitions that the client has. It does not know the others.
pub(super) fn unassign(
    client: &BaseConsumer<Rebalances>,
    partitions: &[(String, i32)],
) -> KafkaResult<()> {
    let assigned = client.assignment()?;
    let mut list = TopicPartitionList::new();
    for (name, partition) in partitions {
        if assigned.find_partition(name, *partition).is_some() {
            list.add_partition(name, *partition);
        }
    }
    client.incremental_unassign(&list)
}
