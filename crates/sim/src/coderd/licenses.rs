//! The deployment's licenses: windows with edges within a day, early renewal, the premium default,
//! and licenses without effect.

use std::collections::BTreeMap;

use chrono::{DateTime, DurationRound, TimeDelta, Utc};
use rand::Rng;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::chance::{Dice, uuid_from};
use super::config::Config;
use super::signing::Signer;

/// A license's claims (JWT names, times in whole seconds).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claims {
    /// Issuer; not checked by coderd.
    pub iss: String,
    /// The license's own id.
    pub jti: String,
    /// Issued at.
    #[serde(with = "chrono::serde::ts_seconds")]
    pub iat: DateTime<Utc>,
    /// Start of the usage window.
    #[serde(with = "chrono::serde::ts_seconds")]
    pub nbf: DateTime<Utc>,
    /// End of grace and of the usage window.
    #[serde(with = "chrono::serde::ts_seconds")]
    pub exp: DateTime<Utc>,
    /// End of the paid term, start of grace.
    #[serde(with = "chrono::serde::ts_seconds")]
    pub license_expires: DateTime<Utc>,
    /// `salesforce` for a license that may publish.
    pub account_type: String,
    /// The customer.
    pub account_id: String,
    /// The deployments for which it was sold.
    pub deployment_ids: Vec<String>,
    /// Whether it is a trial.
    pub trial: bool,
    /// `premium` or `enterprise`.
    pub feature_set: String,
    /// Always 3.
    pub version: u64,
    /// Limits by feature name.
    pub features: BTreeMap<String, i64>,
    /// Whether telemetry is required.
    pub require_telemetry: bool,
    /// Whether usage is published.
    pub publish_usage_data: bool,
}

/// A row of `licenses`.
#[derive(Clone, Debug)]
pub struct LicenseRow {
    pub uuid: Uuid,
    pub jwt: String,
    pub exp: DateTime<Utc>,
    pub kid: String,
    /// Whether the published key signed it.
    pub known_key: bool,
    pub claims: Claims,
}

/// A license and the instant of its upload.
pub(super) type Upload = (DateTime<Utc>, LicenseRow);

/// Creates the key pair that signs the licenses, and the licenses.
pub(super) fn plan(
    config: &Config,
    deployment_id: Uuid,
    dice: &mut Dice,
) -> anyhow::Result<(Signer, Vec<Upload>)> {
    let mut secret = config.license_key.unwrap_or([0; 32]);
    if config.license_key.is_none() {
        dice.fill(&mut secret);
    }
    let mut stray = [0; 32];
    dice.fill(&mut stray);
    let known = Signer::new(secret, &format!("coderd-sim-{}", config.seed))?;
    let unknown = Signer::new(stray, "coderd-sim-unknown-key")?;

    let mut rows = Vec::new();
    for terms in terms(config) {
        let signer = if terms.known_key { &known } else { &unknown };
        let claims = terms.claims(config, deployment_id, uuid_from(dice));
        let row = row(signer, claims, uuid_from(dice), terms.known_key)?;
        // Uploaded a few minutes after it was issued, or present when the history begins.
        let at = (row.claims.iat + TimeDelta::minutes(7)).max(config.start);
        rows.push((at, row));
    }
    Ok((known, rows))
}

pub(super) fn row(
    signer: &Signer,
    claims: Claims,
    uuid: Uuid,
    known_key: bool,
) -> anyhow::Result<LicenseRow> {
    let (jwt, kid) = (signer.sign(&claims)?, signer.public().kid.clone());
    Ok(LicenseRow { uuid, jwt, exp: claims.exp, kid, known_key, claims })
}

/// The terms of one license. Instants are parts of the span from start to end, and may be outside
/// of it.
struct Terms {
    issued: f64,
    from: f64,
    grace_from: f64,
    until: f64,
    account_type: &'static str,
    feature_set: &'static str,
    publish: bool,
    trial: bool,
    known_key: bool,
    features: &'static [(&'static str, i64)],
}

const TERMS: Terms = Terms {
    issued: -1.0,
    from: -1.0,
    grace_from: 2.0,
    until: 2.5,
    account_type: "salesforce",
    feature_set: "premium",
    publish: true,
    trial: false,
    known_key: true,
    features: &[],
};

const LIMITS: &[(&str, i64)] =
    &[("managed_agent_limit_soft", 400), ("managed_agent_limit_hard", 600), ("user_limit", 50)];
const RENEWED: &[(&str, i64)] =
    &[("managed_agent_limit_soft", 100), ("managed_agent_limit_hard", 5000), ("user_limit", 50)];

