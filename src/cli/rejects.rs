//! `tallyline rejects`

use std::collections::BTreeMap;

use super::actor::ActorArguments;
use super::output::{or_dash, or_none, time};
use super::via::{Change, Query};
use super::{Context, Exit, Failure, columns};
use crate::ledger::RejectProperty;
use crate::operations::{
    AdmitRejects, Admitted, Bytes, CountRejects, DiscardRejects, DiscardedRejects, ListRejects,
    PredictedDisposition, Reject, RejectCounts, RejectPage, Resubmit, Resubmitted, ShowReject,
    ShownReject,
};

/// Manage records that are not accepted events: rejected, in conflict, or held.
#[derive(Clone, Debug, clap::Subcommand)]
pub enum Rejects {
    List(List),
    Show(Query<ShowReject>),
    Resubmit(Change<Resubmit>),
    Discard(Change<DiscardRejects>),
    Admit(Change<AdmitRejects>),
}

/// List rejects, or count them in groups
#[derive(Clone, Debug, clap::Args)]
pub struct List {
    #[command(flatten)]
    query: Query<ListRejects>,
    /// Count rejects in groups instead
    #[arg(long, value_name = "WHAT", conflicts_with_all = ["limit", "after"])]
    by: Option<RejectProperty>,
}

pub(super) async fn run(rejects: Rejects, context: &Context) -> Result<Exit, Failure> {
    match rejects {
        Rejects::List(List { query, by: None }) => {
            let page = query.run(context).await?;
            context.output.answer(&page, || table(&page))?;
        }
        Rejects::List(List { query, by: Some(by) }) => {
            let counts = query
                .via
                .run(
                    &CountRejects { which: query.request.which, by },
                    &ActorArguments::default(),
                    context,
                )
                .await?;
            context.output.answer(&counts, || groups(&counts))?;
        }
        Rejects::Show(query) => {
            let shown = query.run(context).await?;
            context.output.answer(&shown, || page(&shown))?;
        }
        Rejects::Resubmit(change) => {
            let resubmitted = change.run(context).await?;
            context.output.answer(&resubmitted, || outcomes(&resubmitted))?;
        }
        Rejects::Discard(change) => {
            let discarded = change.run(context).await?;
            context.output.answer(&discarded, || acts(&discarded))?;
        }
        Rejects::Admit(change) => {
            let admitted = change.run(context).await?;
            context.output.answer(&admitted, || sentence(&admitted))?;
        }
    }
    Ok(Exit::Success)
}

fn amount(number: u64, unit: &str) -> String {
    if unit == "unknown" {
        format!("{number} of an unknown unit")
    } else {
        format!("{number} {unit}")
    }
}

fn unbilled(row: &Reject) -> String {
    or_dash(row.units.map(|units| amount(units, row.unit.as_deref().unwrap_or_default())))
}

fn amounts(units: &BTreeMap<String, u64>) -> String {
    let amounts: Vec<String> = units.iter().map(|(unit, number)| amount(*number, unit)).collect();
    if amounts.is_empty() { "-".to_owned() } else { amounts.join(", ") }
}

fn table(page: &RejectPage) -> String {
    let rows = page.rejects.iter().map(|row| {
        let place = format!("{}/{}@{}", row.topic, row.partition, row.offset);
        let unbilled = unbilled(row);
        let [event_type, event_id] =
            [&row.event_type, &row.event_id].map(|of| or_dash(of.as_ref()));
        let [state, disposition, cause] =
            [row.state.to_string(), row.disposition.to_string(), row.cause.to_string()];
        [
            row.id.to_string(),
            state,
            disposition,
            cause,
            time(row.first_seen),
            unbilled,
            event_type,
            event_id,
            place,
        ]
    });
    let headings = [
        "ID",
        "STATE",
        "DISPOSITION",
        "CAUSE",
        "FIRST SEEN",
        "UNBILLED",
        "EVENT TYPE",
        "EVENT ID",
        "RECORD",
    ];
    let mut text = or_none(columns(headings, rows));
    if let Some(after) = page.next_after {
        text.push_str(&format!("more: --after {after}\n"));
    }
    text
}

fn groups(counts: &RejectCounts) -> String {
    let rows = counts.groups.iter().map(|group| {
        [
            or_dash(group.value.clone()),
            group.records.to_string(),
            amounts(&group.units),
            time(group.oldest),
        ]
    });
    or_none(columns(
        [counts.by.as_str().to_uppercase().as_str(), "RECORDS", "UNBILLED", "OLDEST"],
        rows,
    ))
}

/// Bytes for a terminal: as text if possible, else in hexadecimal. Long values are cut.
fn shown(bytes: Option<&Bytes>) -> String {
    use base64::Engine as _;
    const MAX_SHOWN: usize = 4_096;
    let Some(bytes) = bytes else { return "-".to_owned() };
    let whole = match &bytes.text {
        Some(text) => text.clone(),
        None => {
            let raw =
                base64::engine::general_purpose::STANDARD.decode(&bytes.base64).unwrap_or_default();
            format!("hex {}", hex::encode(&raw[..raw.len().min(MAX_SHOWN / 2)]))
        }
    };
    let text: String = whole.chars().take(MAX_SHOWN).collect();
    let cut = bytes.cut
        || text.len() < whole.len()
        || (bytes.text.is_none() && bytes.length > MAX_SHOWN / 2);
    if cut { format!("{text} … ({} bytes; --output json has all)", bytes.length) } else { text }
}

