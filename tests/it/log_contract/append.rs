//! Appending changes nothing and keeps order; commit order is offset order.

use std::collections::BTreeMap;
use std::time::Duration;

use tallyline::event::Message;
use tallyline::log::{KafkaSettings, Log, LogError, PostgresLogSettings};

use super::site::{Kind, PARTITIONS, Site};
use super::{BUILDS, body, builds, message, on_both_logs};
use crate::support::eventually;

on_both_logs!(
    appended_records_are_read_back_unchanged,
    one_key_is_one_partition_in_the_order_of_its_appends,
    a_reader_at_the_end_misses_no_overlapping_append,
    topics_are_created_once_and_drift_is_reported,
    a_missing_topic_is_named,
);

async fn appended_records_are_read_back_unchanged(site: Site) {
    let header = |name: &str, value: Option<&[u8]>| (name.to_owned(), value.map(<[u8]>::to_vec));
    let messages = vec![
        message("plain", "body"),
        Message {
            key: Some(vec![0, 255, 0, 128]),
            payload: Some(vec![0, 1, 2, 255]),
            ..Message::default()
        },
        Message {
            headers: vec![header("only", None)],
            payload: Some(b"no key".to_vec()),
            ..Message::default()
        },
        Message { key: Some(b"tombstone".to_vec()), ..Message::default() },
        Message {
            key: Some(b"empty body".to_vec()),
            headers: vec![header("", Some(b""))],
            payload: Some(vec![]),
            oversized: None,
        },
        Message {
            key: Some(b"headers".to_vec()),
            headers: vec![
                header("twice", Some(b"1")),
                header("äöü", Some(&[0, 255])),
                header("twice", Some(b"2")),
                header("nothing", None),
            ],
            payload: Some(vec![7; 200_000]),
            oversized: None,
        },
    ];
    let placed = site.log.append(BUILDS, messages.clone()).await.unwrap();
    assert_eq!(placed.len(), messages.len());
    for ((partition, offset), sent) in placed.into_iter().zip(messages) {
        let read = site.log.read(builds(partition), offset, 1).await.unwrap();
        assert_eq!(read.len(), 1);
        assert_eq!((read[0].offset, &read[0].message), (offset, &sent));
    }
    assert_eq!(site.log.append(BUILDS, vec![]).await.unwrap(), vec![]);
}

async fn one_key_is_one_partition_in_the_order_of_its_appends(site: Site) {
    // Two appends with every key, one after the other; each append has three messages of each key.
    let keys: Vec<String> = (0..40).map(|number| format!("key-{number}")).collect();
    let mut partitions: BTreeMap<String, i32> = BTreeMap::new();
    for append in 0..2 {
        let messages: Vec<Message> = (0..3)
            .flat_map(|turn| {
                keys.iter().map(move |key| message(key, &format!("{key} {append} {turn}")))
            })
            .collect();
        let placed = site.log.append(BUILDS, messages.clone()).await.unwrap();
        for (sent, (partition, _)) in messages.iter().zip(placed) {
            let key = String::from_utf8(sent.key.clone().unwrap()).unwrap();
            assert_eq!(*partitions.entry(key).or_insert(partition), partition);
        }
    }
    for (partition, records) in (0..PARTITIONS).zip(site.read_topic().await) {
        assert!(!records.is_empty(), "40 keys leave no partition of {PARTITIONS} empty");
        for key in partitions.iter().filter(|(_, of)| **of == partition).map(|(key, _)| key) {
            let actual: Vec<String> = records
                .iter()
                .filter(|record| record.message.key.as_deref() == Some(key.as_bytes()))
                .map(|record| body(&record.message))
                .collect();
            let expected: Vec<String> = (0..2)
                .flat_map(|append| (0..3).map(move |turn| format!("{key} {append} {turn}")))
                .collect();
            assert_eq!(actual, expected);
        }
    }
}

