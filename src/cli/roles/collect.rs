//! The role `collect`.

use std::time::Duration;

use chrono::TimeDelta;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::{Parts, Site};
use crate::cli::{Exit, Failure};
use crate::collectors;
use crate::config::PublishMode;

/// How long after the next pass was due the source is free for another collector.
const LEASE: Duration = Duration::from_secs(15);

pub(super) async fn run(site: Site, parts: Parts, stop: CancellationToken) -> Result<(), Failure> {
    let Some(database) = site.coderd.clone() else {
        return Err(Failure::of(Exit::Configuration, "the role collect needs source.coderd_url"));
    };
    let (source, collect) = (&site.pipeline.source, &site.pipeline.collect);
    let span = |length| TimeDelta::from_std(length).map_err(|error| Failure::new(Exit::Configuration, error));
    let settings = collectors::Settings {
        deployment_id: source.deployment_id,
        identity_required: site.pipeline.publish.mode == PublishMode::Sole,
        introduced_at: source.introduced_at,
        from: source.backfill_from,
        poll_interval: collect.poll,
        // a pause between two passes must not look like the collector's end
        lease_length: collect.poll * 3 + LEASE,
        sweep_interval: span(collect.full_sweep)?,
        margin: span(collect.margin)?,
        paused: parts.paused,
        standing: parts.collecting,
        ..collectors::Settings::new(Uuid::new_v4().to_string())
    };
    collectors::run(settings, database, site.keys, site.log.log, site.ledger.ledger, site.clock, stop).await;
    Ok(())
}
