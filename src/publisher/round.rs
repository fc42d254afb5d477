//! A round: facts of coderd that up to 1,000 events share.

use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use tokio::time::Instant;
use uuid::Uuid;

use super::signing::SigningLicense;

/// The largest number of events that are sent in one round.
const ROUND_EVENTS: usize = 1_000;

/// A round ends after this time.
const ROUND_TIME: Duration = Duration::from_secs(5);

/// The facts that are read once for all requests of a round.
#[derive(Clone)]
pub(super) struct Round {
    pub signing: Arc<Signing>,
    begun: Instant,
    sent: usize,
    /// How far the process's clock is ahead of coderd's database.
    ahead: TimeDelta,
}

/// How requests are signed.
pub(super) struct Signing {
    pub license: SigningLicense,
    /// coderd's own deployment id, which the vendor knows. It differs from the source's id if an
    /// operator accepted another coderd.
    pub coderd_id: Uuid,
}

impl Round {
    /// `ahead` is how far the process's clock is ahead of coderd's database.
    pub fn new(signing: Arc<Signing>, begun: Instant, ahead: TimeDelta) -> Self {
        Round { signing, begun, sent: 0, ahead }
    }

    /// Whether these further events need another round.
    pub fn is_over(&self, events: usize, now: Instant) -> bool {
        self.sent + events > ROUND_EVENTS || now.duration_since(self.begun) >= ROUND_TIME
    }

    pub fn add(&mut self, events: usize) {
        self.sent += events;
    }

    /// The earlier of the process's clock and the clock of coderd's database.
    pub fn earlier(&self, now: DateTime<Utc>) -> DateTime<Utc> {
        now - self.ahead
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn round() -> Round {
        let license = SigningLicense { id: 1, jwt: String::new(), jwt_sha256: [0; 32] };
        let signing = Arc::new(Signing { license, coderd_id: Uuid::nil() });
        Round::new(signing, Instant::now(), TimeDelta::zero())
    }

    #[test]
    fn a_round_ends_after_1000_events() {
        let mut round = round();
        round.add(900);
        assert!(!round.is_over(100, round.begun));
        round.add(100);
        assert!(!round.is_over(0, round.begun));
        assert!(round.is_over(1, round.begun));
    }

    #[test]
    fn a_round_ends_after_5_seconds() {
        let round = round();
        assert!(!round.is_over(1, round.begun + Duration::from_millis(4_999)));
        assert!(round.is_over(0, round.begun + Duration::from_secs(5)));
    }
}