async fn a_reader_at_the_end_misses_no_overlapping_append(site: Site) {
    const APPENDERS: usize = 4;
    const APPENDS: usize = 25;
    let appenders: Vec<_> = (0..APPENDERS)
        .map(|appender| {
            let log = site.log.clone();
            tokio::spawn(async move {
                let mut placed = Vec::new();
                for turn in 0..APPENDS {
                    let messages = (0..3)
                        .map(|number| {
                            message("one key", &format!("{appender} {:03}", turn * 3 + number))
                        })
                        .collect();
                    placed.extend(log.append(BUILDS, messages).await.unwrap());
                }
                placed
            })
        })
        .collect();
    // Reads during the appends: a gap that the reader passed must never be filled later.
    let partition =
        builds(site.log.append(BUILDS, vec![message("one key", "first")]).await.unwrap()[0].0);
    let mut read = Vec::new();
    let mut next = 0;
    eventually(Duration::from_secs(60), "every record is read", || {
        let log = site.log.clone();
        let from = next;
        let records = tokio::task::block_in_place(|| {
            tokio::runtime::Handle::current().block_on(log.read(partition, from, 10))
        })
        .unwrap();
        if let Some(last) = records.last() {
            next = last.offset + 1;
        }
        read.extend(records);
        let done = read.len() > APPENDERS * APPENDS * 3;
        async move { done }
    })
    .await;
    let offsets: Vec<i64> = read.iter().map(|record| record.offset).collect();
    assert_eq!(offsets, (0..i64::try_from(offsets.len()).unwrap()).collect::<Vec<_>>());
    for (appender, placed) in appenders.into_iter().enumerate() {
        let placed = placed.await.unwrap();
        let own: Vec<_> = read
            .iter()
            .filter(|record| body(&record.message).starts_with(&format!("{appender} ")))
            .collect();
        assert_eq!(
            own.iter().map(|record| (partition.partition, record.offset)).collect::<Vec<_>>(),
            placed
        );
        let bodies: Vec<String> = own.iter().map(|record| body(&record.message)).collect();
        assert!(bodies.is_sorted() && bodies.len() == APPENDS * 3, "{bodies:?}");
    }
    assert!(read.is_sorted_by_key(|record| record.timestamp), "times never fall along a partition");
}

/// PostgreSQL only: a transaction can stay open there.
#[tokio::test(flavor = "multi_thread")]
async fn an_append_waits_for_an_open_one_and_follows_it() {
    for commits in [true, false] {
        let site = Site::new(Kind::Postgres).await;
        let pool = &site.database.as_ref().unwrap().pool;
        let Log::Postgres(log) = &site.log else { panic!("a log in PostgreSQL") };
        let mut open = pool.begin().await.unwrap();
        let first = log.append_in(&mut open, BUILDS, &[message("key", "held open")]).await.unwrap();
        let other = tokio::spawn({
            let log = site.log.clone();
            async move { log.append(BUILDS, vec![message("key", "waits")]).await.unwrap() }
        });
        eventually(Duration::from_secs(20), "the second append waits for the partition's row", || async {
            let waiting: i64 = sqlx::query_scalar(
                "select count(*) from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock' and query like '%log_partition%'",
            )
            .fetch_one(pool)
            .await
            .unwrap();
            waiting == 1
        })
        .await;
        // The topic's other partitions are not blocked.
        let elsewhere = (0..)
            .map(|number| format!("other-{number}"))
            .find(|key| partition_of(key) != partition_of("key"))
            .unwrap();
        site.log.append(BUILDS, vec![message(&elsewhere, "passes by")]).await.unwrap();
        assert!(!other.is_finished());
        let partition = first[0].0;
        assert_eq!(site.read_all(partition).await, vec![], "nothing is seen of either");

        if commits {
            open.commit().await.unwrap();
        } else {
            open.rollback().await.unwrap();
        }
        let second = other.await.unwrap();
        let actual: Vec<(i64, String)> = site
            .read_all(partition)
            .await
            .iter()
            .map(|record| (record.offset, body(&record.message)))
            .collect();
        let expected: &[(i64, &str)] =
            if commits { &[(0, "held open"), (1, "waits")] } else { &[(0, "waits")] };
        assert_eq!(
            actual,
            expected.iter().map(|(offset, body)| (*offset, (*body).to_owned())).collect::<Vec<_>>()
        );
        assert_eq!(second, [(partition, expected.last().unwrap().0)]);
    }
}

/// The rule by which the PostgreSQL log chooses a partition: FNV-1a, folded. It must not change for
/// a log in use.
fn partition_of(key: &str) -> u64 {
    let hash = key.bytes().fold(14_695_981_039_346_656_037_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(1_099_511_628_211)
    });
    (hash ^ (hash >> 32)) % u64::try_from(PARTITIONS).unwrap()
}

