//! How each fault begins, what must hold during it, and how it ends.

use std::time::{Duration, Instant};

use chrono::TimeDelta;
use tallyline_sim::tallyman::Books;

use crate::schedule::{Fault, Kind, Round};
use crate::servers::Servers;
use crate::support::eventually;
use crate::traffic::Coderd;
use crate::world::{Place, World};

/// Other processes take over a dead or frozen consumer's work within this, also on a busy machine.
/// It covers the session or lease (6 s), the locks of an open transaction (5 s) and the partition
/// leases.
const TAKEN_OVER: Duration = Duration::from_secs(20);
/// After a fault, new records come within this (a dead collector is replaced within 8 s) and are
/// recorded within this. The longest wait between two attempts is 15 s, and only after several
/// failures; takeovers happen within the same time.
const MOVES_AGAIN: Duration = Duration::from_secs(30);
/// The time for a fault's precondition, with traffic: a dead collector is replaced within 8 s.
pub const MET: Duration = Duration::from_secs(40);
/// Of this many records, nearly always every partition of the largest topic has some.
const RECORDS_THAT_MEET_ALL: i64 = 60;
/// The largest step of a clock: more than the vendor's 30 days for usage and 34 days of memory for
/// ids.
const FARTHEST_STEP_SECONDS: u64 = 40 * 24 * 3600;

impl World {
    /// Runs one round, until all processes work again.
    pub async fn run_round(&mut self, round: &Round, servers: &mut Servers, coderd: &Coderd) {
        tokio::time::sleep(round.calm).await;
        let alone = round.faults.len() == 1;
        for fault in &round.faults {
            self.say(&format!("{:?} begins", fault.kind));
            let begun = Instant::now();
            self.begin_fault(*fault, alone, servers, coderd).await;
            tokio::time::sleep(fault.lasts.saturating_sub(begun.elapsed())).await;
        }
        let mut order = round.faults.clone();
        if round.nested {
            order.reverse();
        }
        for fault in order {
            self.end_fault(fault, servers, coderd).await;
            self.say(&format!("{:?} is over", fault.kind));
        }
        self.new_records_are_recorded(MOVES_AGAIN, MOVES_AGAIN, "all roles work again").await;
    }

    async fn begin_fault(
        &mut self,
        fault: Fault,
        alone: bool,
        servers: &mut Servers,
        coderd: &Coderd,
    ) {
        match fault.kind {
            Kind::ConsumerKilled | Kind::CollectorKilled | Kind::ServerKilled => {
                let place = fault.place();
                self.kill(place);
                self.others_go_on(place, alone).await;
            }
            Kind::PublisherKilled => {
                self.kill_publisher(fault.roll).await;
            }
            Kind::AllKilled => {
                for place in Place::ALL {
                    self.kill(place);
                }
            }
            Kind::BrokerStopped => servers.kafka.stop().await,
            Kind::BrokerKilled => servers.kafka.kill(),
            Kind::PostgresStopped => {
                servers.postgres.stop().await;
                self.answers_lost += 1;
            }
            Kind::PostgresKilled => {
                servers.postgres.kill();
                self.answers_lost += 1;
            }
            Kind::ConnectionsCut => self.cut(fault).await,
            Kind::ConsumersReplaced => self.replace_consumer(fault, alone).await,
            Kind::ProcessFrozen => {
                let place = fault.place();
                self.member(place).process().pause();
                self.others_go_on(place, alone).await;
            }
            Kind::FrozenInTransaction => {
                let place = fault.place();
                self.freeze_in_transaction(place, fault.roll).await;
                self.others_go_on(place, alone).await;
            }
            Kind::ClockStepped => {
                let place = fault.place();
                self.end(place).await;
                let seconds =
                    i64::try_from((fault.roll >> 8) % (2 * FARTHEST_STEP_SECONDS)).expect("days");
                let offset = seconds - i64::try_from(FARTHEST_STEP_SECONDS).expect("days");
                self.say(&format!("{place:?} starts with a clock that is {offset} s off"));
                self.start(place, offset);
            }
            Kind::DiskFull => {
                let before = servers.postgres.refusals();
                servers.postgres.fill_disk();
                self.answers_lost += 1;
                eventually(MET, "PostgreSQL meets the full disk", || {
                    let met = servers.postgres.refusals() > before;
                    async move { met }
                })
                .await;
            }
            Kind::RowsVisibleLate => self.rows_become_visible_late(coderd).await,
            Kind::SourceClockBehind => self.source_clock_falls_behind(coderd).await,
            Kind::TransactionalNoise => self.foreign_transactions_begin(fault.roll).await,
            Kind::BuildsPurged => self.builds_are_purged(coderd, fault.roll).await,
            Kind::SecondPipelineMisconfigured => self.a_wrong_deployment_id_is_refused().await,
        }
    }

