//! Collector settings and errors.

use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use uuid::Uuid;

use super::status::CollectorStatus;
use super::telemetry::CollectorTelemetry;
use crate::coderd::CoderdError;
use crate::ledger::{IdentityRefusal, LeaseError, NO_SIGNING_KEY, Retirement, StatementError};
use crate::log::{AppendError, LogError};
use crate::pauses::Paused;

/// Settings of one source's collector.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The deployment's id; None: read from coderd, if the role may.
    pub deployment_id: Option<Uuid>,
    /// Refuses a coderd that does not report its identity: usage is published from it.
    pub identity_required: bool,
    /// The name of this process as holder of the lease; unique.
    pub holder: String,
    /// Histograms observe builds completed from here on. None: from the introduction of the source.
    /// Used once, then.
    pub introduced_at: Option<DateTime<Utc>>,
    /// Collects builds completed from here on, and counts earlier creations once. None: all
    /// history. Used once, at the introduction.
    pub from: Option<DateTime<Utc>>,
    /// Pause between two passes.
    pub poll_interval: Duration,
    /// How far clocks of coderd's replicas and of the database may differ. Completeness is this
    /// much earlier; the next pass starts there.
    pub margin: TimeDelta,
    /// How late a row may come that passes find for certain. Each half hour a pass reaches back this
    /// far from the last such pass, and each pass does from now if the oldest open transaction
    /// cannot be seen. Once a minute it reaches back up to ten minutes of this.
    pub overlap: TimeDelta,
    /// Time between comparisons of daily usage counts with coderd's; zero: in every pass.
    pub compare_interval: TimeDelta,
    /// A pass reads usage dated this far back. The next comparison of days finds older rows.
    /// coderd itself dates runtime rows up to 7 days back.
    pub usage_window: TimeDelta,
    /// Rows in one read, and events in one append.
    pub page: i64,
    /// Another collector can take the source this long after the last renewal of the lease.
    pub lease_length: Duration,
    pub paused: Paused,
    /// Where the collector reports its state.
    pub status: CollectorStatus,
    pub telemetry: CollectorTelemetry,
}

impl Settings {
    #[must_use]
    pub fn new(holder: impl Into<String>) -> Self {
        Settings {
            deployment_id: None,
            identity_required: false,
            holder: holder.into(),
            introduced_at: None,
            from: None,
            poll_interval: Duration::from_secs(10),
            margin: TimeDelta::seconds(60),
            overlap: TimeDelta::hours(1),
            compare_interval: TimeDelta::minutes(3),
            usage_window: TimeDelta::days(8),
            page: 1000,
            lease_length: Duration::from_secs(6),
            paused: Paused::never(),
            status: CollectorStatus::default(),
            telemetry: CollectorTelemetry::default(),
        }
    }
}

/// Why a pass did not finish. The events that it appended are acknowledged and stay.
#[derive(Debug, thiserror::Error)]
pub enum CollectError {
    /// A read of coderd's database failed.
    #[error(transparent)]
    Coderd(#[from] CoderdError),
    /// A statement of the ledger failed.
    #[error("the ledger cannot be used: {}", crate::cause::text(.0))]
    Ledger(#[from] StatementError),
    /// The log did not acknowledge all events.
    #[error("events not appended: {0}")]
    Append(#[from] AppendError),
    /// Partitions or ends of the log could not be read.
    #[error("the log cannot be used: {0}")]
    Log(#[from] LogError),
    /// coderd does not belong to this source.
    #[error(transparent)]
    WrongCoderd(#[from] IdentityRefusal),
    /// An operator has retired the source.
    #[error("{0}")]
    Retired(Retirement),
    /// Records must be signed, and this process has no signing key.
    #[error("{NO_SIGNING_KEY}")]
    NoSigningKey,
    /// Consumers reject this process's signatures.
    #[error(
        "consumers reject the signatures of this collector's records (bad_signature): set log.verification_keys of all consumers to include the key that log.signing_key names here, then restart this process; where topics were deleted and created again, run `tallyline recover plan --lost log` first. Until then it collects nothing and reports no completeness"
    )]
    SignaturesRejected,
    /// Consumers reject records that an earlier process of the source signed with another key. The
    /// next collector appends their rows again.
    #[error(
        "consumers reject records that an earlier collector of this source has signed with another key (bad_signature): their rows are collected again; keep a key in log.verification_keys of all consumers until they have read its records"
    )]
    OtherKeyRejected,
    /// Another collector has taken the source, or the ledger or the log lacks the last writes of
    /// this one.
    #[error(
        "collector lease lost: another collector has this source, or the database lost this collector's last writes; reopening"
    )]
    LeaseLost,
    /// The baseline is too recent: builds before it could still be committed after the count.
    #[error(
        "source.backfill_from {from} is too recent: only builds completed before {complete} are certain to be committed; set an earlier time or wait"
    )]
    FromTooRecent {
        /// The requested time.
        from: DateTime<Utc>,
        /// The latest possible time.
        complete: DateTime<Utc>,
    },
    /// Open transactions cannot be seen, so the commit of all builds before `from` is not certain.
    #[error(
        "source.backfill_from: coderd's open transactions are not visible, so builds before it could be missed; let an administrator run src/coderd/grants.sql for the role (it does not help on a standby)"
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
