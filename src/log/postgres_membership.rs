//! Who reads what in the PostgreSQL log: members of a group renew a lease, and each holds its fair share of every topic's partitions.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use sqlx::PgConnection;
use tokio::time::timeout;
use uuid::Uuid;

use super::LogError;
use super::postgres::{PostgresLog, refused};
use crate::event::{Topic, TopicPartition};

/// One member of one group.
pub(super) struct Membership {
    log: PostgresLog,
    group: String,
    member: Uuid,
}

/// A partition and who holds it.
#[derive(Clone, Debug, sqlx::FromRow)]
struct Held {
    partition_id: i32,
    topic: String,
    partition: i32,
    member: Option<Uuid>,
}

impl Membership {
    /// A new member. It has no partition before its first [`Membership::beat`].
    pub async fn new(log: &PostgresLog, group: &str) -> Result<Membership, LogError> {
        log.in_time(async {
            sqlx::query("insert into log_group (name) values ($1) on conflict do nothing")
                .bind(group)
                .execute(&log.pool)
                .await
                .map_err(refused)
        })
        .await?;
        Ok(Membership { log: log.clone(), group: group.to_owned(), member: Uuid::new_v4() })
    }

    /// How often to renew the lease: several times within it, at most once in 50 ms.
    pub fn beat_every(&self) -> Duration {
        (self.log.settings.lease / 5).clamp(Duration::from_millis(50), Duration::from_secs(1))
    }

    /// Renews the lease, notes the marks, drops the dead, gives up what is more than the fair share and takes what is free up to it. One
    /// member at a time does this. Answers what this member holds now.
    pub async fn beat(&self, marks: &BTreeMap<TopicPartition, i64>) -> Result<BTreeMap<TopicPartition, i32>, LogError> {
        let beat = async {
            let mut tx = self.log.pool.begin().await.map_err(refused)?;
            self.renew(&mut tx).await?;
            let mut held = self.all_held(&mut tx).await?;
            let members: Vec<Uuid> = sqlx::query_scalar("select member from log_member where group_name = $1 order by member")
                .bind(&self.group)
                .fetch_all(&mut *tx)
                .await
                .map_err(refused)?;
            let wanted = fair_share(&held, &members, self.member);
            let changed: Vec<&mut Held> =
                held.iter_mut().filter(|one| (one.member == Some(self.member)) != wanted.contains(&one.partition_id)).collect();
            for one in changed {
                one.member = wanted.contains(&one.partition_id).then_some(self.member);
                sqlx::query("update log_assignment set member = $3 where group_name = $1 and partition_id = $2")
                    .bind(&self.group)
                    .bind(one.partition_id)
                    .bind(one.member)
                    .execute(&mut *tx)
                    .await
                    .map_err(refused)?;
            }
            let ours = self.ours(&held);
            self.note(&mut tx, &ours, marks).await?;
            tx.commit().await.map_err(refused)?;
            Ok(ours)
        };
        // A beat that takes longer than the lease is worth nothing.
        match timeout(self.log.settings.lease, beat).await {
            Ok(answer) => answer,
            Err(_) => Err(LogError::Unreachable("the lease was not renewed in time".to_owned())),
        }
    }

    /// Gives everything up.
    pub async fn leave(&self) -> Result<(), LogError> {
        self.log
            .in_time(async {
                let mut tx = self.log.pool.begin().await.map_err(refused)?;
                self.lock_group(&mut tx).await?;
                sqlx::query("delete from log_member where group_name = $1 and member = $2")
                    .bind(&self.group)
                    .bind(self.member)
                    .execute(&mut *tx)
                    .await
                    .map_err(refused)?;
                sqlx::query("update log_assignment set member = null where group_name = $1 and member = $2")
                    .bind(&self.group)
                    .bind(self.member)
                    .execute(&mut *tx)
                    .await
                    .map_err(refused)?;
                tx.commit().await.map_err(refused)
            })
            .await
    }

    async fn lock_group(&self, connection: &mut PgConnection) -> Result<(), LogError> {
        sqlx::query("select from log_group where name = $1 for update")
            .bind(&self.group)
            .execute(connection)
            .await
            .map(|_| ())
            .map_err(refused)
    }

    /// Renews this member's lease and removes the members whose lease has ended.
    async fn renew(&self, connection: &mut PgConnection) -> Result<(), LogError> {
        self.lock_group(connection).await?;
        sqlx::query(
            "insert into log_member (group_name, member, lease_until)
             values ($1, $2, clock_timestamp() + $3 * interval '1 millisecond')
             on conflict (group_name, member) do update set lease_until = greatest(log_member.lease_until, excluded.lease_until)",
        )
        .bind(&self.group)
        .bind(self.member)
        .bind(i64::try_from(self.log.settings.lease.as_millis()).unwrap_or(i64::MAX))
        .execute(&mut *connection)
        .await
        .map_err(refused)?;
        sqlx::query("delete from log_member where group_name = $1 and lease_until < clock_timestamp()")
            .bind(&self.group)
            .execute(&mut *connection)
            .await
            .map(|_| ())
            .map_err(refused)
    }

