//! Rehearsals: license windows and warnings under other rules, with a candidate license, or without
//! an installed license.

use std::fmt;

use chrono::{DateTime, TimeDelta, Utc};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{RebuildPlan, RebuildRequest};
use crate::event::Fact;
use crate::license::{
    Entitlement, Entitlements, LicenseClaims, RuleSet, Validity, VerifiedLicense,
};
use crate::operations::effect::saturating;
use crate::operations::plan_hash::plan_hash;
use crate::operations::{OperationError, Operations};
use crate::projection;
use crate::stages::{AgentCounts, DeploymentLicenses, KnownLicense, LicensesState, Stage as _};

/// Entitlements now, compared with those under other rules or licenses.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Rehearsal {
    /// Instant of the rehearsal.
    pub at: DateTime<Utc>,
    /// Rules in force.
    pub rules_now: String,
    /// Rehearsed rules.
    pub rules_then: String,
    /// Remarks on the rehearsal.
    pub notes: Vec<String>,
    /// Result for each deployment.
    pub deployments: Vec<RehearsedDeployment>,
}

/// Entitlement of one deployment, and its license windows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct RehearsedDeployment {
    /// Id of the deployment.
    pub deployment: Uuid,
    /// Current answer to coderd.
    pub now: Granted,
    /// Rehearsed answer to coderd.
    pub then: Granted,
    /// Each license, evaluated as the only one.
    pub windows: Vec<RehearsedWindow>,
}

/// One license, evaluated as the only one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct RehearsedWindow {
    /// coderd's own id of the license; for a candidate, the next id that coderd would assign.
    pub license_id: i32,
    /// Whether the license is a candidate: given in the request and not in coderd.
    pub candidate: bool,
    /// State at the instant: `valid`, `in_grace`, `not_yet_valid`, `expired`, `term_too_long`, or
    /// `refused` if the token's verification failed.
    pub validity: String,
    /// What it grants now, at the nearest instant when it is valid; absent if coderd does not have
    /// it now.
    pub now: Option<Granted>,
    /// What it would grant; absent if coderd would not have it.
    pub then: Option<Granted>,
}

/// Entitlement to managed agents.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Granted {
    /// `entitled`, `grace_period` or `not_entitled`.
    pub entitlement: String,
    /// Whether the feature is granted and not disabled by a limit of 0.
    pub enabled: bool,
    /// Whether an effective license exists. Without one, agents are free.
    pub has_license: bool,
    /// Effective limit; under 2025-07 the hard limit.
    pub limit: Option<i64>,
    /// Soft limit; only under 2025-07.
    pub soft_limit: Option<i64>,
    /// Start of the usage period, included. Without a grant, start of the license's own period.
    pub start: Option<DateTime<Utc>>,
    /// End of the period, not included.
    pub end: Option<DateTime<Utc>>,
    /// Managed agents in the period.
    pub agents: Option<u64>,
    /// Warnings for administrators.
    pub warnings: Vec<String>,
    /// Refused licenses, or refused parts of them.
    pub errors: Vec<String>,
}

