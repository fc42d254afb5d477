//! All that holds usage back from the vendor, in one list.

use crate::ledger::{Finding, Hold, HoldScope, Pausable, Pause, PublishStop, Recovering, holds};

use super::Queue;

/// The widest holds first.
pub(super) fn all(
    findings: &[Finding],
    recovering: Option<&Recovering>,
    pauses: &[Pause],
    stops: &[PublishStop],
    queues: &[Queue],
) -> Vec<Hold> {
    let recovering = recovering.map(|recovering| Hold {
        since: Some(recovering.opened_at),
        ..everything(
            "the ledger was restored from a backup",
            "the end of its recovery: it has read the log to its end and coderd as a whole",
        )
    });
    let paused = pauses.iter().filter(|pause| pause.operation == Pausable::Publish);
    let paused = paused.map(|pause| Hold { since: Some(pause.since), ..everything(&pause.to_string(), "`tallyline resume publish`") });
    let mut found: Vec<Hold> = recovering.into_iter().chain(paused).chain(holds(findings)).chain(stops.iter().map(stop)).collect();
    found.extend(queues.iter().flat_map(|queue| {
        queue.held_back_first.iter().map(|event| Hold {
            scope: HoldScope::Event,
            deployment_id: Some(queue.deployment_id),
            event_id: Some(event.event_id.clone()),
            since: Some(event.since),
            why: event.why.clone(),
            ends: "coderd's row saying what was accepted, at the publisher's next look".to_owned(),
        })
    }));
    found.sort_by_key(|hold| hold.scope);
    found
}

fn everything(why: &str, ends: &str) -> Hold {
    Hold { scope: HoldScope::Everything, deployment_id: None, event_id: None, since: None, why: why.to_owned(), ends: ends.to_owned() }
}

fn stop(stop: &PublishStop) -> Hold {
    let deployment = stop.deployment_id;
    Hold {
        scope: HoldScope::Source,
        deployment_id: Some(deployment),
        event_id: None,
        since: Some(stop.seen_at),
        why: format!("coderd has published usage by itself at {}", stop.later_mark.to_rfc3339()),
        ends: format!("cutting coderd's publishing off, then `tallyline resume publish --coderd-cut-off {deployment}`"),
    }
}

#[cfg(test)]
mod tests {
    use chrono::{DateTime, Utc};
    use uuid::Uuid;

    use super::*;
    use crate::ledger::HeldBack;

    const AT: DateTime<Utc> = DateTime::UNIX_EPOCH;
    const SOURCE: Uuid = Uuid::from_u128(0xd);

    #[test]
    fn each_hold_says_what_it_holds_why_and_what_ends_it_and_the_widest_comes_first() {
        let pause = |operation| Pause { operation, topic: None, actor: "sre-1".into(), reason: "a test".into(), since: AT };
        let stop = PublishStop { deployment_id: SOURCE, later_mark: AT, seen_at: AT };
        let event = HeldBack { event_id: "usage-1".into(), created_at: AT, since: AT, why: "coderd no longer has the row".into() };
        let queue = Queue {
            deployment_id: SOURCE,
            pending: 1,
            held_back: 1,
            held_back_first: vec![event],
            unanswered: 0,
            oldest_created_at: None,
            last_request: None,
        };
        let found = all(&[], None, &[pause(Pausable::Publish), pause(Pausable::Collect)], &[stop], &[queue]);
        let told: Vec<_> = found.iter().map(|hold| (hold.scope, hold.deployment_id, hold.event_id.as_deref())).collect();
        use HoldScope::{Event, Everything, Source};
        assert_eq!(told, [(Everything, None, None), (Source, Some(SOURCE), None), (Event, Some(SOURCE), Some("usage-1"))]);
        assert!(found.iter().all(|hold| hold.since == Some(AT) && !hold.why.is_empty() && !hold.ends.is_empty()));
        assert!(found[1].ends.contains(&format!("--coderd-cut-off {SOURCE}")));
    }
}
