//! Known failures of other pipelines: each test is named after the promise instead. The collector's
//! tests have one more: `records_that_the_log_did_not_store_are_appended_by_the_next_pass`, for an
//! id that is seen but not stored.

use std::time::Duration;

use chrono::TimeDelta;
use prometheus::Registry;
use rdkafka::consumer::{BaseConsumer, Consumer as _};
use rdkafka::{ClientConfig, Offset, TopicPartitionList};
use tallyline::consumer::{Consumer, ConsumerTelemetry};
use tallyline::event::{Event, Fact, Message, Payload, Topic};
use tallyline::ledger::{Chain, Counts, Ledger, books, entries, sources};
use tallyline::log::{KafkaSettings, Log, LogError, PostgresLogSettings};
use tallyline_sim::tallyman::{Behaviour, EventRule, Switches};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::publisher::world::World;
use crate::support::ledger::{
    DEPLOYMENT, GROUP, arrival, build, lease_partition, ledger, moved, noon, partition,
    record_batch, usage,
};
use crate::support::{self, Database, Kafka, eventually};

const SOON: Duration = Duration::from_secs(120);

/// A running consumer in this process.
struct Consuming {
    stop: CancellationToken,
    task: JoinHandle<()>,
}

impl Consuming {
    fn start(log: &Log, ledger: &Ledger) -> Consuming {
        let consumer = Consumer::new(
            log.clone(),
            ledger.clone(),
            GROUP,
            ConsumerTelemetry::register(&Registry::new()).unwrap(),
        );
        let stop = CancellationToken::new();
        let task = tokio::spawn({
            let stop = stop.clone();
            async move { consumer.run(&stop).await }
        });
        Consuming { stop, task }
    }

    async fn ends(self) {
        self.stop.cancel();
        tokio::time::timeout(SOON, self.task).await.expect("it ends").unwrap();
    }
}

/// A ledger with the tests' deployment registered.
async fn new_ledger() -> (Database, Ledger) {
    let (database, ledger) = ledger().await;
    ledger
        .run(async |conn| {
            sources::register(conn, DEPLOYMENT, noon(), None, ledger.clock.now()).await
        })
        .await
        .unwrap();
    (database, ledger)
}

/// The PostgreSQL log in the ledger's database, with one partition a topic.
async fn postgres_log(ledger: &Ledger, batch_records: usize) -> Log {
    let log = Log::postgres(
        ledger.pool.clone(),
        PostgresLogSettings { batch_records, ..PostgresLogSettings::default() },
    );
    log.create_topics(1).await.unwrap();
    log
}

fn kafka_log(kafka: &Kafka) -> Log {
    Log::kafka(KafkaSettings {
        topic_prefix: kafka.prefix.clone(),
        ..KafkaSettings::new(&kafka.brokers)
    })
    .unwrap()
}

fn messages(numbers: std::ops::Range<u32>) -> Vec<Message> {
    numbers.map(|n| usage(DEPLOYMENT, n).to_message()).collect()
}

async fn number(database: &Database, query: &'static str) -> i64 {
    sqlx::query_scalar(query).fetch_one(&database.pool).await.unwrap()
}

async fn recorded(database: &Database, events: i64) {
    eventually(SOON, "every record is recorded", || async {
        number(database, "select count(*) from usage_event").await >= events
    })
    .await;
}

/// Checks that this number of events is recorded, each once, and that the books balance.
async fn all_is_recorded_once(database: &Database, ledger: &Ledger, events: i64) {
    recorded(database, events).await;
    let books = ledger.run(books::add_up).await.unwrap();
    assert_eq!((books.usage, books.differences), (events, vec![]));
    assert_eq!(
        number(database, "select sum(records)::bigint from position").await,
        events,
        "nothing was read twice"
    );
}

