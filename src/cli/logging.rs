//! Starts logging on stderr.

use std::io::IsTerminal as _;

use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, Layer as _};

use super::slow_statements::SlowStatements;
use super::{Exit, Failure, Global, LogFormat};

/// Server notices ("relation already exists, skipping") are logged only if a filter names them.
const QUIET: &str = "sqlx::postgres::notice=warn";

/// A user who waits for one answer notices the delay. The roles log slow statements.
const QUIET_ABOUT_SLOWNESS: &str = "sqlx::query=error,sqlx::pool::acquire=error";

/// What a command logs without flags.
#[derive(Clone, Copy, Debug)]
pub struct LogDefaults {
    pub level: &'static str,
    /// Whether slow statements are logged, as for a role.
    pub slow_statements: bool,
}

/// Starts logging for the process. The flag overrides `RUST_LOG`, which overrides the default
/// level.
pub(super) fn start(global: &Global, defaults: LogDefaults) -> Result<(), Failure> {
    let (origin, filter) = match &global.log_level {
        Some(filter) => ("--log-level", filter.clone()),
        None => (
            "RUST_LOG",
            std::env::var("RUST_LOG")
                .ok()
                .filter(|filter| !filter.is_empty())
                .unwrap_or_else(|| defaults.level.to_owned()),
        ),
    };
    let quiet = if defaults.slow_statements {
        QUIET.to_owned()
    } else {
        format!("{QUIET},{QUIET_ABOUT_SLOWNESS}")
    };
    let filter = EnvFilter::try_new(format!("{quiet},{filter}"))
        .map_err(|error| Failure::of(Exit::Configuration, format!("{origin}: {error}")))?;
    let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    let lines = match global.log_format {
        LogFormat::Human => lines.with_ansi(std::io::stderr().is_terminal()).boxed(),
        LogFormat::Json => lines.json().flatten_event(true).boxed(),
    };
    tracing_subscriber::registry().with(filter).with(SlowStatements).with(lines).init();
    Ok(())
}
