//! Sources and their completeness, read from the ledger at a sequence that both states have reached
//! since.
//!
//! Therefore this completeness also holds for every answer from the states: if the ledger is
//! complete until an instant, memory is complete until that instant. Completeness never moves back,
//! so an old value stays true.

use std::sync::{Arc, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::sources::{Known, KnownSource, KnownSources};
use super::{Api, Serving};
use crate::cause::LastingFault;
use crate::ledger::{Ledger, Sequence, StatementError, passes, snapshots, sources};
use crate::operations::OperationError;
use crate::projection::Freshness;

/// Timeout of a query to the ledger.
const ANSWER: Duration = Duration::from_secs(10);

impl KnownSources {
    /// Queries the ledger repeatedly until `stop`, also for the open rejects.
    pub(super) async fn follow(&self, serving: &Serving, stop: &CancellationToken) {
        let (api, settings) = (&serving.api, &serving.settings);
        let mut fault = LastingFault::default();
        while !stop.is_cancelled() {
            let asked = async {
                serving.rejects.look(&api.own.ledger, &api.clock, ANSWER).await;
                self.round(api).await
            };
            let Some(round) = stop.run_until_cancelled(asked).await else { return };
            match &round {
                Err(cause) if fault.is_new(cause) => {
                    tracing::warn!(
                        cause,
                        "sources and rules of the ledger are not usable: the last ones remain"
                    );
                }
                Err(_) => {}
                Ok(()) => drop(fault.end()),
            }
            stop.run_until_cancelled(tokio::time::sleep(settings.poll)).await;
        }
    }

    async fn round(&self, api: &Api) -> Result<(), String> {
        // rules of a later version only prevent answers that need rules
        let rules = match api.operations.license_rules().await {
            Ok(rules) => Ok(rules),
            Err(unknown @ OperationError::Forbidden(_)) => Err(unknown.to_string()),
            Err(error) => return Err(error.to_string()),
        };
        let before = std::mem::replace(
            &mut *self.rules.write().unwrap_or_else(PoisonError::into_inner),
            rules.clone().ok(),
        );
        if let (Some(before), Ok(now)) = (before, &rules)
            && before != *now
        {
            tracing::info!(rules = %now, "an operator chose other license rules");
        }
        let asked = tokio::time::timeout(ANSWER, ask(&api.own.ledger))
            .await
            .map_err(|_| "no answer in time".to_owned())?;
        let (head, recovering, sources) = asked.map_err(|error| crate::cause::text(&error))?;
        if reached(api, head).await {
            let known = Known { head, recovering, sources, reached_at: Instant::now() };
            *self.known.write().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(known));
        }
        rules.map(|_| ())
    }
}

async fn ask(ledger: &Ledger) -> Result<(Sequence, bool, Vec<KnownSource>), StatementError> {
    let mut sources = Vec::new();
    for source in ledger.run(sources::list).await? {
        let (backfilled, completeness) = (
            ledger.run(async |conn| passes::is_backfilled(conn, source.id).await).await?,
            ledger.run(async |conn| passes::completeness(conn, source.id).await).await?,
        );
        sources.push(KnownSource { source, backfilled, completeness });
    }
    // Read this last: all values above come from batches up to here.
    let (head, recovering) = ledger.run(snapshots::head_and_recovery).await?;
    Ok((head, recovering, sources))
}

/// Waits until both states have reached `head`. Returns false if the ledger's incarnation has
/// changed. Has no deadline, because a later `head` would only be reached later. Readiness reports
/// that the states are behind.
async fn reached(api: &Api, head: Sequence) -> bool {
    let (metrics, licenses) =
        tokio::join!(reaches(api.metrics.watch(), head), reaches(api.licenses.watch(), head));
    metrics && licenses
}

async fn reaches(mut freshness: watch::Receiver<Option<Freshness>>, head: Sequence) -> bool {
    let is_decided = |at: Sequence| at.incarnation != head.incarnation || at.number >= head.number;
    let decided = freshness
        .wait_for(|freshness| freshness.is_some_and(|freshness| is_decided(freshness.sequence)))
        .await;
    decided.is_ok_and(|freshness| {
        freshness.is_some_and(|freshness| freshness.sequence.incarnation == head.incarnation)
    })
}
