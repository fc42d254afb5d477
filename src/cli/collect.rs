//! `tallyline collect sweep`

use std::time::Duration;

use chrono::{DateTime, Utc};
use clap::Subcommand;
use serde::Serialize;
use uuid::Uuid;

use super::output::time;
use super::progress::Progress;
use super::roles::Handles;
use super::{Context, Exit, Failure, PipelineArguments};
use crate::ledger::{
    Ledger, Pausable, Source, SweepRequest, collector_lease, collector_requests, leases, losses,
    passes, pauses, sources,
};

/// Interval of progress queries to the ledger.
const LOOK: Duration = Duration::from_millis(500);

/// Requests to collectors.
#[derive(Clone, Debug, Subcommand)]
pub enum Collect {
    /// Let the running collector read everything now, and show the progress until the ledger has
    /// all of it
    Sweep(Arguments),
}

/// Let the running collector read everything now.
#[derive(Clone, Debug, clap::Args)]
pub struct Arguments {
    #[command(flatten)]
    pipeline: PipelineArguments,
}

/// A sweep whose rows are all in the ledger.
#[derive(Debug, Serialize)]
struct Swept {
    deployment_id: Uuid,
    rows_read: i64,
    pass_id: i64,
    /// Events appended to the log.
    appended: i32,
    /// Of these, events from before the completeness of an earlier pass.
    late: i32,
    /// Everything that coderd committed before this instant is in the ledger; `None` if not known.
    complete_until: Option<DateTime<Utc>>,
}

pub(super) async fn run(collect: Collect, context: Context) -> Result<Exit, Failure> {
    let Collect::Sweep(arguments) = collect;
    let handles = Handles::open(arguments.pipeline.load()?, context.clock.clone()).await?;
    handles.ledger.reach().await?;
    let ledger = &handles.ledger.ledger;
    let source = source(&handles, &context).await?;
    collector_runs(ledger, &source).await?;
    let total = ledger.run(async |conn| losses::source_events(conn, source.id).await).await?;
    ledger.run(async |conn| collector_requests::add_sweep(conn, source.id).await).await?;
    let progress = Progress::default();
    let watched = context
        .stop
        .run_until_cancelled(watch(
            ledger,
            &source,
            u64::try_from(total).unwrap_or_default(),
            &progress,
        ))
        .await;
    progress.finish();
    let Some(swept) = watched else {
        let advice = "the sweep continues; `tallyline collect sweep` requests another one";
        return Err(Failure::of(Exit::Interrupted, format!("stopped watching: {advice}")));
    };
    let swept = swept?;
    context.output.answer(&swept, || table(&swept))?;
    Ok(Exit::Success)
}

async fn source(handles: &Handles, context: &Context) -> Result<Source, Failure> {
    let Some(deployment) = handles.deployment(&context.stop).await else {
        let unset = "source.deployment_id is not set, and coderd's database cannot be asked: set source.deployment_id";
        return Err(if context.stop.is_cancelled() {
            Failure::interrupted()
        } else {
            Failure::of(Exit::Configuration, unset)
        });
    };
    let source =
        handles.ledger.ledger.run(async |conn| sources::get(conn, deployment).await).await?;
    source.ok_or_else(|| {
        Failure::of(
            Exit::Refused,
            format!("deployment {deployment}: no collector has introduced it; {START}"),
        )
    })
}

/// Advice if no collector runs.
const START: &str = "start a process with the role collect";

/// Refuses if no collector runs, because only a running collector answers the request.
async fn collector_runs(ledger: &Ledger, source: &Source) -> Result<(), Failure> {
    let pauses = ledger.run(pauses::list).await?;
    if let Some(pause) = pauses.iter().find(|pause| pause.operation == Pausable::Collect) {
        return Err(Failure::of(
            Exit::Refused,
            format!("{pause}; to resume, run `tallyline resume collect`"),
        ));
    }
    let holder = ledger
        .run(async |conn| leases::holder(conn, &collector_lease(source.deployment_id)).await)
        .await?;
    holder.map(|_| ()).ok_or_else(|| {
        Failure::of(
            Exit::Refused,
            format!(
                "deployment {}: no collector runs; {START} and ask again",
                source.deployment_id
            ),
        )
    })
}

/// Shows the progress until the ledger has all rows of the sweep. `total` is the ledger's event
/// count: coderd has about as many rows.
async fn watch(
    ledger: &Ledger,
    source: &Source,
    total: u64,
    progress: &Progress,
) -> Result<Swept, Failure> {
    loop {
        let gone = || {
            Failure::of(
                Exit::Refused,
                "the request is missing in the ledger, which may have been restored: run `tallyline collect sweep` again",
            )
        };
        let request = ledger
            .run(async |conn| collector_requests::sweep(conn, source.id).await)
            .await?
            .ok_or_else(gone)?;
        let SweepRequest { rows_read, pass_id, appended, late } = request;
        let rows = u64::try_from(rows_read).unwrap_or_default();
        match pass_id {
            None => {
                collector_runs(ledger, source).await?;
                progress.at(("reading coderd", "rows"), rows, total.max(rows));
            }
            Some(pass_id)
                if ledger
                    .run(async |conn| passes::is_confirmed(conn, source.id, pass_id).await)
                    .await? =>
            {
                let complete_until = ledger
                    .run(async |conn| passes::completeness(conn, source.id).await)
                    .await?
                    .complete_until;
                let (appended, late) = (appended.unwrap_or_default(), late.unwrap_or_default());
                return Ok(Swept {
                    deployment_id: source.deployment_id,
                    rows_read,
                    pass_id,
                    appended,
                    late,
                    complete_until,
                });
            }
            Some(_) => progress.at(("recording", "rows"), 0, rows),
        }
        tokio::time::sleep(LOOK).await;
    }
}

fn table(swept: &Swept) -> String {
    let Swept { rows_read, pass_id, appended, late, complete_until, .. } = swept;
    let complete = complete_until.map_or_else(
        || "completeness is not reported".to_owned(),
        |until| format!("complete until {}", time(until)),
    );
    format!(
        "swept in pass {pass_id}: {rows_read} rows read, {appended} events appended, {late} of them late; {complete}\n"
    )
}
