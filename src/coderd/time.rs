//! A time in coderd's database: any `timestamptz`, even one that chrono cannot represent.

use std::fmt;

use chrono::{DateTime, Datelike as _, SecondsFormat, TimeDelta, Utc};
use sqlx::encode::IsNull;
use sqlx::error::BoxDynError;
use sqlx::postgres::{PgArgumentBuffer, PgHasArrayType, PgTypeInfo, PgValueFormat, PgValueRef};
use sqlx::{Decode, Encode, Postgres, Type};

/// PostgreSQL's `timestamptz`: microseconds since 2000; the two extremes are the infinities. It
/// sorts like PostgreSQL, keeps its exact value, and has no arithmetic. Only [`Time::instant`]
/// gives a calendar time.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Time(i64);

/// 2000-01-01T00:00:00Z in microseconds since 1970.
const EPOCH_MICROS: i64 = 946_684_800_000_000;

impl Time {
    /// Before each other time.
    pub const NEGATIVE_INFINITY: Time = Time(i64::MIN);
    /// After each other time.
    pub const INFINITY: Time = Time(i64::MAX);

    /// Microseconds since 1970; the two extremes are the infinities.
    #[must_use]
    pub fn from_micros(micros: i64) -> Self {
        match micros {
            i64::MAX | i64::MIN => Time(micros),
            _ => Time(micros.saturating_sub(EPOCH_MICROS)),
        }
    }

    /// The calendar time. None for the infinities and outside the years 1 to 9999, which RFC 3339
    /// cannot write.
    #[must_use]
    pub fn instant(self) -> Option<DateTime<Utc>> {
        self.in_any_year().filter(|at| (1..=9999).contains(&at.year()))
    }

    fn in_any_year(self) -> Option<DateTime<Utc>> {
        DateTime::from_timestamp_micros(self.0.checked_add(EPOCH_MICROS)?)
    }

    /// The age at `now`: zero for a later time, the longest span for an earlier one without a
    /// calendar time.
    #[must_use]
    pub fn age(self, now: DateTime<Utc>) -> TimeDelta {
        match self.instant() {
            Some(at) => now.signed_duration_since(at).max(TimeDelta::zero()),
            None if self < Time::from(now) => TimeDelta::MAX,
            None => TimeDelta::zero(),
        }
    }
}

/// In whole microseconds. Tallyline's own times are within PostgreSQL's range.
impl From<DateTime<Utc>> for Time {
    fn from(at: DateTime<Utc>) -> Self {
        Time::from_micros(at.timestamp_micros())
    }
}

/// RFC 3339, with a sign for years outside it; PostgreSQL's names for the infinities; a distance
/// for years that chrono lacks.
impl fmt::Display for Time {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.in_any_year(), self.0) {
            (Some(at), _) => f.write_str(&at.to_rfc3339_opts(SecondsFormat::AutoSi, true)),
            (None, i64::MAX) => f.write_str("infinity"),
            (None, i64::MIN) => f.write_str("-infinity"),
            (None, micros) => write!(f, "{micros} microseconds from the year 2000"),
        }
    }
}

impl fmt::Debug for Time {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Type<Postgres> for Time {
    fn type_info() -> PgTypeInfo {
        <DateTime<Utc> as Type<Postgres>>::type_info()
    }
}

impl PgHasArrayType for Time {
    fn array_type_info() -> PgTypeInfo {
        <DateTime<Utc> as PgHasArrayType>::array_type_info()
    }
}

impl Decode<'_, Postgres> for Time {
    fn decode(value: PgValueRef<'_>) -> Result<Self, BoxDynError> {
        match value.format() {
            PgValueFormat::Binary => Ok(Time(<i64 as Decode<Postgres>>::decode(value)?)),
            PgValueFormat::Text => {
                Err("a time in text form; expected the binary form of a prepared statement".into())
            }
        }
    }
}

impl Encode<'_, Postgres> for Time {
    fn encode_by_ref(&self, buffer: &mut PgArgumentBuffer) -> Result<IsNull, BoxDynError> {
        <i64 as Encode<Postgres>>::encode_by_ref(&self.0, buffer)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::{any, prop_assert_eq, proptest};

    use super::*;

    #[test]
    fn the_infinities_and_distant_years_have_no_calendar_time() {
        for (micros, words) in [
            (i64::MAX, "infinity"),
            (i64::MIN, "-infinity"),
            (i64::MAX - 1, "9223372036854775806 microseconds from"),
        ] {
            assert_eq!(Time(micros).instant(), None);
            assert!(Time(micros).to_string().starts_with(words), "{}", Time(micros));
        }
        assert_eq!(Time(0).to_string(), "2000-01-01T00:00:00Z");
        let year_20000 = Time::from_micros(568_971_820_800_000_000);
        assert_eq!(
            (year_20000.to_string().as_str(), year_20000.instant()),
            ("+20000-01-01T00:00:00Z", None)
        );
        assert!(
            Time::from(DateTime::<Utc>::MIN_UTC) < Time(0)
                && Time::from(DateTime::<Utc>::MAX_UTC) > Time(0)
        );
    }

    proptest! {
        #[test]
        fn every_postgres_time_has_a_text_and_calendar_times_round_trip(micros in any::<i64>(), now in 0_i64..200_000_000_000) {
            let (time, now) = (Time(micros), DateTime::from_timestamp(now, 0).unwrap());
            if let Some(at) = time.instant() {
                prop_assert_eq!(Time::from(at), time);
            }
            prop_assert_eq!(time.age(now) > TimeDelta::zero(), time < Time::from(now));
            prop_assert_eq!(time.to_string().is_empty(), false);
        }
    }
}
