//! Reading without a group: from an offset, from a time, in pages.

use std::time::Duration;

use chrono::{DateTime, TimeDelta};
use rdkafka::producer::{FutureProducer, FutureRecord};
use tallyline::log::{Log, LogError};

use super::site::{Kind, PARTITIONS, Site};
use super::{BUILDS, body, builds, message, on_both_logs};
use crate::support::eventually;

on_both_logs!(
    reading_begins_at_an_offset_and_ends_where_the_log_did,
    reading_begins_at_a_time,
    an_offset_outside_the_log_is_refused,
    several_readers_do_not_disturb_each_other,
);

/// Twenty records in one partition, appended one by one.
async fn twenty(site: &Site) -> i32 {
    let mut partition = 0;
    for number in 0..20 {
        partition =
            site.log.append(BUILDS, vec![message("key", &format!("{number}"))]).await.unwrap()[0].0;
    }
    partition
}

async fn reading_begins_at_an_offset_and_ends_where_the_log_did(site: Site) {
    let partition = twenty(&site).await;
    assert_eq!(site.log.watermarks(builds(partition)).await.unwrap(), (0, 20));
    let read = |from, limit| {
        let log = site.log.clone();
        async move {
            log.read(builds(partition), from, limit)
                .await
                .unwrap()
                .iter()
                .map(|record| body(&record.message))
                .collect::<Vec<_>>()
        }
    };
    let texts =
        |range: std::ops::Range<i32>| range.map(|number| number.to_string()).collect::<Vec<_>>();
    assert_eq!(read(0, 100).await, texts(0..20));
    assert_eq!(read(5, 3).await, texts(5..8));
    assert_eq!(read(8, 3).await, texts(8..11));
    assert_eq!(read(2, 1).await, texts(2..3));
    assert_eq!(read(19, 5).await, texts(19..20));
    assert_eq!(read(20, 5).await, texts(0..0));
    assert_eq!(read(3, 0).await, texts(0..0));
    // A reader at the end sees later records.
    assert_eq!(read(10, 10).await, texts(10..20));
    site.log.append(BUILDS, vec![message("key", "20")]).await.unwrap();
    assert_eq!(read(20, 5).await, texts(20..21));
    let other = (0..PARTITIONS).find(|other| *other != partition).unwrap();
    assert_eq!(site.log.read(builds(other), 0, 5).await.unwrap(), vec![]);
}

async fn reading_begins_at_a_time(site: Site) {
    let partition = twenty(&site).await;
    let records = site.read_all(partition).await;
    let mut times: Vec<DateTime<_>> = records.iter().map(|record| record.timestamp).collect();
    assert!(
        times.first() < times.last(),
        "twenty appends take longer than a millisecond: {times:?}"
    );
    let (before, after) = (times[0] - TimeDelta::days(40), times[19] + TimeDelta::milliseconds(1));
    times.extend([
        before,
        after,
        DateTime::UNIX_EPOCH - TimeDelta::days(9),
        times[19] + TimeDelta::days(36_500),
    ]);
    times.extend(records.iter().map(|record| record.timestamp + TimeDelta::microseconds(1)));
    times.extend(records.iter().map(|record| record.timestamp - TimeDelta::microseconds(1)));
    for time in times {
        let expected = records
            .iter()
            .find(|record| record.timestamp >= time)
            .map_or(20, |record| record.offset);
        assert_eq!(site.log.offset_at(builds(partition), time).await.unwrap(), expected, "{time}");
    }
    let other = (0..PARTITIONS).find(|other| *other != partition).unwrap();
    assert_eq!(site.log.offset_at(builds(other), before).await.unwrap(), 0);
}

async fn an_offset_outside_the_log_is_refused(site: Site) {
    let partition = builds(twenty(&site).await);
    for offset in [-1, 21, 1_000_000] {
        let error = site.log.read(partition, offset, 1).await.unwrap_err();
        assert_eq!(error, LogError::OutOfRange { partition, offset, start: 0, end: 20 });
    }
    assert_eq!(site.log.read(builds(PARTITIONS), 0, 1).await, Err(LogError::NoTopic(BUILDS)));
}

async fn several_readers_do_not_disturb_each_other(site: Site) {
    let messages = (0..500)
        .map(|number| message(&format!("key-{}", number % 50), &format!("{number}")))
        .collect();
    site.log.append(BUILDS, messages).await.unwrap();
    let readers: Vec<_> = (0..8)
        .map(|_| {
            let site = site.clone();
            tokio::spawn(async move { site.read_topic().await })
        })
        .collect();
    let expected = site.read_topic().await;
    assert_eq!(expected.iter().map(Vec::len).sum::<usize>(), 500);
    for reader in readers {
        assert_eq!(reader.await.unwrap(), expected);
    }
}

