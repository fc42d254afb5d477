//! `GET /metrics`: this process's telemetry, and the domain series of one source if this process
//! may show them.
//!
//! The order of steps is the guarantee. Read the lease when the request arrives, then the states of
//! one moment. Raise `shown_sequence` in the ledger to that moment, then answer. Any later process
//! reads a sequence at least as high in the ledger, so no series decreases.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::State;
use axum::http::header::{ACCEPT, CONTENT_TYPE, HeaderMap};
use axum::response::{IntoResponse, Response};
use prometheus::proto::MetricFamily;
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, timeout_at};
use utoipa::{IntoParams, ToSchema};
use uuid::Uuid;

use super::Serving;
use super::answer::Problem;
use super::chosen_source::{NoSource, choose};
use super::received::Received;
use super::sources::Known;
use super::withheld::Withheld;
use crate::ledger::{Lease, leases};
use crate::metrics::{Format, encode};
use crate::projection::{self, DeploymentFamilies, Freshness};

/// Maximum wait for the domain series. The wait is also limited to half of the scrape timeout that
/// the server sends.
const LONGEST_WAIT: Duration = Duration::from_secs(5);
/// Header in which Prometheus sends its scrape timeout, in seconds.
const SCRAPE_TIMEOUT: &str = "x-prometheus-scrape-timeout-seconds";

/// Options of the page.
#[derive(Debug, Serialize, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct Page {
    /// Id of the deployment whose series are shown.
    source: Option<Uuid>,
    /// Format of the page. Overrides the `Accept` headers.
    #[param(inline)]
    format: Option<Forced>,
}

/// A format that overrides the `Accept` headers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
enum Forced {
    Text,
}

/// Show the domain series of one source, and the telemetry of this process
#[utoipa::path(get, path = "/metrics", params(Page), responses((status = 200, description = "The series.", body = String)))]
pub(super) async fn metrics(
    State(serving): State<Arc<Serving>>,
    headers: HeaderMap,
    Received { request: page, .. }: Received<Page>,
) -> Result<Response, Problem> {
    let format = match page.format {
        Some(Forced::Text) => Format::Text,
        None => Format::for_accept(&accepted(&headers)),
    };
    let domain = match families(&serving, page.source, wait(&headers)).await {
        Ok(families) => families,
        // Report only a requested source: a configured one may be introduced later, and its
        // telemetry is needed until then.
        Err(Withheld::Source(unknown @ NoSource::Unknown(_))) if page.source.is_some() => {
            return Err(unknown.into());
        }
        Err(why) => {
            serving.telemetry.withheld(why);
            Vec::new()
        }
    };
    let encoded = tokio::task::spawn_blocking(move || {
        let folded = [
            ("metrics", *serving.api.metrics.watch().borrow()),
            ("licenses", *serving.api.licenses.watch().borrow()),
        ];
        serving.telemetry.update(
            serving.lease.held().is_some(),
            folded,
            serving.known.now().as_deref(),
        );
        encode(&together(serving.api.own.registry.gather(), domain), format)
    });
    let (content_type, body) = encoded
        .await
        .map_err(|cause| Problem::internal(&cause))?
        .map_err(|cause| Problem::internal(&cause))?;
    Ok(([(CONTENT_TYPE, content_type)], body).into_response())
}

/// Joins all `Accept` headers.
pub(super) fn accepted(headers: &HeaderMap) -> String {
    let all: Vec<&str> =
        headers.get_all(ACCEPT).iter().filter_map(|value| value.to_str().ok()).collect();
    all.join(",")
}

fn wait(headers: &HeaderMap) -> Duration {
    let seconds =
        headers.get(SCRAPE_TIMEOUT).and_then(|value| value.to_str().ok()?.parse::<f64>().ok());
    let half = seconds.and_then(|seconds| Duration::try_from_secs_f64(seconds / 2.0).ok());
    half.map_or(LONGEST_WAIT, |half| half.min(LONGEST_WAIT))
}

/// All families in the order of names. A telemetry family with a domain family's name is omitted: a
/// duplicate family fails the whole scrape.
fn together(mut telemetry: Vec<MetricFamily>, domain: Vec<MetricFamily>) -> Vec<MetricFamily> {
    telemetry.retain(|own| domain.iter().all(|family| family.name() != own.name()));
    telemetry.extend(domain);
    telemetry.sort_by(|one, other| one.name().cmp(other.name()));
    telemetry
}

