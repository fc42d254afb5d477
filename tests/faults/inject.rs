//! How each fault begins, what must hold while it lasts, and how it is over.

use std::time::Duration;

use crate::schedule::{Fault, Kind, Round};
use crate::servers::Servers;
use crate::support::eventually;
use crate::world::{Place, World};

/// Others take over what a consumer that is dead or frozen had within this: its session (3 s; in the PostgreSQL log a lease of 10 s), the locks of a
/// transaction that it left open (5 s), and the claims, with room for a machine that is busy.
const TAKEN_OVER: Duration = Duration::from_secs(20);
/// After a fault is over, all that waited in the log is recorded within this: the longest wait between two attempts is 15 s, and only after
/// several that failed; and what others take over is taken over meanwhile.
const MOVES_AGAIN: Duration = Duration::from_secs(30);
/// For what a fault needs to have happened, while there is traffic: a collector that died is replaced within 17 s.
const MET: Duration = Duration::from_secs(40);
/// Of so many records nearly always some lie in every partition of the topic that has the most of them.
const RECORDS_THAT_MEET_ALL: i64 = 60;
/// The farthest step of a clock. The history is 20 days long, and the vendor takes usage of 30.
const FARTHEST_STEP_SECONDS: u64 = 5 * 24 * 3600;

impl World {
    /// One round, until all moves again.
    pub async fn suffer(&mut self, round: &Round, servers: &mut Servers) {
        tokio::time::sleep(round.calm).await;
        let alone = round.faults.len() == 1;
        for fault in &round.faults {
            self.say(&format!("{:?} begins", fault.kind));
            self.begin_fault(*fault, alone, servers).await;
            tokio::time::sleep(fault.lasts).await;
        }
        let mut order = round.faults.clone();
        if round.nested {
            order.reverse();
        }
        for fault in order {
            self.end_fault(fault, servers).await;
            self.say(&format!("{:?} is over", fault.kind));
        }
        let ends = self.ends().await;
        self.positions_reach(&ends, MOVES_AGAIN, "all that waited is recorded").await;
    }

