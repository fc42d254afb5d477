//! The common state of a cycle's lanes: the connection to coderd, the round, and the rights to
//! lease, to send and to halve.
//!
//! All lanes of a cycle run at the same time. They use the connection in turn: a look at 100 rows
//! by their key is short beside the vendor's answer.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::sync::{Mutex, Notify, Semaphore, SemaphorePermit, watch};
use tokio_util::sync::CancellationToken;

use super::round::Round;
use crate::coderd::Reader;
use crate::tallyman::SendError;

/// Lanes beyond the requests in flight. They lease and record while others are in flight.
const MORE_LANES: usize = 2;

/// The common state of a cycle's lanes.
pub(super) struct Lanes<'a> {
    pub source_id: i16,
    pub reader: Mutex<&'a mut Reader>,
    concurrency: usize,
    in_flight: Semaphore,
    /// Held while a lane reads or begins a round, so that only one begins it.
    pub round: Mutex<Option<Round>>,
    /// Held while a lane leases or waits for more due events: one lane asks for all. Contains
    /// whether its latest lease found fewer events than a request takes.
    pub turn: Mutex<bool>,
    /// Lanes with leased events.
    working: watch::Sender<usize>,
    /// All lanes but one may halve a refused request at the same time. The other one takes usage
    /// that the vendor has not refused.
    halving: Semaphore,
    halving_ended: Notify,
    /// No further request begins: the process stops, a request has failed, or nothing may be sent.
    pub over: CancellationToken,
    halted: AtomicBool,
    answered: AtomicBool,
    /// The first refusal of a whole lease for its content.
    refusal: OnceLock<SendError>,
}

/// A lane's lease of events.
pub(super) struct Lease<'a> {
    /// The lease's own holder, so that no other lane writes under it.
    pub holder: String,
    /// The right to halve a request that the vendor refuses.
    pub halving: Option<SemaphorePermit<'a>>,
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
            round: Mutex::default(),
            turn: Mutex::default(),
            working: watch::Sender::new(0),
            halving: Semaphore::new(concurrency + MORE_LANES - 1),
            halving_ended: Notify::new(),
            over: stop.child_token(),
            halted: AtomicBool::new(false),
            answered: AtomicBool::new(false),
            refusal: OnceLock::new(),
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

    /// The right to lease held events and to halve a refused request. None: all other lanes have
    /// it.
    pub fn halving(&self) -> Option<SemaphorePermit<'_>> {
        self.halving.try_acquire().ok()
    }

    pub fn begin_work(&self) {
        self.working.send_modify(|lanes| *lanes += 1);
    }

    /// Ends the work on a lease, and its right to halve if it has it.
    pub fn end_work(&self, halving: Option<SemaphorePermit<'_>>) {
        if halving.is_some() {
            drop(halving);
            self.halving_ended.notify_one();
        }
        self.working.send_modify(|lanes| *lanes -= 1);
    }

    /// Waits until more events may be due. False: no lane has leased events, or no further request
    /// begins.
    pub async fn wait_for_more(&self, rest: Duration) -> bool {
        let mut working = self.working.subscribe();
        let all_ended = async { working.wait_for(|lanes| *lanes == 0).await.is_ok() };
        tokio::select! {
            biased;
            () = self.over.cancelled() => false,
            () = self.halving_ended.notified() => true,
            _ = all_ended => false,
            () = tokio::time::sleep(rest) => true,
        }
    }

    /// Records that the vendor has answered a request with verdicts.
    pub fn set_answered(&self) {
        self.answered.store(true, Ordering::Relaxed);
    }

    /// Records that the vendor has refused all parts of a lease for their content.
    pub fn set_refused(&self, error: SendError) {
        self.refusal.get_or_init(|| error);
    }

    /// The refusal, unless the vendor has answered a request of any lane with verdicts.
    pub fn refusal(&self) -> Option<SendError> {
        self.refusal.get().filter(|_| !self.answered.load(Ordering::Relaxed)).cloned()
    }
}
