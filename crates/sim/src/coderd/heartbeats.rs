//! Plans the rows of the usage cron and generator (4.3, 4.4), their usage, and the verdicts of
//! coderd's own publisher.

use std::collections::BTreeMap;

use chrono::{DateTime, DurationRound, TimeDelta, Utc};
use rand::Rng;
use uuid::Uuid;

use super::acts::{Act, Change, UsageKind, UsageRow};
use super::chance::{Dice, Subject, dice, one_in, pick, uniform, uuid_from};
use super::config::Config;
use super::deployment::Deployment;

/// 2023-01-01T00:00:00Z: seat boundaries are multiples of four hours from here.
const SEAT_EPOCH: i64 = 1_672_531_200;
const SEAT_INTERVAL: i64 = 4 * 3600;
const MINUTE: i64 = 60_000_000;
/// Time between two cycles of coderd's publisher.
const PUBLISH_INTERVAL: i64 = 17 * 60;

/// Plans heartbeats, window after window.
pub(super) struct Heartbeats {
    dice: Dice,
    publishing: Dice,
    config: Config,
    /// Users of AI with their first use; only active ones (true) are counted.
    seats: BTreeMap<Uuid, (DateTime<Utc>, bool)>,
    chats: Vec<Uuid>,
}

impl Heartbeats {
    pub fn new(config: &Config) -> Self {
        let mut dice = dice(config.seed, Subject::Heartbeats);
        let chats = (0..10).map(|_| uuid_from(&mut dice)).collect();
        let publishing = super::chance::dice(config.seed, Subject::Publishing);
        Heartbeats { dice, publishing, config: config.clone(), seats: BTreeMap::new(), chats }
    }

    /// Plans seat uses, chat messages and the heartbeat rows of every boundary and hour that begins
    /// in the window.
    pub fn plan(
        &mut self,
        deployment: &Deployment,
        from: DateTime<Utc>,
        to: DateTime<Utc>,
    ) -> Vec<Act> {
        let mut acts = self.seat_uses(deployment, from, to);
        acts.extend(self.seat_rows(from, to));
        acts.extend(self.runtime_rows(from, to));
        acts
    }

    fn seat_uses(
        &mut self,
        deployment: &Deployment,
        from: DateTime<Utc>,
        to: DateTime<Utc>,
    ) -> Vec<Act> {
        let span = (to - from).num_microseconds().unwrap_or(i64::MAX);
        let mut acts = Vec::new();
        // One of them is a suspended user, who has a row but is not a seat.
        let people = deployment
            .users
            .iter()
            .step_by(2)
            .map(|user| (user.id, true))
            .chain([(deployment.suspended.id, false)]);
        for (user, active) in people {
            if !self.seats.contains_key(&user) {
                let at = from + uniform(&mut self.dice, (0, span));
                self.seats.insert(user, (at, active));
                acts.push(Act { at, held_for: None, change: Change::Seat { user } });
            }
        }
        acts
    }

    /// At each boundary plus jitter; coderd never makes up for a missed boundary.
    fn seat_rows(&mut self, from: DateTime<Utc>, to: DateTime<Utc>) -> Vec<Act> {
        let mut acts = Vec::new();
        let mut boundary =
            SEAT_EPOCH + (from.timestamp() - SEAT_EPOCH).div_euclid(SEAT_INTERVAL) * SEAT_INTERVAL;
        while boundary < to.timestamp() {
            let start = DateTime::from_timestamp(boundary, 0).unwrap_or(from);
            boundary += SEAT_INTERVAL;
            if start < from || one_in(&mut self.dice, 25) {
                continue;
            }
            let at = start + uniform(&mut self.dice, (0, 10 * MINUTE - 1));
            let seats =
                self.seats.values().filter(|(since, active)| *active && *since <= at).count();
            let quantity = i64::try_from(seats).unwrap_or(i64::MAX);
            let row = UsageRow {
                id: heartbeat_id(UsageKind::Seats, start),
                kind: UsageKind::Seats,
                quantity,
                created_at: at,
            };
            acts.push(Act { at, held_for: None, change: Change::Usage(row) });
        }
        acts
    }

    /// One row per hour, also for idle hours; a few come days late (the generator looks back seven
    /// days).
    fn runtime_rows(&mut self, from: DateTime<Utc>, to: DateTime<Utc>) -> Vec<Act> {
        let mut acts = Vec::new();
        let mut hour = from.duration_trunc(TimeDelta::hours(1)).unwrap_or(from);
        while hour < to {
            let start = hour;
            hour += TimeDelta::hours(1);
            if start < from {
                continue;
            }
            let mut total = 0;
            if !one_in(&mut self.dice, 3) {
                for _ in 0..self.dice.random_range(1..4) {
                    // Sometimes on the hour itself: such a message belongs to the hour that begins.
                    let at = if one_in(&mut self.dice, 20) {
                        start
                    } else {
                        start + uniform(&mut self.dice, (0, 60 * MINUTE - 1))
                    };
                    let runtime_ms = self.dice.random_range(500..600_000);
                    total += runtime_ms;
                    let chat = pick(&mut self.dice, &self.chats);
                    acts.push(Act {
                        at,
                        held_for: None,
                        change: Change::Chat { chat, runtime_ms },
                    });
                }
            }
            let mut at = hour + uniform(&mut self.dice, (5 * MINUTE, 9 * MINUTE));
            if one_in(&mut self.dice, 30) {
                at += uniform(&mut self.dice, (24 * 60 * MINUTE, 6 * 24 * 60 * MINUTE));
            }
            let row = UsageRow {
                id: heartbeat_id(UsageKind::Runtime, start),
                kind: UsageKind::Runtime,
                quantity: total,
                created_at: start,
            };
            acts.push(Act { at, held_for: None, change: Change::Usage(row) });
        }
        acts
    }

