//! Arguments of the demo.

use std::path::PathBuf;
use std::time::Duration;

use tallyline::operations::duration_flag;

/// The options of the demo.
#[derive(Clone, Debug, clap::Args)]
pub struct Arguments {
    /// End after this time with a summary and an audit, such as 20s or 5m [default: run until
    /// Ctrl-C]
    #[arg(long = "for", value_name = "DURATION", value_parser = duration_flag)]
    pub run_for: Option<Duration>,
    /// Seed of every id, name, time and outcome
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// New folder for the private PostgreSQL and its pipeline file, kept afterwards [default: a
    /// temporary folder]
    #[arg(long, value_name = "FOLDER")]
    pub data: Option<PathBuf>,
    /// Port of the API; 0 selects a free port
    #[arg(long, default_value_t = 8090, value_name = "PORT")]
    pub api_port: u16,
    /// Port of /metrics; 0 selects a free port
    #[arg(long, default_value_t = 2112, value_name = "PORT")]
    pub metrics_port: u16,
    /// Builds per second, after the history is written
    #[arg(long, default_value_t = 5.0, value_name = "RATE")]
    pub rate: f64,
    /// Folder with initdb, postgres and pg_ctl [default: search for it]
    #[arg(long, env = "TALLYLINE_PG_BIN", value_name = "FOLDER")]
    pub postgres_bin: Option<PathBuf>,
}
