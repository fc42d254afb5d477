//! What listens where, and who may ask.

use std::net::SocketAddr;
use std::time::Duration;

use uuid::Uuid;

use super::ServeError;
use super::connections::Limits;
use super::tokens::Tokens;

/// How the HTTP side is run.
#[derive(Clone, Debug)]
pub struct ServeSettings {
    /// Where the API listens: loopback.
    pub api_listen: SocketAddr,
    /// Where `/metrics` listens: loopback.
    pub metrics_listen: SocketAddr,
    /// Who may ask; where there are any, each path but the probes and the document needs one.
    pub tokens: Tokens,
    /// Host names, beside loopback's own, that a request may name if no tokens are configured.
    pub host_names: Vec<String>,
    /// The deployment that is shown where a request names none.
    pub source: Option<Uuid>,
    /// Who holds the lease on the domain series: differs between processes.
    pub holder: String,
    /// The domain series are free for another process this long after ours last renewed its lease.
    pub lease_length: Duration,
    /// How often the ledger is asked how far its sources are complete.
    pub poll: Duration,
    /// When both states were last at the ledger's end: longer ago than this, and they are behind.
    pub fresh: Duration,
    /// What clients may take up of each listener.
    pub limits: Limits,
    /// How long open requests may go on after the stop.
    pub grace: Duration,
}

impl Default for ServeSettings {
    fn default() -> Self {
        Self {
            api_listen: SocketAddr::from(([127, 0, 0, 1], 8090)),
            metrics_listen: SocketAddr::from(([127, 0, 0, 1], 2112)),
            tokens: Tokens::default(),
            host_names: Vec::new(),
            source: None,
            holder: format!("{}-{}", std::process::id(), Uuid::new_v4().simple()),
            lease_length: Duration::from_secs(6),
            poll: Duration::from_secs(1),
            fresh: Duration::from_secs(30),
            limits: Limits::default(),
            grace: Duration::from_secs(10),
        }
    }
}

impl ServeSettings {
    /// Refuses addresses beyond loopback until there is TLS.
    pub(super) fn check(&self) -> Result<(), ServeError> {
        for (key, address) in [("serve.api_listen", self.api_listen), ("serve.metrics_listen", self.metrics_listen)] {
            if !address.ip().is_loopback() {
                return Err(ServeError::NoTls { key, address });
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listening(api: &str, metrics: &str) -> Result<(), ServeError> {
        let (api_listen, metrics_listen) = (api.parse().unwrap(), metrics.parse().unwrap());
        ServeSettings { api_listen, metrics_listen, ..ServeSettings::default() }.check()
    }

    #[test]
    fn only_loopback_is_listened_on() {
        for loopback in ["127.0.0.1:1", "127.9.9.9:1", "[::1]:1"] {
            assert!(listening(loopback, loopback).is_ok());
        }
        for beyond in ["0.0.0.0:1", "[::]:1", "10.0.0.1:1", "[::ffff:10.0.0.1]:1"] {
            assert!(matches!(listening(beyond, "127.0.0.1:1"), Err(ServeError::NoTls { key: "serve.api_listen", .. })));
            assert!(matches!(listening("127.0.0.1:1", beyond), Err(ServeError::NoTls { key: "serve.metrics_listen", .. })));
        }
    }
}
