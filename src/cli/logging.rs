//! The log on stderr.

use std::io::IsTerminal as _;

use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, Layer as _};

use super::slow_statements::SlowStatements;
use super::{Cli, Command, Exit, Failure, LogFormat};

/// Servers' notices ("relation already exists, skipping") are told only where something asks for them by name.
const QUIET: &str = "sqlx::postgres::notice=warn";

/// Who waits for one answer sees how long it takes. The roles tell of slow statements.
const QUIET_ABOUT_SLOWNESS: &str = "sqlx::query=error,sqlx::pool::acquire=error";

/// Starts logging for the whole process: flag over `RUST_LOG` over `info`. The demo has a status line of its own, so there it is `warn`.
pub fn start(cli: &Cli) -> Result<(), Failure> {
    let global = &cli.global;
    let default = if matches!(cli.command, Command::Demo(_)) { "warn" } else { "info" };
    let (origin, filter) = match &global.log_level {
        Some(filter) => ("--log-level", filter.clone()),
        None => ("RUST_LOG", std::env::var("RUST_LOG").ok().filter(|filter| !filter.is_empty()).unwrap_or_else(|| default.to_owned())),
    };
    let runs = matches!(cli.command, Command::Run(_) | Command::CoderdSim(_) | Command::TallymanSim(_));
    let quiet = if runs { QUIET.to_owned() } else { format!("{QUIET},{QUIET_ABOUT_SLOWNESS}") };
    let filter =
        EnvFilter::try_new(format!("{quiet},{filter}")).map_err(|error| Failure::of(Exit::Configuration, format!("{origin}: {error}")))?;
    let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    let lines = match global.log_format {
        LogFormat::Human => lines.with_ansi(std::io::stderr().is_terminal()).boxed(),
        LogFormat::Json => lines.json().flatten_event(true).boxed(),
    };
    tracing_subscriber::registry().with(filter).with(SlowStatements).with(lines).init();
    Ok(())
}
