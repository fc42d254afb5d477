//! `tallyline run`

use clap::ValueEnum;

use tracing::info;

use super::roles::{self, Site};
use super::{Context, Exit, Failure, PipelineArguments};
use crate::config::{Pipeline, Role};

/// Run the roles that a pipeline file names, until stopped.
#[derive(Clone, Debug, clap::Args)]
pub struct Arguments {
    #[command(flatten)]
    pipeline: PipelineArguments,
    /// A role of this process, over the file's; may be repeated
    #[arg(long, value_enum, value_name = "ROLE")]
    role: Vec<RoleArgument>,
}

/// A role as a flag.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum RoleArgument {
    Collect,
    Consume,
    Publish,
    Serve,
}

impl Arguments {
    /// The settings, with the roles of the flags.
    fn load(mut self) -> Result<Pipeline, Failure> {
        let mut roles: Vec<&str> = self.role.iter().map(|role| role.role().name()).collect();
        roles.dedup();
        if !roles.is_empty() {
            self.pipeline.set.push(format!("roles={}", roles.join(",")));
        }
        self.pipeline.load()
    }
}

impl RoleArgument {
    fn role(self) -> Role {
        match self {
            RoleArgument::Collect => Role::Collect,
            RoleArgument::Consume => Role::Consume,
            RoleArgument::Publish => Role::Publish,
            RoleArgument::Serve => Role::Serve,
        }
    }
}

pub(super) async fn run(arguments: Arguments, context: Context) -> Result<Exit, Failure> {
    let site = Site::open(arguments.load()?, context.clock).await?;
    let names: Vec<&str> = site.pipeline.roles.iter().map(|role| role.name()).collect();
    info!(roles = names.join(","), ledger = site.ledger.address, log = site.log.address, "starting");
    roles::run(site, &context.stop, |at| info!(api = %at.api, metrics = %at.metrics, "listening")).await?;
    Ok(Exit::Success)
}
