//! The last check before sending: compares an event with coderd's own row.

use chrono::{DateTime, TimeDelta, Utc};

use crate::coderd::{Time, UsageRow};
use crate::event::UsageQuantity;
use crate::ledger::Publication;

/// Tallyman refuses older events. Source: coderd's own limit.
const LONGEST_AGE: TimeDelta = TimeDelta::days(30);

/// How long a reservation of a coderd replica (`publish_started_at`) keeps others off. Source:
/// coderd's claim expiry.
const RESERVATION_AGE: TimeDelta = TimeDelta::hours(1);

/// The state of coderd's row of an event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SourceCheck {
    /// coderd has not published it. It equals the accepted event, or an operator has explained the
    /// difference.
    Sendable,
    /// coderd has published it, or received its permanent refusal.
    PublishedByCoderd,
    /// A replica of coderd has just reserved it: its answer may be in flight.
    Reserved,
    /// It differs now or is gone; contains the difference, for people.
    Differs(String),
}

/// Facts about an event from acts of operators.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OperatorStatement {
    /// coderd lost it when its database was restored (`recover --lost coderd`), even if coderd has
    /// reused the id since.
    pub lost: bool,
    /// Its record was refused and resubmitted from the rejects: coderd's row may never have been a
    /// valid event.
    pub resubmitted: bool,
}

/// The instant after which an event must be dated to be sent. The comparison is strict, as in
/// coderd.
pub fn sendable_after(now: DateTime<Utc>) -> DateTime<Utc> {
    now - LONGEST_AGE
}

/// Compares an event with coderd's row of the same id, if it exists. The accepted event stays
/// valid, and so does the vendor's first copy. A different row only holds the event back until an
/// operator has explained it.
pub fn compare(
    accepted: &Publication,
    row: Option<&UsageRow>,
    statement: OperatorStatement,
    now: DateTime<Utc>,
) -> SourceCheck {
    let Some(row) = row else {
        return if statement.lost {
            SourceCheck::Sendable
        } else {
            SourceCheck::Differs("coderd no longer has the row".to_owned())
        };
    };
    if row.published_at.is_some() {
        return SourceCheck::PublishedByCoderd;
    }
    match difference(accepted, row, statement) {
        Some(why) => SourceCheck::Differs(why),
        None if is_reserved(row, now) => SourceCheck::Reserved,
        None => SourceCheck::Sendable,
    }
}

/// The difference of coderd's row that no operator has explained.
fn difference(
    accepted: &Publication,
    row: &UsageRow,
    statement: OperatorStatement,
) -> Option<String> {
    if statement.lost {
        return None;
    }
    match UsageQuantity::parse(&row.event_type, row.event_data.as_bytes()) {
        Err(_) if statement.resubmitted => None,
        Err(error) => Some(format!("coderd's row is not a valid usage event any more: {error}")),
        Ok(_) if row.created_at != accepted.created_at.into() => Some(format!(
            "coderd's row is dated {}, the accepted event {}",
            row.created_at,
            Time::from(accepted.created_at)
        )),
        Ok(quantity) if quantity == accepted.quantity => None,
        Ok(quantity) => Some(format!(
            "coderd's row has {}, the accepted event {}",
            text(quantity),
            text(accepted.quantity)
        )),
    }
}

/// Whether a replica of coderd may be publishing the row.
pub fn is_reserved(row: &UsageRow, now: DateTime<Utc>) -> bool {
    row.publish_started_at.is_some_and(|started_at| started_at >= Time::from(now - RESERVATION_AGE))
}

