//! The status for people. Problems come first, counts last.

use chrono::TimeDelta;
use serde_json::Value;

use super::super::columns;
use super::super::output::{joined, or_dash, time};
use crate::ledger::HoldScope;
use crate::status::{Partition, Queue, Status};

/// All parts of the status; parts without rows are omitted.
pub(super) fn of(status: &Status) -> String {
    let mut head = format!(
        "ledger sequence {}, {}\nhead {}\n",
        status.ledger_sequence,
        time(status.at),
        status.ledger_head
    );
    if let Some(problem) = &status.log_problem {
        head += &format!("the log: {}\n", problem.replace(char::is_control, "\u{fffd}"));
    }
    if status.signed_since.is_none() {
        head += "warning: records are not verified, for log.verification_keys is not set; anyone who may write to the topics can add numbers\n";
    }
    if let Some(edge) = &status.next_license_edge {
        let until = span((edge.at - status.at).num_seconds());
        head += &format!(
            "next license edge {} (in {until}): license {}, {}\n",
            time(edge.at),
            edge.license_id,
            edge.what
        );
    }
    let rates = &status.rates;
    head += &format!(
        "read per second: {:.1} records, {:.1} new events in the last minute; {:.1} records, {:.1} new events in the last ten\n",
        rates.records_per_second_1m,
        rates.events_per_second_1m,
        rates.records_per_second_10m,
        rates.events_per_second_10m
    );
    let tables = [
        attention(status),
        open_transactions(status),
        columns(
            ["TOPIC", "PARTITION", "POSITION", "LOG END", "LAG", "BEHIND", "LOSS IN", "MOVED AT"],
            status.partitions.iter().map(partition),
        ),
        sources(status),
        queues(status),
        processes(status),
        retention(status),
        counts(status),
    ];
    joined([head].into_iter().chain(tables))
}

fn attention(status: &Status) -> String {
    let pauses = status.pauses.iter().map(|pause| {
        let topic = or_dash(pause.topic.as_ref());
        [
            pause.operation.as_str().to_owned(),
            topic,
            pause.actor.clone(),
            time(pause.since),
            pause.reason.clone(),
        ]
    });
    let recoveries = status.recovering.iter().map(|row| {
        [row.id.to_string(), row.actor.clone(), time(row.opened_at), row.reason.clone()]
    });
    let late = status.late_audits.iter().map(|late| {
        [
            late.joint.clone(),
            or_dash(late.deployment_id),
            or_dash(late.audited_at.map(time)),
            late.to_string(),
        ]
    });
    let overdue = status.overdue_turns.iter().map(|turn| {
        [
            turn.joint.clone(),
            or_dash(turn.deployment_id),
            turn.rows.as_str().to_owned(),
            time(turn.due_at),
        ]
    });
    let differs = status.audit.iter().filter_map(|row| row.imbalance().map(|words| [words]));
    joined([
        status
            .recovering
            .as_ref()
            .map(|recovering| format!("{recovering}\n{}\n", recovering.lost_acts()))
            .unwrap_or_default(),
        columns(["PAUSED", "TOPIC", "BY", "SINCE", "REASON"], pauses),
        columns(["RECOVERY", "BY", "SINCE", "REASON"], recoveries),
        columns(
            [
                "AUDIT",
                "DEPLOYMENT",
                "RESULT",
                "DIFFERENCES",
                "OPEN",
                "SOURCE GONE",
                "AUDITED AT",
                "DIFFERS SINCE",
                "35 DAYS AGAIN",
                "ALL AGAIN",
            ],
            audit_rows(status),
        ),
        columns(["THE BOOKS DIFFER"], differs),
        columns(["AUDITS ARE LATE", "DEPLOYMENT", "AUDITED AT", "WHY"], late),
        columns(["TURNS ARE OVERDUE", "DEPLOYMENT", "ROWS", "SINCE"], overdue),
        columns(["USAGE HELD", "OF", "SINCE", "WHY", "ENDS WITH"], hold_rows(status)),
        columns(["A PUBLISHER REFUSES", "HOST", "PID", "SINCE", "WHY"], refusal_rows(status)),
        columns(["OPEN REJECTS", "CAUSE", "RECORDS", "UNBILLED", "OLDEST"], reject_rows(status)),
    ])
}

/// The last finding of each joint, and when its older rows were last compared again.
fn audit_rows(status: &Status) -> impl Iterator<Item = [String; 10]> {
    status.audit.iter().map(|row| {
        let result = if row.differences == 0 { "balanced" } else { "DIFFERS" };
        let [differences, open, gone] =
            [row.differences, row.open, row.gone].map(|count| count.to_string());
        let deployment = or_dash(row.deployment_id);
        [
            row.joint.clone(),
            deployment,
            result.to_owned(),
            differences,
            open,
            gone,
            time(row.audited_at),
            or_dash(row.differs_since.map(time)),
            or_dash(row.recent_turn_ended_at.map(time)),
            or_dash(row.whole_turn_ended_at.map(time)),
        ]
    })
}

