//! `tallyline run`

use clap::builder::PossibleValuesParser;
use tracing::info;

use super::roles::{self, Handles};
use super::{Context, Exit, Failure, PipelineArguments};
use crate::config::Pipeline;

/// Run the roles of a pipeline file until stopped.
#[derive(Clone, Debug, clap::Args)]
pub struct Arguments {
    #[command(flatten)]
    pipeline: PipelineArguments,
    /// A role of this process; overrides the file; may be repeated
    #[arg(long, value_name = "ROLE", value_parser = PossibleValuesParser::new(["collect", "consume", "publish", "serve"]))]
    role: Vec<String>,
}

impl Arguments {
    /// The settings with the roles of the flags.
    fn load(mut self) -> Result<Pipeline, Failure> {
        self.role.sort_unstable();
        self.role.dedup();
        if !self.role.is_empty() {
            self.pipeline.set.push(format!("roles={}", self.role.join(",")));
        }
        self.pipeline.load()
    }
}

pub(super) async fn run(arguments: Arguments, context: Context) -> Result<Exit, Failure> {
    let handles = Handles::open(arguments.load()?, context.clock).await?;
    let names: Vec<&str> = handles.pipeline.roles.iter().map(|role| role.name()).collect();
    info!(
        roles = names.join(","),
        ledger = handles.ledger.address,
        log = handles.log.address,
        "starting"
    );
    roles::run(
        handles,
        &context.stop,
        |at| info!(api = %at.api, metrics = %at.metrics, "listening"),
    )
    .await?;
    Ok(Exit::Success)
}
