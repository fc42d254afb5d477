//! Loopback ports out of the block that `scripts/test` reserved for this run.

use std::net::TcpListener;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::setting;

/// A port on 127.0.0.1 on which nothing listens, given to no other test of this run until the whole block is used up. Where a program can
/// listen on port 0 and tell which one it got, prefer that.
pub fn free_port() -> u16 {
    static GIVEN: AtomicUsize = AtomicUsize::new(0);
    let block = setting("TALLYLINE_TEST_PORTS");
    let (first, last) = block.split_once('-').expect("a range, FIRST-LAST");
    let ports: Vec<u16> = (first.parse().expect("a port")..=last.parse().expect("a port")).collect();
    (0..ports.len())
        .map(|_| ports[GIVEN.fetch_add(1, Ordering::Relaxed) % ports.len()])
        .find(|port| TcpListener::bind(("127.0.0.1", *port)).is_ok())
        .unwrap_or_else(|| panic!("every port of {block} is in use"))
}
