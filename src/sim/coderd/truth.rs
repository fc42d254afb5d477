//! What is true about a simulated deployment, as plain JSON.
//!
//! It is kept by the simulator's own bookkeeping as it acts: never read back from the database, never computed by code that a stage
//! uses. Numbers are whole: durations in microseconds, instants to the microsecond.

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

/// Everything that is true of what has been done so far.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Truth {
    /// The seed of the simulation.
    pub seed: u64,
    /// The schema it lived in.
    pub schema: SchemaVersion,
    /// The deployment's id, `site_configs.deployment_id`.
    pub deployment_id: Uuid,
    /// The public key that verifies the licenses.
    pub license_key: LicenseKey,
    /// Completed builds, in the order in which they completed (ties by id).
    pub builds: Vec<BuildTruth>,
    /// `coderd_workspace_creation_total`: over all time, names as first seen.
    pub creation_total: Vec<CreationTotal>,
    /// What `coderd_workspace_creation_duration_seconds` observes if it was there from the beginning.
    pub creation_seconds: Vec<CreationSeries>,
    /// What `coderd_prebuilt_workspace_claim_duration_seconds` observes if it was there from the beginning.
    pub claim_seconds: Vec<ClaimSeries>,
    /// Successful timed builds that ended before they started: observed as 0.
    pub clock_skews: u64,
    /// Every usage row, by time of insert (ties by id).
    pub usage: Vec<UsageTruth>,
    /// Every license, in the order of upload.
    pub licenses: Vec<LicenseTruth>,
    /// Users who are AI seats now: active, not deleted, not system.
    pub active_seats: u64,
    /// Names that were changed and things that were removed behind what had been seen.
    pub renames: Vec<Rename>,
}

/// The labels that all three metric families share.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Labels {
    /// Organization at completion.
    pub organization_name: String,
    /// Template at completion.
    pub template_name: String,
    /// Preset at completion; empty when there is none.
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
    /// What it was for.
    pub class: Class,
    /// How it ended.
    pub status: Status,
    /// Asked for by the prebuilds user.
    pub by_prebuilds_user: bool,
    /// The workspace's first successful start.
    pub first_successful_start: bool,
    /// It adds one to `coderd_workspace_creation_total`: a first successful start, not by the prebuilds user.
    pub counted_as_creation: bool,
    /// Names when it completed.
    #[serde(flatten)]
    pub labels: Labels,
    /// When it was queued.
    pub created_at: DateTime<Utc>,
    /// As its job's row says; absent when no daemon took it.
    pub started_at: Option<DateTime<Utc>>,
    /// As its job's row says.
    pub completed_at: DateTime<Utc>,
    /// From start to end, negative where clocks disagreed; absent when there was no start, or a reaper wrote one.
    pub duration_micros: Option<i64>,
}

/// How a completed build ended.
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
    /// The series.
    #[serde(flatten)]
    pub labels: Labels,
    /// Creations.
    pub count: u64,
}

/// One series of the creation histogram.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CreationSeries {
    /// The series.
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
    /// The label's value.
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
    /// The series.
    #[serde(flatten)]
    pub labels: Labels,
    /// In order of completion.
    pub observations: Vec<Observation>,
}

/// One observed duration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Observation {
    /// The build.
    pub build_id: Uuid,
    /// Histograms count only what completed at or after their introduction.
    pub completed_at: DateTime<Utc>,
    /// What is observed: the duration, or 0 where it was negative.
    pub micros: u64,
    /// It was negative.
    pub skewed: bool,
}

/// One usage row.
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
    /// When the row came.
    pub inserted_at: DateTime<Utc>,
    /// The build in whose transaction it came.
    pub build_id: Option<Uuid>,
    /// Set by coderd's own publisher, on acceptance and on a refusal for good.
    pub published_at: Option<DateTime<Utc>>,
    /// Set by coderd's own publisher.
    pub failure_message: Option<String>,
}

