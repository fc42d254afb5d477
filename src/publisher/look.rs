//! The last check before sending: compares an event with coderd's own row.

use chrono::{DateTime, TimeDelta, Utc};

use crate::coderd::{Time, UsageRow};
use crate::event::UsageQuantity;
use crate::ledger::Publication;

/// Tallyman refuses older events. Source: coderd's own limit.
const LONGEST_AGE: TimeDelta = TimeDelta::days(30);

/// How long a reservation of a coderd replica (`publish_started_at`) keeps others off. Source: coderd's claim expiry.
const CLAIM_AGE: TimeDelta = TimeDelta::hours(1);

/// The state of coderd's row of an event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SourceCheck {
    /// coderd has not published it. It equals the accepted event, or an operator has explained the difference.
    Ours,
    /// coderd has published it, or received its permanent refusal.
    NotOurs,
    /// A replica of coderd has just reserved it: its answer may be in flight.
    Claimed,
    /// It differs now or is gone; contains the difference, for people.
    Changed(String),
}

/// Facts about an event from acts of operators.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OperatorStatement {
    /// coderd lost it when its database was restored (`recover --lost coderd`), even if coderd has reused the id since.
    pub lost: bool,
    /// Its record was refused and resubmitted from the rejects: coderd's row may never have been a valid event.
    pub mended: bool,
}

/// The instant after which an event must be dated to be sent. The comparison is strict, as in coderd.
pub fn sendable_after(now: DateTime<Utc>) -> DateTime<Utc> {
    now - LONGEST_AGE
}

/// Compares an event with coderd's row of the same id, if it exists. The accepted event stays valid, and so does the vendor's first copy. A
/// different row only holds the event back until an operator has explained it.
pub fn compare(ours: &Publication, theirs: Option<&UsageRow>, statement: OperatorStatement, now: DateTime<Utc>) -> SourceCheck {
    let Some(theirs) = theirs else {
        return if statement.lost { SourceCheck::Ours } else { SourceCheck::Changed("coderd no longer has the row".to_owned()) };
    };
    if theirs.published_at.is_some() {
        return SourceCheck::NotOurs;
    }
    match difference(ours, theirs, statement) {
        Some(why) => SourceCheck::Changed(why),
        None if claimed(theirs, now) => SourceCheck::Claimed,
        None => SourceCheck::Ours,
    }
}

/// The difference of coderd's row that no operator has explained.
fn difference(ours: &Publication, theirs: &UsageRow, statement: OperatorStatement) -> Option<String> {
    if statement.lost {
        return None;
    }
    match UsageQuantity::parse(&theirs.event_type, theirs.event_data.as_bytes()) {
        Err(_) if statement.mended => None,
        Err(error) => Some(format!("coderd's row is no usage event any more: {error}")),
        Ok(_) if theirs.created_at != ours.created_at.into() => {
            Some(format!("coderd's row is now dated {}, accepted was {}", theirs.created_at, Time::from(ours.created_at)))
        }
        Ok(quantity) if quantity == ours.quantity => None,
        Ok(quantity) => Some(format!("coderd's row now says {}, accepted was {}", words(quantity), words(ours.quantity))),
    }
}

/// Whether a replica of coderd may be publishing the row.
pub fn claimed(theirs: &UsageRow, now: DateTime<Utc>) -> bool {
    theirs.publish_started_at.is_some_and(|started_at| started_at >= Time::from(now - CLAIM_AGE))
}