/// Known failure: the offset is committed when a record is delivered, and a crash before its rows
/// are written loses it.
#[tokio::test(flavor = "multi_thread")]
async fn a_position_never_moves_before_its_rows_are_written() {
    let (database, ledger) = new_ledger().await;
    let log = Log::postgres(
        ledger.pool.clone(),
        PostgresLogSettings { lease: Duration::from_secs(3), ..PostgresLogSettings::default() },
    );
    log.create_topics(1).await.unwrap();
    log.append(Topic::AgentUsage, messages(0..100)).await.unwrap();
    // the first is already recorded, so that this process knows the source
    let claim = lease_partition(&ledger, partition(Topic::AgentUsage, 0), 0).await.unwrap();
    record_batch(&ledger, &Chain::Live(claim), &[arrival(0, usage(DEPLOYMENT, 0))], 1)
        .await
        .unwrap();
    // every batch locks this last: while it is locked, rows and position are written but not
    // committed
    let mut held = database.pool.begin().await.unwrap();
    sqlx::query("select 1 from ledger for update").execute(&mut *held).await.unwrap();
    let consuming = Consuming::start(&log, &ledger);
    // the writer dies there twice
    for _ in 0..2 {
        let waiting = "select coalesce(max(pid), 0)::bigint from pg_stat_activity
             where datname = current_database() and wait_event_type = 'Lock' and query ilike 'commit%'";
        let a_batch_waits = || {
            eventually(SOON, "a batch is about to be committed", || async {
                number(&database, waiting).await > 0
            })
        };
        a_batch_waits().await;
        let renewed = "select (extract(epoch from max(expires_at)) * 1000000)::bigint from lease where name like 'log:member:%'";
        for _ in 0..3 {
            let before = number(&database, renewed).await;
            eventually(SOON, "the member renews its lease", || async {
                number(&database, renewed).await > before
            })
            .await;
        }
        let claimed = "select next_offset from position where topic = 'tallyline.agent-usage.v1'";
        assert_eq!(number(&database, "select count(*) from usage_event").await, 1);
        assert_eq!(number(&database, claimed).await, 1);
        a_batch_waits().await;
        let kill = "select count(pg_terminate_backend(pid)) from pg_stat_activity
             where datname = current_database() and wait_event_type = 'Lock' and query ilike 'commit%'";
        assert!(number(&database, kill).await > 0);
        eventually(SOON, "the session has ended", || async {
            number(&database, waiting).await == 0
        })
        .await;
    }
    held.rollback().await.unwrap();
    all_is_recorded_once(&database, &ledger, 100).await;
    consuming.ends().await;
}

/// Known failure: workers finish out of order, and the highest offset is committed for all of them.
#[tokio::test(flavor = "multi_thread")]
async fn the_group_never_commits_more_than_is_recorded() {
    let (database, ledger) = new_ledger().await;
    let kafka = support::kafka();
    let log = kafka_log(&kafka);
    log.create_topics(2).await.unwrap();
    let places = log.append(Topic::AgentUsage, messages(0..100)).await.unwrap();
    let first_of_0 =
        (0..100).zip(&places).find(|(_, (partition, _))| *partition == 0).map(|(n, _)| n).unwrap();
    // another open transaction has that id: the batch of partition 0 can neither be recorded nor
    // refused
    let mut held = database.pool.begin().await.unwrap();
    sqlx::query(
        "insert into usage_event (source_id, id, batch_id, log_offset, digest, event_type, quantity, created_at)
         select id, $1, 0, 0, '', 'dc_managed_agents_v1', 1, now() from source",
    )
    .bind(format!("usage-{first_of_0}"))
    .execute(&mut *held)
    .await
    .unwrap();
    let consuming = Consuming::start(&log, &ledger);
    let ends = [0, 1].map(|of| {
        i64::try_from(places.iter().filter(|(partition, _)| *partition == of).count()).unwrap()
    });
    let committed = || {
        let group: BaseConsumer = ClientConfig::new()
            .set("bootstrap.servers", &kafka.brokers)
            .set("group.id", kafka.name(GROUP))
            .create()
            .unwrap();
        let mut partitions = TopicPartitionList::new();
        let topic = kafka.name(Topic::AgentUsage.name());
        partitions.add_partition_range(&topic, 0, 1);
        let answer = tokio::task::block_in_place(|| {
            group.committed_offsets(partitions, Duration::from_secs(20))
        });
        let offset = |offset: Offset| if let Offset::Offset(offset) = offset { offset } else { 0 };
        answer.map_or([0, 0], |answer| {
            [0, 1]
                .map(|partition| offset(answer.find_partition(&topic, partition).unwrap().offset()))
        })
    };
    eventually(
        SOON,
        "the other partition is read to its end, and the group has committed it",
        || async { committed()[1] == ends[1] },
    )
    .await;
    let waiting = "select count(*) from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'";
    eventually(SOON, "the batch waits", || async { number(&database, waiting).await > 0 }).await;
    // more records come after the unfinished batch
    log.append(Topic::AgentUsage, messages(100..200)).await.unwrap();
    recorded(&database, ends[1] + 1).await;
    assert_eq!(committed()[0], 0);
    held.rollback().await.unwrap();
    all_is_recorded_once(&database, &ledger, 200).await;
    eventually(SOON, "the group has committed the position", || async { committed()[0] > ends[0] })
        .await;
    consuming.ends().await;
}

