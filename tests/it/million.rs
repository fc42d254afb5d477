//! A consumer records a million records in a real ledger. Most are right; many are duplicates,
//! conflicts, held or mutated. Each becomes exactly one thing, and the books balance.

#[path = "../fuzz/mutate.rs"]
mod mutate;

use std::ops::Range;

use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use tallyline::consumer;
use tallyline::event::{
    BuildStatus, Event, Message, Payload, Topic, TopicPartition, UsageQuantity,
};
use tallyline::ledger::{Arrival, Chain, Counts, Disposition, Ledger, PartitionBooks, books};
use tallyline::log::Record;
use tokio::task::JoinSet;

use crate::support::ledger::{
    REGISTERED, event, lease_partition, moved, noon, partition, record_batch, registered_ledger,
};

const RECORDS: u32 = 1_000_000;
const PER_PARTITION: u32 = RECORDS / 4;
const SEED: u64 = 1;
/// The consumer's batch size.
const BATCH: u32 = 5_000;
/// Both partitions of builds have some of the same builds, at the same time.
const PARTITIONS: [(Topic, i32); 4] = [
    (Topic::WorkspaceBuilds, 0),
    (Topic::WorkspaceBuilds, 1),
    (Topic::PrebuildClaims, 0),
    (Topic::AgentUsage, 0),
];

/// The first of the builds that both have.
const BOTH_FROM: u32 = 100_000;

/// A message with the digits of [`MARK`] at each place of its event's number: far cheaper than a
/// million events.
struct Template {
    message: Message,
    header_places: Vec<(usize, usize)>,
    body_places: Vec<usize>,
}

const MARK: &str = "12345678";

impl Template {
    fn of(event: &Event) -> Template {
        let message = event.to_message();
        let places = |bytes: &[u8]| {
            let parts = bytes.windows(MARK.len()).enumerate();
            parts.filter(|(_, part)| *part == MARK.as_bytes()).map(|(at, _)| at).collect::<Vec<_>>()
        };
        let in_header = |(index, (_, value)): (usize, &(String, Option<Vec<u8>>))| {
            places(value.as_deref().unwrap())
                .into_iter()
                .map(move |at| (index, at))
                .collect::<Vec<_>>()
        };
        let header_places: Vec<_> =
            message.headers.iter().enumerate().flat_map(in_header).collect();
        let body_places = places(message.payload.as_deref().unwrap());
        assert!(!header_places.is_empty(), "its id has the number");
        Template { message, header_places, body_places }
    }

    fn numbered(&self, number: u32) -> Message {
        let mut message = self.message.clone();
        let digits = format!("{number:08}");
        let write = |bytes: &mut Vec<u8>, at: usize| {
            bytes[at..at + digits.len()].copy_from_slice(digits.as_bytes())
        };
        for (header, at) in &self.header_places {
            write(message.headers[*header].1.as_mut().unwrap(), *at);
        }
        for at in &self.body_places {
            write(message.payload.as_mut().unwrap(), *at);
        }
        message
    }
}

/// The topic's event of number [`MARK`], and one with the same id and other content.
fn told_twice(topic: Topic) -> [Event; 2] {
    let id = |kind: &str| format!("00000000-0000-0000-{kind}-0000{MARK}").parse().unwrap();
    [1, 2].map(|other| {
        let mut event = event(topic, 1);
        match &mut event.payload {
            Payload::Build(build) => {
                (build.build_id, build.workspace_id, build.build_number) =
                    (id("000b"), id("000a"), other);
                // a changed copy must not become a second first start
                (build.status, build.first_successful_start) = (BuildStatus::Failed, false);
            }
            Payload::Claim(claim) => {
                (claim.build_id, claim.workspace_id, claim.build_number) =
                    (id("000c"), id("000a"), other)
            }
            Payload::Usage(usage) => {
                usage.id = format!("usage-{MARK}");
                usage.quantity = UsageQuantity::ManagedAgents(u64::from(other.unsigned_abs()));
            }
        }
        event
    })
}

