//! The handles that operations use, and the actor of an operation.

use uuid::Uuid;

use super::OperationError;
use crate::coderd::Database;
use crate::ledger::{ActKind, LICENSE_RULES, Ledger, NewAct, Retention, Subject, choices};
use crate::license::{PublicKeys, RuleSet};
use crate::log::Log;

/// The handles of one deployment, of a command or of a serving process. Each dependency may still
/// be unreachable.
#[derive(Clone)]
pub struct Operations {
    /// The ledger. Operations use its clock.
    pub ledger: Ledger,
    pub log: Log,
    /// The consumer group. Its committed offsets in the log can prove that the ledger was further.
    pub group: String,
    /// Partitions of each topic that an operation creates.
    pub partitions: i32,
    /// coderd's database, if configured.
    pub coderd: Option<Database>,
    /// The deployment that the pipeline names or that coderd reported; `None` if unknown.
    pub deployment: Option<Uuid>,
    /// The keys that may sign licenses.
    pub keys: PublicKeys,
    /// The pipeline's license rules. Rules chosen in the ledger take precedence.
    pub rules: RuleSet,
    /// The pipeline's settings of retention.
    pub retention: Retention,
}

impl Operations {
    /// The license rules in force: those chosen in the ledger, else the pipeline's.
    ///
    /// # Errors
    /// [`OperationError::Forbidden`] if the ledger names rules that this version does not know.
    pub async fn license_rules(&self) -> Result<RuleSet, OperationError> {
        match self.ledger.run(async |conn| choices::get(conn, LICENSE_RULES).await).await? {
            Some(name) => name.parse().map_err(|error| {
                OperationError::Forbidden(format!("license rules chosen in the ledger: {error}"))
            }),
            None => Ok(self.rules),
        }
    }
}

/// Maximum characters of a reason. Every view of an act shows the whole reason.
const MAX_REASON_CHARS: usize = 2_000;

/// Checks the length of a reason for the audit log.
pub fn reason(text: &str) -> Result<String, String> {
    match text.chars().count() {
        length if length > MAX_REASON_CHARS => {
            Err(format!("has {length} characters, more than {MAX_REASON_CHARS}"))
        }
        _ => Ok(text.to_owned()),
    }
}

/// Who performs an operation, and why. Both are recorded in the audit log.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Actor {
    /// A person's login, a token's name, or `tallyline VERSION`. Empty for a question without a
    /// token.
    pub name: String,
    /// The reason, in the actor's words. May be empty where an operation does not require one.
    pub reason: String,
}

impl Actor {
    /// An act of this actor for the audit log.
    pub(super) fn act<'a>(
        &'a self,
        act: ActKind,
        subject: Subject<'a>,
        detail: serde_json::Value,
    ) -> NewAct<'a> {
        NewAct { actor: &self.name, act, subject, reason: &self.reason, detail }
    }

    pub(super) fn require_reason(&self) -> Result<(), OperationError> {
        match self.reason.trim() {
            "" => Err(OperationError::Invalid {
                field: "reason",
                message: "is missing: it goes into the audit log".to_owned(),
            }),
            _ => Ok(()),
        }
    }
}