impl Operations {
    /// Makes the rehearsal. Its hash covers limits, entitlements and warnings, but not the counts,
    /// because live events raise them.
    pub(super) async fn rehearse(
        &self,
        request: &RebuildRequest,
    ) -> Result<RebuildPlan, OperationError> {
        let rules_now = self.license_rules().await?;
        let rules_then = match &request.rules {
            Some(name) => name.parse().map_err(|error| invalid("rules", error))?,
            None => rules_now,
        };
        let candidate = match &request.license {
            Some(token) => {
                Some(self.keys.verify(token.0.trim()).map_err(|error| invalid("license", error))?)
            }
            None => None,
        };
        let at = request.at.unwrap_or_else(|| self.ledger.clock.now());
        let folded = projection::fold_on::<LicensesState>(&self.ledger, i64::MAX).await?;
        let mut then = folded.state.clone();
        let mut notes = Vec::new();
        if candidate.is_some() || !request.without.is_empty() {
            let deployment = self.one_deployment(&folded.state, request)?;
            change(&mut then, deployment, candidate.as_ref(), &request.without)?;
            notes.extend(candidate.as_ref().and_then(|license| foreign(license, deployment)));
        }
        let mut deployments = Vec::new();
        for (deployment, now) in folded.state.deployments() {
            let asked = request.source.is_none_or(|source| source == deployment);
            if let Some(then) = then.deployment(deployment).filter(|_| asked) {
                deployments.push(rehearsed(deployment, (now, rules_now), (then, rules_then), at));
            }
        }
        if let (Some(source), true) = (request.source, deployments.is_empty()) {
            return Err(OperationError::NotFound(format!("the ledger has no deployment {source}")));
        }
        let executable = candidate.is_none() && request.without.is_empty();
        let rehearsal = Rehearsal {
            at,
            rules_now: rules_now.to_string(),
            rules_then: rules_then.to_string(),
            notes,
            deployments,
        };
        let differs = |one: &RehearsedDeployment| {
            one.now != one.then || one.windows.iter().any(|window| window.now != window.then)
        };
        Ok(RebuildPlan {
            hash: executable
                .then(|| plan_hash(&(request.source, request.at, essence(&rehearsal))))
                .transpose()?,
            sequence: folded.sequence,
            differs: rehearsal.deployments.iter().any(differs),
            falling: 0,
            differences: Vec::new(),
            rehearsal: Some(rehearsal),
        })
    }

    /// The deployment of the request, else the pipeline's, else the only one in the ledger.
    fn one_deployment(
        &self,
        state: &LicensesState,
        request: &RebuildRequest,
    ) -> Result<Uuid, OperationError> {
        let there: Vec<Uuid> = state.deployments().map(|(deployment, _)| deployment).collect();
        match (request.source.or(self.deployment), there.as_slice()) {
            (Some(asked), there) if there.contains(&asked) => Ok(asked),
            (Some(asked), _) => {
                Err(OperationError::NotFound(format!("the ledger has no deployment {asked}")))
            }
            (None, [only]) => Ok(*only),
            (None, []) => {
                Err(OperationError::NotFound("the ledger has no deployment yet".to_owned()))
            }
            (None, several) => Err(invalid(
                "source",
                format!("there are several deployments, name one of {several:?}"),
            )),
        }
    }
}

fn invalid(field: &'static str, problem: impl fmt::Display) -> OperationError {
    OperationError::Invalid { field, message: problem.to_string() }
}

/// Adds and removes licenses as the fold does for licenses that appear in coderd or disappear.
fn change(
    then: &mut LicensesState,
    deployment: Uuid,
    candidate: Option<&VerifiedLicense>,
    without: &[i32],
) -> Result<(), OperationError> {
    let there =
        then.deployment(deployment).map(|licenses| licenses.licenses.to_vec()).unwrap_or_default();
    let mut facts = Vec::new();
    for license_id in without {
        let known = there.iter().find(|license| license.license_id == *license_id);
        let known = known.ok_or_else(|| {
            invalid(
                "without",
                format!("deployment {deployment} has no license with id {license_id}"),
            )
        })?;
        facts.push(Fact::License {
            deployment,
            license_id: *license_id,
            jwt_sha256: hash(known)?,
            present: false,
            claims: None,
        });
    }
    if let Some(VerifiedLicense { claims, jwt_sha256, .. }) = candidate {
        if let Some(known) =
            there.iter().find(|license| license.jwt_sha256 == hex::encode(jwt_sha256))
        {
            return Err(invalid(
                "license",
                format!("it is in coderd already, with id {}", known.license_id),
            ));
        }
        let license_id =
            there.iter().map(|license| license.license_id).max().unwrap_or(0).saturating_add(1);
        let claims = Some(serde_json::to_value(claims).map_err(anyhow::Error::from)?);
        facts.push(Fact::License {
            deployment,
            license_id,
            jwt_sha256: *jwt_sha256,
            present: true,
            claims,
        });
    }
    for fact in &facts {
        then.apply(fact).map_err(anyhow::Error::from)?;
    }
    Ok(())
}

fn hash(license: &KnownLicense) -> Result<[u8; 32], OperationError> {
    let mut hash = [0; 32];
    hex::decode_to_slice(&license.jwt_sha256, &mut hash).map_err(anyhow::Error::from)?;
    Ok(hash)
}

