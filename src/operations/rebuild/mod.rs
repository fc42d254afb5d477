//! Rebuilds: fold a stage from zero, compare it with the shown state, and replace that state.

mod rehearsal;
mod request;

pub use rehearsal::{Granted, Rehearsal, RehearsedDeployment, RehearsedWindow};
pub use request::{LicenseToken, RebuildRequest, RebuildStage};

use std::collections::{BTreeMap, BTreeSet};

use axum::http::Method;
use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::effect::saturating;
use super::plan_hash::plan_hash;
use super::series::{Series, SeriesKey, series};
use super::{Actor, ApiRequest, Operation, OperationError, Operations, Progress, Run, Step};
use crate::ledger::{ActKind, LICENSE_RULES, Sequence, Subject, choices, snapshots};
use crate::projection::{self, Folded};
use crate::stages::{DeploymentLicenses, LicensesState, MetricsState, Stage};

/// Compute the plan again and execute it if its hash is equal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema, clap::Args)]
#[serde(deny_unknown_fields)]
pub struct RebuildExecution {
    /// The request of the plan.
    #[command(flatten)]
    pub rebuild: RebuildRequest,
    /// Hash that the plan of the same request has.
    #[arg(long = "plan")]
    pub hash: String,
    /// Execute even if shown series would decrease. A metrics server treats a decrease as a
    /// restart.
    #[arg(long, alias = "may-fall")]
    #[serde(default, alias = "may_fall")]
    pub allow_decrease: bool,
}

/// Effect of a rebuild.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct RebuildPlan {
    /// SHA-256 of the changes, in hexadecimal. Absent if nothing can be executed: a license is
    /// installed in coderd, by its administrators.
    pub hash: Option<String>,
    /// Ledger sequence of both the shown and the rebuilt state.
    pub sequence: Sequence,
    /// Whether the rebuilt state differs from the shown state.
    pub differs: bool,
    /// Number of shown series that would decrease.
    pub falling: u32,
    /// Differences under the current rules and licenses. If there are any, the shown state is
    /// wrong.
    pub differences: Vec<StateDifference>,
    /// Result under other rules or licenses.
    pub rehearsal: Option<Rehearsal>,
}

/// A series or a license window that differs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct StateDifference {
    /// Id of the deployment.
    pub deployment: Uuid,
    /// Name of the metric, `license ID`, or `managed agents` for their total.
    pub what: String,
    /// Labels of the series, or the license window.
    pub labels: String,
    /// Shown value; absent if nothing is shown.
    pub shown: Option<SeriesValue>,
    /// Value of the fold from zero; absent if it has none.
    pub rebuilt: Option<SeriesValue>,
}

/// Value of a series or a window.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct SeriesValue {
    /// Value of a counter, observations of a histogram, or managed agents of a window.
    pub count: u64,
    /// Sum of a histogram in seconds.
    pub sum_seconds: Option<f64>,
}

/// Result of a rebuild.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Rebuilt {
    /// Hash of the plan.
    pub hash: String,
    /// Description of the change, and when it takes effect.
    pub done: String,
}

impl ApiRequest for RebuildRequest {
    type Answer = RebuildPlan;
    const METHOD: Method = Method::POST;
    const PATH: &'static str = "/api/v1/rebuilds";
    const ANSWER: &'static str = "The effect. Nothing is written.";
    const IS_LONG: bool = true;
}

impl Operation for RebuildRequest {
    async fn run(
        &self,
        Run { operations, progress, .. }: Run<'_>,
    ) -> Result<RebuildPlan, OperationError> {
        match (self.stage, self.rehearses()?) {
            (_, true) => operations.rehearse(self).await,
            (RebuildStage::Metrics, false) => {
                compared(&operations.both(progress).await?, metrics_found)
            }
            (RebuildStage::Licenses, false) => {
                compared(&operations.both(progress).await?, licenses_found)
            }
        }
    }
}

impl ApiRequest for RebuildExecution {
    type Answer = Rebuilt;
    const METHOD: Method = Method::POST;
    const PATH: &'static str = "/api/v1/rebuilds/execute";
    const ANSWER: &'static str =
        "The change. 409: the effect is not the planned one, or series would decrease.";
    const IS_LONG: bool = true;
}

