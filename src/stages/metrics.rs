//! Stage `metrics`: number of workspace creations, and durations of creations and claims.
//!
//! Names, labels, classic buckets and native settings are coderd's own, but native histograms are
//! never reset.

use std::collections::BTreeMap;

use chrono::{DateTime, TimeDelta, Utc};
use prometheus::proto::MetricFamily;
use uuid::Uuid;

use super::pieces::Changed;
use crate::event::{
    BuildKind, BuildStatus, Event, PREBUILDS_USER, Payload, PrebuildClaimed,
    WorkspaceBuildCompleted, kind,
};
use crate::metrics::{
    BucketOptions, Counter, CounterFamily, HistogramFamily, NativeOptions, Series, Tally,
};

/// Regular creations of all time. Source: coderd's query for the metric of this name (first
/// successful start build of a workspace, not by the prebuilds user). Labels keep the names of the
/// first collection.
pub const CREATIONS: CounterFamily<3> = CounterFamily {
    name: "coderd_workspace_creation_total",
    help: "Total regular (non-prebuilt) workspace creations of all time by organization, template, and preset: each workspace's first successful start, unless the prebuilds user started it.",
    labels: ["organization_name", "template_name", "preset_name"],
};

/// Durations of successful creations since the introduction; `type` is `regular` or `prebuild`.
pub const CREATION_SECONDS: HistogramFamily<4> = HistogramFamily {
    name: "coderd_workspace_creation_duration_seconds",
    help: "Time to create a workspace by organization, template, preset, and type (regular or prebuild), of successful builds completed since the introduction.",
    labels: ["organization_name", "template_name", "preset_name", "type"],
    buckets: BucketOptions::new(
        &[1.0, 10.0, 30.0, 60.0, 300.0, 600.0, 1800.0, 3600.0],
        Some(NativeOptions::NEVER_RESET),
    ),
};

/// Durations of successful claims since the introduction.
pub const CLAIM_SECONDS: HistogramFamily<3> = HistogramFamily {
    name: "coderd_prebuilt_workspace_claim_duration_seconds",
    help: "Time to claim a prebuilt workspace by organization, template, and preset, of successful claims completed since the introduction.",
    labels: ["organization_name", "template_name", "preset_name"],
    buckets: BucketOptions::new(
        &[1.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 180.0, 240.0, 300.0],
        Some(NativeOptions::NEVER_RESET),
    ),
};

/// Observations whose start is after their end because two clocks differ. They are observed as 0.
/// Counted by organization, because each provisioner belongs to one.
pub const NEGATIVE_DURATIONS: CounterFamily<1> = CounterFamily {
    name: "tallyline_negative_durations_total",
    help: "Creations and claims whose start is after their end, observed as 0, because the clocks of coderd's replicas or provisioners differ.",
    labels: ["organization_name"],
};

/// Effect of one event on one series.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    /// A regular creation, with organization, template and preset name.
    Creation([String; 3]),
    /// An observed creation duration, with organization, template and preset name, and `regular` or
    /// `prebuild`.
    CreationSeconds([String; 4], u64),
    /// An observed claim duration, with organization, template and preset name.
    ClaimSeconds([String; 3], u64),
    /// An observation whose start is after its end, with organization name.
    NegativeDuration([String; 1]),
}

/// A family that an event of this type can affect but this event did not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnaffectedFamily {
    /// Name of the family.
    pub family: &'static str,
    pub why: NoEffectReason,
}

/// Why an event does not affect a family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoEffectReason {
    /// A restart, a stop, or a failed start.
    #[error("it is not its workspace's first successful start")]
    NotTheFirstStart,
    /// A build for the pool of prebuilt workspaces.
    #[error("it was started by the prebuilds user")]
    ByThePrebuildsUser,
    /// A restart, a stop, or a claim. Claims have their own events with durations.
    #[error("it is not a creation of a workspace")]
    NoCreation,
    /// A failed or canceled build.
    #[error("it did not succeed")]
    NotSucceeded,
    /// Histograms begin at the introduction.
    #[error("it was completed before the introduction of its deployment")]
    BeforeTheIntroduction,
    /// The job never started.
    #[error("it has no duration")]
    NoDuration,
}

