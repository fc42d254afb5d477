//! The role `publish`.

use prometheus::Registry;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::{Handles, Parts};
use crate::cli::{Exit, Failure};
use crate::coderd::{CoderdError, Reader};
use crate::config::PublishMode;
use crate::publisher::{ConditionHandle, Publisher, PublisherTelemetry, Settings};
use crate::tallyman::ClientSettings;

pub(super) async fn run(
    handles: Handles,
    registry: Registry,
    parts: Parts,
    stop: CancellationToken,
) -> Result<(), Failure> {
    let publish = &handles.pipeline.publish;
    let sole = publish.mode == PublishMode::Sole;
    if sole {
        refuse_unknown_coderd(&handles, &parts).await?;
    }
    let Some(deployment) = handles.deployment(&stop).await else { return Ok(()) };
    let tallyman = ClientSettings {
        request_timeout: publish.request_timeout,
        ..ClientSettings::new(publish.url.clone())
    };
    let defaults =
        Settings::new(deployment, handles.coderd.clone(), handles.keys.clone(), tallyman);
    let settings = Settings {
        sole,
        concurrency: publish.concurrency,
        poll: publish.interval,
        paused: parts.paused,
        ..defaults
    };
    let telemetry = PublisherTelemetry::register(&registry)
        .map_err(|error| Failure::new(Exit::Internal, error))?;
    let publisher = Publisher::new(handles.ledger.ledger.clone(), settings, telemetry);
    let mut publisher = publisher.map_err(|error| Failure::new(Exit::Configuration, error))?;
    parts.publishing.get_or_init(|| publisher.condition());
    publisher.run(|| parts.consumer.compare_marks(), &stop).await;
    Ok(())
}

/// Mode `sole` starts only if coderd reports its identity, because its usage could be billed under
/// two sources. The publisher itself waits for an unreachable coderd. The refusal remains in the
/// process's row.
async fn refuse_unknown_coderd(handles: &Handles, parts: &Parts) -> Result<(), Failure> {
    let Some(database) = &handles.coderd else { return Ok(()) };
    let Ok(mut reader) = database.connect().await else { return Ok(()) };
    let identity = reader.identity().await;
    let refusal = match identity {
        Err(error @ CoderdError::UnknownIdentity(_)) => {
            let why =
                format!("publish.mode is sole, and which coderd this is cannot be read: {error}");
            let source = deployment(handles, &mut reader).await;
            parts.publishing.get_or_init(|| {
                ConditionHandle::refused(source, why.clone(), handles.clock.clone())
            });
            Err(Failure::of(Exit::Refused, why))
        }
        _ => Ok(()),
    };
    reader.close().await;
    refusal
}

/// The source: the configured deployment id, or the one that a coderd without a known organization
/// reports.
async fn deployment(handles: &Handles, reader: &mut Reader) -> Option<Uuid> {
    match handles.pipeline.source.deployment_id {
        Some(id) => Some(id),
        None => reader.deployment_id().await.ok(),
    }
}