/// The records of one partition, and the expected counts of the unchanged ones.
struct Maker {
    /// An event, and the same id with other content.
    templates: [Template; 2],
    held: Template,
    chance: StdRng,
    /// The numbers of the events made here.
    made: Range<u32>,
    expected: Counts,
    mutated: i32,
}

impl Maker {
    fn new(of: TopicPartition) -> Maker {
        let templates = told_twice(of.topic).map(|event| Template::of(&event));
        let mut held = Template::of(&told_twice(Topic::AgentUsage)[0]);
        held.message.headers.iter_mut().find(|(name, _)| name == "ce_type").unwrap().1 =
            Some(b"dc_gpu_hours_v1".to_vec());
        let first = if of.partition == 0 { 0 } else { BOTH_FROM };
        let chance = StdRng::seed_from_u64(SEED + u64::from(first) + of.topic as u64);
        Maker {
            templates,
            held,
            chance,
            made: first..first,
            expected: Counts::default(),
            mutated: 0,
        }
    }

    fn next(&mut self) -> Message {
        self.expected.records += 1;
        let kind = self.chance.random_range(0..100);
        if kind < 60 || self.made.is_empty() {
            self.expected.accepted += 1;
            self.made.end += 1;
            return self.templates[0].numbered(self.made.end - 1);
        }
        let earlier = self.chance.random_range(self.made.clone());
        match kind {
            60..75 => {
                self.expected.duplicates += 1;
                self.templates[0].numbered(earlier)
            }
            75..80 => {
                self.expected.conflicts += 1;
                self.templates[1].numbered(earlier)
            }
            80..83 => {
                self.expected.held += 1;
                self.held.numbered(earlier)
            }
            _ => {
                self.mutated += 1;
                self.changed()
            }
        }
    }

    /// A message with changes anywhere. No other message has its number, or gets it by a change of
    /// a digit.
    fn changed(&mut self) -> Message {
        let mut message =
            self.templates[0].numbered(self.chance.random_range(50_000_000..60_000_000));
        if self.chance.random() {
            message.payload = message.payload.map(|body| mutate::one(&[body], &mut self.chance));
        } else {
            let at = self.chance.random_range(0..message.headers.len());
            match self.chance.random_range(0..5) {
                0 => drop(message.headers.remove(at)),
                1 => message.headers.push(message.headers[at].clone()),
                2 => message.headers[at].1 = None,
                3 => message.payload = None,
                _ => {
                    message.headers[at].1 = message.headers[at]
                        .1
                        .take()
                        .map(|value| mutate::one(&[value], &mut self.chance))
                }
            }
        }
        // a few records of the largest size are enough
        let large = message.payload.as_ref().is_some_and(|payload| payload.len() > 20_000);
        message.payload = message.payload.filter(|_| !large || self.chance.random_ratio(1, 20));
        message
    }
}

/// The work of one partition's consumer.
struct Consumed {
    of: TopicPartition,
    counts: Counts,
    maker: Maker,
}

async fn consume(ledger: Ledger, of: TopicPartition) -> Consumed {
    let mut maker = Maker::new(of);
    let mut claim = lease_partition(&ledger, of, 0).await.unwrap();
    let mut counts = Counts::default();
    for _ in 0..PER_PARTITION / BATCH {
        // offsets have gaps, like Kafka's
        let offset = |index: i64| claim.next_offset + index * 2 + index % 2;
        let record =
            |index| Record { offset: offset(index), timestamp: noon(), message: maker.next() };
        let arrivals: Vec<Arrival> =
            (0..i64::from(BATCH)).map(record).map(consumer::read).collect();
        let next_offset = offset(i64::from(BATCH));
        let batch = record_batch(&ledger, &Chain::Live(claim.clone()), &arrivals, next_offset)
            .await
            .unwrap();
        let refused = |disposition| {
            let refused = arrivals.iter().filter(
                |arrival| matches!(&arrival.event, Err(refusal) if refusal.disposition == disposition),
            );
            i32::try_from(refused.count()).unwrap()
        };
        // a mutated source is another deployment, which no collector has registered
        let unregistered = |arrival: &&Arrival| matches!(&arrival.event, Ok(event) if !REGISTERED.contains(&event.deployment));
        let unregistered = i32::try_from(arrivals.iter().filter(unregistered).count()).unwrap();
        assert_eq!(
            (batch.rejects, batch.held),
            (refused(Disposition::Rejected), refused(Disposition::Held) + unregistered)
        );
        assert_eq!(u32::try_from(total(batch)), Ok(BATCH), "each is one thing: {batch:?}");
        claim = moved(&claim, next_offset);
        counts = counts + batch;
    }
    Consumed { of, counts, maker }
}

