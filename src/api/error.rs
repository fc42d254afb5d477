//! Errors of the start.

use std::net::SocketAddr;

/// Why the HTTP server cannot start.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The address is not on loopback, where a token in clear text would be exposed.
    #[error(
        "{key} is {address}: not a loopback address, and TLS is not implemented yet; listen on 127.0.0.1 behind a TLS proxy"
    )]
    NoTls {
        /// Name of the setting.
        key: &'static str,
        /// Value of the setting.
        address: SocketAddr,
    },
    /// The address cannot be bound.
    #[error(
        "{key} is {address}, which cannot be bound: end the process that listens there, or choose another port"
    )]
    Listen {
        /// Name of the setting.
        key: &'static str,
        /// Value of the setting.
        address: SocketAddr,
        /// Error of the system.
        source: std::io::Error,
    },
    /// A metric's name is already registered: two servers share one registry.
    #[error("the telemetry cannot be registered: {0}")]
    Telemetry(#[from] prometheus::Error),
}