/// The effects of an event, and the unaffected families.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Effects {
    pub added: Vec<Effect>,
    /// Unaffected families, with reasons.
    pub unaffected: Vec<UnaffectedFamily>,
}

/// The effect of an accepted event on the series of its deployment, which was introduced at
/// `introduced_at`. No clock, no I/O, no state. Usage does not affect series.
#[must_use]
pub fn effects_of(event: &Event, introduced_at: DateTime<Utc>) -> Effects {
    let mut effects = Effects::default();
    match &event.payload {
        Payload::Build(build) => effects.build(build, introduced_at),
        Payload::Claim(claim) => effects.claim(claim, introduced_at),
        Payload::Usage(_) => {}
    }
    effects
}

impl Effects {
    fn build(&mut self, build: &WorkspaceBuildCompleted, introduced_at: DateTime<Utc>) {
        let [organization, template, preset] =
            names(&build.organization_name, &build.template_name, &build.preset_name);
        if !build.first_successful_start {
            self.unaffected(CREATIONS.name, NoEffectReason::NotTheFirstStart);
        } else if build.initiator_id == PREBUILDS_USER {
            self.unaffected(CREATIONS.name, NoEffectReason::ByThePrebuildsUser);
        } else {
            self.added.push(Effect::Creation([
                organization.clone(),
                template.clone(),
                preset.clone(),
            ]));
        }
        let creation = match kind(build) {
            BuildKind::RegularCreation => "regular",
            BuildKind::PrebuildCreation => "prebuild",
            BuildKind::PrebuildClaim | BuildKind::Other => {
                return self.unaffected(CREATION_SECONDS.name, NoEffectReason::NoCreation);
            }
        };
        match observed(build.status, build.duration(), build.completed_at, introduced_at) {
            Ok(micros) => {
                let micros = self.not_negative(micros, &organization);
                self.added.push(Effect::CreationSeconds(
                    [organization, template, preset, creation.to_owned()],
                    micros,
                ));
            }
            Err(why) => self.unaffected(CREATION_SECONDS.name, why),
        }
    }

    fn claim(&mut self, claim: &PrebuildClaimed, introduced_at: DateTime<Utc>) {
        match observed(claim.status, claim.duration(), claim.completed_at, introduced_at) {
            Ok(micros) => {
                let micros = self.not_negative(micros, &claim.organization_name);
                let labels =
                    names(&claim.organization_name, &claim.template_name, &claim.preset_name);
                self.added.push(Effect::ClaimSeconds(labels, micros));
            }
            Err(why) => self.unaffected(CLAIM_SECONDS.name, why),
        }
    }

    /// Observes a negative duration as 0, and counts it.
    fn not_negative(&mut self, micros: i64, organization: &str) -> u64 {
        micros.try_into().unwrap_or_else(|_| {
            self.added.push(Effect::NegativeDuration([organization.to_owned()]));
            0
        })
    }

    fn unaffected(&mut self, family: &'static str, why: NoEffectReason) {
        self.unaffected.push(UnaffectedFamily { family, why });
    }
}

/// The duration in microseconds, if it is observed.
fn observed(
    status: BuildStatus,
    duration: Option<TimeDelta>,
    completed_at: DateTime<Utc>,
    introduced_at: DateTime<Utc>,
) -> Result<i64, NoEffectReason> {
    if status != BuildStatus::Succeeded {
        return Err(NoEffectReason::NotSucceeded);
    }
    if completed_at < introduced_at {
        return Err(NoEffectReason::BeforeTheIntroduction);
    }
    let duration = duration.ok_or(NoEffectReason::NoDuration)?;
    // times in PostgreSQL are at most 300,000 years apart, slightly more than 64 bits of
    // microseconds can hold
    let beyond = if duration < TimeDelta::zero() { i64::MIN } else { i64::MAX };
    Ok(duration.num_microseconds().unwrap_or(beyond))
}