fn words(quantity: UsageQuantity) -> String {
    format!("{} {}", quantity.usage_type().as_str(), quantity.number())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn now() -> DateTime<Utc> {
        "2025-08-01T12:00:00Z".parse().expect("a time")
    }

    fn ours() -> Publication {
        Publication {
            event_id: "a".into(),
            quantity: UsageQuantity::ManagedAgents(1),
            created_at: now(),
            unanswered: false,
            refusals: 0,
            confirmed: true,
            last_message: None,
        }
    }

    fn theirs() -> UsageRow {
        UsageRow {
            id: "a".into(),
            event_type: "dc_managed_agents_v1".into(),
            event_data: r#"{"count": 1}"#.into(),
            created_at: now().into(),
            publish_started_at: None,
            published_at: None,
            failure_message: None,
        }
    }

    fn check_of(change: impl FnOnce(&mut UsageRow)) -> SourceCheck {
        let mut row = theirs();
        change(&mut row);
        compare(&ours(), Some(&row), OperatorStatement::default(), now())
    }

    #[test]
    fn an_unchanged_row_that_nobody_published_is_ours() {
        assert_eq!(check_of(|_| {}), SourceCheck::Ours);
        assert_eq!(
            check_of(|row| row.failure_message = Some("later".into())),
            SourceCheck::Ours,
            "a refusal for now of coderd's own attempt"
        );
    }

    #[test]
    fn a_published_row_is_not_ours_whatever_else_it_says() {
        assert_eq!(check_of(|row| row.published_at = Some(now().into())), SourceCheck::NotOurs);
        let refused = |row: &mut UsageRow| {
            row.published_at = Some(now().into());
            row.failure_message = Some("never".into());
            row.event_data = r#"{"count": 2}"#.into();
        };
        assert_eq!(check_of(refused), SourceCheck::NotOurs);
    }

    #[test]
    fn a_changed_or_missing_row_is_held_back_and_says_why() {
        let why = |check| if let SourceCheck::Changed(why) = check { why } else { panic!("{check:?}") };
        assert!(why(check_of(|row| row.event_data = r#"{"count": 2}"#.into())).contains("now says dc_managed_agents_v1 2, accepted was"));
        assert!(why(check_of(|row| row.event_type = "hb_ai_seats_v1".into())).contains("hb_ai_seats_v1 1"));
        assert!(why(check_of(|row| row.event_data = r#"{"count": 1, "x": 1}"#.into())).contains("no usage event"));
        assert!(why(check_of(|row| row.created_at = (now() + TimeDelta::microseconds(1)).into())).contains("dated"));
        assert!(why(compare(&ours(), None, OperatorStatement::default(), now())).contains("no longer has the row"));
    }

    #[test]
    fn what_was_accepted_stands_where_an_operator_has_said_that_coderd_lost_it() {
        let lost = OperatorStatement { lost: true, ..OperatorStatement::default() };
        assert_eq!(compare(&ours(), None, lost, now()), SourceCheck::Ours);
        let mut again = theirs();
        (again.event_data, again.created_at) = (r#"{"count": 2}"#.into(), (now() + TimeDelta::minutes(1)).into());
        assert_eq!(compare(&ours(), Some(&again), lost, now()), SourceCheck::Ours, "its id was used again");
        again.publish_started_at = Some(now().into());
        assert_eq!(compare(&ours(), Some(&again), lost, now()), SourceCheck::Claimed);
        again.published_at = Some(now().into());
        assert_eq!(compare(&ours(), Some(&again), lost, now()), SourceCheck::NotOurs, "the vendor has the id already");
    }

    #[test]
    fn a_row_that_never_was_an_event_is_ours_only_where_an_operator_has_mended_it() {
        let mended = OperatorStatement { mended: true, ..OperatorStatement::default() };
        let mut row = theirs();
        row.event_data = r#"{"count": 1, "x": 1}"#.into();
        assert_eq!(compare(&ours(), Some(&row), mended, now()), SourceCheck::Ours);
        row.event_data = r#"{"count": 2}"#.into();
        assert!(
            matches!(compare(&ours(), Some(&row), mended, now()), SourceCheck::Changed(_)),
            "coderd's row is an event, and another one"
        );
        assert!(matches!(compare(&ours(), None, mended, now()), SourceCheck::Changed(_)));
    }

    #[test]
    fn a_claim_is_fresh_for_an_hour_and_not_longer() {
        let started = |at: DateTime<Utc>| check_of(|row| row.publish_started_at = Some(at.into()));
        assert_eq!(started(now()), SourceCheck::Claimed);
        assert_eq!(started(now() - CLAIM_AGE), SourceCheck::Claimed, "coderd claims what is older than an hour, strictly");
        assert_eq!(started(now() - CLAIM_AGE - TimeDelta::microseconds(1)), SourceCheck::Ours);
        assert_eq!(started(now() + TimeDelta::minutes(5)), SourceCheck::Claimed, "a replica whose clock is ahead");
    }
}