impl Operation for RebuildExecution {
    async fn run(&self, run: Run<'_>) -> Result<Rebuilt, OperationError> {
        let Run { operations, actor, .. } = run;
        let plan = self.rebuild.run(run).await?;
        match &plan.hash {
            None => {
                let message = "there is nothing to execute: licenses are installed and removed in coderd, by its administrators";
                return Err(OperationError::Forbidden(message.to_owned()));
            }
            Some(hash) if *hash != self.hash => return Err(OperationError::plan_changed()),
            Some(_) if plan.falling > 0 && !self.allow_decrease => {
                let message = format!(
                    "{} shown series would decrease, which a metrics server treats as a restart",
                    plan.falling
                );
                return Err(OperationError::Forbidden(
                    message + ": add --allow-decrease to execute",
                ));
            }
            Some(_) => {}
        }
        let done = match &self.rebuild.rules {
            Some(rules) => operations.choose_rules(rules, self, actor).await?,
            None => operations.restart_fold(self, actor).await?,
        };
        Ok(Rebuilt { hash: self.hash.clone(), done })
    }
}

impl Operations {
    async fn choose_rules(
        &self,
        rules: &str,
        request: &RebuildExecution,
        actor: &Actor,
    ) -> Result<String, OperationError> {
        let detail = serde_json::json!({ "plan": request.hash, "from": self.license_rules().await?.to_string(), "to": rules });
        let act = actor.act(ActKind::Rebuild, Subject::Named(LICENSE_RULES), detail);
        self.ledger
            .run(async |conn| {
                choices::set(conn, LICENSE_RULES, rules, &act, self.ledger.clock.now()).await
            })
            .await?;
        Ok(format!(
            "license rules {rules} are chosen, over the pipeline's: serving processes follow within seconds"
        ))
    }

    async fn restart_fold(
        &self,
        request: &RebuildExecution,
        actor: &Actor,
    ) -> Result<String, OperationError> {
        let stage = request.rebuild.stage.as_str();
        let detail =
            serde_json::json!({ "plan": request.hash, "allow_decrease": request.allow_decrease });
        let act = actor.act(ActKind::Rebuild, Subject::Named(stage), detail);
        self.ledger
            .with_statements(snapshots::REBUILD_STATEMENTS)
            .run(async |conn| snapshots::rebuild(conn, stage, &act, self.ledger.clock.now()).await)
            .await?;
        Ok(format!(
            "{stage}: the fold restarts from zero; every process shows the new state from this act's ledger sequence on"
        ))
    }

    /// The shown state and the state folded from zero, at the same sequence. For metrics, the second
    /// has the events as corrected now.
    async fn both<S: Stage>(
        &self,
        progress: Progress<'_>,
    ) -> Result<(Folded<S>, Folded<S>), OperationError> {
        let shown = projection::fold_on::<S>(&self.ledger, i64::MAX).await?;
        let told = |done: i64, total: i64| {
            progress(Step {
                doing: "folding",
                items: "batches",
                done: done.unsigned_abs(),
                total: total.unsigned_abs(),
            });
        };
        let rebuilt =
            projection::fold_as_rebuilt::<S>(&self.ledger, shown.sequence.number, told).await?;
        if shown.sequence == rebuilt.sequence {
            Ok((shown, rebuilt))
        } else {
            Err(OperationError::Forbidden(
                "the ledger's incarnation changed during the fold: plan again".to_owned(),
            ))
        }
    }
}

/// A difference, its size independent of live events, and whether a shown series would decrease.
struct Found {
    difference: StateDifference,
    delta: (i128, i128),
    falls: bool,
}

fn compared<S>(
    (shown, rebuilt): &(Folded<S>, Folded<S>),
    find: impl Fn(&S, &S) -> Vec<Found>,
) -> Result<RebuildPlan, OperationError>
where
    S: Stage + PartialEq,
{
    let found =
        if shown.state == rebuilt.state { Vec::new() } else { find(&shown.state, &rebuilt.state) };
    let essence: Vec<_> = found
        .iter()
        .map(|found| {
            (
                found.difference.deployment,
                &found.difference.what,
                &found.difference.labels,
                found.delta,
            )
        })
        .collect();
    Ok(RebuildPlan {
        hash: Some(plan_hash(&(S::NAME, essence))?),
        sequence: shown.sequence,
        differs: shown.state != rebuilt.state,
        falling: u32::try_from(found.iter().filter(|found| found.falls).count())
            .unwrap_or(u32::MAX),
        differences: found.into_iter().map(|found| found.difference).collect(),
        rehearsal: None,
    })
}