    async fn begin_fault(&mut self, fault: Fault, alone: bool, servers: &mut Servers) {
        match fault.kind {
            Kind::ConsumerKilled | Kind::CollectorKilled | Kind::ServerKilled => {
                let place = fault.place();
                self.kill(place);
                self.others_go_on(place, alone).await;
            }
            Kind::PublisherKilled => {
                self.a_request_is_on_its_way().await;
                self.kill(Place::Publish);
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
                let seconds = i64::try_from((fault.roll >> 8) % (2 * FARTHEST_STEP_SECONDS)).expect("days");
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
        }
    }

    async fn end_fault(&mut self, fault: Fault, servers: &mut Servers) {
        match fault.kind {
            Kind::ConsumerKilled | Kind::CollectorKilled | Kind::ServerKilled | Kind::PublisherKilled => self.start(fault.place(), 0),
            Kind::AllKilled => Place::ALL.into_iter().for_each(|place| self.start(place, 0)),
            Kind::BrokerStopped | Kind::BrokerKilled => servers.kafka.start().await,
            Kind::PostgresStopped | Kind::PostgresKilled => servers.postgres.start().await,
            Kind::ConnectionsCut => {}
            Kind::ConsumersReplaced => {
                self.start(fault.place(), 0);
                self.end(Place::ConsumeC).await;
            }
            Kind::ProcessFrozen | Kind::FrozenInTransaction => self.member(fault.place()).process().resume(),
            Kind::ClockStepped => {
                self.end(fault.place()).await;
                self.start(fault.place(), 0);
            }
            Kind::DiskFull => {
                servers.postgres.empty_disk();
                servers.postgres.start().await;
            }
        }
    }

    /// Without a consumer the others record what comes after its end, in its partitions, too. What a process of another role holds stops none of
    /// them. Where a server is away as well, nothing goes on.
    async fn others_go_on(&mut self, place: Place, alone: bool) {
        if !alone || place == Place::Collect {
            return;
        }
        let before = self.site.appended().await;
        let what = format!("records come after the end of {place:?}");
        eventually(MET, &what, || async { self.site.appended().await >= before + RECORDS_THAT_MEET_ALL }).await;
        let ends = self.ends().await;
        self.positions_reach(&ends, TAKEN_OVER, &format!("others go on without {place:?}")).await;
    }

    /// Or none comes: there may be nothing to publish.
    async fn a_request_is_on_its_way(&self) {
        let taken = |books: &tallyline::sim::tallyman::Books| books.deliveries.last().map_or(0, |delivery| delivery.request);
        let on_its_way = async {
            loop {
                let books = self.tallyman.books();
                if books.requests > taken(&books) {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        let met = tokio::time::timeout(Duration::from_secs(5), on_its_way).await;
        self.say(if met.is_ok() { "a request is on its way" } else { "no request is on its way" });
    }

    /// Three times, in the middle of what the server sends: of one process, or of all.
    async fn cut(&mut self, fault: Fault) {
        let all = fault.roll.is_multiple_of(3);
        for time in 0..3 {
            let bytes = 500 + (fault.roll >> (8 * time)) % 20_000;
            let place = fault.place();
            let proxies: Vec<_> = self.members().iter().filter(|member| all || member.place == place).map(|member| &member.proxy).collect();
            proxies.iter().for_each(|proxy| proxy.cut_after(bytes));
            let cut = async {
                while !proxies.iter().all(|proxy| proxy.has_cut()) {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
            };
            if tokio::time::timeout(Duration::from_secs(3), cut).await.is_err() {
                // too little was sent
                proxies.iter().for_each(|proxy| proxy.cut());
            }
        }
    }

    /// A third comes, and one of the others goes.
    async fn replace_consumer(&mut self, fault: Fault, alone: bool) {
        self.add(Place::ConsumeC).await;
        if alone {
            let process = self.member(Place::ConsumeC).process();
            eventually(TAKEN_OVER, "the third consumer has its part", || {
                let assigned = process.stderr().contains("partitions assigned");
                async move { assigned }
            })
            .await;
        }
        self.end(fault.place()).await;
    }

    /// Bytes stand still in the middle of something, then the process is stopped. Again, until that is within a transaction.
    async fn freeze_in_transaction(&mut self, place: Place, roll: u64) {
        let attempt = async {
            for time in 0.. {
                let member = self.member(place);
                member.proxy.freeze_after(1 + (roll >> (time % 40)) % 3000);
                while !member.proxy.is_frozen() {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
                member.process().pause();
                member.proxy.thaw();
                if self.a_transaction_stands_still().await {
                    return time + 1;
                }
                self.member(place).process().resume();
            }
            unreachable!("there is no end")
        };
        let Ok(attempts) = tokio::time::timeout(MET, attempt).await else { panic!("{place:?} was not frozen within a transaction") };
        self.say(&format!("{place:?} is frozen within a transaction, at attempt {attempts}"));
    }

    /// Whether a transaction of the ledger has waited for its client for longer than any does that runs.
    async fn a_transaction_stands_still(&self) -> bool {
        let waits = "select count(*) from pg_stat_activity where datname = current_database() and state = 'idle in transaction'
             and state_change < clock_timestamp() - interval '200 milliseconds'";
        for _ in 0..30 {
            let waiting = sqlx::query_scalar::<_, i64>(waits).fetch_one(&self.site.database.pool).await;
            if waiting.is_ok_and(|waiting| waiting > 0) {
                return true;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        false
    }
}

impl Fault {
    /// Which process it is about.
    fn place(self) -> Place {
        let one_of = |places: &[Place]| places[usize::try_from(self.roll % places.len() as u64).expect("small")];
        match self.kind {
            Kind::CollectorKilled => Place::Collect,
            Kind::PublisherKilled => Place::Publish,
            Kind::ServerKilled => one_of(&[Place::ServeA, Place::ServeB]),
            Kind::ConsumerKilled | Kind::ConsumersReplaced => one_of(&[Place::ConsumeA, Place::ConsumeB]),
            Kind::ProcessFrozen | Kind::FrozenInTransaction => {
                one_of(&[Place::ConsumeA, Place::ConsumeB, Place::ConsumeA, Place::ConsumeB, Place::Collect, Place::Publish])
            }
            _ => one_of(&Place::ALL),
        }
    }
}