    /// All partitions with their holders, those of the dead free.
    async fn all_held(&self, connection: &mut PgConnection) -> Result<Vec<Held>, LogError> {
        sqlx::query(
            "insert into log_assignment (group_name, partition_id)
             select $1, id from log_partition
             where not exists (select from log_assignment where group_name = $1 and partition_id = id)",
        )
        .bind(&self.group)
        .execute(&mut *connection)
        .await
        .map_err(refused)?;
        sqlx::query_as(
            "select partition_id, topic, partition, log_member.member
             from log_assignment join log_partition on log_partition.id = partition_id
                 left join log_member on log_member.group_name = log_assignment.group_name and log_member.member = log_assignment.member
             where log_assignment.group_name = $1 order by partition_id",
        )
        .bind(&self.group)
        .fetch_all(connection)
        .await
        .map_err(refused)
    }

    fn ours(&self, held: &[Held]) -> BTreeMap<TopicPartition, i32> {
        held.iter()
            .filter(|one| one.member == Some(self.member))
            .filter_map(|one| Some((TopicPartition { topic: Topic::named(&one.topic)?, partition: one.partition }, one.partition_id)))
            .collect()
    }

    async fn note(
        &self,
        connection: &mut PgConnection,
        ours: &BTreeMap<TopicPartition, i32>,
        marks: &BTreeMap<TopicPartition, i64>,
    ) -> Result<(), LogError> {
        let (ids, offsets): (Vec<i32>, Vec<i64>) =
            marks.iter().filter_map(|(partition, offset)| Some((*ours.get(partition)?, *offset))).unzip();
        if ids.is_empty() {
            return Ok(());
        }
        sqlx::query(
            "update log_assignment set marked_offset = mark.next_offset
             from unnest($2::int[], $3::bigint[]) as mark (id, next_offset) where group_name = $1 and partition_id = mark.id",
        )
        .bind(&self.group)
        .bind(ids)
        .bind(offsets)
        .execute(connection)
        .await
        .map(|_| ())
        .map_err(refused)
    }
}

/// What the member should hold: of each topic its share, as much as possible what it holds already. Shares differ by one at most, and who
/// gets one more goes round by topic. What another member still holds is left to it until it gives it up.
fn fair_share(held: &[Held], members: &[Uuid], member: Uuid) -> BTreeSet<i32> {
    let rank = members.iter().position(|one| *one == member).unwrap_or(0);
    let mut wanted = BTreeSet::new();
    for (turn, topic) in Topic::ALL.iter().enumerate() {
        let partitions: Vec<&Held> = held.iter().filter(|one| one.topic == topic.name()).collect();
        let count = members.len().max(1);
        let share = partitions.len() / count + usize::from((rank + turn) % count < partitions.len() % count);
        let ours = partitions.iter().filter(|one| one.member == Some(member));
        let free = partitions.iter().filter(|one| one.member.is_none());
        wanted.extend(ours.chain(free).take(share).map(|one| one.partition_id));
    }
    wanted
}

#[cfg(test)]
mod tests {
    use super::*;

    fn held(partitions: i32) -> Vec<Held> {
        let topics = Topic::ALL.iter().enumerate();
        topics
            .flat_map(|(turn, topic)| {
                (0..partitions).map(move |partition| Held {
                    partition_id: i32::try_from(turn).unwrap() * partitions + partition,
                    topic: topic.name().to_owned(),
                    partition,
                    member: None,
                })
            })
            .collect()
    }

    /// Lets every member take its turn until nothing changes any more.
    fn settle(held: &mut [Held], members: &[Uuid]) -> usize {
        for round in 0..10 {
            let before: Vec<Option<Uuid>> = held.iter().map(|one| one.member).collect();
            for member in members {
                let wanted = fair_share(held, members, *member);
                for one in held.iter_mut().filter(|one| one.member == Some(*member) || one.member.is_none()) {
                    one.member = wanted.contains(&one.partition_id).then_some(*member);
                }
            }
            if before == held.iter().map(|one| one.member).collect::<Vec<_>>() {
                return round;
            }
        }
        panic!("shares do not settle");
    }

    #[test]
    fn every_partition_is_shared_fairly_and_few_move() {
        for partitions in [1, 2, 3, 6, 7] {
            for count in 1..=5 {
                let members: Vec<Uuid> = (1..=count).map(Uuid::from_u128).collect();
                let mut held = held(partitions);
                settle(&mut held, &members[..members.len() - 1]);
                let before = held.clone();
                settle(&mut held, &members);
                assert!(held.iter().all(|one| one.member.is_some()), "{partitions} partitions, {count} members");
                for topic in Topic::ALL {
                    let of_topic = |one: &&Held| one.topic == topic.name();
                    let shares: Vec<usize> = members
                        .iter()
                        .map(|member| held.iter().filter(of_topic).filter(|one| one.member == Some(*member)).count())
                        .collect();
                    assert!(shares.iter().max().unwrap() - shares.iter().min().unwrap() <= 1, "{shares:?}");
                }
                let moved = before.iter().zip(&held).filter(|(was, is)| was.member.is_some() && was.member != is.member).count();
                let new_ones = held.iter().filter(|one| one.member == members.last().copied()).count();
                assert!(moved <= new_ones + 2 * Topic::ALL.len(), "{moved} moved for {new_ones}");
            }
        }
    }
}
