//! What operations work on, and who asks for them.

use uuid::Uuid;

use super::OperationError;
use crate::coderd::Database;
use crate::ledger::{ActKind, LICENSE_RULES, Ledger, NewAct, Subject};
use crate::license::{PublicKeys, RuleSet};
use crate::log::Log;

/// The handles of one deployment, as a command or a serving process has them. None need be reachable yet.
#[derive(Clone)]
pub struct Desk {
    /// The ledger; its clock is the operations' clock.
    pub ledger: Ledger,
    /// The log.
    pub log: Log,
    /// The consumers' group, whose marks in the log may prove that the ledger was further.
    pub group: String,
    /// Partitions of each topic that has to be created.
    pub partitions: i32,
    /// coderd's database, where it is configured.
    pub coderd: Option<Database>,
    /// The deployment that the pipeline names or coderd told; none: not known.
    pub deployment: Option<Uuid>,
    /// The keys that may have signed licenses.
    pub keys: PublicKeys,
    /// The pipeline's license rules; a choice in the ledger goes before them.
    pub rules: RuleSet,
}

impl Desk {
    /// The rules that hold: those that were chosen in the ledger, else the pipeline's.
    ///
    /// # Errors
    /// The ledger's; [`OperationError::Forbidden`] where rules were chosen that this version does not know.
    pub async fn license_rules(&self) -> Result<RuleSet, OperationError> {
        match self.ledger.in_time(self.ledger.choice(LICENSE_RULES)).await? {
            Some(name) => name.parse().map_err(|error| OperationError::Forbidden(format!("in the ledger were chosen: {error}"))),
            None => Ok(self.rules),
        }
    }
}

/// Most characters of a reason: it is shown whole wherever its act is.
const MOST_OF_A_REASON: usize = 2_000;

/// A reason that the audit trail takes.
pub fn reason(text: &str) -> Result<String, String> {
    match text.chars().count() {
        length if length > MOST_OF_A_REASON => Err(format!("has {length} characters, more than {MOST_OF_A_REASON}")),
        _ => Ok(text.to_owned()),
    }
}

/// Who does something, and why. Both go into the audit trail.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Actor {
    /// A person's login, a token's name, or `tallyline VERSION`.
    pub name: String,
    /// Why, in the actor's words; may be empty where an operation does not demand it.
    pub reason: String,
}

impl Actor {
    /// What this actor does, to be written down.
    pub(super) fn act<'a>(&'a self, act: ActKind, subject: Subject<'a>, detail: serde_json::Value) -> NewAct<'a> {
        NewAct { actor: &self.name, act, subject, reason: &self.reason, detail }
    }

    /// Refuses an act without a reason.
    pub(super) fn require_reason(&self) -> Result<(), OperationError> {
        match self.reason.trim() {
            "" => Err(OperationError::Invalid { field: "reason", message: "is missing: it goes into the audit trail".to_owned() }),
            _ => Ok(()),
        }
    }
}
