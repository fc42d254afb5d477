//! The effects of one event, computed by the real stages: the rules have one implementation.

use chrono::{DateTime, Utc};
use serde::Deserialize as _;

use super::{ExplainedSeries, Label, LicenseWindow, NoSeries};
use crate::event::{Event, Fact, Payload, UsageQuantity};
use crate::ledger::{LicenseHistory, first_starts, licenses, sources};
use crate::license::{LicenseClaims, RuleSet, UsagePeriod};
use crate::operations::{OperationError, Operations};
use crate::stages::{Effect, LicensesState, Stage as _, effects_of};

const MICROS_PER_SECOND: f64 = 1e6;

/// A license that coderd has or had, from the ledger.
struct Known {
    license_id: i32,
    jwt_sha256: [u8; 32],
    claims: LicenseClaims,
    /// The claims as the ledger stores them.
    kept: serde_json::Value,
    gone_at: Option<DateTime<Utc>>,
}

impl Operations {
    /// The series that the event changed, and the families that it did not change, with the first
    /// starts at the sequence `at`.
    pub(in crate::operations) async fn metrics_of(
        &self,
        event: &Event,
        at: i64,
    ) -> Result<(Vec<ExplainedSeries>, Vec<NoSeries>), OperationError> {
        let source =
            self.ledger.run(async |conn| sources::get(conn, event.deployment).await).await?;
        let Some(source) = source else { return Ok((Vec::new(), Vec::new())) };
        let mut event = event.clone();
        if let Payload::Build(build) = &mut event.payload {
            let kept = self
                .ledger
                .run(async |conn| first_starts::at(conn, source.id, build.workspace_id, at).await)
                .await?;
            build.first_successful_start &= kept == Some(build.build_id);
        }
        let effects = effects_of(&event, source.introduced_at);
        let unaffected = effects
            .unaffected
            .iter()
            .map(|one| NoSeries { family: one.family.to_owned(), why: one.why.to_string() });
        Ok((effects.added.iter().map(series).collect(), unaffected.collect()))
    }

    /// The usage periods of all licenses that coderd has or had, under the rules in force. A fold
    /// of this license and this event alone gives each period, at an instant when the license is
    /// valid.
    pub(super) async fn license_windows(
        &self,
        source_id: i16,
        event: &Event,
    ) -> Result<Vec<LicenseWindow>, OperationError> {
        if !matches!(&event.payload, Payload::Usage(usage) if matches!(usage.quantity, UsageQuantity::ManagedAgents(_)))
        {
            return Ok(Vec::new());
        }
        let (rules, known) = (self.license_rules().await?, self.known_licenses(source_id).await?);
        let there: Vec<&Known> = known.iter().filter(|license| license.gone_at.is_none()).collect();
        let in_force = period(rules, event, &there, self.ledger.clock.now())?;
        let mut windows = Vec::new();
        for license in &known {
            let good_at = license.claims.not_before.max(license.claims.issued_at);
            if let Some((period, agents)) = period(rules, event, &[license], good_at)? {
                windows.push(LicenseWindow {
                    license_id: license.license_id,
                    start: period.start,
                    end: period.end,
                    counts: agents > 0,
                    agents,
                    in_force: license.gone_at.is_none()
                        && in_force.is_some_and(|(winning, _)| winning == period),
                    gone_at: license.gone_at,
                });
            }
        }
        Ok(windows)
    }

    async fn known_licenses(&self, source_id: i16) -> Result<Vec<Known>, OperationError> {
        let mut known = Vec::new();
        for license in self.ledger.run(async |conn| licenses::all(conn, source_id).await).await? {
            let LicenseHistory { license_id, jwt_sha256, claims: kept, gone_at } = license;
            let claims = LicenseClaims::deserialize(&kept)?;
            known.push(Known { license_id, jwt_sha256, claims, kept, gone_at });
        }
        Ok(known)
    }
}

/// The usage period in force at `at`, and how much of its usage is this event. The licenses stage
/// computes both.
fn period(
    rules: RuleSet,
    event: &Event,
    licenses: &[&Known],
    at: DateTime<Utc>,
) -> Result<Option<(UsagePeriod, i64)>, OperationError> {
    let deployment = event.deployment;
    let mut state = LicensesState::default();
    let mut facts =
        vec![Fact::Introduced { deployment, introduced_at: at }, Fact::Event(event.clone())];
    facts.extend(licenses.iter().map(|license| Fact::License {
        deployment,
        license_id: license.license_id,
        jwt_sha256: license.jwt_sha256,
        present: true,
        claims: Some(license.kept.clone()),
    }));
    for fact in &facts {
        state.apply(fact).map_err(anyhow::Error::from)?;
    }
    let answer = state.deployment(deployment).map(|licenses| licenses.entitlements(rules, at));
    let feature = answer.as_ref().map(|answer| answer.managed_agents());
    Ok(feature.and_then(|feature| feature.usage_period.zip(feature.actual)))
}

fn series(effect: &Effect) -> ExplainedSeries {
    let label =
        |(name, value): (&str, &str)| Label { name: name.to_owned(), value: value.to_owned() };
    ExplainedSeries {
        family: effect.family().to_owned(),
        labels: effect.labels().into_iter().map(label).collect(),
        observed_seconds: effect.observed_micros().map(|micros| micros as f64 / MICROS_PER_SECOND),
    }
}
