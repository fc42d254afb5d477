//! `tallyline explain`

use super::output::{exact_time as time, or_dash};
use super::via::Query;
use super::{Context, Exit, Failure};
use crate::event::UsageType;
use crate::ledger::{AttemptVerdict, BatchKind};
use crate::operations::{ExplainRequest, ExplainedEvent, Explanation};

pub(super) async fn run(query: Query<ExplainRequest>, context: &Context) -> Result<Exit, Failure> {
    let explanation = query.run(context).await?;
    context.output.answer(&explanation, || page(&explanation))?;
    Ok(Exit::Success)
}

/// Lines with headings. A heading precedes its first line.
#[derive(Default)]
struct Page(String);

impl Page {
    fn line(&mut self, heading: &str, text: &str) {
        // a vendor's message or a name may contain any character: the terminal must not execute
        // control characters
        let text: String = text
            .chars()
            .map(|character| if character.is_control() { '\u{fffd}' } else { character })
            .collect();
        self.0.push_str(format!("{heading:<12}{text}").trim_end());
        self.0.push('\n');
    }

    fn lines(&mut self, heading: &str, lines: impl IntoIterator<Item = String>) {
        for (index, line) in lines.into_iter().enumerate() {
            self.line(if index == 0 { heading } else { "" }, &line);
        }
    }
}

/// The explanation for people.
fn page(explanation: &Explanation) -> String {
    let mut page = Page::default();
    page.line("EVENT", &explanation.event_id);
    let deployment = explanation
        .deployment_id
        .map_or_else(|| "of no known deployment".to_owned(), |id| format!("of deployment {id}"));
    page.line("", &deployment);
    page.line("SOURCE", &explanation.source.detail);
    if let Some(published_at) = explanation.source.published_at {
        page.line("", &format!("coderd has marked it as published at {}", time(published_at)));
    }
    match &explanation.accepted {
        None => page.line("ACCEPTED", "no event is accepted under this id"),
        Some(accepted) => accepted_lines(&mut page, accepted),
    }
    refusal_lines(&mut page, explanation);
    page.line("AS OF", &format!("ledger sequence {}", explanation.as_of_sequence));
    page.0
}

fn accepted_lines(page: &mut Page, accepted: &ExplainedEvent) {
    let text = |name: &str| accepted.event[name].as_str().unwrap_or_default().to_owned();
    page.line("WHAT", &format!("{} at {}: {}", text("type"), text("time"), accepted.event["data"]));
    let log = &accepted.log;
    let number =
        |number: Option<i32>| number.map_or_else(|| "?".to_owned(), |number| number.to_string());
    let place = format!(
        "{}/{}@{}, generation {} of the partition",
        log.topic,
        number(log.partition),
        log.offset,
        number(log.generation)
    );
    page.lines("LOG", [place, log.detail.clone()]);
    let batch = &accepted.batch;
    match (batch.sequence, batch.recorded_at) {
        (Some(sequence), Some(recorded_at)) => {
            let epoch = batch.epoch.map(|epoch| format!(", epoch {epoch}")).unwrap_or_default();
            let kind = batch.kind.map_or("", BatchKind::as_str);
            page.line(
                "LEDGER",
                &format!(
                    "sequence {sequence}: {kind} batch {}{epoch}, recorded at {}",
                    batch.id,
                    time(recorded_at)
                ),
            );
        }
        _ => page.line(
            "LEDGER",
            &format!("batch {}, which is NOT there: run `tallyline audit`", batch.id),
        ),
    }
    let holds = if accepted.digest_holds {
        "the row has it"
    } else {
        "the row does NOT have it any more: run `tallyline audit --deep`"
    };
    page.line("", &format!("digest {}; {holds}", accepted.digest));
    for correction in &accepted.corrections {
        let at = or_dash(correction.sequence);
        let (actor, when) = (&correction.actor, time(correction.acted_at));
        page.line(
            "CORRECTED",
            &format!("from sequence {at} on, by {actor} at {when}: {}", correction.reason),
        );
        let content = match &correction.corrected {
            Some(event) => format!("to {} at {}: {}", event["type"], event["time"], event["data"]),
            None => "to nothing: coderd does not have it".to_owned(),
        };
        page.line("", &content);
    }
    counted_lines(page, accepted);
    publication_lines(page, accepted);
    page.lines(
        "EXPORTS",
        accepted.exports.iter().map(|export| {
            let range = format!("{} to {}", time(export.first_instant), time(export.end_instant));
            let head = format!(
                "{} {} by {} at {}",
                export.format,
                export.id,
                export.actor,
                time(export.exported_at)
            );
            format!(
                "{head}: {range}, as of sequence {}, SHA-256 {}",
                export.sequence, export.sha256
            )
        }),
    );
    if accepted.publication.is_some() && accepted.exports.is_empty() {
        page.line("EXPORTS", "in no file yet");
    }
}

