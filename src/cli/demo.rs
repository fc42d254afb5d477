//! `tallyline demo`

use std::path::PathBuf;
use std::time::Duration;

use super::{Context, Exit, Failure, instant};

/// Show everything working on a private PostgreSQL and simulated traffic.
#[derive(Clone, Debug, clap::Args)]
pub struct Arguments {
    /// End after this time with a summary and an audit, such as 20s or 5m
    #[arg(long = "for", value_name = "TIME", value_parser = instant::span)]
    pub run_for: Option<Duration>,
    /// Decides every id, name, time and outcome
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Folder for the private PostgreSQL; without it a temporary one
    #[arg(long, value_name = "FOLDER")]
    pub data: Option<PathBuf>,
    /// Port of the API; 0 takes a free one
    #[arg(long, default_value_t = 8090, value_name = "PORT")]
    pub api_port: u16,
    /// Port of /metrics; 0 takes a free one
    #[arg(long, default_value_t = 2112, value_name = "PORT")]
    pub metrics_port: u16,
}

pub(super) async fn run(_arguments: Arguments, _context: Context) -> Result<Exit, Failure> {
    Err(Failure::of(Exit::Internal, "the demo is not built yet"))
}
