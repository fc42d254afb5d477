//! Parses times and durations in arguments.

use std::time::Duration;

pub(super) use crate::operations::instant;

/// Parses a running time: `20s`, `5m`, `2h`, or seconds without unit.
pub fn span(text: &str) -> Result<Duration, String> {
    let units = [("s", 1), ("m", 60), ("h", 3600), ("", 1)];
    units
        .into_iter()
        .find_map(|(unit, seconds)| {
            Some(Duration::from_secs(
                text.strip_suffix(unit)?.parse::<u32>().ok().map(u64::from)? * seconds,
            ))
        })
        .ok_or_else(|| "not a duration; expected 20s, 5m or 2h".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans() {
        assert_eq!(
            (span("20s"), span("5m"), span("2h"), span("7")),
            (
                Ok(Duration::from_secs(20)),
                Ok(Duration::from_secs(300)),
                Ok(Duration::from_secs(7200)),
                Ok(Duration::from_secs(7))
            )
        );
        assert!(span("").is_err() && span("-1s").is_err() && span("1d").is_err());
    }
}