/// One license.
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
    /// What it says.
    pub claims: Claims,
    /// When it was uploaded.
    pub uploaded_at: DateTime<Utc>,
    /// Managed agents whose usage lies in `[nbf, exp)`, whether or not the license is any good.
    pub managed_agents: u64,
}

/// What was changed behind what had been seen.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "what", rename_all = "snake_case")]
pub enum Rename {
    /// An organization's name.
    Organization {
        /// Which.
        id: Uuid,
        /// Old name.
        from: String,
        /// New name.
        to: String,
    },
    /// A template's name.
    Template {
        /// Which.
        id: Uuid,
        /// Old name.
        from: String,
        /// New name.
        to: String,
    },
    /// A preset's name.
    Preset {
        /// Which.
        id: Uuid,
        /// Old name.
        from: String,
        /// New name.
        to: String,
    },
    /// A workspace's name.
    Workspace {
        /// Which.
        id: Uuid,
        /// New name.
        to: String,
    },
    /// A preset row removed: its builds lost it.
    PresetRemoved {
        /// Which.
        id: Uuid,
        /// Its name.
        name: String,
    },
    /// A template deleted, another created under its name.
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
    /// The creation counter's series.
    #[must_use]
    pub fn creation_totals(&self) -> BTreeMap<Labels, u64> {
        self.creation_total.iter().map(|series| (series.labels.clone(), series.count)).collect()
    }

    /// The creation histogram's observations of builds that completed at or after `introduced`. A series without any is left out.
    #[must_use]
    pub fn creation_micros(&self, introduced: DateTime<Utc>) -> BTreeMap<(Labels, CreationType), Vec<u64>> {
        let series =
            self.creation_seconds.iter().map(|series| ((series.labels.clone(), series.kind), since(&series.observations, introduced)));
        series.filter(|(_, micros)| !micros.is_empty()).collect()
    }

    /// The claim histogram's observations of builds that completed at or after `introduced`. A series without any is left out.
    #[must_use]
    pub fn claim_micros(&self, introduced: DateTime<Utc>) -> BTreeMap<Labels, Vec<u64>> {
        let series = self.claim_seconds.iter().map(|series| (series.labels.clone(), since(&series.observations, introduced)));
        series.filter(|(_, micros)| !micros.is_empty()).collect()
    }

    /// The names each build completed under: what a reader who looked at once has seen.
    #[must_use]
    pub fn names(&self) -> BTreeMap<Uuid, Labels> {
        self.builds.iter().map(|build| (build.id, build.labels.clone())).collect()
    }

    /// Managed agents with usage in `[from, until)`.
    #[must_use]
    pub fn managed_agents(&self, from: DateTime<Utc>, until: DateTime<Utc>) -> u64 {
        let agents = self.usage.iter().filter(|row| row.event_type == UsageKind::ManagedAgents);
        agents.filter(|row| row.created_at >= from && row.created_at < until).map(|row| u64::try_from(row.quantity).unwrap_or(0)).sum()
    }

    /// Writes it beside `path` and renames it there.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn write(&self, path: &Path) -> anyhow::Result<()> {
        let beside = path.with_extension("partial");
        let json = serde_json::to_vec_pretty(self).context("truth as JSON")?;
        std::fs::write(&beside, json).with_context(|| format!("write {}", beside.display()))?;
        std::fs::rename(&beside, path).with_context(|| format!("rename to {}", path.display()))
    }

    /// Reads what [`Truth::write`] wrote.
    ///
    /// # Errors
    /// When the file is missing or not a truth.
    pub fn read(path: &Path) -> anyhow::Result<Self> {
        let json = std::fs::read(path).with_context(|| format!("read {}", path.display()))?;
        serde_json::from_slice(&json).with_context(|| format!("{} is not a simulator's truth", path.display()))
    }
}

fn since(observations: &[Observation], introduced: DateTime<Utc>) -> Vec<u64> {
    observations.iter().filter(|observation| observation.completed_at >= introduced).map(|observation| observation.micros).collect()
}
