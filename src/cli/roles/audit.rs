//! The continuous audit of a process that collects, publishes or serves.

use std::time::Duration;

use prometheus::Registry;
use tokio_util::sync::CancellationToken;
use tracing::info;
use uuid::Uuid;

use super::Handles;
use crate::audit::{Audit, AuditTelemetry, Continuous};
use crate::cli::{Exit, Failure};
use crate::config::Role;

/// The metrics of the audit, if this process audits. A process that only consumes does not.
pub(super) fn register(
    handles: &Handles,
    registry: &Registry,
) -> Result<Option<AuditTelemetry>, Failure> {
    let audits = [Role::Collect, Role::Publish, Role::Serve].iter().any(|role| handles.has(*role));
    audits
        .then(|| AuditTelemetry::register(registry, handles.coderd.is_some()))
        .transpose()
        .map_err(|error| Failure::new(Exit::Internal, error))
}

/// Audits until `stop`. The source is compared as soon as coderd reports its deployment id.
pub(super) async fn run(
    handles: Handles,
    telemetry: AuditTelemetry,
    stop: CancellationToken,
) -> Result<(), Failure> {
    let holder = format!("{}-{}", std::process::id(), Uuid::new_v4().simple());
    let settings = &handles.pipeline.audit;
    let continuous = |source| {
        let audit = Audit {
            ledger: handles.ledger.ledger.clone(),
            log: handles.log.log.clone(),
            source,
            patience: Duration::ZERO,
        };
        Continuous {
            audit,
            every: settings.interval,
            late_after: settings.late_after,
            holder: holder.clone(),
            telemetry: telemetry.clone(),
        }
    };
    let Some(database) = &handles.coderd else {
        info!(
            "no database of coderd is configured: this process audits the ledger against log and vendor only"
        );
        continuous(None).run(&stop).await;
        return Ok(());
    };
    // the other joints do not wait for coderd's deployment id
    let asking = stop.child_token();
    let asked = async {
        let deployment = handles.deployment(&stop).await;
        asking.cancel();
        deployment
    };
    let meanwhile = continuous(None);
    let (deployment, ()) = tokio::join!(asked, meanwhile.run(&asking));
    if let Some(deployment) = deployment {
        continuous(Some((database.clone(), deployment))).run(&stop).await;
    }
    Ok(())
}
