//! The simulated Tallyman as a running server with its control API.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use anyhow::{Context as _, ensure};
use axum::body::Bytes;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse as _, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use chrono::TimeDelta;
use tallyline::clock::Clock;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::books::{Bookkeeping, Books};
use super::connection::{CuttableListener, Scissors};
use super::ingest::{failure, ingest};
use super::state::{ServerState, Shared};
use super::switches::{Running, Switches};

/// The configuration of a simulated Tallyman.
#[derive(Clone)]
pub struct Config {
    /// A loopback address: the control API has no other protection. Port 0 takes a free one.
    pub listen: SocketAddr,
    /// The accepted license tokens; with none, any.
    pub license_keys: Vec<String>,
    /// The accepted deployments; with none, any.
    pub deployment_ids: Vec<Uuid>,
    /// How long an id is remembered, by the simulator's clock.
    pub remember: TimeDelta,
    /// A file of JSON lines that keeps the books beyond the process; an existing one is continued.
    pub books: Option<PathBuf>,
    /// The initial misbehaviour.
    pub switches: Switches,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            license_keys: Vec::new(),
            deployment_ids: Vec::new(),
            remember: TimeDelta::days(34),
            books: None,
            switches: Switches::default(),
        }
    }
}

/// A running simulated Tallyman.
pub struct Tallyman {
    /// Its address.
    pub addr: SocketAddr,
    shared: Arc<Shared>,
    serving: JoinHandle<std::io::Result<()>>,
}

impl Tallyman {
    /// Starts to listen and serves until `stop`.
    pub async fn start(
        config: Config,
        clock: Clock,
        stop: CancellationToken,
    ) -> anyhow::Result<Self> {
        ensure!(config.listen.ip().is_loopback(), "{}: not a loopback address", config.listen);
        if let Some(mistake) = config.switches.mistake() {
            anyhow::bail!("switches: {mistake}");
        }
        let books = Bookkeeping::open(config.remember, config.books.as_deref())?;
        let listener = TcpListener::bind(config.listen)
            .await
            .with_context(|| format!("listening on {}", config.listen))?;
        let addr = listener.local_addr()?;
        let shared = Arc::new(Shared {
            license_keys: config.license_keys,
            deployment_ids: config.deployment_ids,
            clock,
            stop: stop.clone(),
            state: Mutex::new(ServerState { books, running: Running::new(config.switches) }),
        });
        let routes = routes(Arc::clone(&shared)).into_make_service_with_connect_info::<Scissors>();
        let serve = axum::serve(CuttableListener(listener), routes)
            .with_graceful_shutdown(stop.cancelled_owned());
        Ok(Tallyman { addr, shared, serving: tokio::spawn(serve.into_future()) })
    }

    /// The URL of the ingest endpoint.
    #[must_use]
    pub fn ingest_url(&self) -> String {
        format!("http://{}/api/v1/events/ingest", self.addr)
    }

    #[must_use]
    pub fn books(&self) -> Books {
        self.shared.state().books.books()
    }

    /// Misbehaves from now on by `switches`; all counts restart.
    pub fn set_switches(&self, switches: Switches) -> anyhow::Result<()> {
        self.shared.set_switches(switches).map_err(anyhow::Error::msg)
    }

    /// Waits until the server has ended after its stop.
    pub async fn stopped(self) -> anyhow::Result<()> {
        self.serving.await?.context("serving the simulated Tallyman")
    }
}

fn routes(shared: Arc<Shared>) -> Router {
    Router::new()
        .route("/api/v1/events/ingest", post(ingest))
        .route("/sim/books", get(show_books))
        .route("/sim/switches", get(show_switches).put(put_switches))
        .fallback(|| async { failure(StatusCode::NOT_FOUND, "not found") })
        .method_not_allowed_fallback(|| async {
            failure(StatusCode::METHOD_NOT_ALLOWED, "method not allowed")
        })
        .with_state(shared)
}

async fn show_books(State(shared): State<Arc<Shared>>) -> Json<Books> {
    Json(shared.state().books.books())
}

async fn show_switches(State(shared): State<Arc<Shared>>) -> Json<Switches> {
    Json(shared.state().running.switches().clone())
}

async fn put_switches(State(shared): State<Arc<Shared>>, body: Bytes) -> Response {
    let set = serde_json::from_slice(&body)
        .map_err(|error| error.to_string())
        .and_then(|switches| shared.set_switches(switches));
    match set {
        Ok(()) => StatusCode::NO_CONTENT.into_response(),
        Err(message) => failure(StatusCode::BAD_REQUEST, message),
    }
}
