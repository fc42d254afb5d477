//! Lists everything that holds usage back from the vendor.

use uuid::Uuid;

use crate::ledger::{
    HeldBack, HeldFor, Hold, HoldScope, Pausable, Pause, ProcessRow, PublishRefusal, PublishStop,
    Recovering, Retirement,
};

use super::Queue;

/// All holds, the widest first.
pub(super) fn all(
    of_audits: Vec<Hold>,
    recovering: Option<&Recovering>,
    pauses: &[Pause],
    stops: &[PublishStop],
    retirements: &[Retirement],
    processes: &[ProcessRow],
    queues: &[Queue],
) -> Vec<Hold> {
    let recovering = recovering.map(|recovering| Hold {
        since: Some(recovering.opened_at),
        ..everything(
            "the ledger was restored from a backup",
            "the end of its recovery, after it has read the whole log and all of coderd",
        )
    });
    let paused = pauses.iter().filter(|pause| pause.operation == Pausable::Publish);
    let paused = paused.map(|pause| Hold {
        since: Some(pause.since),
        ..everything(&pause.to_string(), "`tallyline resume publish`")
    });
    let mut found: Vec<Hold> = recovering
        .into_iter()
        .chain(paused)
        .chain(of_audits)
        .chain(stops.iter().map(stop))
        .collect();
    found.extend(retirements.iter().filter_map(|retirement| retired(retirement, queues)));
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
    Hold {
        scope: HoldScope::Everything,
        deployment_id: None,
        event_id: None,
        since: None,
        why: why.to_owned(),
        ends: ends.to_owned(),
    }
}

fn stop(stop: &PublishStop) -> Hold {
    let deployment = stop.deployment_id;
    Hold {
        scope: HoldScope::Source,
        deployment_id: Some(deployment),
        event_id: None,
        since: Some(stop.seen_at),
        why: format!("coderd itself published usage at {}", stop.later_mark.to_rfc3339()),
        ends: format!(
            "cutting off coderd's publishing, then `tallyline resume publish --coderd-cut-off {deployment}`"
        ),
    }
}

/// The hold of usage that was pending when its source was retired.
fn retired(retirement: &Retirement, queues: &[Queue]) -> Option<Hold> {
    let deployment = retirement.deployment_id;
    let queue =
        queues.iter().find(|queue| queue.deployment_id == deployment && queue.pending > 0)?;
    let Retirement { actor, reason, .. } = retirement;
    Some(Hold {
        scope: HoldScope::Source,
        deployment_id: Some(deployment),
        event_id: None,
        since: Some(retirement.acted_at),
        why: format!(
            "the source was retired by {actor} ({reason}); pending events that are neither sent nor expired: {}",
            queue.pending
        ),
        ends: format!(
            "`tallyline sources reinstate {deployment} --reason WHY`, which sends them; those over 30 days old expire"
        ),
    })
}

/// Each refusal once, for any number of processes. It holds nothing if another process publishes
/// the source.
fn refusals(processes: &[ProcessRow]) -> Vec<Hold> {
    let published: Vec<Uuid> = processes.iter().filter_map(ProcessRow::publishes).collect();
    let mut refusals: Vec<PublishRefusal> =
        processes.iter().filter_map(ProcessRow::publish_refusal).collect();
    refusals.retain(|refusal| {
        refusal.deployment_id.is_none_or(|deployment| !published.contains(&deployment))
    });
    refusals.sort_by_key(|refusal| (refusal.deployment_id, refusal.why.clone(), refusal.since));
    refusals.dedup_by(|later, first| {
        (later.deployment_id, &later.why) == (first.deployment_id, &first.why)
    });
    let hold = |refusal: PublishRefusal| Hold {
        scope: HoldScope::Source,
        deployment_id: refusal.deployment_id,
        event_id: None,
        since: Some(refusal.since),
        why: refusal.why,
        ends: "a publisher that finds the coderd of this source and a license for it".to_owned(),
    };
    refusals.into_iter().map(hold).collect()
}

fn end_of(event: &HeldBack) -> &'static str {
    match event {
        event if event.held_for == HeldFor::VendorRules => {
            "a version of Tallyline with other rules; otherwise the event expires"
        }
        event if event.held_for == HeldFor::VendorRefuses => {
            "Tallyman accepts the event, which is retried apart from others; otherwise the event expires"
        }
        HeldBack { confirmed: true, .. } => {
            "coderd's row equals the accepted event, or `tallyline recover execute` of a plan with `--lost coderd`"
        }
        _ => {
            "coderd's row equals the accepted event, or `tallyline events correct` sets the event to coderd's row"
        }
    }
}

#[cfg(test)]
mod tests {
    use chrono::{DateTime, Utc};

    use super::*;
    use crate::ledger::HeldBack;

    const AT: DateTime<Utc> = DateTime::UNIX_EPOCH;
    const SOURCE: Uuid = Uuid::from_u128(0xd);