/// A message if coderd would refuse to upload the license because it names other deployments.
fn foreign(license: &VerifiedLicense, deployment: Uuid) -> Option<String> {
    let named = || license.claims.deployment_ids.join(", ");
    (!license.claims.is_for(deployment)).then(|| {
        format!("the license names other deployments ({}): coderd will refuse it", named())
    })
}

type Under<'a> = (&'a DeploymentLicenses, RuleSet);

fn rehearsed(
    deployment: Uuid,
    now: Under<'_>,
    then: Under<'_>,
    at: DateTime<Utc>,
) -> RehearsedDeployment {
    let whole = |(licenses, rules): Under<'_>| {
        granted(licenses.entitlements(rules, at), &licenses.agents, None)
    };
    let mut windows = Vec::new();
    let gone = now.0.licenses.iter().filter(|license| !then.0.licenses.contains(license));
    for license in gone.chain(&then.0.licenses) {
        let alone = |(licenses, rules): Under<'_>| {
            let judged_at = license.claims.as_ref().map_or(at, |claims| counting(claims, at));
            licenses.licenses.contains(license).then(|| {
                let answer =
                    licenses.entitlements_by(std::slice::from_ref(license), rules, judged_at);
                granted(answer, &licenses.agents, license.claims.as_ref())
            })
        };
        windows.push(RehearsedWindow {
            license_id: license.license_id,
            candidate: !now.0.licenses.contains(license),
            validity: license
                .claims
                .as_ref()
                .map_or("refused", |claims| validity(claims.validity(at)))
                .to_owned(),
            now: alone(now),
            then: alone(then),
        });
    }
    windows.sort_by_key(|window| window.license_id);
    RehearsedDeployment { deployment, now: whole(now), then: whole(then), windows }
}

/// The instant nearest to `at` at which the license is effective, if there is one.
fn counting(claims: &LicenseClaims, at: DateTime<Utc>) -> DateTime<Utc> {
    let micro = TimeDelta::microseconds(1);
    match claims.validity(at) {
        Validity::NotYetValid => claims.not_before.max(claims.issued_at),
        Validity::Expired => claims.expires_at.checked_sub_signed(micro).unwrap_or(at),
        Validity::Valid | Validity::InGrace | Validity::TermTooLong => at,
    }
}

fn validity(validity: Validity) -> &'static str {
    match validity {
        Validity::NotYetValid => "not_yet_valid",
        Validity::Valid => "valid",
        Validity::InGrace => "in_grace",
        Validity::Expired => "expired",
        Validity::TermTooLong => "term_too_long",
    }
}

fn granted(answer: Entitlements, agents: &AgentCounts, own: Option<&LicenseClaims>) -> Granted {
    let feature = answer.managed_agents();
    let period = feature.usage_period.map(|period| (period.start, period.end));
    let window = period.or_else(|| own.map(|claims| (claims.not_before, claims.expires_at)));
    Granted {
        entitlement: match feature.entitlement {
            Entitlement::NotEntitled => "not_entitled",
            Entitlement::GracePeriod => "grace_period",
            Entitlement::Entitled => "entitled",
        }
        .to_owned(),
        enabled: feature.enabled,
        has_license: answer.has_license,
        limit: feature.limit,
        soft_limit: feature.soft_limit,
        start: window.map(|(start, _)| start),
        end: window.map(|(_, end)| end),
        agents: window.map(|(start, end)| saturating(agents.count(start, end))),
        warnings: answer.warnings,
        errors: answer.errors,
    }
}

/// The rehearsal without its counts and its instant.
fn essence(rehearsal: &Rehearsal) -> impl Serialize + use<> {
    let bare = |granted: &Granted| Granted { agents: None, ..granted.clone() };
    let deployments = rehearsal.deployments.iter().map(|one| {
        let windows: Vec<_> = one
            .windows
            .iter()
            .map(|window| {
                (
                    window.license_id,
                    window.validity.clone(),
                    window.now.as_ref().map(bare),
                    window.then.as_ref().map(bare),
                )
            })
            .collect();
        (one.deployment, bare(&one.now), bare(&one.then), windows)
    });
    (rehearsal.rules_now.clone(), rehearsal.rules_then.clone(), deployments.collect::<Vec<_>>())
}