/// Kafka only: a transaction of another producer leaves markers in the log, and an aborted one
/// leaves invisible offsets.
#[tokio::test(flavor = "multi_thread")]
async fn missing_offsets_are_skipped() {
    use rdkafka::producer::Producer as _;
    let site = Site::new(Kind::Kafka).await;
    let kafka = site.kafka.as_ref().unwrap();
    let producer: FutureProducer = rdkafka::ClientConfig::new()
        .set("bootstrap.servers", &kafka.brokers)
        .set("transactional.id", kafka.name("transactions"))
        .create()
        .unwrap();
    let deadline = Duration::from_secs(20);
    producer.init_transactions(deadline).unwrap();
    let name = kafka.name(BUILDS.name());
    for (text, commits) in [("0", true), ("aborted", false), ("3", true), ("aborted", false)] {
        producer.begin_transaction().unwrap();
        producer
            .send(FutureRecord::to(&name).partition(0).key("key").payload(text), deadline)
            .await
            .unwrap();
        if commits {
            producer.commit_transaction(deadline).unwrap()
        } else {
            producer.abort_transaction(deadline).unwrap()
        }
    }
    // The broker writes the markers shortly after its answer.
    let ends_at = |end| {
        let log = site.log.clone();
        move || {
            let log = log.clone();
            async move { log.watermarks(builds(0)).await.unwrap() == (0, end) }
        }
    };
    eventually(deadline, "the last marker is written", ends_at(8)).await;
    let read = site.log.read(builds(0), 0, 100).await.unwrap();
    assert_eq!(
        read.iter().map(|record| (record.offset, body(&record.message))).collect::<Vec<_>>(),
        [(0, "0".into()), (4, "3".into())]
    );
    for from in [5, 6, 7, 8] {
        assert_eq!(site.log.read(builds(0), from, 1).await.unwrap(), vec![]);
    }
    // A kept reader is before the gap when more is appended after it.
    assert_eq!(site.log.read(builds(0), 4, 1).await.unwrap()[0].offset, 4);
    producer.begin_transaction().unwrap();
    producer
        .send(FutureRecord::to(&name).partition(0).key("key").payload("8"), deadline)
        .await
        .unwrap();
    producer.commit_transaction(deadline).unwrap();
    eventually(deadline, "its marker is written", ends_at(10)).await;
    let read = site.log.read(builds(0), 5, 100).await.unwrap();
    assert_eq!(
        read.iter().map(|record| (record.offset, body(&record.message))).collect::<Vec<_>>(),
        [(8, "8".into())]
    );
}

/// PostgreSQL only: on Kafka the broker removes expired records.
#[tokio::test(flavor = "multi_thread")]
async fn expired_recorded_records_are_removed() {
    let site = Site::new(Kind::Postgres).await;
    let (pool, partition) = (&site.database.as_ref().unwrap().pool, builds(twenty(&site).await));
    let Log::Postgres(log) = &site.log else { panic!("a log in PostgreSQL") };
    // The first twelve are older than the retention; the ledger has recorded six, then all.
    sqlx::query("update log_record set appended_at = appended_at - interval '36 days' where record_offset < 12")
        .execute(pool)
        .await
        .unwrap();
    assert_eq!(log.remove_expired(partition).await.unwrap(), 0, "none is recorded");
    sqlx::query("insert into position (topic, partition, epoch, start_offset, next_offset, moved_at) values ($1, $2, 1, 0, 6, now())")
        .bind(BUILDS.name())
        .bind(partition.partition)
        .execute(pool)
        .await
        .unwrap();
    assert_eq!(log.remove_expired(partition).await.unwrap(), 6);
    assert_eq!(site.log.watermarks(partition).await.unwrap(), (6, 20));
    sqlx::query("update position set next_offset = 20").execute(pool).await.unwrap();
    assert_eq!(log.remove_expired(partition).await.unwrap(), 6);
    assert_eq!(log.remove_expired(partition).await.unwrap(), 0, "the rest is young");
    assert_eq!(site.log.watermarks(partition).await.unwrap(), (12, 20));
    assert_eq!(site.read_all(partition.partition).await.len(), 8);
    let error = site.log.read(partition, 11, 1).await.unwrap_err();
    assert_eq!(error, LogError::OutOfRange { partition, offset: 11, start: 12, end: 20 });
}