    async fn end_fault(&mut self, fault: Fault, servers: &mut Servers, coderd: &Coderd) {
        match fault.kind {
            Kind::ConsumerKilled
            | Kind::CollectorKilled
            | Kind::ServerKilled
            | Kind::PublisherKilled => self.start(fault.place(), 0),
            Kind::AllKilled => Place::ALL.into_iter().for_each(|place| self.start(place, 0)),
            Kind::BrokerStopped | Kind::BrokerKilled => servers.kafka.start().await,
            Kind::PostgresStopped | Kind::PostgresKilled => servers.postgres.start().await,
            Kind::ConnectionsCut => {}
            Kind::ConsumersReplaced => {
                self.start(fault.place(), 0);
                self.end(Place::ConsumeC).await;
            }
            Kind::ProcessFrozen | Kind::FrozenInTransaction => {
                self.member(fault.place()).process().resume()
            }
            Kind::ClockStepped => {
                self.end(fault.place()).await;
                self.start(fault.place(), 0);
            }
            Kind::DiskFull => {
                servers.postgres.empty_disk();
                servers.postgres.start().await;
            }
            Kind::RowsVisibleLate | Kind::BuildsPurged | Kind::SecondPipelineMisconfigured => {}
            Kind::SourceClockBehind => coderd.lock().await.set_clock_behind(TimeDelta::zero()),
            Kind::TransactionalNoise => self.foreign_transaction_ends(fault.roll).await,
        }
    }

    /// While a consumer is away, the others record new records of its partitions, too. A process of
    /// another role holds up none of them. If a server is also away, nothing moves.
    async fn others_go_on(&mut self, place: Place, alone: bool) {
        if !alone || place == Place::Collect {
            return;
        }
        self.new_records_are_recorded(MET, TAKEN_OVER, &format!("others go on without {place:?}"))
            .await;
    }

