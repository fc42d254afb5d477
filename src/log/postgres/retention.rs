//! Retention of the PostgreSQL log: it removes records older than the topic's retention that the
//! ledger has recorded.

use super::tables::{self, PostgresLog};
use crate::event::TopicPartition;
use crate::log::LogError;

/// Maximum number of records removed at once: an append waits that long.
const AT_ONCE: i64 = 10_000;

impl PostgresLog {
    /// Removes the partition's oldest records, at most 10,000, and returns their number. They are
    /// older than the retention, by the database's clock, and below the ledger's position, which is
    /// in the same database.
    pub async fn remove_expired(&self, partition: TopicPartition) -> Result<i64, LogError> {
        self.run(async |conn| {
            let id = tables::partition(conn, partition).await?.id;
            // Times never decrease within a partition, so that expired records are one range from
            // its start.
            let removed = sqlx::query_scalar(
                "with bound as (
                     select max(record_offset) + 1 as until
                     from log_partition
                         join log_topic on log_topic.name = log_partition.topic
                         join log_record on partition_id = log_partition.id
                             and record_offset >= start_offset and record_offset < start_offset + $2
                     where log_partition.id = $1
                         and appended_at < clock_timestamp() - retention_days * interval '1 day'
                         and record_offset < (select next_offset from position
                             where position.topic = log_partition.topic and position.partition = log_partition.partition)
                 ), moved as (
                     update log_partition set start_offset = until from bound where id = $1 and start_offset < until
                 ), removed as (
                     delete from log_record using bound where partition_id = $1 and record_offset < until returning 1
                 )
                 select count(*) from removed",
            )
            .bind(id)
            .bind(AT_ONCE)
            .fetch_one(conn);
            Ok(removed.await?)
        })
        .await
    }
}
