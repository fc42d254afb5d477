//! Accepts that a source is collected from another coderd than before.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{Actor, OperationError, Operations};
use crate::ledger::{ActKind, SourceIdentity, Subject, identity};

/// A source, and the coderd to which it is now bound.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AcceptedIdentity {
    /// The source's id.
    pub source_id: Uuid,
    /// The deployment id that coderd reports.
    pub deployment_id: Uuid,
    /// The default organization that coderd reports.
    pub organization_id: Uuid,
}

impl Operations {
    /// Binds a source to the configured coderd. Replaces any earlier binding.
    ///
    /// # Errors
    /// [`OperationError::Invalid`] without a reason; [`OperationError::Coderd`] if coderd does not
    /// report its identity; [`OperationError::Forbidden`] if no coderd is configured or another
    /// source is bound to it; [`OperationError::NotFound`].
    pub async fn accept_identity(
        &self,
        source_id: Uuid,
        actor: &Actor,
    ) -> Result<AcceptedIdentity, OperationError> {
        actor.require_reason()?;
        let Some(database) = &self.coderd else {
            return Err(OperationError::Forbidden(
                "source.coderd_url is not set: it names the coderd to accept".to_owned(),
            ));
        };
        let mut reader = database.connect().await?;
        let identity = reader.identity().await;
        reader.close().await;
        let found = SourceIdentity::from(identity?);
        let subject = source_id.to_string();
        let act = actor.act(ActKind::Accept, Subject::Named(&subject), serde_json::Value::Null);
        match self
            .ledger
            .run(async |conn| {
                identity::accept(conn, source_id, found, &act, self.ledger.clock.now()).await
            })
            .await?
        {
            Ok(Some(_)) => Ok(AcceptedIdentity {
                source_id,
                deployment_id: found.deployment_id,
                organization_id: found.organization_id,
            }),
            Ok(None) => {
                Err(OperationError::NotFound(format!("source {source_id} is not registered")))
            }
            Err(refusal) => Err(OperationError::Forbidden(refusal.to_string())),
        }
    }
}