    /// The marks of coderd's own publisher on the usage of these acts: most are accepted at the
    /// next cycle. A few are refused permanently (published, with a message), a few refused for now
    /// (a message only).
    pub fn publishing(&mut self, acts: &[Act]) -> Vec<Act> {
        let Some(until) = self.config.coderd_publishes_until else { return Vec::new() };
        let mut verdicts = Vec::new();
        for act in acts {
            let row = match &act.change {
                Change::Usage(row) => row,
                Change::Complete(done) => {
                    match done.success.as_ref().and_then(|success| success.usage.as_ref()) {
                        Some(row) => row,
                        None => continue,
                    }
                }
                _ => continue,
            };
            let cycle = (act.at - self.config.start).num_seconds().div_euclid(PUBLISH_INTERVAL) + 1;
            let at = self.config.start + TimeDelta::seconds(cycle * PUBLISH_INTERVAL);
            if at >= until {
                continue;
            }
            let answered = at + uniform(&mut self.publishing, (50_000, 900_000));
            let (published_at, failure) = match self.publishing.random_range(0..50) {
                0 => (Some(answered), Some("refused for good".to_owned())),
                1 => (None, Some("refused for now".to_owned())),
                _ => (Some(answered), None),
            };
            verdicts.push(Act {
                at: answered,
                held_for: None,
                change: Change::Publish { id: row.id.clone(), published_at, failure },
            });
        }
        verdicts
    }
}

/// Type and truncated time, `hb_agent_runtime_v1:2025-03-10_10:00:00`.
fn heartbeat_id(kind: UsageKind, start: DateTime<Utc>) -> String {
    format!("{}:{}", kind.event_type(), start.format("%Y-%m-%d_%H:%M:%S"))
}

#[cfg(test)]
mod tests {
    use super::super::schema::SchemaVersion;
    use super::*;

    fn planned() -> Vec<Act> {
        let start = DateTime::from_timestamp(1_780_000_123, 0).unwrap();
        let config =
            Config::history(5, SchemaVersion::Sep2026, start, start + TimeDelta::days(20), 10);
        let deployment = Deployment::plan(&config);
        Heartbeats::new(&config).plan(&deployment, config.start, config.end)
    }

    fn rows(kind: UsageKind) -> Vec<(DateTime<Utc>, UsageRow)> {
        let row = |act: Act| match act.change {
            Change::Usage(row) if row.kind == kind => Some((act.at, row)),
            _ => None,
        };
        planned().into_iter().filter_map(row).collect()
    }

    #[test]
    fn every_hour_has_one_runtime_row_named_by_its_hour_and_some_come_days_late() {
        let rows = rows(UsageKind::Runtime);
        assert_eq!(rows.len(), 20 * 24);
        assert!(rows.iter().all(|(_, row)| row.created_at.timestamp() % 3600 == 0
            && row.id == heartbeat_id(row.kind, row.created_at)));
        assert!(rows.iter().any(|(_, row)| row.quantity == 0), "idle hours have a row of zero");
        let late: Vec<TimeDelta> = rows
            .iter()
            .map(|(at, row)| *at - row.created_at)
            .filter(|late| *late > TimeDelta::days(1))
            .collect();
        assert!(!late.is_empty() && late.iter().all(|late| *late < TimeDelta::days(7)));
    }

    #[test]
    fn a_runtime_row_is_the_sum_of_its_hours_messages() {
        let mut by_hour: BTreeMap<DateTime<Utc>, i64> = BTreeMap::new();
        for act in planned() {
            if let Change::Chat { runtime_ms, .. } = act.change {
                *by_hour.entry(act.at.duration_trunc(TimeDelta::hours(1)).unwrap()).or_default() +=
                    runtime_ms;
            }
        }
        for (_, row) in rows(UsageKind::Runtime) {
            assert_eq!(
                row.quantity,
                by_hour.get(&row.created_at).copied().unwrap_or(0),
                "{}",
                row.id
            );
        }
    }

    #[test]
    fn a_seat_row_carries_its_boundary_in_the_id_and_its_jitter_in_the_time() {
        let rows = rows(UsageKind::Seats);
        assert!(rows.len() > 100 && rows.len() < 120, "some boundaries are missed: {}", rows.len());
        for (at, row) in rows {
            let boundary = at.duration_trunc(TimeDelta::hours(4)).unwrap();
            assert_eq!(
                (row.id.as_str(), row.created_at),
                (heartbeat_id(row.kind, boundary).as_str(), at)
            );
            assert!(at - boundary < TimeDelta::minutes(10) && row.quantity <= 20);
        }
    }
}