fn counted_lines(page: &mut Page, accepted: &ExplainedEvent) {
    page.lines(
        "LICENSES",
        accepted.license_windows.iter().map(|window| {
            let counts = if window.counts {
                format!("counts {}", window.agents)
            } else {
                "outside".to_owned()
            };
            let standing = match window.gone_at {
                Some(gone_at) => format!(", gone from coderd at {}", time(gone_at)),
                None if window.in_force => ", in force now".to_owned(),
                None => String::new(),
            };
            format!(
                "license {}: {} to {} (not included){standing}: {counts}",
                window.license_id,
                time(window.start),
                time(window.end)
            )
        }),
    );
    let added = accepted.metrics.iter().map(|series| {
        let labels: Vec<String> =
            series.labels.iter().map(|label| format!("{}={:?}", label.name, label.value)).collect();
        let value = series
            .observed_seconds
            .map_or_else(|| "+1".to_owned(), |seconds| format!("observed {seconds} s"));
        format!("{}{{{}}} {value}", series.family, labels.join(", "))
    });
    let unaffected = accepted
        .not_in_metrics
        .iter()
        .map(|family| format!("not in {}: {}", family.family, family.why));
    page.lines("METRICS", added.chain(unaffected));
}

fn publication_lines(page: &mut Page, accepted: &ExplainedEvent) {
    let Some(life) = &accepted.publication else { return };
    let settled = match (life.settled_sequence, life.settled_at) {
        (Some(sequence), Some(at)) => format!(" at sequence {sequence}, {}", time(at)),
        _ => String::new(),
    };
    let next = life.next_attempt_at.map(|at| format!(", due at {}", time(at))).unwrap_or_default();
    let unanswered = if life.unanswered { ", an attempt may have been accepted" } else { "" };
    page.line("PUBLISHED", &format!("{}{settled}{next}{unanswered}", life.state));
    let held = if life.held_for.is_some() { "held back: " } else { "" };
    page.lines("", life.last_message.iter().map(|message| format!("{held}{message}")));
    if life.removed_attempts > 0 {
        let on = life
            .attempts_removed_at
            .map(|at| format!(", the settling one on {}", at.date_naive()))
            .unwrap_or_default();
        page.line("", &format!("{} attempts were removed by retention{on}", life.removed_attempts));
    }
    for attempt in &life.attempts {
        let verdict = attempt.verdict.map_or("no answer is recorded", AttemptVerdict::as_str);
        let status = attempt.status.map(|status| format!(", HTTP {status}")).unwrap_or_default();
        let answered =
            attempt.answered_at.map(|at| format!(", answered {}", time(at))).unwrap_or_default();
        let message =
            attempt.message.as_ref().map(|message| format!(": {message}")).unwrap_or_default();
        page.line(
            "",
            &format!(
                "request {} sent {}{answered}{status}: {verdict}{message}",
                attempt.request_id,
                time(attempt.sent_at)
            ),
        );
        page.line("", &format!("  under the license {}", attempt.license_sha256));
    }
}

fn refusal_lines(page: &mut Page, explanation: &Explanation) {
    for refusal in &explanation.refusals {
        let place = format!("{}/{}@{}", refusal.topic, refusal.partition, refusal.log_offset);
        page.line(
            "REFUSED",
            &format!(
                "reject {} at {place}, recorded at {}: {}",
                refusal.id,
                time(refusal.recorded_at),
                refusal.disposition
            ),
        );
        let unit = refusal
            .event_type
            .as_deref()
            .and_then(UsageType::unit_of)
            .unwrap_or("of an unknown unit");
        let units = refusal
            .units
            .as_ref()
            .map(|units| format!(", {units} {unit} unbilled"))
            .unwrap_or_default();
        page.line("", &format!("{}: {}{units}", refusal.cause, refusal.detail));
        page.line("", &format!("is {}", refusal.state));
        let removed = refusal.payload_removed_at.map(|at| at.date_naive());
        page.lines(
            "",
            removed.map(|on| format!("headers and body were removed by retention on {on}")),
        );
        for act in &refusal.acts {
            page.line(
                "",
                &format!("{} by {} at {}: {}", act.act, act.actor, time(act.acted_at), act.reason),
            );
        }
    }
    if explanation.accepted.is_some() && explanation.refusals.is_empty() {
        page.line(
            "REFUSED",
            "no record under this id; equal ones are counted as duplicates with their batches",
        );
    }
}