fn word(predicted: PredictedDisposition) -> &'static str {
    match predicted {
        PredictedDisposition::Accepted => "accepted",
        PredictedDisposition::Duplicate => "duplicate",
        PredictedDisposition::Conflict => "conflict",
        PredictedDisposition::Rejected => "rejected",
        PredictedDisposition::Held => "held",
    }
}

fn page(shown_reject: &ShownReject) -> String {
    let row = &shown_reject.reject;
    let mut text = facts(shown_reject);
    let headers =
        row.headers.iter().map(|header| [header.name.clone(), shown(header.value.as_ref())]);
    let acts = row.acts.iter().map(|act| {
        let did = if act.ended_it { "ended it" } else { "did not end it" };
        [
            time(act.acted_at),
            act.act.to_string(),
            act.actor.clone(),
            act.reason.clone(),
            did.to_owned(),
        ]
    });
    let same = shown_reject.same_event.iter().map(|other| {
        [
            other.id.to_string(),
            other.state.to_string(),
            other.disposition.to_string(),
            other.cause.to_string(),
            time(other.recorded_at),
        ]
    });
    let tables = [
        columns(["HEADER", "VALUE"], headers),
        columns(["ACT AT", "ACT", "BY", "REASON", "EFFECT"], acts),
        columns(["SAME EVENT ID", "STATE", "DISPOSITION", "CAUSE", "FIRST SEEN"], same),
    ];
    for table in tables.into_iter().filter(|table| !table.is_empty()) {
        text.push('\n');
        text.push_str(&table);
    }
    let body = match (&row.removed, &row.payload) {
        (Some(removed), _) => removed.to_string(),
        (None, None) => "no body: a tombstone".to_owned(),
        (None, payload) => shown(payload.as_ref()),
    };
    format!("{text}\nBODY\n{body}\n")
}

fn facts(shown_reject: &ShownReject) -> String {
    let row = &shown_reject.reject;
    let unbilled = unbilled(row);
    let would = match &shown_reject.if_resubmitted_reason {
        None => word(shown_reject.if_resubmitted).to_owned(),
        Some(reason) => format!("{}: {reason}", word(shown_reject.if_resubmitted)),
    };
    let facts = [
        ("reject", row.id.to_string()),
        ("state", row.state.to_string()),
        ("disposition", format!("{} ({})", row.disposition, row.cause)),
        ("detail", row.detail.clone()),
        (
            "record",
            format!(
                "{}/{}@{}, generation {} of the partition",
                row.topic, row.partition, row.offset, row.generation
            ),
        ),
        ("record time", or_dash(row.record_time.map(time))),
        ("first seen", time(row.first_seen)),
        ("deployment", or_dash(row.deployment_id)),
        ("event id", or_dash(row.event_id.clone())),
        ("event type", or_dash(row.event_type.clone())),
        ("unbilled", unbilled),
        (
            "event accepted",
            shown_reject
                .accepted_sequence
                .map_or_else(|| "no".to_owned(), |at| format!("at ledger sequence {at}")),
        ),
        ("if resubmitted", would),
        ("key", shown(row.key.as_ref())),
    ];
    let text = columns(["", ""], facts.map(|(name, value)| [name.to_owned(), value]));
    // remove the empty headings
    text.split_once('\n').map_or(String::new(), |(_, rows)| rows.to_owned())
}

fn outcomes(resubmitted: &Resubmitted) -> String {
    let rows = resubmitted.records.iter().map(|record| {
        let place = record
            .place
            .as_ref()
            .map(|place| format!("{}/{}@{}", place.topic, place.partition, place.offset));
        let ended = if record.ended || resubmitted.dry_run {
            ""
        } else {
            "; another process ended it meanwhile"
        };
        let why = format!("{}{ended}", record.reason.clone().unwrap_or_default());
        [
            record.id.to_string(),
            or_dash(record.event_id.clone()),
            word(record.predicted).to_owned(),
            or_dash(place),
            or_dash(record.act_id),
            why,
        ]
    });
    let table = columns(["ID", "EVENT ID", "PREDICTED", "RECORD", "ACT", "WHY"], rows);
    if resubmitted.dry_run { format!("{table}nothing was done\n") } else { table }
}

fn acts(discarded: &DiscardedRejects) -> String {
    let rows = discarded
        .ids
        .iter()
        .zip(&discarded.act_ids)
        .map(|(id, act)| [id.to_string(), "discarded".to_owned(), act.to_string()]);
    columns(["ID", "STATE", "ACT"], rows)
}

fn sentence(admitted: &Admitted) -> String {
    let Admitted { records, refused, left } = admitted;
    format!(
        "{records} held records of known types admitted, {refused} of them will be refused for another cause; {left} remain held, and so do records of unknown types\n"
    )
}
