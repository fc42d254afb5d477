//! Seeded chance: one stream of numbers per subject, so that more of one thing does not change
//! another.

use chrono::TimeDelta;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use uuid::Uuid;

/// The generator of every part. Its numbers are the same on every machine and in every version of
/// `rand_chacha`.
pub(super) type Dice = ChaCha8Rng;

/// The use of the numbers.
#[derive(Clone, Copy)]
pub(super) enum Subject {
    Deployment = 1,
    Licenses = 2,
    LifePlanner = 3,
    Heartbeats = 4,
    Publishing = 5,
}

pub(super) fn dice(seed: u64, subject: Subject) -> Dice {
    let mut dice = ChaCha8Rng::seed_from_u64(seed);
    dice.set_stream(subject as u64);
    dice
}

pub(super) fn uuid_from(dice: &mut Dice) -> Uuid {
    uuid::Builder::from_random_bytes(dice.random()).into_uuid()
}

/// Between `low` and `high` microseconds, each order of magnitude equally likely.
#[allow(clippy::cast_possible_truncation, clippy::cast_precision_loss)] // hours in microseconds are far below 2^52
pub(super) fn log_uniform(dice: &mut Dice, (low, high): (i64, i64)) -> TimeDelta {
    let (low, high) = ((low.max(1) as f64).ln(), (high.max(1) as f64).ln());
    TimeDelta::microseconds((low + (high - low) * dice.random::<f64>()).exp() as i64)
}

/// Between `low` and `high` microseconds.
pub(super) fn uniform(dice: &mut Dice, (low, high): (i64, i64)) -> TimeDelta {
    TimeDelta::microseconds(dice.random_range(low..=high))
}

/// True once in `n`; never for 0.
pub(super) fn one_in(dice: &mut Dice, n: usize) -> bool {
    n > 0 && dice.random_range(0..n) == 0
}

pub(super) fn pick<T: Copy>(dice: &mut Dice, from: &[T]) -> T {
    from[dice.random_range(0..from.len())]
}
