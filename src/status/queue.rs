//! A source's queue of publications.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

use crate::ledger::{HeldBack, LastRequest};

/// Publications queued for one source. The rows of processes contain the state of publishers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Queue {
    /// coderd's deployment id.
    pub deployment_id: Uuid,
    /// Pending events.
    pub pending: i64,
    /// Of the pending events, those held: coderd's row differs or is gone, the vendor's rules do
    /// not allow them, or it refuses each request with them.
    pub held_back: i64,
    /// The first held events by time, at most 10.
    pub held_back_first: Vec<HeldBack>,
    /// Pending events with an attempt that the vendor may have accepted.
    pub unanswered: i64,
    /// Time of the oldest pending event. It expires 30 days later.
    pub oldest_created_at: Option<DateTime<Utc>>,
    /// The latest request to the vendor, with its verdicts.
    pub last_request: Option<LastRequest>,
}