/// The source and the lease for its series, if they may be shown.
fn permitted(
    known: Option<&Known>,
    lease: Option<Lease>,
    configured: Option<Uuid>,
    asked: Option<Uuid>,
) -> Result<(Uuid, Lease), Withheld> {
    let known = known.ok_or(Withheld::Behind)?;
    let there: Vec<Uuid> = known.sources.iter().map(|known| known.source.deployment_id).collect();
    let source = choose(&there, configured.or_else(|| known.only_one_in_use()), asked)
        .map_err(Withheld::Source)?;
    let lease = lease.ok_or(Withheld::NotHolder)?;
    if known.recovering {
        return Err(Withheld::Recovering);
    }
    if known.source(source).is_some_and(|source| source.backfilled) {
        Ok((source, lease))
    } else {
        Err(Withheld::Backfilling)
    }
}

/// The ledger's answer when a state is to be shown.
#[derive(Debug, PartialEq, Eq)]
enum Raised {
    /// The state may be shown.
    Shown,
    /// A later sequence was already shown: reach this sequence first.
    CatchUp(i64),
    /// Another process has the lease.
    Lost,
}

fn raised(freshness: Freshness, shown_sequence: Option<i64>) -> Raised {
    match shown_sequence {
        None => Raised::Lost,
        Some(shown) if shown > freshness.sequence.number => Raised::CatchUp(shown),
        Some(_) => Raised::Shown,
    }
}

