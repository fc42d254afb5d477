//! A round: facts of coderd that up to 1,000 events share.

use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use tokio::time::Instant;
use uuid::Uuid;

use super::lanes::Lanes;
use super::signing::{NoLicense, SigningLicense, signing_license};
use super::{Condition, Publisher};

/// A round ends once this number of events is leased.
const ROUND_EVENTS: usize = 1_000;

/// A round ends after this time.
const ROUND_TIME: Duration = Duration::from_secs(5);

/// The facts that are read once for all requests of a round.
pub(super) struct Round {
    pub signing: Arc<Signing>,
    begun: Instant,
    leased: usize,
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
    pub fn is_over(&self, now: Instant) -> bool {
        self.leased >= ROUND_EVENTS || now.duration_since(self.begun) >= ROUND_TIME
    }

    pub fn add(&mut self, leased: usize) {
        self.leased += leased;
    }

    /// The earlier of the process's clock and the clock of coderd's database.
    pub fn earlier(&self, now: DateTime<Utc>) -> DateTime<Utc> {
        now - self.ahead
    }
}

impl Publisher {
    /// Reads coderd's identity, publish marks, licenses and clock, and whether the source is held
    /// or retired. None: nothing may be sent, and the condition says why.
    pub(super) async fn begin_round(&self, lanes: &Lanes<'_>) -> anyhow::Result<Option<Round>> {
        if self.is_retired().await? {
            return Ok(None);
        }
        let mut reader = lanes.reader.lock().await;
        let Some(coderd_id) = self.identify(&mut reader).await? else { return Ok(None) };
        if self.stops_for_coderd(&mut reader, lanes.source_id).await? || self.is_held().await? {
            return Ok(None);
        }
        // the license may have been replaced, especially after a 401
        let rows = reader.licenses().await?;
        let now = self.ledger.clock.now();
        let ahead = (now - reader.now().await?).max(TimeDelta::zero());
        match signing_license(rows, &self.settings.license_keys, coderd_id, now) {
            Ok(license) => Ok(Some(Round {
                signing: Arc::new(Signing { license, coderd_id }),
                begun: Instant::now(),
                leased: 0,
                ahead,
            })),
            Err(none) => {
                self.condition.set(match none {
                    NoLicense::None => Condition::NoLicense,
                    NoLicense::OtherDeployment(why) => Condition::Refused(why),
                });
                Ok(None)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn round() -> Round {
        let license = SigningLicense { id: 1, jwt: String::new(), jwt_sha256: [0; 32] };
        Round {
            signing: Arc::new(Signing { license, coderd_id: Uuid::nil() }),
            begun: Instant::now(),
            leased: 0,
            ahead: TimeDelta::zero(),
        }
    }

    #[test]
    fn a_round_ends_after_1000_events() {
        let mut round = round();
        round.add(999);
        assert!(!round.is_over(round.begun));
        round.add(1);
        assert!(round.is_over(round.begun));
    }

    #[test]
    fn a_round_ends_after_5_seconds() {
        let round = round();
        assert!(!round.is_over(round.begun + Duration::from_millis(4_999)));
        assert!(round.is_over(round.begun + Duration::from_secs(5)));
    }
}