fn total(counts: Counts) -> i32 {
    counts.accepted + counts.duplicates + counts.conflicts + counts.rejects + counts.held
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_million_records_each_become_exactly_one_thing_and_the_books_balance() {
    let (_database, ledger) = registered_ledger().await;
    let partitions: JoinSet<Consumed> = PARTITIONS
        .into_iter()
        .map(|(topic, number)| consume(ledger.clone(), partition(topic, number)))
        .collect();
    let consumed = partitions.join_all().await;
    let counts = consumed.iter().fold(Counts::default(), |sum, one| sum + one.counts);
    assert_eq!(
        (u32::try_from(counts.records), u32::try_from(total(counts))),
        (Ok(RECORDS), Ok(RECORDS))
    );

    // unchanged records have the expected counts; the rest are mutated ones
    let mut expected = consumed.iter().fold(Counts::default(), |sum, one| sum + one.maker.expected);
    let builds: Vec<&Range<u32>> = consumed
        .iter()
        .filter(|one| one.of.topic == Topic::WorkspaceBuilds)
        .map(|one| &one.maker.made)
        .collect();
    let both =
        i32::try_from(builds.iter().map(|made| made.end).min().unwrap() - BOTH_FROM).unwrap();
    assert!(both > 10_000, "{builds:?}");
    (expected.accepted, expected.duplicates) =
        (expected.accepted - both, expected.duplicates + both);
    let mutated: i32 = consumed.iter().map(|one| one.maker.mutated).sum();
    let of_mutated = Counts {
        records: mutated,
        accepted: counts.accepted - expected.accepted,
        duplicates: counts.duplicates - expected.duplicates,
        conflicts: counts.conflicts - expected.conflicts,
        rejects: counts.rejects - expected.rejects,
        held: counts.held - expected.held,
    };
    println!("{counts:?}; of the mutated ones {of_mutated:?}");
    assert_eq!(total(of_mutated), mutated);
    let each = [
        of_mutated.accepted,
        of_mutated.duplicates,
        of_mutated.conflicts,
        of_mutated.rejects,
        of_mutated.held,
    ];
    assert!(
        each.iter().all(|count| *count >= 0)
            && of_mutated.accepted > 1_000
            && of_mutated.rejects > 100_000,
        "{of_mutated:?}"
    );

    // the rows have the same counts
    let rows: (i64, i64, i64, i64, i64) = sqlx::query_as(
        "select (select count(*) from workspace_build) + (select count(*) from prebuild_claim) + (select count(*) from usage_event),
             count(*) filter (where disposition = 'conflict'), count(*) filter (where disposition = 'rejected'), count(*) filter (where disposition = 'held'),
             (select sum(records)::bigint from position)
         from reject",
    )
    .fetch_one(&ledger.pool)
    .await
    .unwrap();
    let in_rows = [rows.0, rows.1, rows.2, rows.3, rows.4];
    assert_eq!(
        in_rows,
        [counts.accepted, counts.conflicts, counts.rejects, counts.held, counts.records]
            .map(i64::from)
    );
    let books = ledger.run(books::add_up).await.unwrap();
    assert_eq!(books.differences, []);
    let sum = |of: fn(&PartitionBooks) -> i64| books.partitions.iter().map(of).sum::<i64>();
    assert_eq!(
        (sum(|one| one.accepted), sum(|one| one.duplicates)),
        (i64::from(counts.accepted), i64::from(counts.duplicates))
    );
}