/// Usage that is held, and the condition that ends each hold.
fn hold_rows(status: &Status) -> impl Iterator<Item = [String; 5]> {
    status.holds.iter().map(|hold| {
        let (scope, of) = match (hold.scope, hold.deployment_id, &hold.event_id) {
            (HoldScope::Everything, ..) => ("all", "-".to_owned()),
            (HoldScope::Source, deployment, _) => ("source", or_dash(deployment)),
            (HoldScope::Event, _, event) => ("event", event.clone().unwrap_or_default()),
        };
        [scope.to_owned(), of, or_dash(hold.since.map(time)), hold.why.clone(), hold.ends.clone()]
    })
}

/// Refusals of publishers that no hold shows.
fn refusal_rows(status: &Status) -> impl Iterator<Item = [String; 5]> {
    status.processes.iter().filter_map(|process| {
        let refusal = process.publish_refusal()?;
        let held = status
            .holds
            .iter()
            .any(|hold| (hold.deployment_id, &hold.why) == (refusal.deployment_id, &refusal.why));
        let of = or_dash(refusal.deployment_id);
        (!held).then(|| {
            [
                of,
                process.host.clone(),
                process.pid.to_string(),
                time(refusal.since),
                refusal.why.clone(),
            ]
        })
    })
}

/// Open rejects by cause.
fn reject_rows(status: &Status) -> impl Iterator<Item = [String; 5]> {
    status.open_rejects.iter().map(|row| {
        let units: Vec<String> =
            row.units.iter().map(|(unit, number)| format!("{number} {unit}")).collect();
        [
            row.disposition.to_string(),
            row.cause.to_string(),
            row.records.to_string(),
            units.join(", "),
            time(row.oldest),
        ]
    })
}

fn open_transactions(status: &Status) -> String {
    let waiting = status
        .partitions
        .iter()
        .filter(|row| row.in_open_transaction.is_some_and(|offsets| offsets > 0));
    let line = |row: &Partition| {
        let (topic, partition, offsets) =
            (&row.topic, row.partition, row.in_open_transaction.unwrap_or_default());
        format!(
            "{topic}/{partition}: {offsets} offsets wait until another producer's open transaction ends; completeness waits with them\n"
        )
    };
    waiting.map(line).collect()
}

fn partition(row: &Partition) -> [String; 8] {
    let [position, end, lag] = [row.position, row.log_end, row.lag].map(or_dash);
    let [behind, loss] =
        [row.lag_seconds, row.loss_in_seconds].map(|seconds| or_dash(seconds.map(span)));
    [
        row.topic.clone(),
        row.partition.to_string(),
        position,
        end,
        lag,
        behind,
        loss,
        or_dash(row.moved_at.map(time)),
    ]
}

fn sources(status: &Status) -> String {
    let rows = status.sources.iter().map(|row| {
        let state = if row.retired { "retired" } else { "in use" }.to_owned();
        let complete = [
            row.complete_until,
            row.builds_complete_until,
            row.claims_complete_until,
            row.usage_complete_until,
        ];
        let [all, builds, claims, usage] = complete.map(|until| or_dash(until.map(time)));
        [
            row.deployment_id.to_string(),
            state,
            all,
            builds,
            claims,
            usage,
            or_dash(row.runtime_complete_until.map(time)),
        ]
    });
    columns(
        [
            "DEPLOYMENT",
            "STATE",
            "COMPLETE UNTIL",
            "BUILDS UNTIL",
            "CLAIMS UNTIL",
            "USAGE UNTIL",
            "RUNTIME UNTIL",
        ],
        rows,
    )
}

fn queues(status: &Status) -> String {
    let rows = status.queues.iter().map(|row| {
        let [pending, held, unanswered] =
            [row.pending, row.held_back, row.unanswered].map(|count| count.to_string());
        [
            row.deployment_id.to_string(),
            pending,
            held,
            unanswered,
            or_dash(row.oldest_created_at.map(time)),
            last_request(row),
        ]
    });
    columns(["QUEUE OF", "PENDING", "HELD BACK", "UNANSWERED", "OLDEST", "LAST REQUEST"], rows)
}

fn last_request(row: &Queue) -> String {
    let Some(request) = &row.last_request else { return "-".to_owned() };
    let mut words = vec![time(request.sent_at)];
    words.extend(request.status.map(|status| format!("HTTP {status}")));
    words.extend(
        request
            .verdicts
            .iter()
            .map(|(verdict, events)| format!("{events} {}", verdict.as_str().replace('_', " "))),
    );
    words.extend(request.error.clone());
    words.join(", ")
}

