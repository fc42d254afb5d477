//! Connections: how many at a time, and how long each may take to say what it asks.

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

/// How long to wait before another try when no connection can be taken: no file descriptor is left, most of all.
const AGAIN: Duration = Duration::from_secs(1);

/// What clients may take up of one listener.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Connections that are open at a time; the next ones wait until one ends.
    pub connections: usize,
    /// From the opening of a connection, or the answer before, to the end of the next request's header. Then it is closed, idle or not.
    pub header: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self { connections: 512, header: Duration::from_secs(30) }
    }
}

/// Answers until `stop`, then to the end what is being answered. Dropped, it drops that, too.
pub(super) async fn answer_on(listener: TcpListener, router: Router, limits: Limits, stop: &CancellationToken) {
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
                        warn!(connections = limits.connections, "as many connections are open as may be: others wait");
                    }
                }
                Err(error) => {
                    warn!(%error, "a connection cannot be taken");
                    stop.run_until_cancelled(tokio::time::sleep(AGAIN)).await;
                }
            },
        }
    }
    drop(listener);
    while open.join_next().await.is_some() {}
}

async fn answer(http: Builder, stream: TcpStream, router: Router, stop: CancellationToken) {
    let mut connection = pin!(http.serve_connection(TokioIo::new(stream), TowerToHyperService::new(router)));
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
