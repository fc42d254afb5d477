//! Which coderd a database belongs to.

use uuid::Uuid;

use super::connect::within;
use super::functions::{Access, DEPLOYMENT_ID};
use super::{CoderdError, Reader};

/// Two facts that distinguish one coderd from another. A restored dump and an upgrade keep both.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// `site_configs`, key `deployment_id`
    pub deployment_id: Uuid,
    /// `organizations.id` of the default organization
    pub organization_id: Uuid,
}

/// Each fact by itself. None: it is missing, or the role may not read it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IdentityFacts {
    /// `site_configs`, key `deployment_id`
    pub deployment_id: Option<Uuid>,
    /// `organizations.id` of the default organization
    pub organization_id: Option<Uuid>,
    /// Why a fact is unknown, and what to do. None: both are known.
    pub problem: Option<String>,
}

impl IdentityFacts {
    /// Both facts; None if one is unknown.
    #[must_use]
    pub fn identity(&self) -> Option<Identity> {
        let (deployment_id, organization_id) = self.deployment_id.zip(self.organization_id)?;
        Some(Identity { deployment_id, organization_id })
    }
}

impl Reader {
    /// The deployment's own id. Source: `site_configs`, key `deployment_id`.
    ///
    /// # Errors
    /// [`CoderdError::UnknownIdentity`] if the id is missing or the role may not read it.
    pub async fn deployment_id(&mut self) -> Result<Uuid, CoderdError> {
        let unknown = format!(
            "the deployment id is unknown: set source.deployment_id, or let an administrator run:\npsql --set reader={} --file src/coderd/grants.sql CODERD_DATABASE_URL",
            self.user
        );
        let query = match self.access(DEPLOYMENT_ID).await? {
            Some(Access::Function) => {
                self.identity_query = Some(
                    "select tallyline.deployment_id(), (select id from organizations where is_default)",
                );
                "select tallyline.deployment_id()"
            }
            Some(Access::Tables) => {
                self.identity_query = Some(
                    "select (select value from site_configs where key = 'deployment_id'), (select id from organizations where is_default)",
                );
                "select (select value from site_configs where key = 'deployment_id')"
            }
            None => return Err(CoderdError::UnknownIdentity(unknown)),
        };
        let query = sqlx::query_scalar(query);
        let value: Option<String> =
            within(self.deadline, query.fetch_one(&mut self.connection)).await?;
        let value = value.ok_or(CoderdError::UnknownIdentity(unknown))?;
        Uuid::parse_str(&value).map_err(|_| {
            CoderdError::UnknownIdentity(format!(
                "site_configs.deployment_id is {value:?}, not a UUID"
            ))
        })
    }

    /// The facts that exist and that the role may read. Once it has read both, one statement reads
    /// them again, without the catalog.
    pub async fn identity_facts(&mut self) -> Result<IdentityFacts, CoderdError> {
        if let Some(query) = self.identity_query.take()
            && let Some(facts) = self.reread_identity(query).await?
        {
            self.identity_query = Some(query);
            return Ok(facts);
        }
        let mut problems = Vec::new();
        let mut known = |fact: Result<Uuid, CoderdError>| match fact {
            Ok(id) => Ok(Some(id)),
            Err(CoderdError::UnknownIdentity(problem)) => {
                problems.push(problem);
                Ok(None)
            }
            Err(error) => Err(error),
        };
        let (deployment_id, organization_id) =
            (known(self.deployment_id().await)?, known(self.default_organization().await)?);
        let problem = (!problems.is_empty()).then(|| problems.join("\n"));
        self.identity_query = self.identity_query.filter(|_| problem.is_none());
        Ok(IdentityFacts { deployment_id, organization_id, problem })
    }

    /// Both facts by this statement. None: one is unknown now.
    async fn reread_identity(
        &mut self,
        query: &'static str,
    ) -> Result<Option<IdentityFacts>, CoderdError> {
        let query = sqlx::query_as(query).fetch_one(&mut self.connection);
        let facts: (Option<String>, Option<Uuid>) = match within(self.deadline, query).await {
            Err(error) if error.is_of_schema() => return Ok(None),
            facts => facts?,
        };
        let deployment_id = facts.0.and_then(|id| Uuid::parse_str(&id).ok());
        let known = deployment_id.is_some() && facts.1.is_some();
        Ok(known.then_some(IdentityFacts {
            deployment_id,
            organization_id: facts.1,
            problem: None,
        }))
    }

    /// Both facts.
    ///
    /// # Errors
    /// [`CoderdError::UnknownIdentity`] if a fact is missing or the role may not read it.
    pub async fn identity(&mut self) -> Result<Identity, CoderdError> {
        let facts = self.identity_facts().await?;
        facts
            .identity()
            .ok_or_else(|| CoderdError::UnknownIdentity(facts.problem.unwrap_or_default()))
    }

    async fn default_organization(&mut self) -> Result<Uuid, CoderdError> {
        let unknown = |problem: &str| {
            CoderdError::UnknownIdentity(format!(
                "coderd's default organization is unknown: {problem}"
            ))
        };
        let lacking = self.lacking_columns(&[("organizations", &["id", "is_default"])]).await?;
        if let Some(problem) = lacking {
            return Err(unknown(&problem));
        }
        let query = sqlx::query_scalar("select id from organizations where is_default");
        let id = within(self.deadline, query.fetch_optional(&mut self.connection)).await?;
        id.ok_or_else(|| unknown("no organization is the default one"))
    }
}
