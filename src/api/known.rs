//! Which sources there are and how far they are complete, as the ledger said at a sequence that both states have reached by now.
//!
//! So what is said here is true of every answer from the states: a source that is complete in the ledger until an instant is complete until
//! then in memory, too. Claims never move back, so an old one stays true.

use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::{Api, Serving};
use crate::cause::Lasting;
use crate::ledger::{Completeness, Ledger, Sequence, Source};
use crate::license::RuleSet;
use crate::operations::OperationError;
use crate::projection::Standing;

/// How long the ledger may take to answer.
const ANSWER: Duration = Duration::from_secs(10);

/// What was last known; clones see the same.
#[derive(Clone, Default)]
pub(super) struct KnownSources {
    known: Arc<RwLock<Option<Arc<Known>>>>,
    rules: Arc<RwLock<Option<RuleSet>>>,
}

/// What the ledger said.
#[derive(Debug)]
pub(super) struct Known {
    /// The ledger's end, read after all else.
    pub(super) head: Sequence,
    /// It was restored from a backup and has not caught up yet; of the same moment.
    pub(super) recovering: bool,
    /// In the order of their introduction.
    pub(super) sources: Vec<KnownSource>,
    /// When both states had reached it.
    pub(super) reached_at: Instant,
}

/// A source and how far it is.
#[derive(Clone, Debug)]
pub(super) struct KnownSource {
    pub(super) source: Source,
    /// Its first full pass is in the ledger: before, its series would show the backfill as a spike.
    pub(super) backfilled: bool,
    pub(super) completeness: Completeness,
}

impl Known {
    pub(super) fn source(&self, deployment: Uuid) -> Option<&KnownSource> {
        self.sources.iter().find(|known| known.source.deployment_id == deployment)
    }

    /// The one source in use; none where there are several.
    pub(super) fn only_one_in_use(&self) -> Option<Uuid> {
        let mut in_use = self.sources.iter().filter(|known| !known.source.retired);
        let first = in_use.next()?;
        in_use.next().is_none().then_some(first.source.deployment_id)
    }

    /// Whether a state of this standing holds all that was known of.
    pub(super) fn is_in(&self, standing: Standing) -> bool {
        standing.sequence.incarnation == self.head.incarnation && standing.sequence.number >= self.head.number
    }
}

impl KnownSources {
    /// What is known; nothing before the states first caught up.
    pub(super) fn now(&self) -> Option<Arc<Known>> {
        self.known.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The license rules that hold: those that an operator chose in the ledger, else the pipeline's. None before the ledger was first asked, and
    /// where rules were chosen that this version does not know.
    pub(super) fn rules(&self) -> Option<RuleSet> {
        *self.rules.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// How far a source is complete in a state of this standing.
    pub(super) fn completeness(&self, deployment: Uuid, standing: Standing) -> Completeness {
        let known = self.now().filter(|known| known.is_in(standing));
        known.and_then(|known| known.source(deployment).map(|source| source.completeness.clone())).unwrap_or_default()
    }

    /// Asks the ledger again and again until `stop`, for the open rejects too.
    pub(super) async fn follow(&self, serving: &Serving, stop: &CancellationToken) {
        let (api, settings) = (&serving.api, &serving.settings);
        let mut fault = Lasting::default();
        while !stop.is_cancelled() {
            let asked = async {
                serving.rejects.look(&api.own.ledger, &api.clock, ANSWER).await;
                self.round(api).await
            };
            let Some(round) = stop.run_until_cancelled(asked).await else { return };
            match &round {
                Err(cause) if fault.is_news(cause) => {
                    tracing::warn!(cause, "what the ledger says of its sources and rules cannot be used: what was known stays");
                }
                Err(_) => {}
                Ok(()) => drop(fault.has_ended()),
            }
            stop.run_until_cancelled(tokio::time::sleep(settings.poll)).await;
        }
    }

    async fn round(&self, api: &Api) -> Result<(), String> {
        // Rules of a later version, which this one cannot answer by, hide nothing else.
        let rules = match api.desk.license_rules().await {
            Ok(rules) => Ok(rules),
            Err(unknown @ OperationError::Forbidden(_)) => Err(unknown.to_string()),
            Err(error) => return Err(error.to_string()),
        };
        let before = std::mem::replace(&mut *self.rules.write().unwrap_or_else(PoisonError::into_inner), rules.clone().ok());
        if let (Some(before), Ok(now)) = (before, &rules)
            && before != *now
        {
            tracing::info!(rules = %now, "an operator chose other license rules");
        }
        let asked = tokio::time::timeout(ANSWER, ask(&api.own.ledger)).await.map_err(|_| "no answer in time".to_owned())?;
        let (head, recovering, sources) = asked.map_err(|error| crate::cause::text(&error))?;
        if reached(api, head).await {
            let known = Known { head, recovering, sources, reached_at: Instant::now() };
            *self.known.write().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(known));
        }
        rules.map(|_| ())
    }
}

async fn ask(ledger: &Ledger) -> Result<(Sequence, bool, Vec<KnownSource>), sqlx::Error> {
    let mut sources = Vec::new();
    for source in ledger.sources().await? {
        let (backfilled, completeness) = (ledger.backfilled(source.id).await?, ledger.completeness(source.id).await?);
        sources.push(KnownSource { source, backfilled, completeness });
    }
    // Last: whatever was said before rests on batches up to here.
    let (head, recovering) = ledger.head_and_recovery().await?;
    Ok((head, recovering, sources))
}

/// Waits until both states have reached the ledger's end as it was; false where it has become another ledger. Without a deadline, because a
/// later end would only be reached later: what is waited for is the folds' own progress, and readiness tells that they are behind.
async fn reached(api: &Api, head: Sequence) -> bool {
    let (metrics, licenses) = tokio::join!(reaches(api.metrics.watch(), head), reaches(api.licenses.watch(), head));
    metrics && licenses
}

async fn reaches(mut standing: watch::Receiver<Option<Standing>>, head: Sequence) -> bool {
    let is_decided = |at: Sequence| at.incarnation != head.incarnation || at.number >= head.number;
    let decided = standing.wait_for(|standing| standing.is_some_and(|standing| is_decided(standing.sequence))).await;
    decided.is_ok_and(|standing| standing.is_some_and(|standing| standing.sequence.incarnation == head.incarnation))
}
