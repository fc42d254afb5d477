//! The truth about a simulated deployment, as plain JSON.
//!
//! The simulator's own bookkeeping keeps it during the acts. It is never read back from the
//! database, and shares no code with a stage. Numbers are whole: durations in microseconds,
//! instants to the microsecond.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Context;
use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

pub use super::acts::{Class, Transition, UsageKind};
pub use super::licenses::Claims;
pub use super::schema::SchemaVersion;
pub use super::signing::LicenseKey;

/// The truth about all acts until now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Truth {
    /// The seed of the simulation.
    pub seed: u64,
    /// coderd's schema.
    pub schema: SchemaVersion,
    /// The deployment's id, `site_configs.deployment_id`.
    pub deployment_id: Uuid,
    /// The public key that verifies the licenses.
    pub license_key: LicenseKey,
    /// Completed builds, in the order in which they completed (ties by id).
    pub builds: Vec<BuildTruth>,
    /// `coderd_workspace_creation_total`: over all time, names as first seen.
    pub creation_total: Vec<CreationTotal>,
    /// The observations of `coderd_workspace_creation_duration_seconds` since the start.
    pub creation_seconds: Vec<CreationSeries>,
    /// The observations of `coderd_prebuilt_workspace_claim_duration_seconds` since the start.
    pub claim_seconds: Vec<ClaimSeries>,
    /// Successful timed builds that ended before they started: observed as 0.
    pub clock_skews: u64,
    /// Every usage row, by time of insert (ties by id).
    pub usage: Vec<UsageTruth>,
    /// Every license, in the order of upload.
    pub licenses: Vec<LicenseTruth>,
    /// Current users with an AI seat: active, not deleted, not system.
    pub active_seats: u64,
    /// Changed names and removed things that a reader had already seen.
    pub renames: Vec<Rename>,
}

/// The labels that all three metric families share.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Labels {
    /// Organization at completion.
    pub organization_name: String,
    /// Template at completion.
    pub template_name: String,
    /// Preset at completion; empty without a preset.
    pub preset_name: String,
}

/// One completed build.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BuildTruth {
    /// `workspace_builds.id`
    pub id: Uuid,
    /// `provisioner_jobs.id`
    pub job_id: Uuid,
    /// `workspaces.id`
    pub workspace_id: Uuid,
    /// Number within the workspace.
    pub build_number: i32,
    /// Start, stop or delete.
    pub transition: Transition,
    /// Its purpose.
    pub class: Class,
    /// Its end.
    pub status: Status,
    /// Whether the prebuilds user requested it.
    pub by_prebuilds_user: bool,
    /// Whether it is the workspace's first successful start.
    pub first_successful_start: bool,
    /// Whether it adds one to `coderd_workspace_creation_total`: a first successful start, not by
    /// the prebuilds user.
    pub counted_as_creation: bool,
    /// Names at its completion.
    #[serde(flatten)]
    pub labels: Labels,
    /// When it was queued.
    pub created_at: DateTime<Utc>,
    /// From its job's row; absent if no daemon took it.
    pub started_at: Option<DateTime<Utc>>,
    /// From its job's row.
    pub completed_at: DateTime<Utc>,
    /// From start to end, negative if clocks disagreed. Absent without a start, or if a reaper
    /// wrote it.
    pub duration_micros: Option<i64>,
}

/// The end of a completed build.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// No error, not canceled.
    Succeeded,
    /// With a non-empty error.
    Failed,
    /// Canceled, no error.
    Canceled,
}

/// One series of the creation counter.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CreationTotal {
    #[serde(flatten)]
    pub labels: Labels,
    pub count: u64,
}

/// One series of the creation histogram.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CreationSeries {
    #[serde(flatten)]
    pub labels: Labels,
    /// The label `type`.
    #[serde(rename = "type")]
    pub kind: CreationType,
    /// In order of completion.
    pub observations: Vec<Observation>,
}

/// The label `type` of the creation histogram.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CreationType {
    /// By a user.
    Regular,
    /// By the reconciler.
    Prebuild,
}

impl CreationType {
    #[must_use]
    pub fn label(self) -> &'static str {
        match self {
            CreationType::Regular => "regular",
            CreationType::Prebuild => "prebuild",
        }
    }
}

/// One series of the claim histogram.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClaimSeries {
    #[serde(flatten)]
    pub labels: Labels,
    /// In order of completion.
    pub observations: Vec<Observation>,
}

