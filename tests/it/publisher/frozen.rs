//! A second publisher beside a frozen one, as real processes. The first is frozen with a request in
//! flight until after its lease. The second takes over and sends, and the first wakes.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tallyline::ledger::{AttemptVerdict, PublicationState, event_history};

use tallyline::audit::Audit;
use tallyline::log::Log;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use uuid::Uuid;

use super::world::{DEPLOYMENT, World, start_time, usage};
use crate::support::eventually;
use crate::support::process::Process;

const SOON: Duration = Duration::from_secs(60);

/// The message that is blocked between the first publisher and the vendor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Held {
    /// The request: the vendor gets it after the second publisher's.
    Request,
    /// The answer: the vendor has accepted the events.
    Answer,
}

/// The way to the vendor. On each connection it blocks `held` from the first request with events
/// on.
struct Way {
    url: String,
    seen: watch::Sender<bool>,
    open: watch::Sender<bool>,
}

async fn way(vendor: SocketAddr, held: Held) -> Arc<Way> {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/api/v1/events/ingest", listener.local_addr().unwrap());
    let way =
        Arc::new(Way { url, seen: watch::Sender::new(false), open: watch::Sender::new(false) });
    let through = Arc::clone(&way);
    tokio::spawn(async move {
        while let Ok((client, _)) = listener.accept().await {
            let way = Arc::clone(&through);
            tokio::spawn(async move {
                let (mut from_client, mut to_client) = client.into_split();
                let (mut from_vendor, mut to_vendor) =
                    TcpStream::connect(vendor).await.unwrap().into_split();
                let (requests, answers) = (way.clone(), way.clone());
                tokio::spawn(async move {
                    let mut buffer = vec![0; 64 * 1024];
                    while let Ok(read @ 1..) = from_client.read(&mut buffer).await {
                        if buffer.starts_with(b"POST ") {
                            requests.seen.send_replace(true);
                        }
                        if held == Held::Request && *requests.seen.borrow() {
                            requests.open.subscribe().wait_for(|open| *open).await.unwrap();
                        }
                        if to_vendor.write_all(&buffer[..read]).await.is_err() {
                            return;
                        }
                    }
                });
                let mut buffer = vec![0; 64 * 1024];
                while let Ok(read @ 1..) = from_vendor.read(&mut buffer).await {
                    if held == Held::Answer && *answers.seen.borrow() {
                        answers.open.subscribe().wait_for(|open| *open).await.unwrap();
                    }
                    if to_client.write_all(&buffer[..read]).await.is_err() {
                        return;
                    }
                }
            });
        }
    });
    way
}

/// Whether all leases are over, by the database's clock.
async fn leases_are_over(world: &World) -> bool {
    let query =
        "select not exists (select from publication where leased_until > clock_timestamp())";
    sqlx::query_scalar(query).fetch_one(&world.ledger.pool).await.unwrap()
}

/// Every publication, and every attempt except those of that request.
async fn written(world: &World, but: Uuid) -> Vec<String> {
    sqlx::query_scalar(
        "select publication::text from publication
         union all select attempt::text from publication_attempt attempt where request_id <> $1
         union all select request::text from publication_request request where id <> $1 order by 1",
    )
    .bind(but)
    .fetch_all(&world.ledger.pool)
    .await
    .unwrap()
}

struct Publishers<'a> {
    world: &'a World,
    log: Log,
}

impl Publishers<'_> {
    async fn requests(&self) -> Vec<(Uuid, Option<i64>)> {
        let query = "select id, batch_id from publication_request order by sent_at";
        sqlx::query_as(query).fetch_all(&self.world.ledger.pool).await.unwrap()
    }

    /// Checks that each event is published by the verdict of its own request, and billed once.
    async fn each_is_published_once(&self, ids: &[&str], by: Uuid) {
        for id in ids {
            let life = self
                .world
                .ledger
                .run(async |conn| event_history::publication(conn, self.world.source.id, id).await)
                .await
                .unwrap()
                .expect("a publication");
            let carried: Vec<_> = life
                .attempts
                .iter()
                .filter(|attempt| attempt.sequence == life.settled_sequence)
                .collect();
            assert!(life.state == PublicationState::Published && carried.len() == 1, "{life:?}");
            assert_eq!(
                (carried[0].request_id, carried[0].verdict),
                (by, Some(AttemptVerdict::Accepted)),
                "{life:?}"
            );
            assert_eq!(self.world.times_billed(id), 1);
        }
    }

    /// Waits until the second publisher has taken over, sent its events and recorded the answer.
    /// Returns both requests.
    async fn second_takes_over(&self, ids: &[&str]) -> (Process, [Uuid; 2]) {
        let [(frozen, None)] = self.requests().await[..] else {
            panic!("one request without an answer")
        };
        assert!(!leases_are_over(self.world).await);
        let second = self.world.process(&self.world.vendor.ingest_url());
        eventually(SOON, "the second has taken over", || async {
            self.world.number_in("published").await == 3
        })
        .await;
        let requests = self.requests().await;
        let [(_, None), (taken_over, Some(_))] = requests[..] else { panic!("{requests:?}") };
        self.each_is_published_once(ids, taken_over).await;
        (second, [frozen, taken_over])
    }

    /// Ends the second publisher. The first publishes new events, and nothing else.
    async fn first_goes_on(&self, mut first: Process, mut second: Process) {
        self.balances().await;
        assert!(second.terminate(SOON).await.success(), "{}", second.stderr());
        self.world.add_with(&self.log, &[usage("d", start_time())]).await;
        eventually(SOON, "the first publishes again", || async {
            self.world.number_in("published").await == 4
        })
        .await;
        let requests = self.requests().await;
        assert_eq!(requests.len(), 3);
        self.each_is_published_once(&["d"], requests[2].0).await;
        assert!(first.terminate(SOON).await.success(), "{}", first.stderr());
        self.balances().await;
    }

    async fn balances(&self) {
        let source = self.world.settings.coderd.clone().map(|database| (database, DEPLOYMENT));
        let audit = Audit {
            ledger: self.world.ledger.clone(),
            log: self.log.clone(),
            source,
            patience: Duration::ZERO,
        };
        let report = audit.run().await.unwrap();
        assert!(report.balanced, "{report:?}");
    }
}

