//! The effect of one event on the series of stage `metrics`, with reasons for unaffected families.
//! The fold, explanations and plans share this rule.

use chrono::{DateTime, TimeDelta, Utc};

use super::families::{CLAIM_SECONDS, CREATION_SECONDS, CREATIONS, NEGATIVE_DURATIONS};
use crate::event::{
    BuildKind, BuildStatus, Event, PREBUILDS_USER, Payload, PrebuildClaimed,
    WorkspaceBuildCompleted, kind,
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::Fact;
    use crate::event::UsageQuantity;
    use crate::stages::samples;
    use crate::stages::samples::{build, claim, introduced_at, usage};

    fn event(fact: Fact) -> Event {
        let Fact::Event(event) = fact else { panic!("not an event") };
        event
    }

    fn why(fact: Fact) -> Vec<(&'static str, NoEffectReason)> {
        let effects = effects_of(&event(fact), introduced_at());
        effects.unaffected.iter().map(|unaffected| (unaffected.family, unaffected.why)).collect()
    }

    #[test]
    fn an_effect_has_family_labels_and_value() {
        let effects = effects_of(&event(samples::fact(build())), introduced_at());
        let labels = vec![
            ("organization_name", "engineering"),
            ("template_name", "docker"),
            ("preset_name", "small"),
        ];
        let added: Vec<_> = effects
            .added
            .iter()
            .map(|effect| (effect.family(), effect.observed_micros(), effect.labels()))
            .collect();
        let timed = [labels.clone(), vec![("type", "regular")]].concat();
        assert_eq!(
            added,
            [
                ("coderd_workspace_creation_total", None, labels),
                ("coderd_workspace_creation_duration_seconds", Some(42_000_000), timed)
            ]
        );
        assert!(effects.unaffected.is_empty());
        let usage = samples::fact(usage(UsageQuantity::ManagedAgents(3), introduced_at()));
        assert_eq!(effects_of(&event(usage), introduced_at()), Effects::default());
    }

    #[test]
    fn a_success_that_ends_as_it_starts_is_observed_as_0_and_a_reaped_job_is_not() {
        let at_once = WorkspaceBuildCompleted { started_at: Some(build().completed_at), ..build() };
        let effects = effects_of(&event(samples::fact(at_once.clone())), introduced_at());
        assert_eq!(
            effects.added.iter().filter_map(Effect::observed_micros).collect::<Vec<_>>(),
            [0]
        );
        assert!(!effects.added.iter().any(|effect| matches!(effect, Effect::NegativeDuration(_))));
        let claimed = PrebuildClaimed { started_at: Some(claim().completed_at), ..claim() };
        let effects = effects_of(&event(samples::fact(claimed)), introduced_at());
        assert_eq!(
            effects.added.iter().filter_map(Effect::observed_micros).collect::<Vec<_>>(),
            [0]
        );
        let reaped = WorkspaceBuildCompleted {
            status: BuildStatus::Failed,
            first_successful_start: false,
            ..at_once
        };
        assert_eq!(reaped.duration(), None);
        assert_eq!(effects_of(&event(samples::fact(reaped)), introduced_at()).added, []);
    }

    #[test]
    fn an_unaffected_family_has_a_reason() {
        let (total, seconds) = (CREATIONS.name, CREATION_SECONDS.name);
        let failed = WorkspaceBuildCompleted {
            status: BuildStatus::Failed,
            first_successful_start: false,
            ..build()
        };
        assert_eq!(
            why(samples::fact(failed)),
            [(total, NoEffectReason::NotTheFirstStart), (seconds, NoEffectReason::NotSucceeded)]
        );
        assert_eq!(
            why(samples::fact(samples::pool_build())),
            [(total, NoEffectReason::ByThePrebuildsUser)]
        );
        assert_eq!(
            why(samples::fact(samples::claim_build())).last(),
            Some(&(seconds, NoEffectReason::NoCreation))
        );
        let unstarted = WorkspaceBuildCompleted { started_at: None, ..build() };
        assert_eq!(why(samples::fact(unstarted)), [(seconds, NoEffectReason::NoDuration)]);
        let early = PrebuildClaimed {
            completed_at: introduced_at() - TimeDelta::microseconds(1),
            ..claim()
        };
        assert_eq!(
            why(samples::fact(early)),
            [(CLAIM_SECONDS.name, NoEffectReason::BeforeTheIntroduction)]
        );
    }
}
