//! Loopback ports from the block that `scripts/test` reserved for this run.

use std::net::TcpListener;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::setting;

/// An unused port on 127.0.0.1. No other test of this run gets it until the whole block is used. If
/// a program can listen on port 0 and report its port, prefer that.
pub fn free_port() -> u16 {
    static GIVEN: AtomicUsize = AtomicUsize::new(0);
    let block = setting("TALLYLINE_TEST_PORTS");
    let (first, last) = block.split_once('-').expect("a range, FIRST-LAST");
    let ports: Vec<u16> =
        (first.parse().expect("a port")..=last.parse().expect("a port")).collect();
    (0..ports.len())
        .map(|_| ports[GIVEN.fetch_add(1, Ordering::Relaxed) % ports.len()])
        .find(|port| TcpListener::bind(("127.0.0.1", *port)).is_ok())
        .unwrap_or_else(|| panic!("every port of {block} is in use"))
}
