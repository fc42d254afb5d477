//! What a collector is told, and what can stop it.

use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use uuid::Uuid;

use super::run::Standing;
use super::telemetry::CollectorTelemetry;
use crate::coderd::CoderdError;
use crate::ledger::{IdentityRefusal, LeaseError, NO_SIGNING_KEY, Paused, Retirement};
use crate::log::{AppendError, LogError};

/// How one source is collected.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The deployment's id; None: read from coderd, where the role may.
    pub deployment_id: Option<Uuid>,
    /// Nothing is collected from a coderd that does not report which one it is: usage is published from it.
    pub identity_required: bool,
    /// Who collects: differs between processes.
    pub holder: String,
    /// Histograms observe builds completed from here on. None: the moment at which the source is first seen. Read once, at the introduction.
    pub introduced_at: Option<DateTime<Utc>>,
    /// Collect builds completed from here on, and count the creations before it once. None: all history. Read once, at the introduction.
    pub from: Option<DateTime<Utc>>,
    /// Pause between two passes.
    pub poll_interval: Duration,
    /// Everything is read again this long after it was last; zero: in every pass.
    pub sweep_interval: TimeDelta,
    /// How far the clocks of coderd's replicas and of the database may differ: taken off every claim, added to every overlap.
    pub margin: TimeDelta,
    /// How far a pass reaches back once a minute, and always when the oldest open transaction cannot be seen.
    pub overlap: TimeDelta,
    /// Counts of usage by day are compared with coderd's this often; zero: in every pass.
    pub compare_interval: TimeDelta,
    /// Usage dated further back than this, and come since the last pass, is found by the next comparison of days. coderd itself dates runtime
    /// rows up to 7 days back.
    pub usage_window: TimeDelta,
    /// Rows read and events appended at a time.
    pub page: i64,
    /// The source is free for another collector this long after ours last renewed its lease.
    pub lease_length: Duration,
    pub paused: Paused,
    /// Where it is said how collecting stands.
    pub standing: Standing,
    /// What it counts of itself.
    pub telemetry: CollectorTelemetry,
}

impl Settings {
    /// The defaults, for this holder.
    #[must_use]
    pub fn new(holder: impl Into<String>) -> Self {
        Settings {
            deployment_id: None,
            identity_required: false,
            holder: holder.into(),
            introduced_at: None,
            from: None,
            poll_interval: Duration::from_secs(10),
            sweep_interval: TimeDelta::days(1),
            margin: TimeDelta::seconds(60),
            overlap: TimeDelta::hours(1),
            compare_interval: TimeDelta::minutes(3),
            usage_window: TimeDelta::days(8),
            page: 1000,
            lease_length: Duration::from_secs(6),
            paused: Paused::never(),
            standing: Standing::default(),
            telemetry: CollectorTelemetry::default(),
        }
    }
}

/// Why a pass did not come to its end. What it appended is acknowledged and stays.
#[derive(Debug, thiserror::Error)]
pub enum CollectError {
    /// coderd's database.
    #[error(transparent)]
    Coderd(#[from] CoderdError),
    /// The ledger.
    #[error("the ledger cannot be used: {}", crate::cause::text(.0))]
    Ledger(#[from] sqlx::Error),
    /// The log did not acknowledge everything.
    #[error("the log did not take all events: {0}")]
    Append(#[from] AppendError),
    /// The log's partitions or ends could not be asked for.
    #[error("the log cannot be used: {0}")]
    Log(#[from] LogError),
    /// coderd is not the one of this source.
    #[error(transparent)]
    NotItsCoderd(#[from] IdentityRefusal),
    /// An operator has retired the source.
    #[error("{0}")]
    Retired(Retirement),
    /// Records must be signed, and this process has no signing key.
    #[error("{NO_SIGNING_KEY}")]
    NoSigningKey,
    /// Consumers reject this process's signatures.
    #[error(
        "consumers reject the signatures of this collector's records (bad_signature): set log.verification_keys of all consumers to include the key that log.signing_key names here, then restart this process; where topics were deleted and created again, run `tallyline recover plan --lost kafka` first. Until then it collects nothing and reports no completeness"
    )]
    SignaturesRejected,
    /// Consumers reject records that an earlier process of the source has signed with another key. The collector that opens next appends their rows again.
    #[error(
        "consumers reject records that an earlier collector of this source has signed with another key (bad_signature): their rows are collected again; keep a key in log.verification_keys of all consumers until they have read its records"
    )]
    OtherKeyRejected,
    /// Another collector has taken the source, or the ledger or the log is without what this one wrote last.
    #[error("another collector has taken this source, or the database lost what this one wrote last: it opens again")]
    LeaseLost,
    /// A baseline so recent that builds before it could still be committed after it was counted.
    #[error(
        "collecting cannot begin at {from}: only what was completed before {complete} is certain to be committed; begin earlier or wait"
    )]
    FromTooRecent {
        /// What was asked for.
        from: DateTime<Utc>,
        /// The latest possible.
        complete: DateTime<Utc>,
    },
    /// As open transactions cannot be seen, no instant can be given before which all builds are committed.
    #[error(
        "source.backfill_from needs to see coderd's open transactions, or builds before it could be missed: let an administrator run src/coderd/grants.sql for the role (it does not help on a standby)"
    )]
    FromUncertain,
}

impl From<LeaseError> for CollectError {
    fn from(error: LeaseError) -> Self {
        match error {
            LeaseError::Lost(_) => CollectError::LeaseLost,
            LeaseError::Database(error) => CollectError::Ledger(error),
        }
    }
}
