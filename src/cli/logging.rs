use std::io::IsTerminal as _;

use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, Layer as _};

use super::slow_statements::SlowStatements;
use super::{Cli, Command, Exit, Failure, LogFormat};

/// Server notices ("relation already exists, skipping") are logged only if a filter names them.
const QUIET: &str = "sqlx::postgres::notice=warn";

/// A user who waits for one answer notices the delay. The roles log slow statements.
const QUIET_ABOUT_SLOWNESS: &str = "sqlx::query=error,sqlx::pool::acquire=error";

/// Starts logging for the process. The flag overrides `RUST_LOG`, which overrides `info`. Default for the demo: `warn`, as it has a status
/// line.
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
