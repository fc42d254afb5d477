//! The checks for `/readyz`, and their results.

use std::collections::BTreeMap;
use std::fmt::Display;

use serde::Serialize;
use tokio::sync::Mutex;
use utoipa::ToSchema;

use super::handles::ProcessHandles;
use super::recent::Recent;
use crate::coderd;

/// Readiness of the process.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub(super) struct Readiness {
    /// Whether all checks passed.
    pub(super) ready: bool,
    /// Checks by name. The names depend on the roles of the process.
    pub(super) checks: BTreeMap<&'static str, Check>,
}

/// Check of one dependency.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub(super) struct Check {
    /// Whether the check passed.
    pub(super) ok: bool,
    /// Reason of a failure, or the current state.
    pub(super) why: String,
}

impl Check {
    pub(super) fn well(why: impl Display) -> Self {
        Self { ok: true, why: why.to_string() }
    }

    pub(super) fn missing(why: impl Display) -> Self {
        Self { ok: false, why: why.to_string() }
    }

    /// Adds the address to a failed check.
    pub(super) fn at(self, address: &str) -> Self {
        if self.ok { self } else { Self::missing(format!("{address}: {}", self.why)) }
    }
}

/// State of the checks for `/readyz`. For any number of callers, each dependency is checked at most
/// once per second, on open connections.
pub(super) struct Probe {
    pub(super) own: ProcessHandles,
    pub(super) recent: Recent<Readiness>,
    /// The idle connection to coderd's database.
    pub(super) source: Mutex<Option<coderd::Reader>>,
}

impl Probe {
    pub(super) fn new(own: ProcessHandles) -> Self {
        Self { own, recent: Recent::default(), source: Mutex::default() }
    }
}
