//! Rebuilds: a stage folded again from zero, compared with what is shown, and put in its place.

mod rehearsal;
mod request;

pub use rehearsal::{Granted, Rehearsal, RehearsedDeployment, RehearsedWindow};
pub use request::{LicenseToken, RebuildRequest, RebuildStage};

use std::collections::{BTreeMap, BTreeSet};

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::effect::saturating;
use super::plan_hash::plan_hash;
use super::series::{Series, SeriesKey, series};
use super::{Actor, Desk, OperationError};
use crate::ledger::{ActKind, LICENSE_RULES, Sequence, Subject};
use crate::projection::{self, Folded};
use crate::stages::{DeploymentLicenses, LicensesState, MetricsState, Stage};

/// The same request again, with the hash of the plan that is to be executed: the plan is made again, and only an equal one is executed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RebuildExecution {
    /// What was asked for in the plan.
    pub rebuild: RebuildRequest,
    /// The hash that the plan has.
    pub hash: String,
    /// Execute although shown series would fall, which a metrics server takes for a restart.
    #[serde(default)]
    pub may_fall: bool,
}

/// What a rebuild would change.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct RebuildPlan {
    /// SHA-256 of what would change, in hexadecimal; absent where there is nothing to execute: a license is installed in coderd, by its
    /// administrators.
    pub hash: Option<String>,
    /// The ledger sequence up to which both were folded.
    pub sequence: Sequence,
    /// Whether anything differs from what is shown now.
    pub differs: bool,
    /// How many shown series would fall.
    pub falling: u32,
    /// What differs, without other rules or licenses: where this is not empty, what is shown is wrong.
    pub differences: Vec<StateDifference>,
    /// What would be shown under other rules or licenses.
    pub rehearsal: Option<Rehearsal>,
}

/// A series or a license window that differs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct StateDifference {
    /// The deployment.
    pub deployment: Uuid,
    /// The metric's name, `license ID`, or `managed agents` for all of them.
    pub what: String,
    /// The series' labels, or the window.
    pub labels: String,
    /// What is shown now; absent where there is nothing.
    pub shown: Option<Told>,
    /// What the fold from zero says; absent where there is nothing.
    pub rebuilt: Option<Told>,
}

/// What a series or a window says.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Told {
    /// A counter's value, a histogram's observations, a window's managed agents.
    pub count: u64,
    /// A histogram's sum in seconds.
    pub sum_seconds: Option<f64>,
}

/// What was done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Rebuilt {
    /// The plan.
    pub hash: String,
    /// In words, and when it takes effect.
    pub done: String,
}

impl Desk {
    /// What a rebuild would change. Writes nothing at all. `progress` is told how many batches are folded from zero, of how many.
    pub async fn plan_rebuild(
        &self,
        request: &RebuildRequest,
        progress: impl Fn(u64, u64) + Send + Sync,
    ) -> Result<RebuildPlan, OperationError> {
        match (request.stage, request.rehearses()?) {
            (_, true) => self.rehearse(request).await,
            (RebuildStage::Metrics, false) => compared(&self.both(progress).await?, metrics_found),
            (RebuildStage::Licenses, false) => compared(&self.both(progress).await?, licenses_found),
        }
    }

    /// Makes the plan again, with the same `progress`, and executes it if it is still the one of that hash.
    ///
    /// # Errors
    /// [`OperationError::Forbidden`] where it is not, or where shown series would fall and that was not allowed; nothing is written then.
    pub async fn execute_rebuild(
        &self,
        request: &RebuildExecution,
        actor: &Actor,
        progress: impl Fn(u64, u64) + Send + Sync,
    ) -> Result<Rebuilt, OperationError> {
        let plan = self.plan_rebuild(&request.rebuild, progress).await?;
        match &plan.hash {
            None => {
                let message = "there is nothing to execute: licenses are installed and removed in coderd, by its administrators";
                return Err(OperationError::Forbidden(message.to_owned()));
            }
            Some(hash) if *hash != request.hash => return Err(OperationError::plan_changed()),
            Some(_) if plan.falling > 0 && !request.may_fall => {
                let message = format!("{} shown series would fall, which a metrics server takes for a restart", plan.falling);
                return Err(OperationError::Forbidden(message + ": allow it (--may-fall), or leave them"));
            }
            Some(_) => {}
        }
        let done = match &request.rebuild.rules {
            Some(rules) => self.choose_rules(rules, request, actor).await?,
            None => self.fold_anew(request, actor).await?,
        };
        Ok(Rebuilt { hash: request.hash.clone(), done })
    }

    async fn choose_rules(&self, rules: &str, request: &RebuildExecution, actor: &Actor) -> Result<String, OperationError> {
        let detail = serde_json::json!({ "plan": request.hash, "from": self.license_rules().await?.to_string(), "to": rules });
        let act = actor.act(ActKind::Rebuild, Subject::Named(LICENSE_RULES), detail);
        self.ledger.in_time(self.ledger.choose(LICENSE_RULES, rules, &act)).await?;
        Ok(format!("license rules {rules} are chosen, over the pipeline's: serving processes follow within seconds"))
    }

    async fn fold_anew(&self, request: &RebuildExecution, actor: &Actor) -> Result<String, OperationError> {
        let stage = request.rebuild.stage.as_str();
        let detail = serde_json::json!({ "plan": request.hash, "may_fall": request.may_fall });
        let act = actor.act(ActKind::Rebuild, Subject::Named(stage), detail);
        self.ledger.in_time(self.ledger.rebuild(stage, &act)).await?;
        Ok(format!("{stage} are folded anew from zero: every process shows the new state from this act's ledger sequence on"))
    }

