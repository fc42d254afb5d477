//! Whether a command uses the databases or a serving process. Both return the same types.

use std::convert::Infallible;
use std::path::PathBuf;

use reqwest::Url;

use super::actor::ActorArguments;
use super::api::{ApiClient, url};
use super::pipeline::quoted;
use super::progress::Progress;
use super::roles::Handles;
use super::{Context, Exit, Failure, PipelineArguments};
use crate::config::Secret;
use crate::operations::{self, Operation, OperationError, Operations, Step};

/// Variable with the token, if no flag names one.
const TOKEN_VARIABLE: &str = "TALLYLINE_API_TOKEN";

/// The target of a command.
#[derive(Clone, Debug, clap::Args)]
pub struct ViaArguments {
    /// Pipeline file, such as pipelines/single.toml
    #[arg(long, value_name = "FILE", required_unless_present = "api", conflicts_with = "api")]
    pipeline: Option<PathBuf>,
    /// Setting that overrides variables and the file, such as collect.poll_seconds=1; may be
    /// repeated
    #[arg(long, value_name = "KEY=VALUE", requires = "pipeline", conflicts_with = "api")]
    set: Vec<String>,
    /// URL of a serving process to use instead of the databases, such as http://127.0.0.1:8090
    #[arg(long, value_name = "URL", value_parser = url)]
    api: Option<Url>,
    /// Token for --api, as env:NAME, file:PATH or exec:COMMAND [default: the variable
    /// TALLYLINE_API_TOKEN]
    #[arg(long, value_name = "SECRET", requires = "api", value_parser = secret)]
    token: Option<Secret>,
}

// The command's help begins with the documentation of the request. So the request is the last
// field, and these types have no documentation.

#[derive(Clone, Debug, clap::Args)]
pub struct Query<R: clap::Args> {
    #[command(flatten)]
    pub via: ViaArguments,
    #[command(flatten)]
    pub request: R,
}

#[derive(Clone, Debug, clap::Args)]
pub struct Change<R: clap::Args> {
    #[command(flatten)]
    pub via: ViaArguments,
    #[command(flatten)]
    pub actor: ActorArguments,
    #[command(flatten)]
    pub request: R,
}

impl<R: Operation + clap::Args> Query<R> {
    pub async fn run(&self, context: &Context) -> Result<R::Answer, Failure> {
        self.via.run(&self.request, &ActorArguments::default(), context).await
    }
}

impl<R: Operation + clap::Args> Change<R> {
    pub async fn run(&self, context: &Context) -> Result<R::Answer, Failure> {
        self.via.run(&self.request, &self.actor, context).await
    }
}

/// The opened target.
pub enum Via {
    /// This process, with its own handles for the ledger, the log and coderd.
    Handles(Box<Handles>),
    /// A serving process.
    Api(ApiClient),
}

impl ViaArguments {
    /// Runs the operation in this process, or sends it to the serving process.
    pub async fn run<R: Operation>(
        &self,
        request: &R,
        actor: &ActorArguments,
        context: &Context,
    ) -> Result<R::Answer, Failure> {
        match self.open(context).await? {
            Via::Handles(handles) => {
                handles
                    .watched(async |operations, progress| {
                        operations.run(request, &actor.actor(), progress, &context.stop).await
                    })
                    .await
            }
            Via::Api(api) => {
                let answer =
                    context.stop.run_until_cancelled(api.ask(request, actor.reason_alone()?)).await;
                answer.unwrap_or_else(|| Err(Failure::interrupted()))
            }
        }
    }

    /// Opens the target. Checks that the ledger is reachable and has this binary's schema; does not
    /// connect to the API yet.
    pub async fn open(&self, context: &Context) -> Result<Via, Failure> {
        let open = async {
            let via = self.prepare(context).await?;
            if let Via::Handles(handles) = &via {
                handles.ledger.reach().await?;
            }
            Ok(via)
        };
        context.stop.run_until_cancelled(open).await.unwrap_or_else(|| Err(Failure::interrupted()))
    }

    /// Resolves the settings or the token, without connecting.
    pub async fn prepare(&self, context: &Context) -> Result<Via, Failure> {
        Ok(match &self.api {
            Some(base) => Via::Api(ApiClient::new(base.clone(), self.token().await?)?),
            None => Via::Handles(Box::new(
                Handles::open(self.pipeline().load()?, context.clock.clone()).await?,
            )),
        })
    }

    /// The same flags for another command, quoted for a shell. Possible secrets are omitted.
    #[must_use]
    pub(super) fn again(&self) -> String {
        match (&self.api, &self.token) {
            (Some(base), Some(token)) => {
                format!("--api {} --token {}", quoted(base.as_str()), quoted(&token.origin()))
            }
            (Some(base), None) => format!("--api {}", quoted(base.as_str())),
            (None, _) => self.pipeline().again(),
        }
    }

    fn pipeline(&self) -> PipelineArguments {
        PipelineArguments {
            pipeline: self.pipeline.clone().unwrap_or_default(),
            set: self.set.clone(),
        }
    }

    async fn token(&self) -> Result<Option<String>, Failure> {
        let (named, secret) = match (&self.token, std::env::var(TOKEN_VARIABLE)) {
            (Some(token), _) if token.is_literal() => {
                let advice = format!(
                    "anyone on this machine can read a command's arguments; or set {TOKEN_VARIABLE}"
                );
                return Err(Failure::of(
                    Exit::Configuration,
                    format!("--token must be env:NAME, file:PATH or exec:COMMAND: {advice}"),
                ));
            }
            (Some(token), _) => ("--token", token.clone()),
            (None, Ok(text)) => (TOKEN_VARIABLE, Secret::new(&text)),
            (None, Err(_)) => return Ok(None),
        };
        let text = secret.resolve().await;
        text.map(Some)
            .map_err(|error| Failure::of(Exit::Configuration, format!("{named}: {error}")))
    }
}

impl Handles {
    /// Runs an operation and shows its progress.
    pub(super) async fn watched<T>(
        &self,
        operation: impl AsyncFnOnce(&Operations, operations::Progress<'_>) -> Result<T, OperationError>,
    ) -> Result<T, Failure> {
        let progress = Progress::default();
        let ended = operation(&self.operations()?, &|Step { doing, items, done, total }| {
            progress.at((doing, items), done, total)
        })
        .await;
        progress.finish();
        ended.map_err(|error| match error {
            OperationError::Log(error) => {
                Failure::from(error).while_doing(format!("the log, {}", self.log.address))
            }
            error => error.into(),
        })
    }
}

fn secret(text: &str) -> Result<Secret, Infallible> {
    Ok(Secret::new(text))
}
