//! The role `collect`.

use chrono::TimeDelta;
use prometheus::Registry;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::{Handles, Parts};
use crate::cli::{Exit, Failure};
use crate::collectors::{self, CollectorTelemetry};
use crate::config::PublishMode;

pub(super) async fn run(
    handles: Handles,
    registry: Registry,
    parts: Parts,
    stop: CancellationToken,
) -> Result<(), Failure> {
    let Some(database) = handles.coderd.clone() else {
        return Err(Failure::of(Exit::Configuration, "the role collect needs source.coderd_url"));
    };
    let (source, collect) = (&handles.pipeline.source, &handles.pipeline.collect);
    let span = |length| {
        TimeDelta::from_std(length).map_err(|error| Failure::new(Exit::Configuration, error))
    };
    let settings = collectors::Settings {
        deployment_id: source.deployment_id,
        identity_required: handles.pipeline.publish.mode == PublishMode::Sole,
        introduced_at: source.introduced_at,
        from: source.backfill_from,
        poll_interval: collect.poll,
        margin: span(collect.margin)?,
        paused: parts.paused,
        status: parts.collecting,
        telemetry: CollectorTelemetry::register(&registry)
            .map_err(|error| Failure::new(Exit::Internal, error))?,
        ..collectors::Settings::new(Uuid::new_v4().to_string())
    };
    collectors::run(
        settings,
        database,
        handles.keys,
        handles.log.log,
        handles.ledger.ledger,
        handles.clock,
        stop,
    )
    .await;
    Ok(())
}
