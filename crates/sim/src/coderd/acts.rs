//! coderd's acts, one transaction each.

use chrono::{DateTime, TimeDelta, Utc};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::licenses::LicenseRow;

/// One transaction at one instant.
#[derive(Clone, Debug)]
pub struct Act {
    /// When it is done, by coderd's clock.
    pub at: DateTime<Utc>,
    /// How long its transaction stays open after it wrote its timestamps.
    pub held_for: Option<TimeDelta>,
    /// The rows that it writes.
    pub change: Change,
}

/// The rows that a transaction writes.
#[derive(Clone, Debug)]
pub enum Change {
    /// A build and its job are queued, with a new workspace (and task) if it is the first.
    Queue(Box<Queued>),
    /// A daemon takes the job. The written time may come from another replica's clock.
    Acquire { build: BuildIds, worker: Uuid, started_at: DateTime<Utc> },
    /// A user cancels a running job: writes only `canceled_at`.
    CancelRunning { build: BuildIds, canceled_at: DateTime<Utc> },
    /// A job without a daemon is canceled: writes both times, and nothing else.
    CancelPending { build: BuildIds, canceled_at: DateTime<Utc>, completed_at: DateTime<Utc> },
    /// The job ends, by success, failure or a reaper.
    Complete(Box<Completed>),
    /// A pool workspace gets a new owner and name.
    Claim { workspace: Uuid, owner: Uuid, name: String },
    /// A usage row outside a build's transaction: a heartbeat.
    Usage(UsageRow),
    /// coderd's publisher writes a verdict.
    Publish { id: String, published_at: Option<DateTime<Utc>>, failure: Option<String> },
    /// A license is uploaded.
    License(Box<LicenseRow>),
    /// An assistant's message with its model time.
    Chat { chat: Uuid, runtime_ms: i64 },
    /// A user's first use of AI.
    Seat { user: Uuid },
    /// Another version becomes the template's active one.
    Promote { template: Uuid, version: Uuid },
}

impl Act {
    /// Dates the act as a replica with a slow clock does. Heartbeats keep their hour, and licenses
    /// their issuer's dates.
    pub(super) fn date_back(&mut self, behind: TimeDelta) {
        self.at -= behind;
        match &mut self.change {
            Change::Acquire { started_at, .. } => *started_at -= behind,
            Change::CancelRunning { canceled_at, .. } => *canceled_at -= behind,
            Change::CancelPending { canceled_at, completed_at, .. } => {
                *canceled_at -= behind;
                *completed_at -= behind;
            }
            Change::Complete(done) => {
                done.completed_at -= behind;
                if let Some(usage) =
                    done.success.as_mut().and_then(|success| success.usage.as_mut())
                {
                    usage.created_at -= behind;
                }
            }
            Change::Queue(_)
            | Change::Claim { .. }
            | Change::Usage(_)
            | Change::Publish { .. }
            | Change::License(_)
            | Change::Chat { .. }
            | Change::Seat { .. }
            | Change::Promote { .. } => {}
        }
    }
}

#[derive(Clone, Copy, Debug)]
pub struct BuildIds {
    /// `workspace_builds.id`
    pub build: Uuid,
    /// `provisioner_jobs.id`
    pub job: Uuid,
    /// `workspaces.id`
    pub workspace: Uuid,
}

/// The purpose of a build, as its initiator meant it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Class {
    /// The first build of a workspace, requested by a user.
    RegularCreation,
    /// The first build of a pool workspace.
    PrebuildCreation,
    /// The build that gives a pool workspace to its new owner.
    Claim,
    /// Restarts, retries, stops, deletes.
    Other,
}

/// `workspace_transition`
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Transition {
    /// Create or start.
    Start,
    /// Stop.
    Stop,
    /// Delete.
    Delete,
}

impl Transition {
    pub(super) fn label(self) -> &'static str {
        match self {
            Transition::Start => "start",
            Transition::Stop => "stop",
            Transition::Delete => "delete",
        }
    }
}

#[derive(Clone, Debug)]
pub struct Queued {
    pub ids: BuildIds,
    pub class: Class,
    /// The workspace that is created with this build.
    pub new_workspace: Option<NewWorkspace>,
    /// The task that is created with this build.
    pub new_task: Option<NewTask>,
    pub organization: Uuid,
    pub template: Uuid,
    pub version: Uuid,
    pub preset: Option<Uuid>,
    pub number: i32,
    pub transition: Transition,
    pub initiator: Uuid,
    pub reason: &'static str,
    /// `prebuilt_workspace_stage` of the job's input: 1 or 2, else omitted.
    pub stage: Option<u8>,
}

#[derive(Clone, Debug)]
pub struct NewWorkspace {
    pub owner: Uuid,
    pub name: String,
}

#[derive(Clone, Debug)]
pub struct NewTask {
    pub id: Uuid,
    pub owner: Uuid,
    pub name: String,
}

/// The end of a job.
#[derive(Clone, Debug)]
pub struct Completed {
    pub ids: BuildIds,
    pub transition: Transition,
    pub completed_at: DateTime<Utc>,
    /// The reaper also writes a missing start: the same instant as the end.
    pub start_at_end: bool,
    pub error: Option<String>,
    pub error_code: Option<String>,
    /// Only a success writes it.
    pub success: Option<Success>,
}

/// The rows that a successful completion writes besides the job.
#[derive(Clone, Debug)]
pub struct Success {
    pub has_ai_task: bool,
    pub has_external_agent: bool,
    pub deadline: Option<DateTime<Utc>>,
    pub daily_cost: i32,
    /// The usage row of the same transaction.
    pub usage: Option<UsageRow>,
}

/// A row of `usage_events`.
#[derive(Clone, Debug)]
pub struct UsageRow {
    pub id: String,
    pub kind: UsageKind,
    pub quantity: i64,
    pub created_at: DateTime<Utc>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum UsageKind {
    #[serde(rename = "dc_managed_agents_v1")]
    ManagedAgents,
    #[serde(rename = "hb_ai_seats_v1")]
    Seats,
    #[serde(rename = "hb_agent_runtime_v1")]
    Runtime,
}

impl UsageKind {
    /// `usage_events.event_type`
    #[must_use]
    pub fn event_type(self) -> &'static str {
        match self {
            UsageKind::ManagedAgents => "dc_managed_agents_v1",
            UsageKind::Seats => "hb_ai_seats_v1",
            UsageKind::Runtime => "hb_agent_runtime_v1",
        }
    }

    /// The payload with this quantity.
    #[must_use]
    pub fn data(self, quantity: i64) -> String {
        match self {
            UsageKind::ManagedAgents | UsageKind::Seats => format!("{{\"count\": {quantity}}}"),
            UsageKind::Runtime => format!("{{\"runtime_ms\": {quantity}}}"),
        }
    }
}