fn text(quantity: UsageQuantity) -> String {
    format!("{} {}", quantity.usage_type().as_str(), quantity.number())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn now() -> DateTime<Utc> {
        "2025-08-01T12:00:00Z".parse().expect("a time")
    }

    fn accepted() -> Publication {
        Publication {
            event_id: "a".into(),
            quantity: UsageQuantity::ManagedAgents(1),
            created_at: now(),
            unanswered: false,
            refusals: 0,
            refused_alone: false,
            held_since: None,
            confirmed: true,
            last_message: None,
        }
    }

    fn row() -> UsageRow {
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
        let mut row = row();
        change(&mut row);
        compare(&accepted(), Some(&row), OperatorStatement::default(), now())
    }

    #[test]
    fn an_unchanged_unpublished_row_is_sendable() {
        assert_eq!(check_of(|_| {}), SourceCheck::Sendable);
        assert_eq!(
            check_of(|row| row.failure_message = Some("later".into())),
            SourceCheck::Sendable,
            "a refusal for now of coderd's own attempt"
        );
    }

    #[test]
    fn a_published_row_is_never_sent() {
        assert_eq!(
            check_of(|row| row.published_at = Some(now().into())),
            SourceCheck::PublishedByCoderd
        );
        let refused = |row: &mut UsageRow| {
            row.published_at = Some(now().into());
            row.failure_message = Some("never".into());
            row.event_data = r#"{"count": 2}"#.into();
        };
        assert_eq!(check_of(refused), SourceCheck::PublishedByCoderd);
    }

    #[test]
    fn a_changed_or_missing_row_is_held_back_with_a_reason() {
        let why =
            |check| if let SourceCheck::Differs(why) = check { why } else { panic!("{check:?}") };
        assert!(
            why(check_of(|row| row.event_data = r#"{"count": 2}"#.into()))
                .contains("has dc_managed_agents_v1 2, the accepted event")
        );
        assert!(
            why(check_of(|row| row.event_type = "hb_ai_seats_v1".into()))
                .contains("hb_ai_seats_v1 1")
        );
        assert!(
            why(check_of(|row| row.event_data = r#"{"count": 1, "x": 1}"#.into()))
                .contains("not a valid usage event")
        );
        assert!(
            why(check_of(|row| row.created_at = (now() + TimeDelta::microseconds(1)).into()))
                .contains("dated")
        );
        assert!(
            why(compare(&accepted(), None, OperatorStatement::default(), now()))
                .contains("no longer has the row")
        );
    }

    #[test]
    fn an_accepted_event_is_sendable_if_an_operator_recorded_its_loss() {
        let lost = OperatorStatement { lost: true, ..OperatorStatement::default() };
        assert_eq!(compare(&accepted(), None, lost, now()), SourceCheck::Sendable);
        let mut again = row();
        (again.event_data, again.created_at) =
            (r#"{"count": 2}"#.into(), (now() + TimeDelta::minutes(1)).into());
        assert_eq!(
            compare(&accepted(), Some(&again), lost, now()),
            SourceCheck::Sendable,
            "coderd has reused its id"
        );
        again.publish_started_at = Some(now().into());
        assert_eq!(compare(&accepted(), Some(&again), lost, now()), SourceCheck::Reserved);
        again.published_at = Some(now().into());
        assert_eq!(
            compare(&accepted(), Some(&again), lost, now()),
            SourceCheck::PublishedByCoderd,
            "the vendor has the id already"
        );
    }

    #[test]
    fn an_invalid_row_is_sendable_only_if_its_event_was_resubmitted() {
        let resubmitted = OperatorStatement { resubmitted: true, ..OperatorStatement::default() };
        let mut row = row();
        row.event_data = r#"{"count": 1, "x": 1}"#.into();
        assert_eq!(compare(&accepted(), Some(&row), resubmitted, now()), SourceCheck::Sendable);
        row.event_data = r#"{"count": 2}"#.into();
        assert!(
            matches!(compare(&accepted(), Some(&row), resubmitted, now()), SourceCheck::Differs(_)),
            "coderd's row is an event, and another one"
        );
        assert!(matches!(compare(&accepted(), None, resubmitted, now()), SourceCheck::Differs(_)));
    }

    #[test]
    fn a_reservation_lasts_an_hour() {
        let started = |at: DateTime<Utc>| check_of(|row| row.publish_started_at = Some(at.into()));
        assert_eq!(started(now()), SourceCheck::Reserved);
        assert_eq!(
            started(now() - RESERVATION_AGE),
            SourceCheck::Reserved,
            "coderd takes over reservations older than an hour, strictly"
        );
        assert_eq!(
            started(now() - RESERVATION_AGE - TimeDelta::microseconds(1)),
            SourceCheck::Sendable
        );
        assert_eq!(
            started(now() + TimeDelta::minutes(5)),
            SourceCheck::Reserved,
            "a replica whose clock is ahead"
        );
    }
}
