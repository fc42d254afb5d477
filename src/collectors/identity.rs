//! Checks that coderd is the one that the source is bound to.

use uuid::Uuid;

use super::settings::{CollectError, Settings};
use crate::coderd::{CoderdError, Identity, IdentityFacts, Reader};
use crate::ledger::{Ledger, ReportedIdentity, SourceIdentity, identity};

impl From<Identity> for SourceIdentity {
    fn from(identity: Identity) -> Self {
        SourceIdentity {
            deployment_id: identity.deployment_id,
            organization_id: identity.organization_id,
        }
    }
}

impl From<&IdentityFacts> for ReportedIdentity {
    fn from(facts: &IdentityFacts) -> Self {
        ReportedIdentity {
            deployment_id: facts.deployment_id,
            organization_id: facts.organization_id,
        }
    }
}

/// What this coderd reports about itself. Fails if a fact contradicts the source. If the role
/// cannot read a fact, collecting continues with a warning, unless usage is published from this
/// coderd.
pub(super) async fn read(
    settings: &Settings,
    reader: &mut Reader,
    ledger: &Ledger,
    source_id: Uuid,
) -> Result<IdentityFacts, CollectError> {
    let facts = reader.identity_facts().await?;
    if let Some(refusal) = ledger
        .run(async |conn| identity::refusal_of(conn, source_id, (&facts).into()).await)
        .await?
    {
        return Err(refusal.into());
    }
    match &facts.problem {
        Some(problem) if settings.identity_required => {
            Err(CoderdError::UnknownIdentity(problem.clone()).into())
        }
        _ => Ok(facts),
    }
}

/// Binds the source to its coderd, if both facts are known.
pub(super) async fn bind(
    ledger: &Ledger,
    source_id: Uuid,
    facts: &IdentityFacts,
) -> Result<(), CollectError> {
    if let Some(found) = facts.identity() {
        ledger.run(async |conn| identity::bind(conn, source_id, found.into()).await).await??;
    }
    Ok(())
}