/// Freezes the first publisher with a request in flight. It wakes after the second has sent and
/// recorded the same events.
async fn a_frozen_publisher(held: Held) {
    let world = World::new().await;
    let log = world.log().await;
    let ids = ["a", "b", "c"];
    world.add_with(&log, &ids.map(|id| usage(id, start_time()))).await;
    let publishers = Publishers { world: &world, log };
    let way = way(world.vendor.addr, held).await;
    let first = world.process(&way.url);
    eventually(SOON, "a request is in flight", || async {
        *way.seen.borrow()
            && (held == Held::Request || world.vendor.books().deliveries.len() == ids.len())
    })
    .await;
    first.pause();
    let (second, [frozen, taken_over]) = publishers.second_takes_over(&ids).await;
    let before = written(&world, frozen).await;

    way.open.send_replace(true);
    eventually(SOON, "both requests are with the vendor", || async {
        world.vendor.books().deliveries.len() == 2 * ids.len()
    })
    .await;
    first.resume();
    eventually(SOON, "the first has recorded the outcome of its request", || async {
        publishers.requests().await[0].1.is_some()
    })
    .await;
    assert_eq!(written(&world, frozen).await, before, "it has written only that");
    let verdicts: Vec<String> = sqlx::query_scalar(
        "select distinct verdict from publication_attempt where request_id = $1",
    )
    .bind(frozen)
    .fetch_all(&world.ledger.pool)
    .await
    .unwrap();
    assert!(["accepted", "failed"].iter().any(|verdict| verdicts == [*verdict]), "{verdicts:?}");
    publishers.each_is_published_once(&ids, taken_over).await;
    publishers.first_goes_on(first, second).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_publisher_frozen_before_the_vendor_has_its_request_writes_nothing_over_the_second_one() {
    a_frozen_publisher(Held::Request).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_publisher_frozen_before_it_has_its_answer_writes_nothing_over_the_second_one() {
    a_frozen_publisher(Held::Answer).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_publisher_frozen_while_it_records_its_answer_stops_no_second_one_and_writes_nothing() {
    let world = World::new().await;
    let log = world.log().await;
    let ids = ["a", "b", "c"];
    world.add_with(&log, &ids.map(|id| usage(id, start_time()))).await;
    let publishers = Publishers { world: &world, log };
    let way = way(world.vendor.addr, Held::Answer).await;
    let first = world.process(&way.url);
    eventually(SOON, "the vendor has its request", || async {
        world.vendor.books().deliveries.len() == ids.len()
    })
    .await;
    let mut lock = world.ledger.pool.begin().await.unwrap();
    sqlx::query("select from publication for update").execute(&mut *lock).await.unwrap();
    way.open.send_replace(true);
    eventually(SOON, "it is in the transaction that records the answer", || async {
        let waiting = "select count(*) from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'";
        sqlx::query_scalar::<_, i64>(waiting).fetch_one(&world.ledger.pool).await.unwrap() > 0
    })
    .await;
    first.pause();
    // now the frozen one's transaction has the rows
    lock.rollback().await.unwrap();
    let (second, [frozen, _]) = publishers.second_takes_over(&ids).await;
    let before = written(&world, frozen).await;
    first.resume();
    eventually(SOON, "the first has abandoned its answer", || async {
        first.stderr().contains(&format!("the answer to request {frozen} is not recorded"))
    })
    .await;
    assert_eq!(
        (publishers.requests().await[0], written(&world, frozen).await),
        ((frozen, None), before)
    );
    publishers.first_goes_on(first, second).await;
}
