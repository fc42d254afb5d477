//! The role `serve`: both folds and both listeners.

use prometheus::Registry;
use tokio_util::sync::CancellationToken;

use super::{Listening, Looked, Publishing, Site};
use crate::api::{Addresses, Api, ServeSettings, Server, Token};
use crate::cli::{Exit, Failure, connect};
use crate::config::Role;
use crate::consumer::Consumer;
use crate::projection::{Projection, ProjectionError, ProjectionSettings};
use crate::stages::{LicensesState, MetricsState};

/// Listeners that are bound, and the folds that they will show.
pub(super) struct Bound {
    server: Server,
    metrics: Projection<MetricsState>,
    licenses: Projection<LicensesState>,
}

/// Binds the listeners, so that health is answered from the first moment on.
pub(super) async fn bind(
    site: &Site,
    registry: &Registry,
    consumer: &Consumer,
    publishing: &Publishing,
    looked: &Looked,
) -> Result<Bound, Failure> {
    let settings = settings(site).await?;
    let metrics = Projection::new(site.ledger.ledger.clone(), ProjectionSettings::default());
    let licenses = Projection::new(site.ledger.ledger.clone(), ProjectionSettings::default());
    let mut api = Api {
        ledger: site.ledger.ledger.clone(),
        log: site.log.log.clone(),
        addresses: Addresses { ledger: format!("PostgreSQL at {}", site.ledger.address), log: site.log.address.clone() },
        clock: site.clock.clone(),
        metrics: metrics.view(),
        licenses: licenses.view(),
        registry: registry.clone(),
        stopped_partitions: None,
        coderd: site.coderd.clone().filter(|_| site.has(Role::Collect)),
        looked: looked.clone(),
        publisher: site.has(Role::Publish).then(|| publishing.clone()),
    };
    if site.has(Role::Consume) {
        api = api.with_consumer(consumer);
    }
    let server = Server::bind(settings, api).await.map_err(|error| Failure::new(Exit::Configuration, error))?;
    Ok(Bound { server, metrics, licenses })
}

async fn settings(site: &Site) -> Result<ServeSettings, Failure> {
    let serve = &site.pipeline.serve;
    let token = match &serve.token {
        Some(token) => Some(Token::new(&connect::secret("serve.token", token).await?)),
        None => None,
    };
    let rules = site.pipeline.license.rules.parse();
    Ok(ServeSettings {
        api_listen: serve.api_listen,
        metrics_listen: serve.metrics_listen,
        token,
        source: site.pipeline.source.deployment_id,
        rules: rules.map_err(|_| Failure::of(Exit::Configuration, "license.rules names no rule set"))?,
        ..ServeSettings::default()
    })
}

impl Bound {
    /// The addresses, also where port 0 asked for free ones.
    pub fn listening(&self) -> Result<Listening, Failure> {
        let address = |address: std::io::Result<_>| address.map_err(|error| Failure::new(Exit::Internal, error));
        Ok(Listening { api: address(self.server.api_address())?, metrics: address(self.server.metrics_address())? })
    }

    /// Serves until `stop`. A fold that finds a broken promise of the ledger ends the process.
    pub async fn run(self, stop: CancellationToken) -> Result<(), Failure> {
        let Bound { server, metrics, licenses } = self;
        let folds = async { tokio::try_join!(metrics.run(&stop), licenses.run(&stop)).map(|_| ()) };
        let serving = async {
            server.run(&stop).await;
            Ok::<(), ProjectionError>(())
        };
        tokio::try_join!(folds, serving).map(|_| ()).map_err(|error| Failure::new(Exit::Internal, error))
    }
}
