//! Parses times as operators write them.

use chrono::{DateTime, Datelike as _, NaiveDate, NaiveDateTime, Utc};
use serde::de::{Deserialize, Deserializer, Error as _};

/// Whether events may have this time: years 1970 to 9999. The ledger cannot be queried for times
/// far outside it.
#[must_use]
pub fn is_in_years(instant: DateTime<Utc>) -> bool {
    (1970..=9999).contains(&instant.year())
}

/// Error text for an instant outside that range.
pub const OUTSIDE_YEARS: &str = "lies outside the years 1970 to 9999";

/// Parses an instant of the years 1970 to 9999, to the microsecond: RFC 3339, the same without an
/// offset (UTC), or a date (its start, UTC).
pub fn instant(text: &str) -> Result<DateTime<Utc>, String> {
    let offset = || DateTime::parse_from_rfc3339(text).map(|time| time.to_utc()).ok();
    // kafka-consumer-groups also accepts +0200 and +02
    let short_offset = || {
        ["%Y-%m-%dT%H:%M:%S%.f%z", "%Y-%m-%dT%H:%M:%S%.f%#z"]
            .iter()
            .find_map(|form| DateTime::parse_from_str(text, form).ok())
    };
    let naive = || {
        NaiveDateTime::parse_from_str(text, "%Y-%m-%dT%H:%M:%S%.f").map(|time| time.and_utc()).ok()
    };
    let date = || {
        NaiveDate::parse_from_str(text, "%Y-%m-%d")
            .ok()
            .and_then(|date| date.and_hms_opt(0, 0, 0))
            .map(|time| time.and_utc())
    };
    offset()
        .or_else(naive)
        .or_else(|| short_offset().map(|time| time.to_utc()))
        .or_else(date)
        // a leap second becomes the second after it, as in PostgreSQL
        .and_then(|time| DateTime::from_timestamp_micros(time.timestamp_micros()))
        .ok_or_else(|| {
            "not an instant; expected 2025-07-01T00:00:00Z, 2025-07-01T00:00:00.000 or 2025-07-01 (UTC)"
                .to_owned()
        })
        .and_then(|instant| if is_in_years(instant) { Ok(instant) } else { Err(OUTSIDE_YEARS.to_owned()) })
}

/// Deserializes an instant of the years 1970 to 9999: RFC 3339.
pub fn exact_instant<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<DateTime<Utc>, D::Error> {
    let text = String::deserialize(deserializer)?;
    // an unescaped plus sign of an offset arrives as a blank
    let advice = if text.contains(' ') { ": write an offset's + as %2B, or use Z" } else { "" };
    let expected =
        |_| D::Error::custom(format!("not an instant such as 2025-07-01T00:00:00Z{advice}"));
    let instant = text.parse().map_err(expected)?;
    if is_in_years(instant) { Ok(instant) } else { Err(D::Error::custom(OUTSIDE_YEARS)) }
}

/// The same for a field that may be null.
pub fn optional_instant<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<DateTime<Utc>>, D::Error> {
    #[derive(serde::Deserialize)]
    struct Exact(#[serde(deserialize_with = "exact_instant")] DateTime<Utc>);
    Ok(Option::deserialize(deserializer)?.map(|Exact(instant)| instant))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instants_in_all_forms() {
        let expected =
            DateTime::parse_from_rfc3339("2025-07-01T10:30:00.25Z").expect("valid").to_utc();
        for text in [
            "2025-07-01T10:30:00.250Z",
            "2025-07-01T12:30:00.25+02:00",
            "2025-07-01T12:30:00.25+0200",
            "2025-07-01T12:30:00.25+02",
            "2025-07-01T10:30:00.250",
        ] {
            assert_eq!(instant(text), Ok(expected), "{text}");
        }
        assert_eq!(instant("2025-07-01"), instant("2025-07-01T00:00:00Z"));
        for far in [
            "-9000-01-01T00:00:00Z",
            "0001-01-01",
            "1969-12-31T23:59:59.999999Z",
            "1970-01-01T00:00:00+01:00",
            "+12000-01-01",
            "9999-12-31T23:59:59-01:00",
        ] {
            assert_eq!(instant(far), Err(OUTSIDE_YEARS.to_owned()), "{far}");
        }
        for near in ["1970-01-01", "9999-12-31T23:59:59.999999999Z"] {
            assert!(instant(near).is_ok(), "{near}");
        }
        for text in ["", "2025-07", "2025-13-01", "tomorrow", "1751328000"] {
            assert!(instant(text).is_err(), "{text}");
        }
    }
}
