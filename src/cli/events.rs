//! `tallyline events correct`

use serde::Serialize;

use super::actor::ActorArguments;
use super::output::{exact_time, or_dash, or_none};
use super::via::ViaArguments;
use super::{Context, Exit, Failure, columns};
use crate::operations::{CorrectionExecution, CorrectionPlan, CorrectionRequest};

/// Correct accepted events.
#[derive(Clone, Debug, clap::Subcommand)]
pub enum Events {
    Correct(Correct),
}

/// Set accepted events to coderd's rows: an event that coderd does not have, or has with other
/// content. Without --plan it shows the effect and changes nothing
///
/// License counts and exports follow at once, metrics at the next rebuild that allows a decrease. A
/// queued publication is withdrawn, or sent with the corrected content. Needs a reason.
#[derive(Clone, Debug, clap::Args)]
pub struct Correct {
    #[command(flatten)]
    via: ViaArguments,
    #[command(flatten)]
    actor: ActorArguments,
    /// Hash of the plan to execute
    #[arg(long = "plan", value_name = "HASH")]
    hash: Option<String>,
    #[command(flatten)]
    request: CorrectionRequest,
}

#[derive(Serialize)]
struct Planned {
    #[serde(flatten)]
    plan: CorrectionPlan,
    execute: String,
}

pub(super) async fn run(events: Events, context: &Context) -> Result<Exit, Failure> {
    let Events::Correct(Correct { via, actor, hash, request }) = events;
    match hash {
        None => {
            let plan = via.run(&request, &actor, context).await?;
            let execute = format!(
                "tallyline events correct {} {} --plan {} --reason TEXT",
                again(&request),
                via.again(),
                plan.hash
            );
            let answer = Planned { plan, execute };
            context.output.answer(&answer, || {
                let (hash, execute) = (&answer.plan.hash, &answer.execute);
                format!("{}hash     {hash}\nexecute  {execute}\n", table(&answer.plan))
            })?;
        }
        Some(hash) => {
            let execution = CorrectionExecution { correction: request, hash };
            let corrected = via.run(&execution, &actor, context).await?;
            context.output.answer(&corrected, || {
                let from = format!("from ledger sequence {} on", corrected.sequence);
                match &corrected.plan {
                    Some(plan) => {
                        format!("{}{} corrected, {from}\n", table(plan), plan.events.len())
                    }
                    None => format!("this plan was executed before: corrected {from}\n"),
                }
            })?;
        }
    }
    Ok(Exit::Success)
}

/// The same arguments for the execution.
fn again(request: &CorrectionRequest) -> String {
    let mut words: Vec<String> =
        request.event_ids.iter().map(|id| super::pipeline::quoted(id)).collect();
    words.extend(request.source.map(|source| format!("--source {source}")));
    words.extend(request.allow_confirmed.then(|| "--allow-confirmed".to_owned()));
    words.join(" ")
}

fn table(plan: &CorrectionPlan) -> String {
    let events = plan.events.iter().map(|event| {
        let state = match (event.publication, event.publication_after) {
            (Some(before), Some(after)) if before != after => format!("{before}, then {after}"),
            (state, _) => or_dash(state),
        };
        let confirmed = if event.confirmed { "yes" } else { "no" }.to_owned();
        [
            event.event_id.clone(),
            shown(event.before.as_ref()),
            shown(event.after.as_ref()),
            or_dash(Some(event.differs.join(", ")).filter(|names| !names.is_empty())),
            confirmed,
            state,
        ]
    });
    let mut text = or_none(columns(
        ["EVENT ID", "IN THE LEDGER", "IN CODERD", "DIFFERS IN", "CONFIRMED", "PUBLICATION"],
        events,
    ));
    let licenses = plan.licenses.iter().map(|row| {
        let [start, end] = [row.start, row.end].map(exact_time);
        [row.license_id.to_string(), start, end, row.before.to_string(), row.after.to_string()]
    });
    text += &columns(["LICENSE", "FROM", "UNTIL", "AGENTS NOW", "THEN"], licenses);
    let metrics = plan.metrics.iter();
    text += &columns(
        ["METRIC, AT THE NEXT REBUILD", "REMOVED", "ADDED"],
        metrics.map(|row| [row.family.clone(), row.removed.to_string(), row.added.to_string()]),
    );
    let vendor = plan.vendor.iter().map(|note| {
        let certain = if note.billed { "billed" } else { "perhaps billed" };
        let truth = match (&note.quantity_true, &note.true_event_type) {
            (Some(quantity), Some(event_type)) => format!("{event_type} {quantity}"),
            _ => "nothing".to_owned(),
        };
        let billed = format!("{} {}", note.event_type, note.quantity_billed);
        [note.event_id.clone(), certain.to_owned(), billed, truth]
    });
    text += &columns(["FOR THE VENDOR", "STATE", "BILLED", "TRUE"], vendor);
    if !plan.metrics.is_empty() {
        text += "metrics follow with `tallyline rebuild plan metrics` and an execution with --allow-decrease\n";
    }
    text
}

/// The type, the time and the amount of usage, or the status of a build; `-` for no event.
fn shown(event: Option<&serde_json::Value>) -> String {
    let Some(event) = event else { return "-".to_owned() };
    let text = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_owned();
    let data = &event["data"];
    let what = match data["build_id"].is_null() {
        true => data.to_string(),
        false => format!("{} build", text(&data["status"])),
    };
    format!("{} {} {what}", text(&event["type"]), text(&event["time"]))
}