/// Known failure: the store refuses a delivery, and the acknowledgement of the next one covers
/// both.
#[tokio::test(flavor = "multi_thread")]
async fn a_refused_batch_is_recorded_before_later_ones() {
    let (database, ledger) = new_ledger().await;
    let log = postgres_log(&ledger, 10).await;
    // refused for now, three times: a sequence is not rolled back
    sqlx::raw_sql(
        "create sequence refusals;
         create function refuse() returns trigger language plpgsql as $$
         begin
             if new.id = 'usage-15' and nextval('refusals') <= 3 then
                 raise exception 'no space left' using errcode = '53100';
             end if;
             return new;
         end
         $$;
         create trigger refuses before insert on usage_event for each row execute function refuse()",
    )
    .execute(&database.pool)
    .await
    .unwrap();
    log.append(Topic::AgentUsage, messages(0..100)).await.unwrap();
    let consuming = Consuming::start(&log, &ledger);
    all_is_recorded_once(&database, &ledger, 100).await;
    assert!(
        number(&database, "select last_value from refusals").await >= 4,
        "it was refused three times"
    );
    let order: Vec<i64> =
        sqlx::query_scalar("select first_offset from batch where kind = 'log' order by sequence")
            .fetch_all(&database.pool)
            .await
            .unwrap();
    assert!(order.is_sorted() && order.len() >= 10, "{order:?}");
    consuming.ends().await;
}

/// Known failure: a batch that always exceeds a time limit is retried for ever.
#[tokio::test(flavor = "multi_thread")]
async fn a_batch_that_takes_too_long_is_recorded_in_smaller_ones() {
    let (database, ledger) = new_ledger().await;
    let log = postgres_log(&ledger, 100).await;
    sqlx::raw_sql(
        "create function slow() returns trigger language plpgsql as $$
         begin
             if (select count(*) from added) > 30 then
                 raise exception 'canceling statement due to statement timeout' using errcode = '57014';
             end if;
             return null;
         end
         $$;
         create trigger slow after insert on usage_event referencing new table as added for each statement execute function slow()",
    )
    .execute(&database.pool)
    .await
    .unwrap();
    log.append(Topic::AgentUsage, messages(0..100)).await.unwrap();
    let consuming = Consuming::start(&log, &ledger);
    all_is_recorded_once(&database, &ledger, 100).await;
    consuming.ends().await;
}

/// Known failure: a record that the store refuses costs the batch around it, or blocks it for ever.
#[tokio::test(flavor = "multi_thread")]
async fn a_record_that_postgres_refuses_is_rejected_and_the_others_are_recorded() {
    let (database, ledger) = new_ledger().await;
    let log = postgres_log(&ledger, 100).await;
    sqlx::raw_sql(
        "create function refuse() returns trigger language plpgsql as $$
         begin
             if new.id = 'usage-15' then
                 raise exception 'refused' using errcode = '22000';
             end if;
             return new;
         end
         $$;
         create trigger refuses before insert on usage_event for each row execute function refuse()",
    )
    .execute(&database.pool)
    .await
    .unwrap();
    log.append(Topic::AgentUsage, messages(0..100)).await.unwrap();
    let consuming = Consuming::start(&log, &ledger);
    eventually(SOON, "every record is read", || async {
        number(&database, "select coalesce(sum(records), 0)::bigint from position").await == 100
    })
    .await;
    assert_eq!(number(&database, "select count(*) from usage_event").await, 99);
    let rejects: Vec<(String, String)> =
        sqlx::query_as("select cause, detail from reject").fetch_all(&database.pool).await.unwrap();
    assert_eq!(rejects, [("ledger".to_owned(), "refused".to_owned())]);
    consuming.ends().await;
}

/// Known failure: after partitions have moved, one of them has no reader, and no alarm is raised.
#[tokio::test(flavor = "multi_thread")]
async fn every_partition_is_read_on_after_each_rebalance() {
    let (database, ledger) = new_ledger().await;
    let kafka = support::kafka();
    let log = kafka_log(&kafka);
    log.create_topics(4).await.unwrap();
    let topic = "select max(epoch) from position where topic = 'tallyline.agent-usage.v1'";
    let first = Consuming::start(&log, &ledger);
    append_to_every_partition(&log, 0..200).await;
    recorded(&database, 200).await;
    let before = number(&database, topic).await;
    let second = Consuming::start(&kafka_log(&kafka), &ledger);
    eventually(SOON, "partitions have moved", || async { number(&database, topic).await > before })
        .await;
    append_to_every_partition(&log, 200..400).await;
    recorded(&database, 400).await;
    first.ends().await;
    append_to_every_partition(&log, 400..600).await;
    recorded(&database, 600).await;
    let third = Consuming::start(&log, &ledger);
    append_to_every_partition(&log, 600..800).await;
    second.ends().await;
    append_to_every_partition(&log, 800..1000).await;
    all_is_recorded_once(&database, &ledger, 1000).await;
    third.ends().await;
}

async fn append_to_every_partition(log: &Log, numbers: std::ops::Range<u32>) {
    let mut partitions: Vec<i32> = log
        .append(Topic::AgentUsage, messages(numbers))
        .await
        .unwrap()
        .into_iter()
        .map(|(partition, _)| partition)
        .collect();
    partitions.sort_unstable();
    partitions.dedup();
    assert_eq!(partitions, [0, 1, 2, 3]);
}

