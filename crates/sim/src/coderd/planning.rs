//! The data that every planned life and build shares.

use chrono::{DateTime, Utc};
use uuid::Uuid;

use super::chance::Dice;
use super::config::Config;

/// A span to fill with lives, and the durations in it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Window {
    pub from: DateTime<Utc>,
    pub to: DateTime<Utc>,
    pub pace: Pace,
    /// A history has old forms of claims, open jobs at its end and every kind of life at least
    /// once.
    pub history: bool,
}

/// Ranges in microseconds.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pace {
    pub wait: (i64, i64),
    pub build: (i64, i64),
    pub claim: (i64, i64),
    pub gap: (i64, i64),
    /// How long a late commit stays open: always shorter than the shortest gap.
    pub hold: (i64, i64),
}

const SECOND: i64 = 1_000_000;

impl Pace {
    /// Realistic: builds of under a second to over an hour, hours between them.
    pub const LIFE: Pace = Pace {
        wait: (50_000, 40 * SECOND),
        build: (SECOND * 8 / 10, 4500 * SECOND),
        claim: (SECOND * 7 / 10, 400 * SECOND),
        gap: (300 * SECOND, 12 * 3600 * SECOND),
        hold: (20 * SECOND, 120 * SECOND),
    };
    /// For live viewing: builds of seconds.
    pub const BRISK: Pace = Pace {
        wait: (20_000, 400_000),
        build: (300_000, 12 * SECOND),
        claim: (150_000, 4 * SECOND),
        gap: (3 * SECOND / 2, 30 * SECOND),
        hold: (200_000, 900_000),
    };
}

/// An existing workspace.
#[derive(Clone, Copy, Debug)]
pub(super) struct Existing {
    pub workspace: Uuid,
    pub owner: Uuid,
    pub template: Uuid,
    /// The number of its builds.
    pub builds: i32,
}

/// The settings, the dice and the counters of all workspaces.
pub(super) struct Planning {
    pub config: Config,
    pub dice: Dice,
    /// The number of workspaces: it numbers names.
    pub workspaces: usize,
    /// The number of completions without usage: some are committed late by it.
    pub completions: usize,
}

impl Planning {
    pub fn new(config: &Config, dice: Dice) -> Self {
        Planning { config: config.clone(), dice, workspaces: 0, completions: 0 }
    }
}
