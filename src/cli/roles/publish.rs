//! The role `publish`.

use prometheus::Registry;
use tokio_util::sync::CancellationToken;

use super::{Parts, Site};
use crate::cli::{Exit, Failure};
use crate::config::PublishMode;
use crate::publisher::{Mode, Publisher, PublisherTelemetry, Settings};
use crate::tallyman::ClientSettings;

pub(super) async fn run(site: Site, registry: Registry, parts: Parts, stop: CancellationToken) -> Result<(), Failure> {
    let publish = &site.pipeline.publish;
    if publish.mode == PublishMode::Sole {
        refuse_unknown_coderd(&site).await?;
    }
    let Some(deployment) = site.deployment(&stop).await else { return Ok(()) };
    let mode = match publish.mode {
        PublishMode::Shadow => Mode::Shadow,
        PublishMode::Sole => Mode::Sole,
    };
    let tallyman = ClientSettings { request_timeout: publish.request_timeout, ..ClientSettings::new(publish.url.clone()) };
    let defaults = Settings::new(deployment, site.coderd.clone(), site.keys.clone(), tallyman);
    let settings = Settings { mode, poll: publish.interval, paused: parts.paused, ..defaults };
    let telemetry = PublisherTelemetry::register(&registry).map_err(|error| Failure::new(Exit::Internal, error))?;
    let publisher = Publisher::new(site.ledger.ledger.clone(), settings, telemetry);
    let mut publisher = publisher.map_err(|error| Failure::new(Exit::Configuration, error))?;
    parts.publishing.get_or_init(|| publisher.condition());
    publisher.run(&parts.looked, &stop).await;
    Ok(())
}

/// Mode `sole` begins only where coderd reports which one it is: its usage could be billed under two sources. A coderd that cannot be
/// reached is the publisher's to wait for.
async fn refuse_unknown_coderd(site: &Site) -> Result<(), Failure> {
    let Some(database) = &site.coderd else { return Ok(()) };
    let Ok(mut reader) = database.connect().await else { return Ok(()) };
    let identity = reader.identity().await;
    reader.close().await;
    match identity {
        Err(error) if error.hides_identity() => {
            Err(Failure::of(Exit::Refused, format!("publish.mode is sole, and which coderd this is cannot be read: {error}")))
        }
        _ => Ok(()),
    }
}
