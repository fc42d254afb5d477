//! The demo, and the simulators by themselves.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use tallyline::cli::{self, Context, EXIT_CODES, Exit, Failure, Global, LogDefaults};
use tallyline_sim::{coderd, demo, tallyman};

/// Show everything at work on a private PostgreSQL with simulated traffic
#[derive(Clone, Debug, Parser)]
#[command(name = "tallyline-demo", version, after_help = EXIT_CODES, args_conflicts_with_subcommands = true)]
struct Line {
    #[command(flatten)]
    global: Global,
    #[command(flatten)]
    demo: demo::Arguments,
    #[command(subcommand)]
    simulator: Option<Simulator>,
}

#[derive(Clone, Debug, Subcommand)]
enum Simulator {
    /// Simulate coderd in an empty PostgreSQL database
    CoderdSim(coderd::Options),
    /// Simulate Tallyman
    TallymanSim(tallyman::Options),
}

fn main() -> ExitCode {
    cli::start(|line: &Line| (&line.global, line.log_defaults()), run)
}

impl Line {
    /// The demo has a status line, so it logs only warnings.
    fn log_defaults(&self) -> LogDefaults {
        match self.simulator {
            None => LogDefaults { level: "warn", slow_statements: false },
            Some(_) => LogDefaults { level: "info", slow_statements: true },
        }
    }
}

async fn run(line: Line, context: Context) -> Result<Exit, Failure> {
    match line.simulator {
        None => return demo::run(line.demo, context).await,
        Some(Simulator::CoderdSim(options)) => {
            coderd::run(options, context.clock, context.stop).await?;
        }
        Some(Simulator::TallymanSim(options)) => {
            tallyman::run(options, context.clock, context.stop).await?;
        }
    }
    Ok(Exit::Success)
}