fn processes(status: &Status) -> String {
    let rows = status.processes.iter().map(|row| {
        let state = if row.gone { "gone" } else { "alive" }.to_owned();
        [
            row.host.clone(),
            row.pid.to_string(),
            row.roles.join(","),
            state,
            time(row.seen_at),
            row.version.clone(),
            standing(&row.standing),
        ]
    });
    let leases = status.leases.iter().map(|row| {
        let holder = if row.held { row.holder.clone() } else { "-".to_owned() };
        [row.name.clone(), holder, row.epoch.to_string(), time(row.expires_at)]
    });
    let processes =
        columns(["HOST", "PID", "ROLES", "PROCESS", "LAST SEEN AT", "VERSION", "STATE"], rows);
    let leases = columns(["LEASE", "HELD BY", "EPOCH", "UNTIL"], leases);
    joined([processes, leases])
}

/// State of a process's roles, in words.
fn standing(standing: &Value) -> String {
    let mut words = Vec::new();
    if let Some(collecting) =
        standing["collect"]["standing"].as_str().filter(|words| !words.is_empty())
    {
        words.push(format!("collect: {collecting}"));
    }
    if let Some(partitions) = standing["consume"]["partitions"].as_object() {
        words.push(format!("consume: {} partitions", partitions.len()));
    }
    for (partition, why) in standing["consume"]["not_read"].as_object().into_iter().flatten() {
        words.push(format!("{partition}: {}", why.as_str().unwrap_or_default()));
    }
    if let Some(condition) = standing["publish"]["condition"].as_str() {
        words.push(format!("publish: {condition}"));
    }
    if let Some(api) = standing["serve"]["api"].as_str() {
        words.push(format!("serve: {api}"));
    }
    if let Some(telemetry) = standing["telemetry"].as_str() {
        words.push(format!("telemetry: {telemetry}"));
    }
    words.join("; ")
}

fn retention(status: &Status) -> String {
    let rows = status.retention.iter().map(|row| {
        [
            row.kind.to_string(),
            or_dash(row.ran_at.map(time)),
            or_dash(row.due_since.map(time)),
            row.rows.to_string(),
        ]
    });
    columns(["RETENTION OF", "RAN AT", "ROWS DUE SINCE", "REMOVED SINCE THE LAST ACT"], rows)
}

fn counts(status: &Status) -> String {
    let count = |number: i64, estimated: bool| {
        if estimated { format!("about {number}") } else { number.to_string() }
    };
    let publications = status.publications.iter().map(|row| {
        let [events, unanswered] =
            [row.events, row.unanswered].map(|number| count(number, row.estimated));
        [row.deployment_id.to_string(), row.state.to_string(), events, unanswered]
    });
    let events = status.events.iter().map(|row| {
        [row.deployment_id.to_string(), row.event_type.clone(), count(row.events, row.estimated)]
    });
    let batches = status.batches.iter().map(|row| {
        let numbers = [row.batches, row.records, row.accepted, row.duplicates];
        let [batches, records, accepted, duplicates] =
            numbers.map(|number| count(number, row.estimated));
        [row.kind.to_string(), batches, records, accepted, duplicates]
    });
    joined([
        columns(["DEPLOYMENT", "PUBLICATION", "EVENTS", "UNANSWERED"], publications),
        columns(["DEPLOYMENT", "EVENT TYPE", "EVENTS"], events),
        columns(["BATCHES", "COUNT", "RECORDS", "ACCEPTED", "DUPLICATES"], batches),
    ])
}

/// `3d 4h`, `5m 6s`, `7s`: the two largest units.
fn span(seconds: i64) -> String {
    let span = TimeDelta::seconds(seconds);
    match (span.num_days(), span.num_hours() % 24, span.num_minutes() % 60, seconds % 60) {
        (0, 0, 0, seconds) => format!("{seconds}s"),
        (0, 0, minutes, seconds) => format!("{minutes}m {seconds}s"),
        (0, hours, minutes, _) => format!("{hours}h {minutes}m"),
        (days, hours, ..) => format!("{days}d {hours}h"),
    }
}

#[cfg(test)]
mod tests {
    use super::span;

    #[test]
    fn a_span_shows_its_two_largest_units() {
        let spans = [
            (0, "0s"),
            (59, "59s"),
            (61, "1m 1s"),
            (3_600, "1h 0m"),
            (90_061, "1d 1h"),
            (35 * 86_400, "35d 0h"),
        ];
        for (seconds, words) in spans {
            assert_eq!(span(seconds), words);
        }
    }
}