/// The families of the requested source that may be shown now. Takes little longer than `within`.
async fn families(
    serving: &Serving,
    asked: Option<Uuid>,
    within: Duration,
) -> Result<Vec<MetricFamily>, Withheld> {
    let lease = serving.lease.held();
    let known = serving.known.now();
    let (source, lease) = permitted(known.as_deref(), lease, serving.settings.source, asked)?;
    let known = known.ok_or(Withheld::Behind)?;
    let deadline = Instant::now() + within;
    loop {
        let view = serving.api.metrics.clone();
        let made =
            tokio::task::spawn_blocking(move || projection::families(&view, source, false)).await;
        let Ok(Some(DeploymentFamilies { freshness, families })) = made else {
            return Err(Withheld::Behind);
        };
        if !known.is_in(freshness) {
            return Err(Withheld::Behind);
        }
        let raise =
            serving.api.own.ledger.run(async |conn| {
                leases::raise_shown_sequence(conn, &lease, freshness.sequence).await
            });
        let shown_sequence = timeout_at(deadline, raise)
            .await
            .map_err(|_| Withheld::LedgerAway)?
            .map_err(|_| Withheld::LedgerAway)?;
        match raised(freshness, shown_sequence) {
            Raised::Shown => {
                serving.telemetry.shown(freshness.sequence.number);
                return Ok(families);
            }
            Raised::Lost => {
                serving.lease.lost(&lease);
                return Err(Withheld::NotHolder);
            }
            Raised::CatchUp(sequence) => {
                let mut watched = serving.api.metrics.watch();
                let there = watched.wait_for(|freshness| {
                    freshness.is_some_and(|freshness| freshness.sequence.number >= sequence)
                });
                timeout_at(deadline, there)
                    .await
                    .map_err(|_| Withheld::Behind)?
                    .map_err(|_| Withheld::Behind)?;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::sources::KnownSource;
    use crate::ledger::Sequence;
    use crate::ledger::{Completeness, Source};

    fn headers(values: &[(&'static str, &str)]) -> HeaderMap {
        values
            .iter()
            .map(|(name, value)| {
                (axum::http::HeaderName::from_static(name), value.parse().unwrap())
            })
            .collect()
    }

    #[test]
    fn several_accept_headers_are_one() {
        let protobuf = "application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily;encoding=delimited";
        let both = headers(&[("accept", "text/plain;version=0.0.4;q=0.5"), ("accept", protobuf)]);
        assert_eq!(Format::for_accept(&accepted(&both)), Format::Protobuf);
        assert_eq!(accepted(&headers(&[])), "");
    }

    #[test]
    fn half_of_the_server_s_patience_is_used_and_never_more_than_five_seconds() {
        for (said, waited) in [
            ("1", 500),
            ("0.2", 100),
            ("10", 5000),
            ("600", 5000),
            ("-1", 5000),
            ("soon", 5000),
            ("1e300", 5000),
        ] {
            assert_eq!(
                wait(&headers(&[(SCRAPE_TIMEOUT, said)])),
                Duration::from_millis(waited),
                "{said}"
            );
        }
        assert_eq!(wait(&headers(&[])), LONGEST_WAIT);
    }

    #[test]
    fn no_family_comes_twice() {
        let named = |name: &str| {
            let mut family = MetricFamily::default();
            family.set_name(name.to_owned());
            family
        };
        let all = together(vec![named("c"), named("b")], vec![named("b"), named("a")]);
        assert_eq!(all.iter().map(MetricFamily::name).collect::<Vec<_>>(), ["a", "b", "c"]);
    }

    fn known(sources: &[(u128, bool, bool)]) -> Known {
        let source = |(id, retired, backfilled): &(u128, bool, bool)| KnownSource {
            source: Source {
                id: 1,
                deployment_id: Uuid::from_u128(*id),
                introduced_at: chrono::DateTime::UNIX_EPOCH,
                baseline_until: None,
                retired: *retired,
            },
            backfilled: *backfilled,
            completeness: Completeness::default(),
        };
        let head = Sequence { incarnation: Uuid::from_u128(9), number: 5 };
        Known {
            head,
            recovering: false,
            sources: sources.iter().map(source).collect(),
            reached_at: Instant::now(),
        }
    }

    fn lease() -> Option<Lease> {
        Some(Lease { name: "metrics".into(), holder: "one".into(), epoch: 3 })
    }

    fn outcome(
        known: Option<&Known>,
        lease: Option<Lease>,
        asked: Option<u128>,
    ) -> Result<u128, Withheld> {
        permitted(known, lease, None, asked.map(Uuid::from_u128))
            .map(|(source, _)| source.as_u128())
    }

    #[test]
    fn only_the_holder_shows_and_only_what_is_backfilled() {
        let (backfilled, backfilling) = (known(&[(1, false, true)]), known(&[(1, false, false)]));
        assert_eq!(outcome(Some(&backfilled), lease(), None), Ok(1));
        assert_eq!(outcome(Some(&backfilling), lease(), None), Err(Withheld::Backfilling));
        assert_eq!(outcome(Some(&backfilled), None, None), Err(Withheld::NotHolder));
        assert_eq!(
            outcome(None, lease(), None),
            Err(Withheld::Behind),
            "before the states have caught up"
        );
    }

    #[test]
    fn a_restored_ledger_s_state_is_not_shown_before_it_has_caught_up() {
        let restored = Known { recovering: true, ..known(&[(1, false, true)]) };
        assert_eq!(outcome(Some(&restored), lease(), None), Err(Withheld::Recovering));
    }

    #[test]
    fn one_source_s_backfill_withholds_no_other() {
        let two = known(&[(1, false, true), (2, false, false)]);
        assert_eq!(outcome(Some(&two), lease(), Some(1)), Ok(1));
        assert_eq!(outcome(Some(&two), lease(), Some(2)), Err(Withheld::Backfilling));
        assert_eq!(outcome(Some(&two), lease(), None), Err(Withheld::Source(NoSource::Several)));
        // a retired source does not affect the one in use
        assert_eq!(
            outcome(Some(&known(&[(1, false, true), (2, true, false)])), lease(), None),
            Ok(1)
        );
        assert_eq!(
            outcome(Some(&known(&[(1, true, true), (2, false, true)])), lease(), None),
            Ok(2)
        );
        assert_eq!(
            outcome(Some(&known(&[(1, true, true), (2, true, true)])), lease(), None),
            Err(Withheld::Source(NoSource::Several))
        );
        // every process reports an unknown source, with or without the lease
        let unknown = Err(Withheld::Source(NoSource::Unknown(Uuid::from_u128(3))));
        assert_eq!(outcome(Some(&two), None, Some(3)), unknown);
        assert_eq!(
            outcome(Some(&known(&[])), lease(), None),
            Err(Withheld::Source(NoSource::NoneYet))
        );
    }

    #[test]
    fn a_state_below_the_shown_sequence_is_not_shown() {
        let freshness = Freshness {
            sequence: Sequence { incarnation: Uuid::from_u128(9), number: 7 },
            as_of: None,
        };
        assert_eq!(raised(freshness, Some(7)), Raised::Shown);
        assert_eq!(raised(freshness, Some(8)), Raised::CatchUp(8));
        assert_eq!(raised(freshness, None), Raised::Lost);
    }

    #[test]
    fn a_state_of_another_incarnation_or_before_the_known_end_is_not_shown() {
        let known = known(&[]);
        let sequence =
            |incarnation, number| Sequence { incarnation: Uuid::from_u128(incarnation), number };
        let freshness = |incarnation, number| Freshness {
            sequence: sequence(incarnation, number),
            as_of: None,
        };
        assert!(known.is_in(freshness(9, 5)) && known.is_in(freshness(9, 6)));
        assert!(!known.is_in(freshness(9, 4)) && !known.is_in(freshness(8, 6)));
    }

    #[test]
    fn every_reason_is_listed() {
        let none = [NoSource::Unknown(Uuid::nil()), NoSource::NoneYet, NoSource::Several]
            .map(Withheld::Source);
        let all = [
            Withheld::NotHolder,
            Withheld::LedgerAway,
            Withheld::Behind,
            Withheld::Backfilling,
            Withheld::Recovering,
        ]
        .into_iter()
        .chain(none);
        assert_eq!(all.map(Withheld::reason).collect::<Vec<_>>(), Withheld::REASONS);
    }
}
