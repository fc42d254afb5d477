//! Two listeners and their loops.

use std::net::SocketAddr;
use std::sync::Arc;

use axum::handler::Handler as _;
use axum::middleware::from_fn_with_state;
use axum::{Extension, Router};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tower_http::compression::CompressionLayer;
use tower_http::compression::predicate::{DefaultPredicate, Predicate as _, SizeAbove};
use tracing::warn;
use utoipa_axum::router::OpenApiRouter;

use super::connections::answer_on;
use super::guard::{DEADLINE, Guard, guard};
use super::host::Hosts;
use super::metrics_lease::MetricsLease;
use super::plans::Executions;
use super::probe::Probe;
use super::rejects::RejectsTelemetry;
use super::route::Route;
use super::sources::KnownSources;
use super::telemetry::ApiTelemetry;
use super::tokens::Needs;
use super::{Api, ServeError, ServeSettings, Serving, answer, document, paths};

/// An answer of up to this many bytes is not compressed: it fits in one packet with its header, so
/// compression costs time and saves none.
const ONE_PACKET: u16 = 1024;

/// Both bound listeners. Requests wait until [`Server::run`].
pub struct Server {
    api: TcpListener,
    metrics: TcpListener,
    serving: Arc<Serving>,
}

impl Server {
    /// Binds both listeners; port 0 takes a free port.
    pub async fn bind(settings: ServeSettings, api: Api) -> Result<Self, ServeError> {
        settings.check()?;
        let listeners = (
            listen("serve.api_listen", settings.api_listen).await?,
            listen("serve.metrics_listen", settings.metrics_listen).await?,
        );
        let (telemetry, rejects) = (
            ApiTelemetry::register(&api.own.registry)?,
            RejectsTelemetry::register(&api.own.registry)?,
        );
        let serving = Serving {
            probe: Probe::new(api.own.clone()),
            api,
            settings,
            known: KnownSources::default(),
            lease: MetricsLease::default(),
            telemetry,
            rejects,
            executions: Executions::default(),
            stop: CancellationToken::new(),
            counting: tokio::sync::Mutex::default(),
        };
        Ok(Self { api: listeners.0, metrics: listeners.1, serving: Arc::new(serving) })
    }

    pub fn api_address(&self) -> std::io::Result<SocketAddr> {
        self.api.local_addr()
    }

    pub fn metrics_address(&self) -> std::io::Result<SocketAddr> {
        self.metrics.local_addr()
    }

    /// Answers until `stop`. Then finishes open requests within the grace period, and releases the
    /// lease to show the domain series.
    pub async fn run(self, stop: &CancellationToken) {
        let serving = &self.serving;
        let settings = &serving.settings;
        let answered = CancellationToken::new();
        let listeners = async {
            let (api, metrics) = (router(serving, paths::api()), router(serving, paths::metrics()));
            let limits = settings.limits;
            tokio::select! {
                _ = async { tokio::join!(answer_on(self.api, api, limits, stop), answer_on(self.metrics, metrics, limits, stop)) } => {}
                () = async { stop.cancelled().await; serving.stop.cancel(); tokio::time::sleep(settings.grace).await } => {
                    warn!(grace = ?settings.grace, "open requests are dropped");
                }
            }
            answered.cancel();
        };
        tokio::join!(
            listeners,
            serving.known.follow(serving, &answered),
            serving.lease.keep(serving, &answered)
        );
    }
}

pub(super) async fn listen(
    key: &'static str,
    address: SocketAddr,
) -> Result<TcpListener, ServeError> {
    TcpListener::bind(address).await.map_err(|source| ServeError::Listen { key, address, source })
}

/// The router of a listener. If tokens are configured, a caller needs one to learn that a path is
/// unknown.
fn router(serving: &Arc<Serving>, routes: Vec<Route>) -> Router {
    let guarded =
        from_fn_with_state(Guard::new(serving, Needs::AnyToken, Hosts::Named, DEADLINE), guard);
    let router =
        routes.into_iter().fold(OpenApiRouter::with_openapi(document::empty()), |router, route| {
            route.mount(router, serving)
        });
    let (router, document) = router.split_for_parts();
    router
        .layer(Extension(Arc::new(document)))
        .fallback(answer::unknown_path.layer(guarded.clone()))
        .method_not_allowed_fallback(answer::unknown_method.layer(guarded))
        .layer(
            CompressionLayer::new()
                .compress_when(DefaultPredicate::new().and(SizeAbove::new(ONE_PACKET))),
        )
        .with_state(Arc::clone(serving))
}