    /// The state as it is shown, and as it is from zero, at the same sequence.
    async fn both<S: Stage>(&self, progress: impl Fn(u64, u64) + Send + Sync) -> Result<(Folded<S>, Folded<S>), OperationError> {
        let shown = projection::fold_on::<S>(&self.ledger, i64::MAX).await?;
        let told = |done: i64, total: i64| progress(done.unsigned_abs(), total.unsigned_abs());
        let rebuilt = projection::fold_to_telling::<S>(&self.ledger, shown.sequence.number, told).await?;
        if shown.sequence == rebuilt.sequence {
            Ok((shown, rebuilt))
        } else {
            Err(OperationError::Forbidden("the ledger became another one meanwhile: plan again".to_owned()))
        }
    }
}

/// A difference, how large it is whatever live events add to both sides, and whether a shown series would fall.
struct Found {
    difference: StateDifference,
    delta: (i128, i128),
    falls: bool,
}

fn compared<S>((shown, rebuilt): &(Folded<S>, Folded<S>), find: impl Fn(&S, &S) -> Vec<Found>) -> Result<RebuildPlan, OperationError>
where
    S: Stage + PartialEq,
{
    let found = if shown.state == rebuilt.state { Vec::new() } else { find(&shown.state, &rebuilt.state) };
    let essence: Vec<_> =
        found.iter().map(|found| (found.difference.deployment, &found.difference.what, &found.difference.labels, found.delta)).collect();
    Ok(RebuildPlan {
        hash: Some(plan_hash(&(S::NAME, essence))?),
        sequence: shown.sequence,
        differs: shown.state != rebuilt.state,
        falling: u32::try_from(found.iter().filter(|found| found.falls).count()).unwrap_or(u32::MAX),
        differences: found.into_iter().map(|found| found.difference).collect(),
        rehearsal: None,
    })
}

fn metrics_found(shown: &MetricsState, rebuilt: &MetricsState) -> Vec<Found> {
    let (shown, rebuilt) = (series(shown), series(rebuilt));
    let keys: BTreeSet<&SeriesKey> = shown.keys().chain(rebuilt.keys()).collect();
    let differing = keys.into_iter().map(|key| (key, shown.get(key).copied(), rebuilt.get(key).copied()));
    differing
        .filter(|(_, shown, rebuilt)| shown != rebuilt)
        .map(|(key, shown, rebuilt)| {
            let told = |series: Series| Told { count: series.count(), sum_seconds: series.sum_micros().map(|micros| micros as f64 / 1e6) };
            let count = |series: Option<Series>| series.map_or(0, |series| i128::from(series.count()));
            let sum = |series: Option<Series>| series.and_then(|series| series.sum_micros()).unwrap_or(0);
            let labels: Vec<String> = key.labels.iter().map(|(name, value)| format!("{name}={value:?}")).collect();
            Found {
                difference: StateDifference {
                    deployment: key.deployment,
                    what: key.family.to_owned(),
                    labels: labels.join(","),
                    shown: shown.map(told),
                    rebuilt: rebuilt.map(told),
                },
                delta: (count(rebuilt) - count(shown), sum(rebuilt) - sum(shown)),
                falls: shown.is_some_and(|shown| rebuilt.is_none_or(|rebuilt| shown.falls_to(rebuilt))),
            }
        })
        .collect()
}

fn licenses_found(shown: &LicensesState, rebuilt: &LicensesState) -> Vec<Found> {
    let deployments: BTreeSet<Uuid> = shown.deployments().chain(rebuilt.deployments()).map(|(deployment, _)| deployment).collect();
    let mut found = Vec::new();
    for deployment in deployments {
        let (shown, rebuilt) = (shown.deployment(deployment).map(windows), rebuilt.deployment(deployment).map(windows));
        let (shown, rebuilt) = (shown.unwrap_or_default(), rebuilt.unwrap_or_default());
        let keys: BTreeSet<_> = shown.keys().chain(rebuilt.keys()).collect();
        for key in keys.into_iter().filter(|key| shown.get(*key) != rebuilt.get(*key)) {
            let told = |count: &u128| Told { count: saturating(*count), sum_seconds: None };
            let signed = |count: Option<&u128>| count.map_or(0, |count| i128::try_from(*count).unwrap_or(i128::MAX));
            let (shown, rebuilt) = (shown.get(key), rebuilt.get(key));
            let difference = StateDifference {
                deployment,
                what: key.0.clone(),
                labels: key.1.clone(),
                shown: shown.map(told),
                rebuilt: rebuilt.map(told),
            };
            found.push(Found { difference, delta: (signed(rebuilt) - signed(shown), 0), falls: false });
        }
    }
    found
}

/// Managed agents by window, and all of them.
fn windows(licenses: &DeploymentLicenses) -> BTreeMap<(String, String), u128> {
    let agents = &licenses.agents;
    let all = agents.count(DateTime::<Utc>::MIN_UTC, DateTime::<Utc>::MAX_UTC);
    let mut windows = BTreeMap::from([(("managed agents".to_owned(), "of all time".to_owned()), all)]);
    for license in &licenses.licenses {
        let window = license.claims.as_ref().map(|claims| (claims.not_before, claims.expires_at));
        let count = window.map_or(0, |(start, end)| agents.count(start, end));
        let shown = window.map_or("refused".to_owned(), |(start, end)| format!("{start:?} to {end:?}"));
        windows.insert((format!("license {}", license.license_id), shown), count);
    }
    windows
}
