//! What the lanes of a cycle share: the connection to coderd, the round, and the right to have a
//! request in flight.
//!
//! All lanes of a cycle run at the same time. They use the connection in turn: a look at 100 rows
//! by their key is short beside the vendor's answer.

use std::sync::atomic::{AtomicBool, Ordering};

use tokio::sync::{Mutex, Semaphore, SemaphorePermit};
use tokio_util::sync::CancellationToken;

use super::round::Round;
use crate::coderd::Reader;

/// Lanes beyond the requests in flight. They lease and record while others are in flight.
const MORE_LANES: usize = 2;

/// What the lanes of a cycle share.
pub(super) struct Lanes<'a> {
    pub source_id: i16,
    pub reader: Mutex<&'a mut Reader>,
    concurrency: usize,
    in_flight: Semaphore,
    /// Held while a lane begins a round and leases, so that only one does.
    pub turn: Mutex<Turn>,
    /// No further request begins: the process stops, a request has failed, or nothing may be sent.
    pub over: CancellationToken,
    halted: AtomicBool,
}

/// The round of all lanes.
#[derive(Default)]
pub(super) struct Turn {
    pub round: Option<Round>,
    /// Whether no more events are due.
    pub drained: bool,
}

impl<'a> Lanes<'a> {
    pub fn new(
        reader: &'a mut Reader,
        source_id: i16,
        concurrency: usize,
        stop: &CancellationToken,
    ) -> Self {
        Lanes {
            source_id,
            reader: Mutex::new(reader),
            concurrency,
            in_flight: Semaphore::new(concurrency),
            turn: Mutex::default(),
            over: stop.child_token(),
            halted: AtomicBool::new(false),
        }
    }

    pub fn number(&self) -> usize {
        self.concurrency + MORE_LANES
    }

    /// Lets no further request begin.
    pub fn end(&self) {
        self.over.cancel();
    }

    /// The same; the condition shows why.
    pub fn halt(&self) {
        self.halted.store(true, Ordering::Relaxed);
        self.end();
    }

    pub fn is_halted(&self) -> bool {
        self.halted.load(Ordering::Relaxed)
    }

    /// The right to have a request in flight. None: no further request begins.
    pub async fn permit(&self) -> Option<SemaphorePermit<'_>> {
        let permit = self.over.run_until_cancelled(self.in_flight.acquire()).await?.ok()?;
        (!self.over.is_cancelled()).then_some(permit)
    }
}