    /// Checks that records come in every partition and are then recorded, each within its bound.
    async fn new_records_are_recorded(&mut self, come: Duration, recorded: Duration, what: &str) {
        let (begun, before) = (Instant::now(), self.site.appended().await);
        eventually(come, &format!("{what}: records come"), || async {
            self.site.appended().await >= before + RECORDS_THAT_MEET_ALL
        })
        .await;
        let (arrival, ends) = (begun.elapsed(), self.log_ends().await);
        let begun = Instant::now();
        let reached = async {
            while !self.behind(&ends).await.is_empty() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        if tokio::time::timeout(recorded, reached).await.is_err() {
            panic!("{what}: not within {recorded:?}, behind are {:?}", self.behind(&ends).await);
        }
        let took = begun.elapsed();
        self.slowest = self.slowest.max(took);
        self.say(&format!(
            "{what}: records came within {arrival:.1?}, and were recorded within {took:.1?}"
        ));
    }

    /// Kills the publisher with requests in flight, if there is usage to publish. In half of the
    /// cases it is first frozen until the vendor has the events: the answers are never read.
    /// Otherwise the requests die with it.
    async fn kill_publisher(&mut self, roll: u64) {
        if self.within(Duration::from_secs(5), |books| books.in_flight > 0).await {
            if roll.is_multiple_of(2) {
                self.member(Place::Publish).process().pause();
                let is_taken =
                    self.within(Duration::from_secs(2), |books| books.in_flight == 0).await;
                self.say(if is_taken {
                    "the vendor took a request whose answer is lost"
                } else {
                    "a request was lost"
                });
            } else {
                self.say("a request is in flight");
            }
        }
        self.kill(Place::Publish);
    }

    /// Whether the vendor's books reach this state in time.
    async fn within(&self, limit: Duration, so: impl Fn(&Books) -> bool) -> bool {
        let waited = async {
            while !so(&self.tallyman.books()) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(limit, waited).await.is_ok()
    }

    /// Cuts connections three times within the server's answer: of one process, or of all.
    async fn cut(&mut self, fault: Fault) {
        let all = fault.roll.is_multiple_of(3);
        for time in 0..3 {
            let bytes = 100 + (fault.roll >> (8 * time)) % 5_000;
            let place = fault.place();
            let proxies: Vec<_> = self
                .members()
                .iter()
                .filter(|member| all || member.place == place)
                .map(|member| &member.proxy)
                .collect();
            proxies.iter().for_each(|proxy| proxy.cut_after(bytes));
            let cut = async {
                while !proxies.iter().all(|proxy| proxy.has_cut()) {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
            };
            if tokio::time::timeout(Duration::from_secs(2), cut).await.is_err() {
                // the server sent too few bytes
                proxies.iter().for_each(|proxy| proxy.cut());
            }
        }
    }

    /// A third consumer starts, and one of the others ends.
    async fn replace_consumer(&mut self, fault: Fault, alone: bool) {
        self.add(Place::ConsumeC).await;
        if alone {
            let process = self.member(Place::ConsumeC).process();
            eventually(TAKEN_OVER, "the third consumer has partitions", || {
                let assigned = process.stderr().contains("partitions assigned");
                async move { assigned }
            })
            .await;
        }
        self.end(fault.place()).await;
    }

    /// Blocks the bytes after a statement within a transaction, then stops the process. Retries if
    /// the server ended the transaction.
    async fn freeze_in_transaction(&mut self, place: Place, roll: u64) {
        let attempt = async {
            for time in 0.. {
                let member = self.member(place);
                member.proxy.freeze_in_transaction(1 + (roll >> (time % 40)) % 6);
                while !member.proxy.is_frozen() {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
                member.process().pause();
                member.proxy.thaw();
                if self.has_blocked_transaction().await {
                    return time + 1;
                }
                self.member(place).process().resume();
            }
            unreachable!("the loop has no end")
        };
        let Ok(attempts) = tokio::time::timeout(MET, attempt).await else {
            panic!("{place:?} was not frozen within a transaction")
        };
        self.say(&format!("{place:?} is frozen within a transaction, at attempt {attempts}"));
    }

    /// Whether a transaction of the ledger waits for its client longer than any running one does.
    async fn has_blocked_transaction(&self) -> bool {
        let waits = "select count(*) from pg_stat_activity where datname = current_database() and state = 'idle in transaction'
             and state_change < clock_timestamp() - interval '200 milliseconds'";
        for _ in 0..30 {
            let waiting =
                sqlx::query_scalar::<_, i64>(waits).fetch_one(&self.site.database.pool).await;
            if waiting.is_ok_and(|waiting| waiting > 0) {
                return true;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        false
    }
}

impl Fault {
    /// The process that the fault affects.
    fn place(self) -> Place {
        let one_of = |places: &[Place]| {
            places[usize::try_from(self.roll % places.len() as u64).expect("small")]
        };
        match self.kind {
            Kind::CollectorKilled => Place::Collect,
            Kind::PublisherKilled => Place::Publish,
            Kind::ServerKilled => one_of(&[Place::ServeA, Place::ServeB]),
            Kind::ConsumerKilled | Kind::ConsumersReplaced => {
                one_of(&[Place::ConsumeA, Place::ConsumeB])
            }
            Kind::ProcessFrozen | Kind::FrozenInTransaction => one_of(&[
                Place::ConsumeA,
                Place::ConsumeB,
                Place::ConsumeA,
                Place::ConsumeB,
                Place::Collect,
                Place::Publish,
            ]),
            _ => one_of(&Place::ALL),
        }
    }
}
