//! Parses durations as operators write them.

use std::time::Duration;

use chrono::TimeDelta;

const DAYS: &[(char, u32)] = &[('D', 86_400)];
const CLOCK: &[(char, u32)] = &[('H', 3_600), ('M', 60), ('S', 1)];
const WORDS: &[(char, u32)] = &[('d', 86_400), ('h', 3_600), ('m', 60), ('s', 1)];

/// Parses `20s`, `2h` or `1h30m`, and an ISO 8601 duration as `kafka-consumer-groups` does:
/// `PnDTnHnMnS`. Seconds may have a fraction.
#[must_use]
pub fn duration(text: &str) -> Option<TimeDelta> {
    let Some(iso) = text.strip_prefix('P') else { return sum(text, WORDS) };
    match iso.split_once('T') {
        None => sum(iso, DAYS),
        Some(("", clock)) => sum(clock, CLOCK),
        Some((days, clock)) => sum(days, DAYS)?.checked_add(&sum(clock, CLOCK)?),
    }
}

/// Parses the duration of a flag. A number without a unit is seconds, as in earlier versions.
pub fn duration_flag(text: &str) -> Result<Duration, String> {
    let seconds = || text.parse().ok().map(|seconds: u32| TimeDelta::seconds(seconds.into()));
    duration(text)
        .or_else(seconds)
        .and_then(|duration| duration.to_std().ok())
        .ok_or_else(|| "not a duration; expected 20s, 5m, 1h30m or PT2H".to_owned())
}

/// The same in whole seconds.
pub(super) fn seconds_flag(text: &str) -> Result<u32, String> {
    let duration = duration_flag(text)?;
    u32::try_from(duration.as_secs())
        .ok()
        .filter(|_| duration.subsec_nanos() == 0)
        .ok_or_else(|| format!("must be whole seconds, at most {} s", u32::MAX))
}

/// The sum of numbers with units. The units are in this order, each at most once.
fn sum(text: &str, units: &[(char, u32)]) -> Option<TimeDelta> {
    let mut total = TimeDelta::zero();
    let mut rest = text;
    for (unit, seconds) in units {
        let Some((number, behind)) = rest.split_once(*unit) else { continue };
        total = total.checked_add(&amount(number, *seconds)?)?;
        rest = behind;
    }
    (rest.is_empty() && !text.is_empty()).then_some(total)
}

/// A number of units of this length. Only seconds may have a fraction.
fn amount(number: &str, seconds: u32) -> Option<TimeDelta> {
    if seconds != 1 {
        let number: u32 = number.parse().ok()?;
        return TimeDelta::try_seconds(i64::from(number) * i64::from(seconds));
    }
    // an f64 may also have a sign, an exponent or the value infinity
    let plain = number.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.')
        && number.starts_with(|first: char| first.is_ascii_digit());
    let number = number.parse().ok().filter(|_| plain)?;
    TimeDelta::from_std(Duration::try_from_secs_f64(number).ok()?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_in_all_forms() {
        let valid = [
            ("P1D", 86_400_000),
            ("PT1H", 3_600_000),
            ("P1DT2H3M4.5S", 93_784_500),
            ("PT0S", 0),
            ("PT90M", 5_400_000),
            ("P0DT5S", 5_000),
            ("20s", 20_000),
            ("5m", 300_000),
            ("2h", 7_200_000),
            ("1h30m", 5_400_000),
            ("1d2h3m4.5s", 93_784_500),
        ];
        for (text, milliseconds) in valid {
            assert_eq!(duration(text), Some(TimeDelta::milliseconds(milliseconds)), "{text}");
        }
        for text in [
            "",
            "P",
            "PT",
            "P1DT",
            "1D",
            "P1H",
            "PT1D",
            "P-1D",
            "PT-1S",
            "PT1S1M",
            "PTinfS",
            "PT1e3S",
            "PT.5S",
            "P99999999999D",
            "P1W",
            "7",
            "h",
            "30m1h",
            "1h1h",
            "1.5h",
            "-1s",
            "infs",
            "1w",
            "PT2h",
            "2h ",
        ] {
            assert_eq!(duration(text), None, "{text}");
        }
    }

    #[test]
    fn a_flag_without_a_unit_is_in_seconds() {
        for (text, seconds) in [("7", 7), ("20s", 20), ("1h30m", 5_400), ("PT2H", 7_200)] {
            assert_eq!(duration_flag(text), Ok(Duration::from_secs(seconds)), "{text}");
            assert_eq!(seconds_flag(text).map(u64::from), Ok(seconds), "{text}");
        }
        for wrong in ["", "-1", "4294967296", "soon"] {
            assert!(duration_flag(wrong).is_err() && seconds_flag(wrong).is_err(), "{wrong}");
        }
        for wrong in ["0.5s", "60000d"] {
            assert!(duration_flag(wrong).is_ok() && seconds_flag(wrong).is_err(), "{wrong}");
        }
    }
}
