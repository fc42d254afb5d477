//! The demo: all roles in one process. Only coderd and Tallyman are simulated; PostgreSQL and all
//! roles are real.

mod arguments;
mod folder;
mod postgres;
mod summary;
mod world;

use std::io::{IsTerminal as _, Write as _};
use std::time::Duration;

use tallyline::cause;
use tallyline::cli::{Context, Exit, Failure};
use tallyline::operations::{Actor, RunAudit};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::warn;

pub use arguments::Arguments;

use folder::Folder;
use postgres::PrivatePostgres;
use summary::Summary;
use world::World;

/// Maximum time at the end until everything is counted and billed.
const SETTLE: Duration = Duration::from_secs(60);
/// Interval of the status lines.
const TICK: Duration = Duration::from_secs(1);

/// Runs the demo to its end.
pub async fn run(arguments: Arguments, context: Context) -> Result<Exit, Failure> {
    let folder = Folder::new(arguments.data.as_deref())
        .map_err(|error| Failure::of(Exit::Refused, cause::text(error.as_ref())))?;
    let postgres = PrivatePostgres::start(&folder, arguments.postgres_bin.as_deref()).await?;
    let outcome = show(&arguments, &context, &folder, &postgres).await;
    postgres.stop().await;
    outcome
}

async fn show(
    arguments: &Arguments,
    context: &Context,
    folder: &Folder,
    postgres: &PrivatePostgres,
) -> Result<Exit, Failure> {
    eprintln!("writing a history of coderd's own tables …");
    let mut world = World::begin(arguments, context, folder, postgres).await?;
    eprintln!("{}", world.addresses());
    let ticking = watch(&world, arguments.run_for, &context.stop).await;
    world.end_traffic().await?;
    ticking?;
    let settled = world.settle(SETTLE).await?;
    if !settled {
        warn!("not everything was counted and billed within {} s", SETTLE.as_secs());
    }
    let audit = RunAudit { patience_seconds: Some(20), ..RunAudit::default() };
    let report =
        world.site.operations()?.run(&audit, &Actor::default(), &|_| {}, &context.stop).await?;
    let summary = Summary::of(&world, report).await?;
    world.stop().await?;
    context.output.answer(&summary, || summary.table())?;
    Ok(if settled && summary.balances() { Exit::Success } else { Exit::Differs })
}

/// Prints a status line each second until the time is over, a signal arrives or a role fails.
async fn watch(
    world: &World,
    run_for: Option<Duration>,
    stop: &CancellationToken,
) -> Result<(), Failure> {
    let deadline = run_for.map(|length| Instant::now() + length);
    let on_terminal = std::io::stderr().is_terminal();
    loop {
        let line = world
            .status()
            .await
            .unwrap_or_else(|error| format!("no status: {}", cause::text(error.as_ref())));
        if on_terminal {
            eprint!("\r\x1b[2K{line}");
            let _ = std::io::stderr().flush();
        } else {
            eprintln!("{line}");
        }
        let next =
            deadline.map_or(Instant::now() + TICK, |deadline| deadline.min(Instant::now() + TICK));
        tokio::select! {
            () = stop.cancelled() => break,
            () = world.failed() => break,
            () = tokio::time::sleep_until(next) => {}
        }
        if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
            break;
        }
    }
    if on_terminal {
        eprintln!();
    }
    Ok(())
}
