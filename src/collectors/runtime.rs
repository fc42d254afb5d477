//! How far agent runtime is complete: coderd writes one row an hour, and fills gaps of the last
//! seven days.

use chrono::{DateTime, DurationRound, TimeDelta, Utc};

use super::bounds::before;

/// How far back coderd fills missing hours, from the current hour. Source: `AgentRuntimeWindow`.
const WINDOW: TimeDelta = TimeDelta::days(7);

/// The first hour that can still get a row.
pub(super) fn window_start(now: DateTime<Utc>) -> DateTime<Utc> {
    before(hour(now), WINDOW)
}

/// The hour before which every hour has its row or is past coderd's window. `hours` are the hours
/// that have a row.
pub(super) fn complete_until(hours: &[DateTime<Utc>], now: DateTime<Utc>) -> DateTime<Utc> {
    let mut next = window_start(now);
    while next < hour(now) && hours.contains(&next) {
        next = next.checked_add_signed(TimeDelta::hours(1)).unwrap_or(now);
    }
    next
}

fn hour(at: DateTime<Utc>) -> DateTime<Utc> {
    // Fails only outside the years that PostgreSQL and chrono share.
    at.duration_trunc(TimeDelta::hours(1)).unwrap_or(at)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> DateTime<Utc> {
        text.parse().unwrap()
    }

    #[test]
    fn complete_until_the_first_hour_without_a_row() {
        let now = at("2026-03-10T12:34:56Z");
        let all: Vec<_> =
            (0..168).map(|hours| window_start(now) + TimeDelta::hours(hours)).collect();
        assert_eq!(complete_until(&all, now), at("2026-03-10T12:00:00Z"));
        assert_eq!(complete_until(&all[..167], now), at("2026-03-10T11:00:00Z"));
        let gap: Vec<_> =
            all.iter().copied().filter(|hour| *hour != at("2026-03-05T00:00:00Z")).collect();
        assert_eq!(complete_until(&gap, now), at("2026-03-05T00:00:00Z"));
    }

    #[test]
    fn hours_that_coderd_no_longer_fills_do_not_limit_completeness() {
        let now = at("2026-03-10T12:34:56Z");
        assert_eq!(complete_until(&[], now), at("2026-03-03T12:00:00Z"));
    }
}