/// Known failure: the last writer of an id wins, or a conflict becomes a duplicate of the batch's
/// own first sighting.
#[tokio::test]
async fn the_same_id_with_another_body_is_a_conflict_and_the_accepted_event_remains() {
    let (_database, ledger) = new_ledger().await;
    let claim = lease_partition(&ledger, partition(Topic::WorkspaceBuilds, 0), 0).await.unwrap();
    let accepted = build(DEPLOYMENT, 1);
    let mut otherwise = accepted.clone();
    let Payload::Build(other) = &mut otherwise.payload else { panic!("it is a build") };
    other.build_number = 9;
    record_batch(&ledger, &Chain::Live(claim.clone()), &[arrival(0, accepted.clone())], 1)
        .await
        .unwrap();
    let again = [(1, &otherwise), (2, &accepted), (3, &otherwise), (4, &accepted)]
        .map(|(offset, event)| arrival(offset, event.clone()));
    let counts = record_batch(&ledger, &Chain::Live(moved(&claim, 1)), &again, 5).await.unwrap();
    assert_eq!(counts, Counts { records: 4, duplicates: 2, conflicts: 2, ..Counts::default() });
    let offsets: Vec<i64> = sqlx::query_scalar("select log_offset from reject order by 1")
        .fetch_all(&ledger.pool)
        .await
        .unwrap();
    assert_eq!(offsets, [1, 3]);
    let facts = ledger
        .run(async |conn| entries::after(conn, 0, i64::MAX, 0).await)
        .await
        .unwrap()
        .into_iter()
        .flat_map(|entry| entry.facts);
    let events: Vec<Event> = facts
        .filter_map(|fact| if let Fact::Event(event) = fact { Some(event) } else { None })
        .collect();
    assert_eq!(events, [accepted]);
}

/// Known failure: a producer reports success, but the record went to a new topic without readers.
#[tokio::test(flavor = "multi_thread")]
async fn an_append_to_a_missing_topic_fails_and_does_not_create_it() {
    let (_database, ledger) = new_ledger().await;
    let postgres = Log::postgres(ledger.pool.clone(), PostgresLogSettings::default());
    for log in [postgres, kafka_log(&support::kafka())] {
        let error = log.append(Topic::AgentUsage, messages(0..3)).await.unwrap_err();
        assert_eq!(
            (error.cause, error.placed),
            (LogError::NoTopic(Topic::AgentUsage), vec![None; 3])
        );
        assert_eq!(
            log.partitions(Topic::AgentUsage).await,
            Err(LogError::NoTopic(Topic::AgentUsage)),
            "the question does not create the topic"
        );
    }
}

/// Known failure: the oldest event of the queue is refused for now, and all later ones wait until
/// it expires.
#[tokio::test]
async fn an_event_refused_for_now_does_not_delay_later_events() {
    let ids = (0..120).map(|index| format!("event-{index:04}")).collect();
    let rule = EventRule {
        behaviour: Behaviour::RefuseForNow,
        ids,
        fraction: 0.0,
        until: None,
        times: Some(1),
    };
    let world = World::with(Switches { events: vec![rule], ..Switches::default() }).await;
    world.add_many(250).await;
    let cycle = world.cycle().await;
    assert_eq!(
        (cycle.requests, cycle.refused_for_now, cycle.accepted),
        (3, 120, 130),
        "full requests follow each other at once"
    );
    let sizes: Vec<i32> =
        sqlx::query_scalar("select events from publication_request order by events desc")
            .fetch_all(&world.ledger.pool)
            .await
            .unwrap();
    assert_eq!(sizes, [100, 100, 50]);
    world.pass(TimeDelta::minutes(2));
    assert_eq!(world.cycle().await.accepted, 120);
    assert_eq!(world.number_in("published").await, 250);
    let books = world.vendor.books();
    assert_eq!(books.billed.len(), 250);
    assert!(books.billed.iter().all(|billed| billed.times == 1));
}

#[test]
fn each_failure_has_its_test() {
    let tests = crate::bad_input::table::tests();
    for name in [
        "a_position_never_moves_before_its_rows_are_written",
        "records_that_the_log_did_not_store_are_appended_by_the_next_pass",
        "the_group_never_commits_more_than_is_recorded",
        "a_refused_batch_is_recorded_before_later_ones",
        "every_partition_is_read_on_after_each_rebalance",
        "the_same_id_with_another_body_is_a_conflict_and_the_accepted_event_remains",
        "an_append_to_a_missing_topic_fails_and_does_not_create_it",
        "an_event_refused_for_now_does_not_delay_later_events",
    ] {
        assert_eq!(tests.iter().filter(|test| *test == name).count(), 1, "{name}");
    }
}