/// One observed duration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Observation {
    pub build_id: Uuid,
    /// Histograms count only builds that completed at or after their introduction.
    pub completed_at: DateTime<Utc>,
    /// The observed value: the duration, or 0 if it was negative.
    pub micros: u64,
    /// Whether it was negative.
    pub skewed: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UsageTruth {
    /// `usage_events.id`
    pub id: String,
    /// `usage_events.event_type`
    pub event_type: UsageKind,
    /// `count`, or `runtime_ms`.
    pub quantity: i64,
    /// When the usage happened (bucket start for runtime).
    pub created_at: DateTime<Utc>,
    /// When the row was inserted.
    pub inserted_at: DateTime<Utc>,
    /// The build in whose transaction it was inserted.
    pub build_id: Option<Uuid>,
    /// Set by coderd's own publisher, on acceptance and on a permanent refusal.
    pub published_at: Option<DateTime<Utc>>,
    /// Set by coderd's own publisher.
    pub failure_message: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LicenseTruth {
    /// `licenses.uuid`
    pub uuid: Uuid,
    /// The JWT as stored.
    pub jwt: String,
    /// The JWT header's `kid`.
    pub kid: String,
    /// Whether [`Truth::license_key`] verifies it.
    pub verifiable: bool,
    /// Its claims.
    pub claims: Claims,
    /// When it was uploaded.
    pub uploaded_at: DateTime<Utc>,
    /// Managed agents with usage in `[nbf, exp)`, even if the license is not valid.
    pub managed_agents: u64,
}

/// A change after a reader had seen the value.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "what", rename_all = "snake_case")]
pub enum Rename {
    /// An organization's name.
    Organization {
        id: Uuid,
        /// The old name.
        from: String,
        to: String,
    },
    /// A template's name.
    Template {
        id: Uuid,
        /// The old name.
        from: String,
        to: String,
    },
    /// A preset's name.
    Preset {
        id: Uuid,
        /// The old name.
        from: String,
        to: String,
    },
    /// A workspace's name.
    Workspace {
        id: Uuid,
        /// The new name.
        to: String,
    },
    /// A removed preset row: its builds lost it.
    PresetRemoved {
        id: Uuid,
        /// The name of the preset.
        name: String,
    },
    /// A deleted template, and another one under its name.
    TemplateReplaced {
        /// The deleted one.
        id: Uuid,
        /// The new one.
        successor: Uuid,
        /// The name of both.
        name: String,
    },
}

impl Truth {
    #[must_use]
    pub fn creation_totals(&self) -> BTreeMap<Labels, u64> {
        self.creation_total.iter().map(|series| (series.labels.clone(), series.count)).collect()
    }

    /// The creation histogram's observations of builds that completed at or after `introduced`.
    /// Series without any are left out.
    #[must_use]
    pub fn creation_micros(
        &self,
        introduced: DateTime<Utc>,
    ) -> BTreeMap<(Labels, CreationType), Vec<u64>> {
        let series = self.creation_seconds.iter().map(|series| {
            ((series.labels.clone(), series.kind), since(&series.observations, introduced))
        });
        series.filter(|(_, micros)| !micros.is_empty()).collect()
    }

    /// The claim histogram's observations of builds that completed at or after `introduced`. Series
    /// without any are left out.
    #[must_use]
    pub fn claim_micros(&self, introduced: DateTime<Utc>) -> BTreeMap<Labels, Vec<u64>> {
        let series = self
            .claim_seconds
            .iter()
            .map(|series| (series.labels.clone(), since(&series.observations, introduced)));
        series.filter(|(_, micros)| !micros.is_empty()).collect()
    }

    /// The names of each build at its completion: a reader saw them then.
    #[must_use]
    pub fn names(&self) -> BTreeMap<Uuid, Labels> {
        self.builds.iter().map(|build| (build.id, build.labels.clone())).collect()
    }

    /// Managed agents with usage in `[from, until)`.
    #[must_use]
    pub fn managed_agents(&self, from: DateTime<Utc>, until: DateTime<Utc>) -> u64 {
        let agents = self.usage.iter().filter(|row| row.event_type == UsageKind::ManagedAgents);
        agents
            .filter(|row| row.created_at >= from && row.created_at < until)
            .map(|row| u64::try_from(row.quantity).unwrap_or(0))
            .sum()
    }

    /// Writes it beside `path` and renames it.
    pub fn write(&self, path: &Path) -> anyhow::Result<()> {
        let beside = path.with_extension("partial");
        let json = serde_json::to_vec_pretty(self).context("truth as JSON")?;
        std::fs::write(&beside, json).with_context(|| format!("write {}", beside.display()))?;
        std::fs::rename(&beside, path).with_context(|| format!("rename to {}", path.display()))
    }

    /// Reads a file of [`Truth::write`].
    pub fn read(path: &Path) -> anyhow::Result<Self> {
        let json = std::fs::read(path).with_context(|| format!("read {}", path.display()))?;
        serde_json::from_slice(&json)
            .with_context(|| format!("{} is not a simulator's truth", path.display()))
    }
}

fn since(observations: &[Observation], introduced: DateTime<Utc>) -> Vec<u64> {
    observations
        .iter()
        .filter(|observation| observation.completed_at >= introduced)
        .map(|observation| observation.micros)
        .collect()
}
