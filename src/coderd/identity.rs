//! Which deployment a database belongs to.

use uuid::Uuid;

use super::connect::within;
use super::functions::DEPLOYMENT_ID;
use super::{CoderdError, Reader};

impl Reader {
    /// The deployment's own id. Source: `site_configs`, key `deployment_id`, through the function of `grants.sql`.
    ///
    /// # Errors
    /// [`CoderdError::NoDeploymentId`] where it is not there or may not be asked for.
    pub async fn deployment_id(&mut self) -> Result<Uuid, CoderdError> {
        if !self.may_call(DEPLOYMENT_ID).await? {
            return Err(CoderdError::NoDeploymentId { user: self.user.clone() });
        }
        let query = sqlx::query_scalar("select tallyline.deployment_id()");
        let value: Option<String> = within(self.deadline, query.fetch_one(&mut self.connection)).await?;
        let value = value.ok_or_else(|| CoderdError::NoDeploymentId { user: self.user.clone() })?;
        Uuid::parse_str(&value).map_err(|_| CoderdError::BadDeploymentId(value))
    }
}
