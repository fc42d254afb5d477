//! The role `serve`: both projections and both listeners.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use prometheus::Registry;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::{Handles, Listening, Parts};
use crate::api::{Addresses, Api, OwnServer, ProcessHandles, ServeSettings, Server, Token, Tokens};
use crate::cause::LastingFault;
use crate::cli::{Exit, Failure, connect};
use crate::config::{Role, Serve};
use crate::projection::{Projection, ProjectionError, ProjectionSettings};
use crate::stages::{LicensesState, MetricsState};

/// Interval to reread the tokens, so that a token can change without a restart.
const TOKENS_AGAIN: Duration = Duration::from_secs(60);

/// Bound listeners, and their projections.
pub(super) struct Bound {
    server: Server,
    metrics: Projection<MetricsState>,
    licenses: Projection<LicensesState>,
    handles: Handles,
    tokens: Tokens,
}

/// Binds the listeners first, so that health checks are answered from the start.
pub(super) async fn bind(
    handles: &Handles,
    registry: &Registry,
    parts: &Parts,
) -> Result<Bound, Failure> {
    let settings = settings(handles).await?;
    let tokens = settings.tokens.clone();
    let metrics = Projection::new(handles.ledger.ledger.clone(), ProjectionSettings::default());
    let licenses = Projection::new(handles.ledger.ledger.clone(), ProjectionSettings::default());
    let api = Api {
        own: own(handles, registry, parts),
        operations: handles.operations()?,
        clock: handles.clock.clone(),
        metrics: metrics.view(),
        licenses: licenses.view(),
    };
    let server = Server::bind(settings, api)
        .await
        .map_err(|error| Failure::new(Exit::Configuration, error))?;
    Ok(Bound { server, metrics, licenses, handles: handles.clone(), tokens })
}

/// Binds the listener of a process without the role `serve`.
pub(super) async fn bind_own(
    handles: &Handles,
    registry: &Registry,
    parts: &Parts,
    address: SocketAddr,
) -> Result<OwnServer, Failure> {
    OwnServer::bind(
        address,
        handles.pipeline.serve.host_names.clone(),
        own(handles, registry, parts),
    )
    .await
    .map_err(|error| Failure::new(Exit::Configuration, error))
}

fn own(handles: &Handles, registry: &Registry, parts: &Parts) -> ProcessHandles {
    ProcessHandles {
        ledger: handles.ledger.ledger.clone(),
        log: handles.log.log.clone(),
        addresses: Addresses {
            ledger: format!("PostgreSQL at {}", handles.ledger.address),
            log: handles.log.address.clone(),
        },
        registry: registry.clone(),
        stopped_partitions: handles.has(Role::Consume).then(|| Arc::clone(&parts.consumer.stopped)),
        coderd: handles.coderd.clone().filter(|_| handles.has(Role::Collect)),
        publisher: handles.has(Role::Publish).then(|| parts.publishing.clone()),
        paused: parts.paused.clone(),
    }
}

async fn settings(handles: &Handles) -> Result<ServeSettings, Failure> {
    let serve = &handles.pipeline.serve;
    Ok(ServeSettings {
        api_listen: serve.api_listen,
        metrics_listen: serve.metrics_listen,
        tokens: tokens(serve).await?.into(),
        host_names: serve.host_names.clone(),
        source: handles.pipeline.source.deployment_id,
        ..ServeSettings::default()
    })
}

/// The current tokens.
async fn tokens(serve: &Serve) -> Result<Vec<Token>, Failure> {
    let mut tokens: Vec<(&str, Token)> = Vec::new();
    for (name, setting) in &serve.tokens {
        let text = connect::secret(&format!("serve.tokens.{name}"), &setting.secret).await?;
        let token = Token::new(name, setting.scope, &text);
        if let Some((other, _)) = tokens.iter().find(|(_, other)| other.has_text_of(&token)) {
            let problem = format!(
                "serve.tokens.{other} and serve.tokens.{name} have the same secret: an act needs one actor; give each token its own secret"
            );
            return Err(Failure::of(Exit::Configuration, problem));
        }
        tokens.push((name, token));
    }
    Ok(tokens.into_iter().map(|(_, token)| token).collect())
}

