//! Measures Tallyline, each row against its limit in the same run. docs/performance.md has the
//! table, its figures and how to repeat them.

mod audit;
mod beside;
mod chain;
mod coderd;
mod consuming;
mod drain;
mod entitlements;
mod events;
mod export;
mod fold;
mod history;
mod http;
mod intake;
mod latency;
mod limit;
mod live;
mod process;
mod replay;
mod report;
mod scrape;
mod servers;
mod source;
mod takeover;

use std::path::PathBuf;

use anyhow::{Result, ensure};
use clap::{Parser, ValueEnum};
use serde::{Deserialize, Serialize};
use tokio::sync::Mutex;

use history::History;
use report::{Line, Report, Surroundings};
use servers::Servers;

/// Run it by `scripts/bench`.
#[derive(Parser)]
struct Options {
    /// The rows to measure, separated by commas [default: all]
    #[arg(long, value_enum, value_delimiter = ',')]
    rows: Vec<Row>,
    /// Small sizes: shows that a row works, not how fast it is
    #[arg(long)]
    quick: bool,
    /// Also write the table to this file, as JSON
    #[arg(long)]
    json: Option<PathBuf>,
    /// A task of a row, in a process of its own.
    #[arg(long, hide = true)]
    task: Option<String>,
    /// `cargo bench` passes it.
    #[arg(long, hide = true)]
    bench: bool,
}

/// The rows, in the order in which they run. Coderd, audit and fold share one history.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Row {
    Export,
    Drain,
    Coderd,
    Audit,
    Fold,
    Entitlements,
    Intake,
    Replay,
    Chain,
    Metrics,
    Latency,
    Takeover,
}

/// What a row runs in a process of its own, to separate its memory and its processor time.
#[derive(Serialize, Deserialize)]
enum Task {
    Consume(consuming::Consuming),
    Fold(fold::Folding),
    Bare(http::Bare),
}

/// What the rows of one run share.
struct Suite {
    servers: Servers,
    quick: bool,
    history: Mutex<Option<History>>,
}

impl Suite {
    /// The full size, or the one of a quick run.
    fn size<T>(&self, full: T, quick: T) -> T {
        if self.quick { quick } else { full }
    }

    async fn measure(&self, row: Row) -> Result<Vec<Line>> {
        match row {
            Row::Export => export::measure(self).await,
            Row::Drain => drain::measure(self).await,
            Row::Coderd => source::measure(self).await,
            Row::Audit => audit::measure(self).await,
            Row::Fold => fold::measure(self).await,
            Row::Entitlements => entitlements::measure(self).await,
            Row::Intake => intake::measure(self).await,
            Row::Replay => replay::measure(self).await,
            Row::Chain => chain::measure(self).await,
            Row::Metrics => scrape::measure(self).await,
            Row::Latency => latency::measure(self).await,
            Row::Takeover => takeover::measure(self).await,
        }
    }
}

fn main() -> Result<()> {
    let options = Options::parse();
    let runtime = tokio::runtime::Runtime::new()?;
    let Some(task) = &options.task else { return runtime.block_on(run(&options)) };
    match serde_json::from_str(task)? {
        Task::Consume(consuming) => runtime.block_on(consuming::consume(&consuming)),
        Task::Fold(folding) => runtime.block_on(fold::fold(&folding)),
        Task::Bare(bare) => runtime.block_on(http::serve(&bare)),
    }
}

async fn run(options: &Options) -> Result<()> {
    let servers = Servers::from_environment()?;
    let surroundings = Surroundings::read(&servers.postgres, options.quick).await?;
    let suite = Suite { servers, quick: options.quick, history: Mutex::new(None) };
    let mut report = Report { surroundings, lines: Vec::new(), failures: Vec::new() };
    let all = Row::value_variants();
    for row in all.iter().filter(|row| options.rows.is_empty() || options.rows.contains(row)) {
        let begun = std::time::Instant::now();
        match suite.measure(*row).await {
            Ok(lines) => {
                lines.iter().for_each(report::announce);
                report.lines.extend(lines);
            }
            // the other rows are measured
            Err(error) => {
                eprintln!("{row:?}: not measured: {error:#}");
                report.failures.push((format!("{row:?}").to_lowercase(), format!("{error:#}")));
            }
        }
        eprintln!("{row:?}: took {:.0} s", begun.elapsed().as_secs_f64());
    }
    println!("\n{}", report.table());
    if let Some(path) = &options.json {
        report.write(path)?;
    }
    ensure!(report.failures.is_empty(), "{} rows were not measured", report.failures.len());
    Ok(())
}
