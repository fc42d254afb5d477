//! Assignment of partitions in the PostgreSQL log. Each member of a group and each partition being
//! read has a row in the table `lease`.

use std::collections::BTreeMap;
use std::time::Duration;

use sqlx::PgConnection;
use uuid::Uuid;

use super::tables::PostgresLog;
use crate::event::{Topic, TopicPartition};
use crate::log::LogError;
use crate::pool;

/// The leases of one group member. The ledger's epochs, not these leases, decide whose writes are
/// valid.
pub(super) struct Leases {
    log: PostgresLog,
    group: String,
    member: Uuid,
}

impl Leases {
    /// A new member, which has no lease before its first [`Leases::renew`].
    pub fn new(log: &PostgresLog, group: &str) -> Leases {
        Leases { log: log.clone(), group: group.to_owned(), member: Uuid::new_v4() }
    }

    /// The renewal interval: several times within a lease, at most once in 50 ms.
    pub fn renewal_interval(&self) -> Duration {
        (self.log.settings.lease / 5).clamp(Duration::from_millis(50), Duration::from_secs(1))
    }

    /// Renews this member's leases, releases those beyond its share, and takes free ones up to it.
    /// Returns the partitions that it has, with their ids in the database.
    pub async fn renew(&self) -> Result<BTreeMap<TopicPartition, i32>, LogError> {
        // A renewal that takes longer than the lease is too late.
        pool::run(&self.log.pool, self.log.settings.lease, async |conn| {
            self.renew_member(conn).await?;
            self.renew_partitions(conn).await
        })
        .await
    }

    async fn renew_member(&self, conn: &mut PgConnection) -> Result<(), LogError> {
        sqlx::query(
            "with ended as (delete from lease where name like 'log:member:%' and name <> $1 and expires_at <= clock_timestamp())
             insert into lease as held (name, holder, epoch, expires_at) values ($1, $2, 1, clock_timestamp() + make_interval(secs => $3))
             on conflict (name) do update set holder = excluded.holder, expires_at = greatest(held.expires_at, excluded.expires_at)",
        )
        .bind(self.member_lease())
        .bind(self.member.to_string())
        .bind(self.log.settings.lease.as_secs_f64())
        .execute(conn)
        .await?;
        Ok(())
    }

    /// All members have equal shares, so that the last one may get less. Partitions of one number
    /// stay together.
    async fn renew_partitions(
        &self,
        conn: &mut PgConnection,
    ) -> Result<BTreeMap<TopicPartition, i32>, LogError> {
        let held: Vec<(String, i32, i32)> = sqlx::query_as(
            "with log as (
                 select id, topic, partition, format('log:partition:%s:%s/%s', $1, topic, partition) as lease_name from log_partition
             ), wanted as (
                 select lease_name from log left join lease on name = lease_name
                 where name is null or holder = $3 or expires_at <= clock_timestamp()
                 order by holder is not distinct from $3 desc, partition, topic
                 limit (select ceil((select count(*) from log) / greatest(count(*), 1)::numeric)::bigint from lease
                        where left(name, -length($3)) = format('log:member:%s:', $1) and expires_at > clock_timestamp())
             ), released as (
                 update lease set holder = '', expires_at = clock_timestamp()
                 where holder = $3 and name like 'log:partition:%' and name not in (select lease_name from wanted)
             ), held as (
                 insert into lease as held (name, holder, epoch, expires_at)
                 select lease_name, $3, 1, clock_timestamp() + make_interval(secs => $2) from wanted order by lease_name
                 on conflict (name) do update set holder = excluded.holder,
                     epoch = held.epoch + case when held.holder = excluded.holder then 0 else 1 end,
                     expires_at = greatest(held.expires_at, excluded.expires_at)
                 where held.holder = excluded.holder or held.expires_at <= clock_timestamp()
                 returning name
             )
             select topic, partition, id from held join log on lease_name = name",
        )
        .bind(&self.group)
        .bind(self.log.settings.lease.as_secs_f64())
        .bind(self.member.to_string())
        .fetch_all(conn)
        .await?;
        let place = |(topic, partition, id): (String, i32, i32)| {
            Some((TopicPartition { topic: topic.parse::<Topic>().ok()?, partition }, id))
        };
        Ok(held.into_iter().filter_map(place).collect())
    }

    /// Releases all leases.
    pub async fn release(&self) -> Result<(), LogError> {
        let released = sqlx::query(
            "with gone as (delete from lease where name = $1)
             update lease set holder = '', expires_at = clock_timestamp() where holder = $2 and name like 'log:partition:%'",
        )
        .bind(self.member_lease())
        .bind(self.member.to_string());
        self.log.run(async |conn| Ok(released.execute(conn).await.map(drop)?)).await
    }

    fn member_lease(&self) -> String {
        format!("log:member:{}:{}", self.group, self.member)
    }
}
