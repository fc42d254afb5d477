//! Which coderd a database belongs to.

use uuid::Uuid;

use super::connect::within;
use super::functions::{Access, DEPLOYMENT_ID};
use super::{CoderdError, Reader};

/// Two facts that tell one coderd from another. A dump that is restored elsewhere keeps both, and so does an upgrade.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// `site_configs`, key `deployment_id`
    pub deployment_id: Uuid,
    /// `organizations.id` of the default organization
    pub organization_id: Uuid,
}

impl Reader {
    /// The deployment's own id. Source: `site_configs`, key `deployment_id`.
    ///
    /// # Errors
    /// [`CoderdError::NoDeploymentId`] where it is not there or may not be asked for.
    pub async fn deployment_id(&mut self) -> Result<Uuid, CoderdError> {
        let query = match self.access(DEPLOYMENT_ID).await? {
            Some(Access::Function) => "select tallyline.deployment_id()",
            Some(Access::Tables) => "select (select value from site_configs where key = 'deployment_id')",
            None => return Err(CoderdError::NoDeploymentId { user: self.user.clone() }),
        };
        let query = sqlx::query_scalar(query);
        let value: Option<String> = within(self.deadline, query.fetch_one(&mut self.connection)).await?;
        let value = value.ok_or_else(|| CoderdError::NoDeploymentId { user: self.user.clone() })?;
        Uuid::parse_str(&value).map_err(|_| CoderdError::BadDeploymentId(value))
    }

    /// Both facts.
    ///
    /// # Errors
    /// One of which [`CoderdError::hides_identity`] holds where a fact is not there or may not be read.
    pub async fn identity(&mut self) -> Result<Identity, CoderdError> {
        let deployment_id = self.deployment_id().await?;
        let readable = sqlx::query_scalar(
            "select coalesce(has_column_privilege(attrelid, attnum, 'select'), false) from pg_attribute
             where attrelid = to_regclass('organizations') and attname = 'is_default' and not attisdropped",
        );
        let readable: Option<bool> = within(self.deadline, readable.fetch_optional(&mut self.connection)).await?;
        let problem = match readable {
            Some(true) => "no organization is the default one".to_owned(),
            Some(false) => format!("let an administrator run:\ngrant select (is_default) on organizations to {};", self.user),
            None => "organizations.is_default is missing".to_owned(),
        };
        let unknown = CoderdError::NoDefaultOrganization { problem };
        if readable != Some(true) {
            return Err(unknown);
        }
        let query = sqlx::query_scalar("select id from organizations where is_default");
        let organization_id = within(self.deadline, query.fetch_optional(&mut self.connection)).await?.ok_or(unknown)?;
        Ok(Identity { deployment_id, organization_id })
    }
}
