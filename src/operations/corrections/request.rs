//! The request for a correction.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

use crate::operations::{EventId, OperationError};

/// The most events of one correction.
const MAX_EVENTS: usize = 1_000;

/// Show the effect of setting accepted events to coderd's rows, and the hash that identifies the
/// plan when it is executed.
///
/// An event that coderd does not have is corrected to nothing. An event that equals coderd's row
/// cannot be corrected. Executing an executed plan again returns its ledger sequence.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema, clap::Args)]
#[serde(deny_unknown_fields)]
pub struct CorrectionRequest {
    /// Ids of the events: `workspace_build_completed:BUILD`, `prebuild_claimed:BUILD`, or coderd's
    /// own ids of usage events. At most 1,000.
    #[arg(value_name = "EVENT_ID", required = true)]
    pub event_ids: Vec<String>,
    /// Deployment of the events. It must be the one of the configured coderd.
    #[arg(long, value_name = "DEPLOYMENT_ID")]
    #[serde(default)]
    pub source: Option<Uuid>,
    /// Also correct events that a signature or an audit has confirmed, or that differ only in fields
    /// that coderd rewrites. coderd had them: only a forger makes such an event false.
    #[arg(long)]
    #[serde(default)]
    pub allow_confirmed: bool,
}

impl CorrectionRequest {
    /// The ids, each once and in order.
    pub(super) fn ids(&self) -> Result<Vec<EventId>, OperationError> {
        let invalid = |message: String| OperationError::Invalid { field: "event_ids", message };
        let ids: BTreeSet<&String> = self.event_ids.iter().collect();
        if ids.is_empty() || ids.len() > MAX_EVENTS {
            return Err(invalid(format!("has {} ids, expected 1 to {MAX_EVENTS}", ids.len())));
        }
        let parse = |id: &&String| match EventId::parse(id) {
            Err(OperationError::Invalid { message, .. }) => {
                Err(invalid(format!("{id}: {message}")))
            }
            parsed => parsed,
        };
        let parsed: Vec<EventId> = ids.iter().map(parse).collect::<Result<_, _>>()?;
        let unique: BTreeMap<String, EventId> =
            parsed.into_iter().map(|id| (id.whole(), id)).collect();
        Ok(unique.into_values().collect())
    }
}
