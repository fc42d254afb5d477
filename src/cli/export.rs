//! `tallyline export usage`

use std::io;
use std::path::{Path, PathBuf};

use chrono::{DateTime, Utc};
use serde::Serialize;
use uuid::Uuid;

use super::actor::ActorArguments;
use super::output::exact_time;
use super::{Context, Exit, Failure, PipelineArguments, columns, connect};
use crate::export::{
    Aggregate, ExportFile, Hashed, Totals, export_usage, incomplete, incomplete_as_of, is_stdout,
};
use crate::ledger::{
    Head, Ledger, NewExport, Pausable, Sequence, UsageRange, event_history, head, snapshots,
    sources,
};
use crate::operations::{instant, refuse_paused};

/// Write files for finance.
#[derive(Clone, Debug, clap::Subcommand)]
pub enum Export {
    /// Write usage events with their publication state to a file, ordered by time and id
    Usage(Usage),
}

/// The same range at the same ledger sequence always gives the same bytes. A text that looks like a
/// formula gets an apostrophe in front, so that spreadsheets do not execute it. So does a text that
/// begins with an apostrophe.
#[derive(Clone, Debug, clap::Args)]
pub struct Usage {
    #[command(flatten)]
    pipeline: PipelineArguments,
    /// Usage created at or after this instant (RFC 3339, or a date in UTC)
    #[arg(long, value_name = "TIME", value_parser = instant)]
    from: DateTime<Utc>,
    /// Usage created before this instant
    #[arg(long, value_name = "TIME", value_parser = instant)]
    to: DateTime<Utc>,
    /// Only usage of this Coder deployment
    #[arg(long, value_name = "DEPLOYMENT_ID")]
    source: Option<Uuid>,
    /// State at this ledger sequence [default: the current state]
    #[arg(long, value_name = "INCARNATION:SEQUENCE")]
    as_of: Option<Sequence>,
    /// Format of the file
    #[arg(long, value_enum, default_value = "csv", value_name = "FORMAT")]
    format: Format,
    /// Output file. A regular file is written completely or not at all; a FIFO or device gets the
    /// stream. With `-`, the file goes to stdout and the totals go to stderr
    #[arg(long, value_name = "FILE")]
    file: PathBuf,
    /// Export even if usage of the range may be missing
    #[arg(long)]
    allow_incomplete: bool,
    #[command(flatten)]
    actor: ActorArguments,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Format {
    /// RFC 4180 with a header row
    Csv,
}

#[derive(Serialize)]
struct Answer {
    file: String,
    from: DateTime<Utc>,
    to: DateTime<Utc>,
    source: Option<Uuid>,
    as_of_sequence: Sequence,
    /// The ledger's head at that sequence.
    head: Option<Head>,
    export_id: i64,
    sha256: String,
    /// Reason why usage of the range may be missing.
    incomplete: Option<String>,
    #[serde(flatten)]
    totals: Totals,
}

pub(super) async fn run(export: Export, context: &Context) -> Result<Exit, Failure> {
    let Export::Usage(usage) = export;
    if usage.from >= usage.to {
        return Err(Failure::of(Exit::Configuration, "--from must be before --to"));
    }
    let pipeline = usage.pipeline.load()?;
    let ledger = connect::ledger(&pipeline, context.clock.clone()).await?;
    refuse_paused(&ledger, Pausable::Export).await?;
    let (range, incomplete) = range(&ledger, &usage).await?;
    if let Some(reason) = incomplete.as_ref().filter(|_| !usage.allow_incomplete) {
        let advice = "retry later, choose an earlier --to or a later --as-of, or write what is there with --allow-incomplete";
        return Err(Failure::of(
            Exit::Refused,
            format!("the range is not complete: {reason}; {advice}"),
        ));
    }
    let Format::Csv = usage.format;
    let to_stdout = is_stdout(&usage.file);
    let writing = write(&ledger, &usage, &range, to_stdout);
    // opening a FIFO blocks until it has a reader
    let written =
        context.stop.run_until_cancelled(writing).await.ok_or_else(Failure::interrupted)??;
    let answer = Answer {
        file: usage.file.display().to_string(),
        from: usage.from,
        to: usage.to,
        source: usage.source,
        as_of_sequence: range.as_of,
        head: ledger.run(async |conn| head::at(conn, range.as_of.number).await).await?,
        export_id: written.export_id,
        sha256: hex::encode(written.sha256),
        incomplete,
        totals: written.totals,
    };
    if to_stdout {
        context.output.answer_aside(&answer, || table(&answer))?;
    } else {
        context.output.answer(&answer, || table(&answer))?;
    }
    Ok(Exit::Success)
}

/// The requested range at a ledger sequence, and the reason why its usage may be incomplete.
async fn range(ledger: &Ledger, usage: &Usage) -> Result<(UsageRange, Option<String>), Failure> {
    let last = ledger.run(snapshots::head).await?;
    if let Some(as_of) = usage.as_of.filter(|as_of| as_of.incarnation != last.incarnation) {
        let incarnation = last.incarnation;
        let message = format!(
            "--as-of {as_of} is of another incarnation: this ledger is {incarnation}; each restore begins another"
        );
        return Err(Failure::of(Exit::Refused, message));
    }
    if let Some(as_of) = usage.as_of.filter(|as_of| as_of.number > last.number) {
        return Err(Failure::of(
            Exit::Refused,
            format!("--as-of {as_of}: the ledger's last sequence is {last}"),
        ));
    }
    if let Some(source) = usage.source
        && ledger.run(async |conn| sources::get(conn, source).await).await?.is_none()
    {
        return Err(Failure::of(
            Exit::Refused,
            format!("--source {source}: the ledger knows no such deployment"),
        ));
    }
    let range = UsageRange {
        from: usage.from,
        to: usage.to,
        source: usage.source,
        as_of: usage.as_of.unwrap_or(last),
    };
    if usage.as_of.is_some() {
        let incomplete = incomplete_as_of(ledger, &range).await?;
        return Ok((range, incomplete));
    }
    let incomplete = incomplete(ledger, &range).await?;
    // read the sequence last, so that it covers everything that the check has seen
    let as_of = ledger.run(snapshots::head).await?;
    Ok((UsageRange { as_of, ..range }, incomplete))
}

/// An export in its final place.
struct Written {
    export_id: i64,
    totals: Totals,
    sha256: [u8; 32],
}

async fn write(
    ledger: &Ledger,
    usage: &Usage,
    range: &UsageRange,
    to_stdout: bool,
) -> Result<Written, Failure> {
    let actor = usage.actor.actor();
    let record = async |totals: &Totals, sha256| {
        let (actor, reason, events) = (actor.name.as_str(), actor.reason.as_str(), totals.events);
        let export = NewExport { actor, reason, range, format: "csv", events, sha256 };
        ledger
            .run(async |conn| event_history::record_export(conn, &export, ledger.clock.now()).await)
            .await
            .map_err(Failure::from)
    };
    if to_stdout {
        let (totals, sha256) = hashed(ledger, range, io::stdout(), Path::new("stdout")).await?;
        return Ok(Written { export_id: record(&totals, sha256).await?, totals, sha256 });
    }
    let refused = |error: io::Error| {
        Failure::of(Exit::Refused, format!("{} cannot be written: {error}", usage.file.display()))
    };
    let path = usage.file.clone();
    let opened = tokio::task::spawn_blocking(move || ExportFile::create(&path)).await;
    let mut file = opened.map_err(|error| Failure::new(Exit::Internal, error))?.map_err(refused)?;
    let (totals, sha256) = hashed(ledger, range, &mut file, &usage.file).await?;
    // record the export first: a file without a record would be worse than a record without a file
    let export_id = record(&totals, sha256).await?;
    file.finish().map_err(refused)?;
    Ok(Written { export_id, totals, sha256 })
}

/// Writes the range. Returns its totals and the SHA-256 of its bytes.
async fn hashed(
    ledger: &Ledger,
    range: &UsageRange,
    writer: impl io::Write,
    path: &Path,
) -> Result<(Totals, [u8; 32]), Failure> {
    let mut writer = Hashed::new(writer);
    let totals =
        export_usage(ledger, range, &mut writer).await.map_err(|error| written(error, path))?;
    Ok((totals, writer.sha256()))
}

/// A full disk or a closed reader is not a fault of Tallyline. An incomplete file is never a
/// success.
fn written(error: anyhow::Error, path: &Path) -> Failure {
    let of_csv = error.downcast_ref::<csv::Error>().is_some_and(csv::Error::is_io_error);
    if of_csv || error.downcast_ref::<io::Error>().is_some() {
        return Failure::new(
            Exit::Refused,
            error.context(format!("{} cannot be written whole", path.display())),
        );
    }
    Failure::from(error)
}

fn table(answer: &Answer) -> String {
    let mut text = columns(
        ["TYPE", "EVENTS", "QUANTITY", "UNIT"],
        answer.totals.types.iter().map(|total| {
            let unit = match total.aggregate {
                Aggregate::Sum => total.unit.to_owned(),
                Aggregate::Maximum => format!("{} at most", total.unit),
            };
            [total.event_type.to_string(), total.events.to_string(), total.quantity.clone(), unit]
        }),
    );
    let (from, to) = (exact_time(answer.from), exact_time(answer.to));
    text.push_str(&format!(
        "{} events from {from} to {to} (not included), as of ledger sequence {}, in {}\nexport {}, SHA-256 {}\n",
        answer.totals.events, answer.as_of_sequence, answer.file, answer.export_id, answer.sha256
    ));
    if let Some(head) = answer.head {
        text.push_str(&format!("head {head}\n"));
    }
    if let Some(reason) = &answer.incomplete {
        text.push_str(&format!("not complete: {reason}\n"));
    }
    text
}
