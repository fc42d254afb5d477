//! Processes with the role `consume` admit held records. A record is admitted after an upgrade that
//! knows its type, or after a collector registered its deployment.

use std::time::Duration;

use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::Handles;
use crate::cli::Failure;
use crate::ledger::{Ledger, leases, rejects};
use crate::operations::{Actor, AdmitRejects, Admitted, OperationError, Operations};
use crate::retry::Backoff;

/// Lease for one admitting process at a time. If it expires during the work, some records are only
/// appended more than once.
const LEASE: (&str, Duration) = ("admit", Duration::from_secs(60));

/// Interval of the checks, because a collector may register a deployment at any time.
const AGAIN: Duration = Duration::from_secs(10);

/// Admits held records until `stop`. Retries while the ledger or the log is unreachable.
pub(super) async fn run(handles: Handles, stop: CancellationToken) -> Result<(), Failure> {
    let operations = handles.operations()?;
    let holder = uuid::Uuid::new_v4().to_string();
    let mut waits = Backoff::new(Duration::from_millis(500), Duration::from_secs(30));
    loop {
        let goes_on = match admit(&operations, &holder, &stop).await {
            Ok(Some(Admitted { records, refused, left })) => {
                if records > 0 {
                    info!(records, refused, left, "held records are admitted");
                }
                waits.reset();
                stop.run_until_cancelled(tokio::time::sleep(AGAIN)).await.is_some()
            }
            Err(OperationError::Interrupted) => false,
            // another process has the lease
            Ok(None) => waits.wait(&stop).await,
            Err(error) => {
                warn!(%error, "held records not admitted, retrying");
                waits.wait(&stop).await
            }
        };
        if !goes_on {
            return Ok(());
        }
    }
}

async fn admit(
    operations: &Operations,
    holder: &str,
    stop: &CancellationToken,
) -> Result<Option<Admitted>, OperationError> {
    let ledger: &Ledger = &operations.ledger;
    if ledger.run(async |conn| rejects::admissible(conn, 0, 1).await).await?.is_empty() {
        return Ok(Some(Admitted::default()));
    }
    let Some(lease) =
        ledger.run(async |conn| leases::take(conn, LEASE.0, holder, LEASE.1).await).await?
    else {
        return Ok(None);
    };
    let actor = Actor {
        name: concat!("tallyline ", env!("CARGO_PKG_VERSION")).to_owned(),
        reason: "the type is known and the deployment registered".to_owned(),
    };
    let admitted = operations.run(&AdmitRejects {}, &actor, &|_| {}, stop).await;
    ledger.run(async |conn| leases::release(conn, lease).await).await?;
    admitted.map(Some)
}
