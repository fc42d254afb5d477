//! Checks whether the ledger has all usage of a range, so that its export is final.

use chrono::{DateTime, SecondsFormat, Utc};

use crate::ledger::{
    LaterUsage, Ledger, Recovering, StatementError, UsageCompleteness, UsageRange, exports,
    recoveries, sources,
};

/// Why an export of this range may lack usage. `None` if the range is complete at every ledger
/// sequence taken after this check. Retired sources add nothing any more.
pub async fn incomplete(
    ledger: &Ledger,
    range: &UsageRange,
) -> Result<Option<String>, StatementError> {
    if let Some(recovering) = ledger.run(recoveries::open).await? {
        return Ok(Some(recovery(&recovering)));
    }
    for source in ledger.run(sources::list).await? {
        let is_in_range = range.source.is_none_or(|deployment| deployment == source.deployment_id);
        if is_in_range && !source.retired {
            let completeness =
                ledger.run(async |conn| exports::completeness(conn, source.id).await).await?;
            if let Some(reason) = shortfall(&completeness, range.to) {
                return Ok(Some(format!("deployment {} {reason}", source.deployment_id)));
            }
        }
    }
    Ok(None)
}

/// Why an export of this range may lack usage at its own, possibly old, sequence. If the range is
/// complete now and nothing of it was recorded after the sequence, it was already complete.
pub async fn incomplete_as_of(
    ledger: &Ledger,
    range: &UsageRange,
) -> Result<Option<String>, StatementError> {
    if let Some(reason) = incomplete(ledger, range).await? {
        return Ok(Some(reason));
    }
    let later = ledger.run(async |conn| exports::later_usage(conn, range).await).await?;
    Ok(later.map(|LaterUsage { deployment_id, sequence }| {
        let as_of = range.as_of;
        format!("deployment {deployment_id} has usage in the range that was recorded after sequence {as_of}, up to sequence {sequence}")
    }))
}

fn recovery(recovering: &Recovering) -> String {
    format!(
        "the ledger was restored and has not caught up: the recovery by {} since {} is open ({})",
        recovering.actor,
        text(recovering.opened_at),
        recovering.reason
    )
}

/// Why a source is not complete until the end of the range.
fn shortfall(completeness: &UsageCompleteness, to: DateTime<Utc>) -> Option<String> {
    let UsageCompleteness { complete_until, runtime_complete_until, last_pass_reports } =
        *completeness;
    match (complete_until, last_pass_reports) {
        (Some(until), _) if until >= to => {
            // coderd writes the row of an hour minutes to days after that hour
            let missing = runtime_complete_until.filter(|until| *until < to)?;
            Some(format!(
                "has agent runtime complete only until {}, but the range ends at {}",
                text(missing),
                text(to)
            ))
        }
        (_, None) => Some("was not read by a collector yet".to_owned()),
        (until, Some(false)) => Some(format!(
            "does not report completeness: its database is a hot standby, or the role cannot see all transactions{}",
            until.map_or(String::new(), |until| format!(
                "; it is complete at least until {}",
                text(until)
            ))
        )),
        (until, Some(true)) => {
            let until = until.map_or("an unknown instant".to_owned(), text);
            Some(format!("is complete only until {until}, but the range ends at {}", text(to)))
        }
    }
}

fn text(time: DateTime<Utc>) -> String {
    time.to_rfc3339_opts(SecondsFormat::AutoSi, true)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(day: u32) -> DateTime<Utc> {
        format!("2026-11-{day:02}T00:00:00Z").parse().expect("a time")
    }

    fn of(complete_until: Option<u32>, last_pass_reports: Option<bool>) -> Option<String> {
        with_runtime(complete_until, None, last_pass_reports)
    }

    fn with_runtime(
        complete_until: Option<u32>,
        runtime: Option<u32>,
        last_pass_reports: Option<bool>,
    ) -> Option<String> {
        let (complete_until, runtime_complete_until) = (complete_until.map(at), runtime.map(at));
        shortfall(
            &UsageCompleteness { complete_until, runtime_complete_until, last_pass_reports },
            at(20),
        )
    }

    #[test]
    fn a_range_is_complete_up_to_the_instant_itself() {
        assert_eq!(of(Some(20), Some(true)), None);
        assert_eq!(of(Some(21), Some(false)), None, "a complete range remains complete");
        let short = of(Some(19), Some(true)).expect("a reason");
        assert!(
            short.contains("complete only until 2026-11-19T00:00:00Z")
                && short.contains("ends at 2026-11-20T00:00:00Z"),
            "{short}"
        );
    }

    #[test]
    fn agent_runtime_must_be_complete_if_there_is_any() {
        assert_eq!(with_runtime(Some(21), Some(20), Some(true)), None);
        let short = with_runtime(Some(21), Some(19), Some(true)).expect("a reason");
        assert!(
            short.contains("agent runtime") && short.contains("until 2026-11-19T00:00:00Z"),
            "{short}"
        );
        assert!(
            !with_runtime(Some(19), Some(18), Some(true)).expect("a reason").contains("runtime"),
            "the wider reason comes first"
        );
    }

    #[test]
    fn a_source_without_completeness_is_named() {
        for until in [None, Some(19)] {
            assert!(of(until, Some(false)).expect("a reason").contains("hot standby"));
        }
        assert!(of(None, None).expect("a reason").contains("not read by a collector"));
    }
}
