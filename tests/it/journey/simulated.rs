//! A vendor for a simulated coderd, and a pipeline file that names both.

use chrono::{DateTime, SecondsFormat, SubsecRound, TimeDelta, Utc};
use tallyline::clock::Clock;
use tallyline_sim::coderd::Simulation;
use tallyline_sim::tallyman::{self, Switches, Tallyman};
use tokio_util::sync::CancellationToken;

use crate::support::Database;

/// It accepts only the license under which coderd would publish, and remembers ids for 34 days.
pub async fn vendor(
    simulation: &Simulation,
    switches: Switches,
    stop: &CancellationToken,
) -> Tallyman {
    let now = Clock::system().now();
    let truth = simulation.truth();
    let good = truth.licenses.iter().filter(|license| {
        let claims = &license.claims;
        license.verifiable
            && claims.publish_usage_data
            && claims.account_type == "salesforce"
            && claims.nbf <= now
            && now < claims.exp
    });
    let config = tallyman::Config {
        license_keys: good.map(|license| license.jwt.clone()).collect(),
        deployment_ids: vec![simulation.deployment().id],
        remember: TimeDelta::days(34),
        switches,
        ..tallyman::Config::default()
    };
    assert_eq!(config.license_keys.len(), 1);
    Tallyman::start(config, Clock::system(), stop.clone()).await.expect("a vendor")
}

/// The exact end of the first creation from then on: this one is observed, the one before it is
/// not.
pub fn introduction(simulation: &Simulation, from: DateTime<Utc>) -> DateTime<Utc> {
    let truth = simulation.truth();
    let ends = truth
        .creation_seconds
        .iter()
        .flat_map(|series| &series.observations)
        .map(|observed| observed.completed_at);
    ends.filter(|end| *end >= from).min().expect("a creation")
}

/// Lines of a pipeline that collects this coderd and publishes to this vendor. `pace` contains the
/// lines for the intervals.
pub fn pipeline(
    coderd: &Database,
    simulation: &Simulation,
    tallyman: &Tallyman,
    introduced_at: DateTime<Utc>,
    pace: &str,
) -> String {
    let key = simulation.license_key();
    format!(
        "source.coderd_url = '{}'
source.introduced_at = {}
license.public_keys.'{}' = '''{}'''
publish.mode = 'sole'
publish.url = '{}'
publish.interval_seconds = 0.5
{pace}",
        coderd.url,
        introduced_at.trunc_subsecs(6).to_rfc3339_opts(SecondsFormat::AutoSi, true),
        key.kid,
        key.public_key_pem,
        tallyman.ingest_url(),
    )
}
