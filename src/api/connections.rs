//! Limits of connections: their number, and the time for a request's header.

use std::pin::pin;
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1::Builder;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

/// Pause before a retry after a failed accept, mostly for lack of file descriptors.
const RETRY_PAUSE: Duration = Duration::from_secs(1);

/// Limits of one listener.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Maximum open connections. Further connections wait until one ends.
    pub connections: usize,
    /// Time from the opening of a connection, or from its last answer, to the end of the next
    /// header. Then it is closed, idle or not.
    pub header: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self { connections: 512, header: Duration::from_secs(30) }
    }
}

/// Answers until `stop`, then finishes the open requests. Dropping it drops them.
pub(super) async fn answer_on(
    listener: TcpListener,
    router: Router,
    limits: Limits,
    stop: &CancellationToken,
) {
    info!(address = ?listener.local_addr().ok(), "listening");
    let mut http = Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(limits.header);
    let mut open = JoinSet::new();
    while !stop.is_cancelled() {
        tokio::select! {
            () = stop.cancelled() => {}
            Some(_) = open.join_next() => {}
            taken = listener.accept(), if open.len() < limits.connections => match taken {
                Ok((stream, _)) => {
                    open.spawn(answer(http.clone(), stream, router.clone(), stop.clone()));
                    if open.len() == limits.connections {
                        warn!(connections = limits.connections, "connection limit reached: further connections wait");
                    }
                }
                Err(error) => {
                    warn!(%error, "connection not accepted");
                    stop.run_until_cancelled(tokio::time::sleep(RETRY_PAUSE)).await;
                }
            },
        }
    }
    drop(listener);
    while open.join_next().await.is_some() {}
}

async fn answer(http: Builder, stream: TcpStream, router: Router, stop: CancellationToken) {
    let mut connection =
        pin!(http.serve_connection(TokioIo::new(stream), TowerToHyperService::new(router)));
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = stop.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        debug!(%error, "a connection broke off");
    }
}
