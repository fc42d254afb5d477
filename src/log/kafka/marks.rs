//! Reads a group's marks.

use rdkafka::consumer::{BaseConsumer, Consumer as _};
use rdkafka::error::KafkaError;
use rdkafka::topic_partition_list::TopicPartitionListElem;
use rdkafka::{Offset, TopicPartitionList};

use super::client::KafkaLog;
use super::connection::{Connection, blocking, refused};
use super::consumer::topic_of;
use crate::event::{Topic, TopicPartition};
use crate::log::{LogError, Mark};

impl KafkaLog {
    /// Requests the marks from the group's coordinator without joining the group.
    pub(in crate::log) async fn marks(&self, group: &str) -> Result<Vec<Mark>, LogError> {
        let mut list = TopicPartitionList::new();
        for topic in Topic::ALL {
            match self.partitions(topic).await {
                Ok(partitions) => {
                    for partition in partitions {
                        list.add_partition(&self.topic_name(topic), partition);
                    }
                }
                // The marks were deleted with the topic.
                Err(LogError::NoTopic(_)) => {}
                Err(error) => return Err(error),
            }
        }
        if list.count() == 0 {
            return Ok(Vec::new());
        }
        let (log, config) = (self.clone(), self.member_config(group));
        blocking(move || {
            let refused = |error: KafkaError| refused(Topic::WorkspaceBuilds, &error);
            let client: BaseConsumer<Connection> = log.client(&config, Connection::new("marks"))?;
            let committed =
                client.committed_offsets(list, log.settings.request_deadline).map_err(refused)?;
            let names = Topic::ALL.map(|topic| log.topic_name(topic));
            let mark = |element: &TopicPartitionListElem<'_>| {
                let partition = TopicPartition {
                    topic: topic_of(&names, element.topic())?,
                    partition: element.partition(),
                };
                let Offset::Offset(next_offset) = element.offset() else { return None };
                Some(Mark { partition, next_offset, signature: element.metadata().to_owned() })
            };
            let elements = committed.elements();
            elements.iter().try_for_each(TopicPartitionListElem::error).map_err(refused)?;
            Ok(elements.iter().filter_map(mark).collect())
        })
        .await
    }
}
