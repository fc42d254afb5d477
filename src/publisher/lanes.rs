//! Lanes: each leases events, sends one request at a time, and records its answer.
//!
//! All lanes of a cycle run at the same time. They share one connection to coderd, which they use
//! in turn: a look at 100 rows by their key is short beside the vendor's answer.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::bail;
use tokio::sync::{Mutex, Semaphore, SemaphorePermit};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};
use uuid::Uuid;

use super::round::{Round, Signing};
use super::send::Sent;
use super::{Cycle, Publisher};
use crate::coderd::Reader;
use crate::ledger::Publication;
use crate::tallyman::{MAX_EVENTS_PER_REQUEST, SendError};

/// Lanes beyond the requests in flight. They lease and record while others are in flight.
const MORE_LANES: usize = 2;

/// What the lanes of a cycle share.
pub(super) struct Lanes<'a> {
    pub source_id: i16,
    pub reader: Mutex<&'a mut Reader>,
    concurrency: usize,
    in_flight: Semaphore,
    /// Held while a lane begins a round and leases, so that only one does.
    turn: Mutex<Turn>,
    /// No further request begins: the process stops, a request has failed, or nothing may be sent.
    over: CancellationToken,
    halted: AtomicBool,
}

#[derive(Default)]
struct Turn {
    round: Option<Round>,
    /// Whether no more events are due.
    drained: bool,
}

/// Events that one lane has leased for a request.
struct Leased {
    /// The lease's own holder, so that no other lane writes under it.
    holder: String,
    events: Vec<Publication>,
    signing: Arc<Signing>,
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
    async fn permit(&self) -> Option<SemaphorePermit<'_>> {
        let permit = self.over.run_until_cancelled(self.in_flight.acquire()).await?.ok()?;
        (!self.over.is_cancelled()).then_some(permit)
    }
}

impl Publisher {
    /// Sends due events until there are none, or until no further request may begin. Counts its
    /// work up to an error, too.
    pub(super) async fn lane(&self, lanes: &Lanes<'_>) -> (Cycle, anyhow::Result<()>) {
        let mut cycle = Cycle::default();
        let end = self.send_due(lanes, &mut cycle).await;
        if end.is_err() || cycle.failure.is_some() {
            lanes.end();
        }
        (cycle, end)
    }

    async fn send_due(&self, lanes: &Lanes<'_>, cycle: &mut Cycle) -> anyhow::Result<()> {
        while let Some(leased) = self.lease_next(lanes).await? {
            let (holder, signing) = (leased.holder, leased.signing);
            let ids: Vec<String> =
                leased.events.iter().map(|event| event.event_id.clone()).collect();
            let end = self.publish(lanes, &holder, &signing, leased.events, cycle).await;
            if !matches!(end, Ok(true)) {
                self.release(lanes.source_id, &holder, &ids).await;
            }
            end?;
            if cycle.failure.is_some() {
                break;
            }
        }
        Ok(())
    }

    /// Leases the events of one request. None: no more are due, or nothing may be sent.
    async fn lease_next(&self, lanes: &Lanes<'_>) -> anyhow::Result<Option<Leased>> {
        let mut turn = lanes.turn.lock().await;
        if turn.drained || lanes.over.is_cancelled() {
            return Ok(None);
        }
        if self.is_paused() {
            lanes.halt();
            return Ok(None);
        }
        if turn.round.as_ref().is_none_or(|round| round.is_over(Instant::now())) {
            turn.round = self.begin_round(lanes).await?;
        }
        let Some(round) = &mut turn.round else {
            lanes.halt();
            return Ok(None);
        };
        let holder = Uuid::new_v4().to_string();
        let now = round.earlier(self.ledger.clock.now());
        let events = self.lease(lanes.source_id, &holder, now, MAX_EVENTS_PER_REQUEST).await?;
        round.add(events.len());
        let signing = Arc::clone(&round.signing);
        turn.drained = events.len() < MAX_EVENTS_PER_REQUEST;
        Ok((!events.is_empty()).then_some(Leased { holder, events, signing }))
    }

    /// Publishes leased events: in one request, or in several if the vendor refuses a whole request
    /// for its content. Then each half is sent by itself, down to the single event, which is held.
    /// If the vendor takes none of the halves, the source waits: the cause may not be the events.
    ///
    /// The next lease is of a full request again. Events that were held so are retried apart from
    /// others, which need not be halved again.
    ///
    /// Returns whether it has ended all leases.
    async fn publish(
        &self,
        lanes: &Lanes<'_>,
        holder: &str,
        signing: &Signing,
        events: Vec<Publication>,
        cycle: &mut Cycle,
    ) -> anyhow::Result<bool> {
        let (refused_alone, others) = events.into_iter().partition(|event| event.refused_alone);
        let mut parts: Vec<Vec<Publication>> = vec![refused_alone, others];
        let (mut refusal, mut is_answered, mut has_leases) = (None::<SendError>, false, true);
        while let Some(part) = parts.pop() {
            if part.is_empty() {
                continue;
            }
            let Some(permit) = lanes.permit().await else { return Ok(false) };
            if self.is_paused() {
                lanes.halt();
                return Ok(false);
            }
            let part = self.last_check(lanes, holder, part, cycle).await?;
            match self.send(lanes, holder, signing, part, permit, cycle).await? {
                Sent::Nothing => {}
                Sent::Answered => is_answered = true,
                Sent::Refused(mut first, error) => {
                    warn!(source = %self.settings.deployment, events = first.len(), %error, "the vendor refuses a whole request: each half is sent by itself");
                    refusal = Some(error);
                    let second = first.split_off(first.len() / 2);
                    parts.extend([second, first]);
                }
                Sent::Failed(error) => {
                    cycle.failure = Some(error);
                    return Ok(parts.is_empty());
                }
                Sent::Withheld(condition) => {
                    self.condition.set(condition);
                    lanes.halt();
                    return Ok(false);
                }
                Sent::LeaseLost if refusal.is_some() => {
                    debug!("a lease of a half expired: its events are due again");
                    has_leases = false;
                }
                Sent::LeaseLost => bail!(
                    "request not sent: its leases expired before it was recorded; coderd's database or the ledger is too slow"
                ),
            }
        }
        if !is_answered {
            cycle.failure = refusal;
        }
        Ok(has_leases)
    }
}
