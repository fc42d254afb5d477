//! Settings of the HTTP server.

use std::net::SocketAddr;
use std::time::Duration;

use uuid::Uuid;

use super::ServeError;
use super::connections::Limits;
use super::tokens::Tokens;

/// Settings of the HTTP server.
#[derive(Clone, Debug)]
pub struct ServeSettings {
    /// Address of the API, on loopback.
    pub api_listen: SocketAddr,
    /// Address of `/metrics`, on loopback.
    pub metrics_listen: SocketAddr,
    /// Valid tokens. If there are any, every path except the probes and the document requires one.
    pub tokens: Tokens,
    /// Accepted host names beside loopback's own, if no tokens are configured.
    pub host_names: Vec<String>,
    /// Default deployment of requests.
    pub source: Option<Uuid>,
    /// Name of this process as a lease holder; unique per process.
    pub holder: String,
    /// Duration of the lease to show the domain series. After it, another process may take an
    /// unrenewed lease.
    pub lease_length: Duration,
    /// Interval of the queries for completeness.
    pub poll: Duration,
    /// Maximum time since both states were at the end of the ledger. After it, they are behind.
    pub fresh: Duration,
    /// Limits of each listener.
    pub limits: Limits,
    /// Time for open requests after the stop.
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
    /// Refuses addresses beyond loopback, because TLS is not implemented yet.
    pub(super) fn check(&self) -> Result<(), ServeError> {
        for (key, address) in
            [("serve.api_listen", self.api_listen), ("serve.metrics_listen", self.metrics_listen)]
        {
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
            assert!(matches!(
                listening(beyond, "127.0.0.1:1"),
                Err(ServeError::NoTls { key: "serve.api_listen", .. })
            ));
            assert!(matches!(
                listening("127.0.0.1:1", beyond),
                Err(ServeError::NoTls { key: "serve.metrics_listen", .. })
            ));
        }
    }
}