/// Rereads the tokens until `stop`. The previous tokens remain valid if one cannot be resolved.
async fn follow_tokens(serve: &Serve, held: &Tokens, every: Duration, stop: &CancellationToken) {
    let mut fault = LastingFault::default();
    while stop.run_until_cancelled(tokio::time::sleep(every)).await.is_some() {
        let Some(read) = stop.run_until_cancelled(tokens(serve)).await else { return };
        match read {
            Ok(tokens) => {
                fault.end();
                if held.replace(tokens) {
                    info!("tokens of the API have changed");
                }
            }
            Err(failure) if fault.is_new(&failure.text()) => {
                warn!("{}; the previous tokens remain valid", failure.text())
            }
            Err(_) => {}
        }
    }
}

impl Bound {
    /// The addresses, with the assigned ports for port 0.
    pub fn listening(&self) -> Result<Listening, Failure> {
        let address = |address: std::io::Result<_>| {
            address.map_err(|error| Failure::new(Exit::Internal, error))
        };
        Ok(Listening {
            api: address(self.server.api_address())?,
            metrics: address(self.server.metrics_address())?,
        })
    }

    /// Serves until `stop`. A projection that finds a broken invariant of the ledger ends the
    /// process.
    pub async fn run(self, stop: CancellationToken) -> Result<(), Failure> {
        let Bound { server, metrics, licenses, handles, tokens } = self;
        let folds = async { tokio::try_join!(metrics.run(&stop), licenses.run(&stop)).map(|_| ()) };
        let serving = async {
            let tokens = follow_tokens(&handles.pipeline.serve, &tokens, TOKENS_AGAIN, &stop);
            tokio::join!(server.run(&stop), tokens);
            Ok::<(), ProjectionError>(())
        };
        tokio::try_join!(folds, serving)
            .map(|_| ())
            .map_err(|error| Failure::new(Exit::Internal, error))
    }
}

#[cfg(test)]
mod tests {
    use tempfile::TempDir;

    use super::*;
    use crate::config::{Scope, Secret, TokenSetting};

    async fn until(held: &Tokens, text: &str) {
        let wanted = [Token::new("oncall", Scope::Admin, text)];
        let looks = async {
            while held.now()[..] != wanted {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(30), looks).await.expect("read in time");
    }

    #[tokio::test]
    async fn a_token_is_changed_without_a_restart_and_stays_good_while_its_file_is_gone() {
        let folder = TempDir::new().unwrap();
        let file = folder.path().join("oncall-token");
        std::fs::write(&file, "one\n").unwrap();
        // each reading adds a line
        let (script, readings) = (folder.path().join("read"), folder.path().join("readings"));
        let words = format!(
            "cat {}; found=$?; echo >> {}; exit $found",
            file.display(),
            readings.display()
        );
        std::fs::write(&script, words).unwrap();
        let setting = TokenSetting {
            scope: Scope::Admin,
            secret: Secret::new(&format!("exec:sh {}", script.display())),
        };
        let (listen, tokens_set) =
            (SocketAddr::from(([127, 0, 0, 1], 0)), [("oncall".to_owned(), setting)].into());
        let serve = Serve {
            api_listen: listen,
            metrics_listen: listen,
            tokens: tokens_set,
            host_names: Vec::new(),
        };
        let (held, stop) = (Tokens::from(tokens(&serve).await.unwrap()), CancellationToken::new());
        let following = {
            let (serve, held, stop) = (serve.clone(), held.clone(), stop.clone());
            tokio::spawn(async move {
                follow_tokens(&serve, &held, Duration::from_millis(1), &stop).await
            })
        };
        std::fs::write(&file, "two\n").unwrap();
        until(&held, "two").await;
        std::fs::remove_file(&file).unwrap();
        let read = || std::fs::read_to_string(&readings).unwrap().lines().count();
        let before = read();
        let twice_more = async {
            // the first reading may have begun before the file was removed
            while read() < before + 2 {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(30), twice_more).await.expect("read in time");
        until(&held, "two").await;
        std::fs::write(&file, "three\n").unwrap();
        until(&held, "three").await;
        stop.cancel();
        following.await.unwrap();
    }
}
