//! The sources and license rules that the ledger last reported.

use std::sync::{Arc, PoisonError, RwLock};

use tokio::time::Instant;
use uuid::Uuid;

use crate::ledger::{Completeness, Sequence, Source};
use crate::license::RuleSet;
use crate::projection::Freshness;

/// The last known values. Clones share them.
#[derive(Clone, Default)]
pub(super) struct KnownSources {
    pub(super) known: Arc<RwLock<Option<Arc<Known>>>>,
    pub(super) rules: Arc<RwLock<Option<RuleSet>>>,
}

/// The ledger's answer.
#[derive(Debug)]
pub(super) struct Known {
    /// The end of the ledger, read last.
    pub(super) head: Sequence,
    /// Whether a restored ledger has not caught up yet, read together with `head`.
    pub(super) recovering: bool,
    pub(super) sources: Vec<KnownSource>,
    /// When both states had reached `head`.
    pub(super) reached_at: Instant,
}

#[derive(Clone, Debug)]
pub(super) struct KnownSource {
    pub(super) source: Source,
    /// Whether its first full pass is in the ledger. Before, its series would show the backfill as
    /// a spike.
    pub(super) backfilled: bool,
    pub(super) completeness: Completeness,
}

impl Known {
    pub(super) fn source(&self, deployment: Uuid) -> Option<&KnownSource> {
        self.sources.iter().find(|known| known.source.deployment_id == deployment)
    }

    /// The only source in use; `None` if there are several.
    pub(super) fn only_one_in_use(&self) -> Option<Uuid> {
        let mut in_use = self.sources.iter().filter(|known| !known.source.retired);
        let first = in_use.next()?;
        in_use.next().is_none().then_some(first.source.deployment_id)
    }

    /// Whether a state of this freshness contains everything up to `head`.
    pub(super) fn is_in(&self, freshness: Freshness) -> bool {
        freshness.sequence.incarnation == self.head.incarnation
            && freshness.sequence.number >= self.head.number
    }
}

impl KnownSources {
    /// The known values; `None` before the states first caught up.
    pub(super) fn now(&self) -> Option<Arc<Known>> {
        self.known.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The license rules in force: those chosen in the ledger, else the pipeline's. `None` before
    /// the first answer of the ledger, and if this version does not know the chosen rules.
    pub(super) fn rules(&self) -> Option<RuleSet> {
        *self.rules.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Completeness of a source in a state of this freshness.
    pub(super) fn completeness(&self, deployment: Uuid, freshness: Freshness) -> Completeness {
        let known = self.now().filter(|known| known.is_in(freshness));
        known
            .and_then(|known| known.source(deployment).map(|source| source.completeness.clone()))
            .unwrap_or_default()
    }
}