fn metrics_found(shown: &MetricsState, rebuilt: &MetricsState) -> Vec<Found> {
    let (shown, rebuilt) = (series(shown), series(rebuilt));
    let keys: BTreeSet<&SeriesKey> = shown.keys().chain(rebuilt.keys()).collect();
    let differing =
        keys.into_iter().map(|key| (key, shown.get(key).copied(), rebuilt.get(key).copied()));
    differing
        .filter(|(_, shown, rebuilt)| shown != rebuilt)
        .map(|(key, shown, rebuilt)| {
            let told = |series: Series| SeriesValue {
                count: series.count(),
                sum_seconds: series.sum_micros().map(|micros| micros as f64 / 1e6),
            };
            let count =
                |series: Option<Series>| series.map_or(0, |series| i128::from(series.count()));
            let sum =
                |series: Option<Series>| series.and_then(|series| series.sum_micros()).unwrap_or(0);
            let labels: Vec<String> =
                key.labels.iter().map(|(name, value)| format!("{name}={value:?}")).collect();
            Found {
                difference: StateDifference {
                    deployment: key.deployment,
                    what: key.family.to_owned(),
                    labels: labels.join(","),
                    shown: shown.map(told),
                    rebuilt: rebuilt.map(told),
                },
                delta: (count(rebuilt) - count(shown), sum(rebuilt) - sum(shown)),
                falls: shown
                    .is_some_and(|shown| rebuilt.is_none_or(|rebuilt| shown.falls_to(rebuilt))),
            }
        })
        .collect()
}

fn licenses_found(shown: &LicensesState, rebuilt: &LicensesState) -> Vec<Found> {
    let deployments: BTreeSet<Uuid> = shown
        .deployments()
        .chain(rebuilt.deployments())
        .map(|(deployment, _)| deployment)
        .collect();
    let mut found = Vec::new();
    for deployment in deployments {
        let (shown, rebuilt) = (
            shown.deployment(deployment).map(windows),
            rebuilt.deployment(deployment).map(windows),
        );
        let (shown, rebuilt) = (shown.unwrap_or_default(), rebuilt.unwrap_or_default());
        let keys: BTreeSet<_> = shown.keys().chain(rebuilt.keys()).collect();
        for key in keys.into_iter().filter(|key| shown.get(*key) != rebuilt.get(*key)) {
            let told = |count: &u128| SeriesValue { count: saturating(*count), sum_seconds: None };
            let signed = |count: Option<&u128>| {
                count.map_or(0, |count| i128::try_from(*count).unwrap_or(i128::MAX))
            };
            let (shown, rebuilt) = (shown.get(key), rebuilt.get(key));
            let difference = StateDifference {
                deployment,
                what: key.0.clone(),
                labels: key.1.clone(),
                shown: shown.map(told),
                rebuilt: rebuilt.map(told),
            };
            found.push(Found {
                difference,
                delta: (signed(rebuilt) - signed(shown), 0),
                falls: false,
            });
        }
    }
    found
}

/// Managed agents per window, and their total.
fn windows(licenses: &DeploymentLicenses) -> BTreeMap<(String, String), u128> {
    let agents = &licenses.agents;
    let all = agents.count(DateTime::<Utc>::MIN_UTC, DateTime::<Utc>::MAX_UTC);
    let mut windows =
        BTreeMap::from([(("managed agents".to_owned(), "of all time".to_owned()), all)]);
    for license in &licenses.licenses {
        let window = license.claims.as_ref().map(|claims| (claims.not_before, claims.expires_at));
        let count = window.map_or(0, |(start, end)| agents.count(start, end));
        let shown =
            window.map_or("refused".to_owned(), |(start, end)| format!("{start:?} to {end:?}"));
        windows.insert((format!("license {}", license.license_id), shown), count);
    }
    windows
}