fn terms(config: &Config) -> Vec<Terms> {
    let mut terms = vec![
        // The current year, ending inside the history, in grace before it ends.
        Terms {
            issued: -2.013,
            from: -2.013,
            grace_from: 0.381,
            until: 0.6137,
            features: LIMITS,
            ..TERMS
        },
        // Renewed early: both windows count usage in the overlap.
        Terms {
            issued: 0.2911,
            from: 0.4473,
            grace_from: 11.0,
            until: 12.0,
            features: RENEWED,
            ..TERMS
        },
        // Premium without the keys: the default by user limit. It does not publish.
        Terms {
            issued: -0.9,
            from: 0.1519,
            publish: false,
            features: &[("user_limit", 30)],
            ..TERMS
        },
        // Enterprise without the keys: not entitled.
        Terms {
            issued: -0.8,
            from: -0.8,
            feature_set: "enterprise",
            publish: false,
            features: &[("user_limit", 20)],
            ..TERMS
        },
        // Of another account type: it must not sign requests, even as the newest.
        Terms {
            issued: 0.05,
            from: 0.7391,
            account_type: "internal",
            features: &[("user_limit", 10)],
            ..TERMS
        },
        // A trial that expired early in the history.
        Terms {
            issued: -0.5,
            from: -0.5,
            grace_from: 0.0611,
            until: 0.0877,
            trial: true,
            publish: false,
            features: LIMITS,
            ..TERMS
        },
        // Signed by an unknown key: the newest of all, and invalid.
        Terms { issued: 0.4, from: -1.5, known_key: false, features: LIMITS, ..TERMS },
    ];
    // A history shorter than an hour has no room for separate edges.
    if config.end - config.start < TimeDelta::hours(1) {
        terms.truncate(1);
        terms[0] = Terms { features: LIMITS, ..TERMS };
    }
    terms
}

impl Terms {
    fn claims(&self, config: &Config, deployment_id: Uuid, id: Uuid) -> Claims {
        let at = |part: f64| instant(config, part);
        Claims {
            iss: "license-issuer@example.invalid".to_owned(),
            jti: id.to_string(),
            iat: at(self.issued),
            nbf: at(self.from),
            license_expires: at(self.grace_from),
            exp: at(self.until),
            account_type: self.account_type.to_owned(),
            account_id: "account-001".to_owned(),
            deployment_ids: vec![deployment_id.to_string()],
            trial: self.trial,
            feature_set: self.feature_set.to_owned(),
            version: 3,
            features: self
                .features
                .iter()
                .map(|(name, limit)| ((*name).to_owned(), *limit))
                .collect(),
            require_telemetry: false,
            publish_usage_data: self.publish,
        }
    }
}

/// A part of the span as a whole second within a day. A license that ends after the history ends at
/// least a month later. Otherwise a short history (a demo) would run out of licenses.
#[allow(clippy::cast_possible_truncation, clippy::cast_precision_loss)] // a span of seconds is far below 2^52
fn instant(config: &Config, part: f64) -> DateTime<Utc> {
    let span = (config.end - config.start).num_seconds() as f64;
    let mut at = config.start + TimeDelta::seconds((span * part) as i64);
    if part > 1.0 {
        at += TimeDelta::days(30);
    }
    let at = at.duration_trunc(TimeDelta::seconds(1)).unwrap_or(at);
    let midnight = at.date_naive().and_time(chrono::NaiveTime::MIN).and_utc();
    if (at - midnight).num_seconds() == 0 { at + TimeDelta::seconds(4 * 3600 + 77) } else { at }
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::schema::SchemaVersion;
    use super::*;

    pub(in crate::coderd) fn claims() -> Claims {
        let start = DateTime::from_timestamp(1_780_000_000, 0).unwrap();
        let config =
            Config::history(1, SchemaVersion::TasksEra, start, start + TimeDelta::days(25), 10);
        terms(&config)[0].claims(&config, Uuid::nil(), Uuid::nil())
    }

    #[test]
    fn windows_overlap_and_end_in_whole_seconds_of_a_day() {
        let start = DateTime::from_timestamp(1_780_000_000, 0).unwrap();
        let config =
            Config::history(1, SchemaVersion::TasksEra, start, start + TimeDelta::days(25), 10);
        let (old, new) = (&terms(&config)[0], &terms(&config)[1]);
        let (old, new) = (
            old.claims(&config, Uuid::nil(), Uuid::nil()),
            new.claims(&config, Uuid::nil(), Uuid::nil()),
        );
        assert!(old.nbf < new.nbf && new.nbf < old.exp && old.exp < new.exp, "an early renewal");
        for edge in [old.exp, new.nbf] {
            assert_eq!(edge.timestamp_subsec_nanos(), 0);
            assert_ne!(edge.timestamp() % 86400, 0, "an edge lies in mid-day");
        }
    }
}
