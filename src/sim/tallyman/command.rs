//! `tallyline tallyman-sim`.

use std::net::SocketAddr;
use std::path::PathBuf;

use anyhow::Context as _;
use chrono::{DateTime, TimeDelta, Utc};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::server::{Config, Tallyman};
use super::switches::Switches;
use crate::clock::Clock;

/// Runs a simulated Tallyman. It bills what it is sent, and shows under `/sim/books` what it billed.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// Loopback address to listen on; port 0 takes a free one
    #[arg(long, default_value = "127.0.0.1:8095", value_name = "ADDRESS")]
    pub listen: SocketAddr,
    /// File with one accepted license token per line; without it any license is accepted
    #[arg(long, value_name = "FILE")]
    pub license_keys: Option<PathBuf>,
    /// Accepted deployment id, may be repeated; without it any deployment is accepted
    #[arg(long, value_name = "UUID")]
    pub deployment_id: Vec<Uuid>,
    /// Days for which ids are remembered
    #[arg(long, default_value_t = 34, value_name = "DAYS", value_parser = clap::value_parser!(u32).range(0..=36500))]
    pub remember_days: u32,
    /// File of JSON lines in which the books survive the process; an existing one is continued
    #[arg(long, value_name = "FILE")]
    pub books: Option<PathBuf>,
    /// File with the switches to start with, in the JSON of `PUT /sim/switches`
    #[arg(long, value_name = "FILE")]
    pub switches: Option<PathBuf>,
    /// The simulator's time at its start (RFC 3339); it goes on from there
    #[arg(long, value_name = "TIME")]
    pub start_at: Option<DateTime<Utc>>,
}

/// Serves until `stop`. The one line on stdout is the URL of the ingest endpoint.
///
/// # Errors
/// When a file cannot be read, the address cannot be listened on, or serving fails.
pub async fn run(options: Options, clock: Clock, stop: CancellationToken) -> anyhow::Result<()> {
    let clock = match options.start_at {
        Some(at) => Clock::System { offset: at - Clock::system().now() },
        None => clock,
    };
    let tallyman = Tallyman::start(config(options)?, clock, stop).await?;
    println!("{}", tallyman.ingest_url());
    tracing::info!(address = %tallyman.addr, "simulated Tallyman listens");
    tallyman.stopped().await
}

fn config(options: Options) -> anyhow::Result<Config> {
    let read = |path: PathBuf| std::fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()));
    let license_keys = match options.license_keys {
        Some(path) => read(path)?.lines().map(str::trim).filter(|line| !line.is_empty()).map(str::to_owned).collect(),
        None => Vec::new(),
    };
    let switches = match options.switches {
        Some(path) => serde_json::from_str(&read(path)?).context("reading the switches")?,
        None => Switches::default(),
    };
    Ok(Config {
        listen: options.listen,
        license_keys,
        deployment_ids: options.deployment_id,
        remember: TimeDelta::days(i64::from(options.remember_days)),
        books: options.books,
        switches,
    })
}
