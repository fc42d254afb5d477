//! The faults of a site and their times, drawn from a seed.

use std::fmt;
use std::time::Duration;

use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// The log's backend, and the protocol of its consumer group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backend {
    Kafka,
    /// With the group protocol of brokers from 4.0 on.
    KafkaNewProtocol,
    Postgres,
}

/// All kinds of faults.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    ConsumerKilled,
    CollectorKilled,
    PublisherKilled,
    ServerKilled,
    AllKilled,
    BrokerStopped,
    BrokerKilled,
    PostgresStopped,
    PostgresKilled,
    ConnectionsCut,
    ConsumersReplaced,
    ProcessFrozen,
    FrozenInTransaction,
    ClockStepped,
    DiskFull,
    /// coderd commits rows with timestamps far older than the margin.
    RowsVisibleLate,
    /// The clock of a coderd replica is minutes behind.
    SourceClockBehind,
    /// A foreign producer writes transactions to the topics.
    TransactionalNoise,
    /// coderd removes old builds, and their workspaces start again.
    BuildsPurged,
    /// Another process runs the same pipeline with another deployment id.
    SecondPipelineMisconfigured,
}

use Kind::{
    AllKilled, BrokerKilled, BrokerStopped, BuildsPurged, ClockStepped, CollectorKilled,
    ConnectionsCut, ConsumerKilled, ConsumersReplaced, DiskFull, FrozenInTransaction,
    PostgresKilled, PostgresStopped, ProcessFrozen, PublisherKilled, RowsVisibleLate,
    SecondPipelineMisconfigured, ServerKilled, SourceClockBehind, TransactionalNoise,
};

/// Any five consecutive seeds cover all of these: each has four neighbours of this list for
/// certain.
const KINDS: [Kind; 20] = [
    ConsumerKilled,
    PostgresStopped,
    BuildsPurged,
    FrozenInTransaction,
    BrokerKilled,
    TransactionalNoise,
    ConnectionsCut,
    PublisherKilled,
    DiskFull,
    RowsVisibleLate,
    ConsumersReplaced,
    CollectorKilled,
    ProcessFrozen,
    BrokerStopped,
    SecondPipelineMisconfigured,
    ServerKilled,
    ClockStepped,
    SourceClockBehind,
    PostgresKilled,
    AllKilled,
];
const CERTAIN: usize = 4;
const BY_CHANCE: usize = 1;

/// One fault.
#[derive(Clone, Copy, Debug)]
pub struct Fault {
    pub kind: Kind,
    /// Its shortest duration.
    pub lasts: Duration,
    /// Decides the rest: which process, how many bytes, how far a clock.
    pub roll: u64,
}

/// One fault, or two that overlap.
#[derive(Clone, Debug)]
pub struct Round {
    /// Quiet time before it.
    pub calm: Duration,
    pub faults: Vec<Fault>,
    /// Whether the second of two ends first.
    pub nested: bool,
}

/// All that a seed decides.
#[derive(Clone, Debug)]
pub struct Schedule {
    pub seed: u64,
    pub backend: Backend,
    pub rounds: Vec<Round>,
}

impl Kind {
    fn of_broker(self) -> bool {
        matches!(self, BrokerStopped | BrokerKilled)
    }

    fn of_server(self) -> bool {
        self.of_broker() || matches!(self, PostgresStopped | PostgresKilled | DiskFull)
    }

    /// Whether it needs a log in Kafka.
    fn needs_broker(self) -> bool {
        self.of_broker() || self == TransactionalNoise
    }

    /// Whether it starts only while records are written and all servers answer.
    fn needs_traffic(self) -> bool {
        matches!(
            self,
            DiskFull
                | FrozenInTransaction
                | RowsVisibleLate
                | SourceClockBehind
                | TransactionalNoise
                | BuildsPurged
                | SecondPipelineMisconfigured
        )
    }

    /// Whether `other` may start during this fault. Two faults of the same thing do not overlap:
    /// the later end would undo the other.
    fn overlaps(self, other: Kind) -> bool {
        if other.needs_traffic() {
            return false;
        }
        let role = |kind| match kind {
            ConsumerKilled | ConsumersReplaced => 1,
            CollectorKilled => 2,
            PublisherKilled => 3,
            ServerKilled => 4,
            _ => 0,
        };
        if self == TransactionalNoise && other.of_broker() {
            return false;
        }
        let server = self.of_server() || other.of_server();
        let same_server =
            self.of_broker() == other.of_broker() && self.of_server() && other.of_server();
        if server {
            !same_server
        } else {
            role(self) != role(other) && role(self) != 0 && role(other) != 0
        }
    }