async fn topics_are_created_once_and_drift_is_reported(site: Site) {
    for topic in tallyline::event::Topic::ALL {
        assert_eq!(site.log.partitions(topic).await.unwrap(), (0..PARTITIONS).collect::<Vec<_>>());
    }
    assert_eq!(site.log.create_topics(PARTITIONS).await.unwrap(), Vec::<String>::new());
    let drift = site.log.create_topics(PARTITIONS + 1).await.unwrap();
    assert_eq!(drift.len(), 3, "{drift:?}");
    assert!(drift.iter().all(|line| line.ends_with("4 partitions, expected 5")), "{drift:?}");
    assert_eq!(site.log.partitions(BUILDS).await.unwrap().len(), 4, "nothing was changed");
}

/// A topic that another program created with too short a retention.
#[tokio::test]
async fn a_short_retention_is_reported() {
    use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
    let site = Site::bare(Kind::Kafka).await;
    let kafka = site.kafka.as_ref().unwrap();
    let admin: AdminClient<_> =
        rdkafka::ClientConfig::new().set("bootstrap.servers", &kafka.brokers).create().unwrap();
    let name = kafka.name(BUILDS.name());
    let topic = NewTopic::new(&name, PARTITIONS, TopicReplication::Fixed(1))
        .set("retention.ms", "86400000")
        .set("retention.bytes", "1000000");
    admin.create_topics(&[topic], &AdminOptions::new()).await.unwrap()[0].as_ref().unwrap();
    let drift = site.log.create_topics(PARTITIONS).await.unwrap();
    assert_eq!(
        drift,
        [
            format!("{name}: retention.ms is 86400000, expected at least 3024000000 (35 days)"),
            format!(
                "{name}: retention.bytes is 1000000, which can remove records before 35 days; expected -1"
            ),
        ]
    );
    // The two missing topics now exist, with the right settings.
    assert_eq!(site.log.create_topics(PARTITIONS).await.unwrap(), drift);

    let site = Site::new(Kind::Postgres).await;
    sqlx::query("update log_topic set retention_days = 7 where name = $1")
        .bind(BUILDS.name())
        .execute(&site.database.as_ref().unwrap().pool)
        .await
        .unwrap();
    assert_eq!(
        site.log.create_topics(PARTITIONS).await.unwrap(),
        [format!("{BUILDS}: retention is 7 days, expected at least 35")]
    );
}

async fn a_missing_topic_is_named(site: Site) {
    let site = Site::bare(site.kind).await;
    assert_eq!(site.log.partitions(BUILDS).await, Err(LogError::NoTopic(BUILDS)));
    assert_eq!(site.log.watermarks(builds(0)).await, Err(LogError::NoTopic(BUILDS)));
}

#[tokio::test]
async fn an_unresponsive_log_is_reported_in_time() {
    // A port that was just freed has no listener.
    let port = crate::support::ports::free_port();
    let mut settings = KafkaSettings::new(&format!("127.0.0.1:{port}"));
    settings.append_deadline = Duration::from_millis(500);
    settings.request_deadline = Duration::from_millis(500);
    let kafka = Log::kafka(settings).unwrap();
    let pool = sqlx::postgres::PgPoolOptions::new()
        .acquire_timeout(Duration::from_millis(500))
        .connect_lazy(&format!("postgres://127.0.0.1:{port}/none"))
        .unwrap();
    let postgres = Log::postgres(pool, PostgresLogSettings::default());
    for log in [kafka, postgres] {
        let answers = async {
            let error = log.append(BUILDS, vec![message("key", "body")]).await.unwrap_err();
            assert!(matches!(error.cause, LogError::Unreachable(_)), "{error:?}");
            let error = log.watermarks(builds(0)).await.unwrap_err();
            assert!(matches!(error, LogError::Unreachable(_)), "{error:?}");
            let error = log.create_topics(1).await.unwrap_err();
            assert!(matches!(error, LogError::Unreachable(_)), "{error:?}");
        };
        tokio::time::timeout(Duration::from_secs(20), answers).await.expect("an answer in time");
    }
}

#[test]
fn a_wrong_property_is_reported_at_once() {
    for (name, value) in [
        ("no.such.property", "1"),
        ("session.timeout.ms", "soon"),
        ("acks", "1"),
        ("enable.auto.commit", "true"),
    ] {
        let mut settings = KafkaSettings::new("127.0.0.1:1");
        settings.properties.insert(name.to_owned(), value.to_owned());
        let error = Log::kafka(settings).unwrap_err();
        assert!(matches!(&error, LogError::Settings(text) if text.contains(name)), "{error}");
    }
}
