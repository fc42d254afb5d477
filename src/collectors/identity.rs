//! Whether coderd is the one that the source is bound to: asked before anything is collected, and again in each pass.

use super::open::Collector;
use super::settings::{CollectError, Settings};
use crate::coderd::{CoderdError, Identity, Reader};
use crate::ledger::SourceIdentity;

impl From<Identity> for SourceIdentity {
    fn from(identity: Identity) -> Self {
        SourceIdentity { deployment_id: identity.deployment_id, organization_id: identity.organization_id }
    }
}

/// What coderd reports, or why that is not known.
pub(super) type Known = Result<SourceIdentity, String>;

/// What this coderd reports of itself. Where it may not be asked, collecting goes on with a warning, unless usage is published from it.
pub(super) async fn read(settings: &Settings, reader: &mut Reader) -> Result<Known, CoderdError> {
    match reader.identity().await {
        Ok(identity) => Ok(Ok(identity.into())),
        Err(error) if error.hides_identity() && !settings.identity_required => Ok(Err(error.to_string())),
        Err(error) => Err(error),
    }
}

impl Collector {
    /// Why it is not certain that coderd is the one of this source.
    #[must_use]
    pub fn warning(&self) -> Option<String> {
        let problem = self.identity.as_ref().err()?.replace('\n', " ");
        Some(format!("whether this coderd is the one of source {} is not checked: {problem}", self.source.deployment_id))
    }

    /// Refuses a coderd that is not the one of this source. The ledger is asked each time: an operator may have accepted another one meanwhile.
    pub(super) async fn identify(&mut self, reader: &mut Reader) -> Result<(), CollectError> {
        let (source_id, identity) = (self.source.deployment_id, read(&self.settings, reader).await?);
        if let Ok(found) = identity {
            if let Some(refusal) = self.ledger.in_time(self.ledger.identity_refusal(source_id, found)).await? {
                return Err(refusal.into());
            }
            if self.identity != identity {
                self.ledger.in_time(self.ledger.bind_source(source_id, found)).await??;
            }
        }
        self.identity = identity;
        Ok(())
    }
}