    /// Longer than the process tolerates, if the fault is about that; else short, as usual.
    fn lasts(self, dice: &mut ChaCha8Rng) -> Duration {
        let milliseconds = match self {
            BrokerStopped | BrokerKilled => 0..2000,
            PostgresStopped | PostgresKilled => 0..4000,
            FrozenInTransaction | ProcessFrozen => 6500..8000,
            ClockStepped | DiskFull | SourceClockBehind | TransactionalNoise => 500..2500,
            _ => 0..1500,
        };
        Duration::from_millis(dice.random_range(milliseconds))
    }
}

impl Schedule {
    pub fn of(seed: u64) -> Schedule {
        let mut dice = ChaCha8Rng::seed_from_u64(seed);
        let first = usize::try_from(seed % KINDS.len() as u64).expect("small") * CERTAIN;
        let mut kinds: Vec<Kind> =
            (first..first + CERTAIN).map(|place| KINDS[place % KINDS.len()]).collect();
        let brokers = kinds.iter().any(|kind| kind.needs_broker());
        let backend = match dice.random_range(0..4) {
            0 => Backend::KafkaNewProtocol,
            1 => Backend::Kafka,
            _ if brokers => Backend::Kafka,
            _ => Backend::Postgres,
        };
        while kinds.len() < CERTAIN + BY_CHANCE {
            let kind = KINDS[dice.random_range(0..KINDS.len())];
            if backend != Backend::Postgres || !kind.needs_broker() {
                kinds.push(kind);
            }
        }
        kinds.shuffle(&mut dice);
        let mut rounds: Vec<Round> = Vec::new();
        for kind in kinds {
            let fault = Fault { kind, lasts: kind.lasts(&mut dice), roll: dice.random() };
            match rounds.last_mut() {
                Some(Round { faults, .. })
                    if faults.len() == 1
                        && faults[0].kind.overlaps(kind)
                        && dice.random_bool(0.5) =>
                {
                    faults.push(fault);
                }
                _ => {
                    let calm = Duration::from_millis(dice.random_range(0..1500));
                    rounds.push(Round { calm, faults: vec![fault], nested: dice.random() });
                }
            }
        }
        Schedule { seed, backend, rounds }
    }

    pub fn has(&self, kind: Kind) -> bool {
        self.rounds.iter().flat_map(|round| &round.faults).any(|fault| fault.kind == kind)
    }
}

impl fmt::Display for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "seed {} on {:?}:", self.seed, self.backend)?;
        for round in &self.rounds {
            let faults: Vec<String> = round
                .faults
                .iter()
                .map(|fault| format!("{:?} {:.1?}", fault.kind, fault.lasts))
                .collect();
            write!(
                f,
                "\n  after {:.1?} {}",
                round.calm,
                faults.join(if round.nested { " around " } else { " into " })
            )?;
        }
        Ok(())
    }
}

#[test]
fn five_seeds_in_a_row_have_every_kind_and_a_seed_is_always_the_same_schedule() {
    for seed in [0, 1, 40, 4001, u64::MAX / 2] {
        let schedules: Vec<Schedule> = (seed..seed + 5).map(Schedule::of).collect();
        for kind in KINDS {
            assert!(
                schedules.iter().any(|schedule| schedule.has(kind)),
                "{kind:?} is in none of five from {seed} on"
            );
        }
        assert_eq!(Schedule::of(seed).to_string(), schedules[0].to_string());
    }
    let many: Vec<Schedule> = (0..200).map(Schedule::of).collect();
    for backend in [Backend::Kafka, Backend::KafkaNewProtocol, Backend::Postgres] {
        assert!(
            many.iter().filter(|schedule| schedule.backend == backend).count() > 30,
            "{backend:?}"
        );
    }
    assert!(
        many.iter()
            .filter(|schedule| schedule.rounds.iter().any(|round| round.faults.len() == 2))
            .count()
            > 60
    );
    let brokers = |schedule: &&Schedule| {
        KINDS.into_iter().any(|kind| kind.needs_broker() && schedule.has(kind))
    };
    assert!(many.iter().filter(brokers).all(|schedule| schedule.backend != Backend::Postgres));
}
