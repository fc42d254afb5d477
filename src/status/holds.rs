//! All that holds usage back from the vendor, in one list.

use crate::ledger::{
    BREAKS_RULES, Finding, HeldBack, Hold, HoldScope, Pausable, Pause, ProcessRow, PublishRefusal, PublishStop, Recovering, holds,
};

use super::Queue;

/// The widest holds first.
pub(super) fn all(
    findings: &[Finding],
    recovering: Option<&Recovering>,
    pauses: &[Pause],
    stops: &[PublishStop],
    processes: &[ProcessRow],
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
    found.extend(refusals(processes));
    found.extend(queues.iter().flat_map(|queue| {
        queue.held_back_first.iter().map(|event| Hold {
            scope: HoldScope::Event,
            deployment_id: Some(queue.deployment_id),
            event_id: Some(event.event_id.clone()),
            since: Some(event.since),
            why: event.why.clone(),
            ends: end_of(event).to_owned(),
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

/// Each refusal once, however many processes publish the source.
fn refusals(processes: &[ProcessRow]) -> Vec<Hold> {
    let mut refusals: Vec<PublishRefusal> = processes.iter().filter_map(ProcessRow::publish_refusal).collect();
    refusals.sort_by_key(|refusal| (refusal.deployment_id, refusal.why.clone(), refusal.since));
    refusals.dedup_by(|later, first| (later.deployment_id, &later.why) == (first.deployment_id, &first.why));
    let hold = |refusal: PublishRefusal| Hold {
        scope: HoldScope::Source,
        deployment_id: Some(refusal.deployment_id),
        event_id: None,
        since: Some(refusal.since),
        why: refusal.why,
        ends: "a publisher that finds the coderd of this source and a license for it".to_owned(),
    };
    refusals.into_iter().map(hold).collect()
}

fn end_of(event: &HeldBack) -> &'static str {
    match event {
        event if event.why.starts_with(BREAKS_RULES) => "a version of Tallyline that knows other rules; otherwise it expires",
        HeldBack { confirmed: true, .. } => {
            "coderd's row saying what was accepted, or `tallyline recover execute` of a plan with `--lost coderd`"
        }
        _ => "coderd's row saying what was accepted; no operation releases it",
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

    fn held_back(why: &str, confirmed: bool) -> HeldBack {
        HeldBack { event_id: "usage-1".into(), created_at: AT, since: AT, why: why.into(), confirmed }
    }

    fn process(gone: bool, publish: serde_json::Value) -> ProcessRow {
        ProcessRow {
            id: Uuid::nil(),
            host: "a".into(),
            pid: 1,
            version: "1".into(),
            roles: vec!["publish".into()],
            started_at: AT,
            seen_at: AT,
            gone,
            long_gone: false,
            standing: serde_json::json!({ "publish": publish }),
        }
    }

    #[test]
    fn a_refusal_of_living_publishers_is_one_hold() {
        let refused = PublishRefusal { deployment_id: SOURCE, why: "another coderd".into(), since: AT };
        let refuses = |gone| process(gone, serde_json::json!({ "refused": refused }));
        let works = process(false, serde_json::json!({ "refused": null }));
        let found = all(&[], None, &[], &[], &[refuses(false), refuses(false), works.clone()], &[]);
        let [hold] = found.as_slice() else { panic!("{found:?}") };
        assert_eq!((hold.scope, hold.deployment_id, hold.since), (HoldScope::Source, Some(SOURCE), Some(AT)));
        assert_eq!(hold.why, "another coderd");
        assert_eq!(all(&[], None, &[], &[], &[refuses(true), works], &[]), []);
    }

    #[test]
    fn what_ends_the_hold_of_an_event_depends_on_why_it_is_held() {
        let breaks_rules = format!("{BREAKS_RULES}the quantity is 0");
        for (why, confirmed, recover, row) in [
            ("coderd no longer has the row", true, true, true),
            ("coderd no longer has the row", false, false, true),
            (&breaks_rules, true, false, false),
        ] {
            let ends = end_of(&held_back(why, confirmed));
            assert_eq!((ends.contains("recover execute"), ends.contains("coderd's row")), (recover, row), "{ends}");
        }
    }

    #[test]
    fn each_hold_says_what_it_holds_why_and_what_ends_it_and_the_widest_comes_first() {
        let pause = |operation| Pause { operation, topic: None, actor: "sre-1".into(), reason: "a test".into(), since: AT };
        let stop = PublishStop { deployment_id: SOURCE, later_mark: AT, seen_at: AT };
        let event = held_back("coderd no longer has the row", true);
        let queue = Queue {
            deployment_id: SOURCE,
            pending: 1,
            held_back: 1,
            held_back_first: vec![event],
            unanswered: 0,
            oldest_created_at: None,
            last_request: None,
        };
        let found = all(&[], None, &[pause(Pausable::Publish), pause(Pausable::Collect)], &[stop], &[], &[queue]);
        let told: Vec<_> = found.iter().map(|hold| (hold.scope, hold.deployment_id, hold.event_id.as_deref())).collect();
        use HoldScope::{Event, Everything, Source};
        assert_eq!(told, [(Everything, None, None), (Source, Some(SOURCE), None), (Event, Some(SOURCE), Some("usage-1"))]);
        assert!(found.iter().all(|hold| hold.since == Some(AT) && !hold.why.is_empty() && !hold.ends.is_empty()));
        assert!(found[1].ends.contains(&format!("--coderd-cut-off {SOURCE}")));
    }
}
