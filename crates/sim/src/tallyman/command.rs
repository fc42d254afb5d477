//! The options of the simulated Tallyman, and its run.

use std::net::SocketAddr;
use std::path::PathBuf;

use anyhow::Context as _;
use chrono::{DateTime, TimeDelta, Utc};
use tallyline::clock::Clock;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::server::{Config, Tallyman};
use super::switches::Switches;

/// Runs a simulated Tallyman. It bills the events that it receives, and shows its bills under
/// `/sim/books`.
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
    /// File of JSON lines that keeps the books beyond the process; an existing one is continued
    #[arg(long, value_name = "FILE")]
    pub books: Option<PathBuf>,
    /// File with the initial switches, in the JSON of `PUT /sim/switches`
    #[arg(long, value_name = "FILE")]
    pub switches: Option<PathBuf>,
    /// The simulator's time at its start (RFC 3339); its clock runs from there
    #[arg(long, value_name = "TIME")]
    pub start_at: Option<DateTime<Utc>>,
}

/// Serves until `stop`. The one line on stdout is the URL of the ingest endpoint.
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
    let read = |path: PathBuf| {
        std::fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))
    };
    let license_keys = match options.license_keys {
        Some(path) => read(path)?
            .lines()
            .map(str::trim)
            .filter(|line| !line.is_empty())
            .map(str::to_owned)
            .collect(),
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

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser as _;

    #[derive(clap::Parser)]
    struct Command {
        #[command(flatten)]
        options: Options,
    }

    fn options(arguments: &[&str]) -> Result<Options, clap::Error> {
        Command::try_parse_from([&["tallyman-sim"], arguments].concat())
            .map(|command| command.options)
    }

    #[test]
    fn without_options_it_listens_on_loopback_and_remembers_for_34_days() {
        let config = config(options(&[]).expect("valid")).expect("a config");
        assert_eq!(
            (config.listen.to_string(), config.remember),
            ("127.0.0.1:8095".to_owned(), TimeDelta::days(34))
        );
        assert!(
            config.license_keys.is_empty()
                && config.deployment_ids.is_empty()
                && config.books.is_none()
        );
    }

    #[test]
    fn licenses_and_switches_come_from_files() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = |name: &str, text: &str| {
            let path = folder.path().join(name);
            std::fs::write(&path, text).expect("written");
            path.to_str().expect("UTF-8").to_owned()
        };
        let licenses = file("licenses", "one.two.three\n\n  four.five.six\n");
        let switches = file("switches", r#"{"latency_ms":5}"#);
        let valid = options(&[
            "--license-keys",
            &licenses,
            "--switches",
            &switches,
            "--start-at",
            "2025-08-01T00:00:00Z",
        ]);
        let config = config(valid.expect("valid")).expect("a config");
        assert_eq!(config.license_keys, ["one.two.three", "four.five.six"]);
        assert_eq!(config.switches, Switches { latency_ms: 5, ..Switches::default() });

        let wrong = file("wrong", r#"{"latency":5}"#);
        assert!(super::config(options(&["--switches", &wrong]).expect("valid")).is_err());
        assert!(
            options(&["--remember-days", "-1"]).is_err()
                && options(&["--deployment-id", "x"]).is_err()
        );
    }
}