impl Effect {
    #[must_use]
    pub fn family(&self) -> &'static str {
        match self {
            Effect::Creation(_) => CREATIONS.name,
            Effect::CreationSeconds(..) => CREATION_SECONDS.name,
            Effect::ClaimSeconds(..) => CLAIM_SECONDS.name,
            Effect::NegativeDuration(_) => NEGATIVE_DURATIONS.name,
        }
    }

    /// Labels of the series, in the order of the family.
    #[must_use]
    pub fn labels(&self) -> Vec<(&'static str, &str)> {
        fn named<'a, const N: usize>(
            names: [&'static str; N],
            values: &'a [String; N],
        ) -> Vec<(&'static str, &'a str)> {
            names.into_iter().zip(values.iter().map(String::as_str)).collect()
        }
        match self {
            Effect::Creation(labels) => named(CREATIONS.labels, labels),
            Effect::CreationSeconds(labels, _) => named(CREATION_SECONDS.labels, labels),
            Effect::ClaimSeconds(labels, _) => named(CLAIM_SECONDS.labels, labels),
            Effect::NegativeDuration(labels) => named(NEGATIVE_DURATIONS.labels, labels),
        }
    }

    /// Microseconds that a histogram observes; `None` for a counter, which increases by 1.
    #[must_use]
    pub fn observed_micros(&self) -> Option<u64> {
        match self {
            Effect::CreationSeconds(_, micros) | Effect::ClaimSeconds(_, micros) => Some(*micros),
            Effect::Creation(_) | Effect::NegativeDuration(_) => None,
        }
    }
}

fn names(organization: &str, template: &str, preset: &str) -> [String; 3] {
    [organization, template, preset].map(str::to_owned)
}

#[derive(Clone, Debug, Default, PartialEq)]
pub struct MetricsState {
    pub(super) deployments: BTreeMap<Uuid, DeploymentMetrics>,
    pub(super) changed: Changed,
}

/// The series of one deployment.
#[derive(Clone, Debug, PartialEq)]
pub struct DeploymentMetrics {
    /// Histograms begin at this instant.
    pub introduced_at: DateTime<Utc>,
    pub creations: Series<Counter, 3>,
    pub creation_seconds: Series<Tally, 4>,
    pub claim_seconds: Series<Tally, 3>,
    pub negative_durations: Series<Counter, 1>,
}

impl MetricsState {
    /// The introduced deployments, by id.
    pub fn deployments(&self) -> impl Iterator<Item = (Uuid, &DeploymentMetrics)> {
        self.deployments.iter().map(|(id, metrics)| (*id, metrics))
    }

    /// Series of one deployment, if it was introduced.
    #[must_use]
    pub fn deployment(&self, id: Uuid) -> Option<&DeploymentMetrics> {
        self.deployments.get(&id)
    }
}

impl DeploymentMetrics {
    pub(super) fn introduced(introduced_at: DateTime<Utc>) -> Self {
        Self {
            introduced_at,
            creations: Series::new(),
            creation_seconds: Series::new(),
            claim_seconds: Series::new(),
            negative_durations: Series::new(),
        }
    }

    /// Adds an effect at an instant.
    pub(super) fn add(&mut self, effect: Effect, at: DateTime<Utc>) {
        match effect {
            Effect::Creation(labels) => self.creations.add(labels, 1, at),
            Effect::CreationSeconds(labels, micros) => {
                self.creation_seconds.observe_micros(&CREATION_SECONDS.buckets, labels, micros, at)
            }
            Effect::ClaimSeconds(labels, micros) => {
                self.claim_seconds.observe_micros(&CLAIM_SECONDS.buckets, labels, micros, at)
            }
            Effect::NegativeDuration(labels) => self.negative_durations.add(labels, 1, at),
        }
    }

    /// All families for exposition, including families without series.
    #[must_use]
    pub fn families(&self) -> Vec<MetricFamily> {
        vec![
            CREATIONS.show(&self.creations),
            CREATION_SECONDS.show(&self.creation_seconds),
            CLAIM_SECONDS.show(&self.claim_seconds),
            NEGATIVE_DURATIONS.show(&self.negative_durations),
        ]
    }
}

#[cfg(test)]
#[path = "effect_tests.rs"]
mod effect_tests;
#[cfg(test)]
#[path = "metrics_tests.rs"]
mod tests;