    fn held_back(held_for: HeldFor, confirmed: bool) -> HeldBack {
        HeldBack {
            event_id: "usage-1".into(),
            created_at: AT,
            since: AT,
            held_for,
            why: "a test".into(),
            confirmed,
        }
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

    fn queue(pending: i64, held_back_first: Vec<HeldBack>) -> Queue {
        Queue {
            deployment_id: SOURCE,
            pending,
            held_back: i64::try_from(held_back_first.len()).unwrap(),
            held_back_first,
            unanswered: 0,
            oldest_created_at: None,
            last_request: None,
        }
    }

    fn refuses(gone: bool) -> ProcessRow {
        let refused =
            PublishRefusal { deployment_id: Some(SOURCE), why: "another coderd".into(), since: AT };
        process(
            gone,
            serde_json::json!({ "deployment_id": SOURCE, "publishes": false, "refused": refused }),
        )
    }

    fn publishes(gone: bool, deployment: Uuid, publishes: Option<bool>) -> ProcessRow {
        process(
            gone,
            serde_json::json!({ "deployment_id": deployment, "publishes": publishes, "refused": null }),
        )
    }

    fn of_processes(processes: &[ProcessRow]) -> Vec<Hold> {
        all(Vec::new(), None, &[], &[], &[], processes, &[])
    }

    #[test]
    fn a_refusal_is_one_hold_even_if_its_process_ended_within_the_hour() {
        for processes in [
            vec![refuses(false), refuses(false)],
            vec![refuses(true)],
            vec![refuses(false), refuses(true)],
        ] {
            let found = of_processes(&processes);
            let [hold] = found.as_slice() else { panic!("{found:?}") };
            assert_eq!(
                (hold.scope, hold.deployment_id, hold.since),
                (HoldScope::Source, Some(SOURCE), Some(AT))
            );
            assert_eq!(hold.why, "another coderd");
        }
        assert_eq!(of_processes(&[ProcessRow { long_gone: true, ..refuses(true) }]), []);
    }

    #[test]
    fn a_refusal_holds_nothing_while_another_process_publishes_the_source() {
        assert_eq!(of_processes(&[refuses(false), publishes(false, SOURCE, Some(true))]), []);
        let other = Uuid::from_u128(0xe);
        for beside in [
            publishes(true, SOURCE, Some(true)),
            publishes(false, SOURCE, None),
            publishes(false, other, Some(true)),
        ] {
            assert_eq!(of_processes(&[refuses(false), beside.clone()]).len(), 1, "{beside:?}");
        }
    }

    #[test]
    fn a_retirement_holds_the_usage_that_is_pending() {
        let retirement = Retirement {
            deployment_id: SOURCE,
            actor: "sre-1".into(),
            reason: "moved".into(),
            acted_at: AT,
        };
        let retired = |pending| {
            all(
                Vec::new(),
                None,
                &[],
                &[],
                std::slice::from_ref(&retirement),
                &[],
                &[queue(pending, Vec::new())],
            )
        };
        assert_eq!(retired(0), []);
        let found = retired(7);
        let [hold] = found.as_slice() else { panic!("{found:?}") };
        assert_eq!(
            (hold.scope, hold.deployment_id, hold.since),
            (HoldScope::Source, Some(SOURCE), Some(AT))
        );
        assert!(
            hold.why.contains("retired by sre-1 (moved)") && hold.why.ends_with(": 7"),
            "{hold:?}"
        );
        assert!(
            hold.ends.contains(&format!("`tallyline sources reinstate {SOURCE} --reason WHY`")),
            "{hold:?}"
        );
    }

    #[test]
    fn the_end_of_an_events_hold_depends_on_its_cause() {
        for (held_for, confirmed, recover, row) in [
            (HeldFor::CoderdDiffers, true, true, true),
            (HeldFor::CoderdDiffers, false, false, true),
            (HeldFor::VendorRules, true, false, false),
            (HeldFor::VendorRefuses, true, false, false),
        ] {
            let ends = end_of(&held_back(held_for, confirmed));
            assert_eq!(
                (ends.contains("recover execute"), ends.contains("coderd's row")),
                (recover, row),
                "{ends}"
            );
        }
    }

    #[test]
    fn each_hold_has_scope_reason_and_end_and_the_widest_is_first() {
        let pause = |operation| Pause {
            operation,
            topic: None,
            actor: "sre-1".into(),
            reason: "a test".into(),
            since: AT,
        };
        let stop = PublishStop { deployment_id: SOURCE, later_mark: AT, seen_at: AT };
        let event = held_back(HeldFor::CoderdDiffers, true);
        let pauses = [pause(Pausable::Publish), pause(Pausable::Collect)];
        let found = all(Vec::new(), None, &pauses, &[stop], &[], &[], &[queue(1, vec![event])]);
        let listed: Vec<_> = found
            .iter()
            .map(|hold| (hold.scope, hold.deployment_id, hold.event_id.as_deref()))
            .collect();
        use HoldScope::{Event, Everything, Source};
        assert_eq!(
            listed,
            [
                (Everything, None, None),
                (Source, Some(SOURCE), None),
                (Event, Some(SOURCE), Some("usage-1"))
            ]
        );
        assert!(
            found.iter().all(|hold| hold.since == Some(AT)
                && !hold.why.is_empty()
                && !hold.ends.is_empty())
        );
        assert!(found[1].ends.contains(&format!("--coderd-cut-off {SOURCE}")));
    }
}
