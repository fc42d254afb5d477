//! `GET /metrics`: this process's telemetry, and the domain series of one source if this process
//! may show them.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::State;
use axum::http::header::{ACCEPT, CONTENT_TYPE, HeaderMap};
use axum::response::{IntoResponse, Response};
use prometheus::proto::MetricFamily;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};
use uuid::Uuid;

use super::Serving;
use super::answer::Problem;
use super::asked::Asked;
use super::chosen_source::NoSource;
use super::domain;
use super::withheld::Withheld;
use crate::metrics::{Format, encode};

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
    Asked { request: page, .. }: Asked<Page>,
) -> Result<Response, Problem> {
    let format = match page.format {
        Some(Forced::Text) => Format::Text,
        None => Format::for_accept(&accepted(&headers)),
    };
    let domain = match domain::families(&serving, page.source, wait(&headers)).await {
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

#[cfg(test)]
mod tests {
    use super::*;

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
}
