//! Telemetry and health checks of a process without the role `serve`. It shows no domain series and
//! has no API.

use std::net::SocketAddr;
use std::sync::Arc;

use axum::Router;
use axum::extract::{Request, State};
use axum::http::HeaderMap;
use axum::http::header::CONTENT_TYPE;
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tower_http::compression::CompressionLayer;

use super::answer::Problem;
use super::connections::{Limits, answer_on};
use super::host::{self, Hosts};
use super::metrics::accepted;
use super::probe::Probe;
use super::serve::listen;
use super::{ProcessHandles, ServeError, answer, ready};
use crate::metrics::{Format, encode};

/// The setting with the listener's address.
const KEY: &str = "telemetry.listen";

/// One bound listener. Requests wait until [`OwnServer::run`].
pub struct OwnServer {
    listener: TcpListener,
    host_names: Arc<[String]>,
    probe: Arc<Probe>,
}

impl OwnServer {
    /// Binds the listener; port 0 takes a free port.
    ///
    /// # Errors
    /// [`ServeError`], also for an address beyond loopback.
    pub async fn bind(
        address: SocketAddr,
        host_names: Vec<String>,
        own: ProcessHandles,
    ) -> Result<Self, ServeError> {
        if !address.ip().is_loopback() {
            return Err(ServeError::NoTls { key: KEY, address });
        }
        Ok(Self {
            listener: listen(KEY, address).await?,
            host_names: host_names.into(),
            probe: Arc::new(Probe::new(own)),
        })
    }

    pub fn address(&self) -> std::io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    pub async fn run(self, stop: &CancellationToken) {
        let router = Router::new()
            .route("/metrics", get(metrics))
            .route("/healthz", get(ready::healthz))
            .route("/readyz", get(ready::own_readyz))
            .fallback(answer::unknown_path)
            .method_not_allowed_fallback(answer::unknown_method)
            .layer(from_fn_with_state(self.host_names, admitted))
            .layer(CompressionLayer::new())
            .with_state(self.probe);
        answer_on(self.listener, router, Limits::default(), stop).await;
    }
}

async fn admitted(State(names): State<Arc<[String]>>, request: Request, next: Next) -> Response {
    match host::admit(request.headers(), &names, Hosts::OrAddress) {
        Ok(()) => next.run(request).await,
        Err(problem) => problem.into_response(),
    }
}

async fn metrics(State(probe): State<Arc<Probe>>, headers: HeaderMap) -> Result<Response, Problem> {
    let encoded = encode(&probe.own.registry.gather(), Format::for_accept(&accepted(&headers)));
    let (content_type, body) = encoded.map_err(|cause| Problem::internal(&cause))?;
    Ok(([(CONTENT_TYPE, content_type)], body).into_response())
}
