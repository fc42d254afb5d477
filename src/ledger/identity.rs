//! The coderd that each source is bound to. The same coderd under two ids would be billed twice.

use sqlx::PgConnection;
use uuid::Uuid;

use super::leases::revoke_collector_lease;
use super::{Ledger, NewAct};

/// What tells one coderd from another: its own deployment id and its default organization.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SourceIdentity {
    /// coderd's own deployment id.
    pub deployment_id: Uuid,
    /// The id of its default organization.
    pub organization_id: Uuid,
}

/// Why a coderd is not the one of a source.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IdentityRefusal {
    /// A new source whose id is not the one of coderd itself.
    #[error("source.deployment_id {source_id} is not the id of this coderd: set it to {}, which coderd reports", .found.deployment_id)]
    NotItsOwnId {
        /// The source's id.
        source_id: Uuid,
        /// What coderd reports.
        found: SourceIdentity,
    },
    /// A registered source that was introduced while coderd's facts could not be read, under an id that is not coderd's own.
    #[error(
        "source {source_id} is registered, but not yet bound to a coderd, and this coderd reports deployment id {}: if the source was \
         collected from this coderd, keep its id and bind it with `tallyline sources accept {source_id} --accept-new-identity --reason WHY`; \
         a second source {} would count and bill everything again; if it was not, correct source.coderd_url",
        .found.deployment_id, .found.deployment_id
    )]
    NotBound {
        /// The source's id.
        source_id: Uuid,
        /// What coderd reports.
        found: SourceIdentity,
    },
    /// The source is bound to another coderd.
    #[error(
        "source {source_id} is bound to the coderd with deployment id {} and default organization {}, but this coderd reports {} and {}: \
         correct source.coderd_url, or accept this coderd with `tallyline sources accept {source_id} --accept-new-identity --reason WHY`",
        .bound.deployment_id, .bound.organization_id, .found.deployment_id, .found.organization_id
    )]
    OtherCoderd {
        /// The source's id.
        source_id: Uuid,
        /// The coderd it is bound to.
        bound: SourceIdentity,
        /// What coderd reports.
        found: SourceIdentity,
    },
    /// This coderd is another source of the same ledger.
    #[error(
        "source {source_id} cannot be collected from this coderd, which is source {other_id} of this ledger (deployment id {}, default \
         organization {}): everything would be billed twice; set source.deployment_id to {other_id}",
        .found.deployment_id, .found.organization_id
    )]
    OtherSource {
        /// The source's id.
        source_id: Uuid,
        /// The source that is bound to this coderd.
        other_id: Uuid,
        /// What coderd reports.
        found: SourceIdentity,
    },
}

/// A registered source and the coderd it is bound to. None: coderd's facts could not be read yet.
#[derive(Clone, Copy, Debug)]
struct Binding {
    deployment_id: Uuid,
    bound: Option<SourceIdentity>,
}

/// Why a source may not use the coderd that reports `found`, if so.
fn refusal(bindings: &[Binding], source_id: Uuid, found: SourceIdentity) -> Option<IdentityRefusal> {
    match bindings.iter().find(|binding| binding.deployment_id == source_id).map(|own| own.bound) {
        Some(Some(bound)) if bound != found => Some(IdentityRefusal::OtherCoderd { source_id, bound, found }),
        Some(None) if found.deployment_id != source_id => {
            other_source(bindings, source_id, found).or(Some(IdentityRefusal::NotBound { source_id, found }))
        }
        None if found.deployment_id != source_id => Some(IdentityRefusal::NotItsOwnId { source_id, found }),
        _ => other_source(bindings, source_id, found),
    }
}

fn other_source(bindings: &[Binding], source_id: Uuid, found: SourceIdentity) -> Option<IdentityRefusal> {
    let shares = |bound: SourceIdentity| bound.deployment_id == found.deployment_id || bound.organization_id == found.organization_id;
    let other = bindings.iter().find(|binding| binding.deployment_id != source_id && binding.bound.is_some_and(shares))?;
    Some(IdentityRefusal::OtherSource { source_id, other_id: other.deployment_id, found })
}

impl SourceIdentity {
    /// Why a source of this id cannot be introduced from this coderd, where the ledger knows no source.
    #[must_use]
    pub fn refusal_of_new(self, source_id: Uuid) -> Option<IdentityRefusal> {
        refusal(&[], source_id, self)
    }
}

impl Ledger {
    /// Why the source of this id, registered or not, may not use the coderd that reports `found`. None: it may.
    ///
    /// # Errors
    /// The database's.
    pub async fn identity_refusal(&self, source_id: Uuid, found: SourceIdentity) -> Result<Option<IdentityRefusal>, sqlx::Error> {
        let mut connection = self.pool.acquire().await?;
        Ok(refusal(&bindings(&mut connection).await?, source_id, found))
    }

    /// Whether the source is bound to a coderd.
    ///
    /// # Errors
    /// The database's.
    pub async fn is_bound(&self, source_id: Uuid) -> Result<bool, sqlx::Error> {
        let mut connection = self.pool.acquire().await?;
        Ok(bindings(&mut connection).await?.iter().any(|binding| binding.deployment_id == source_id && binding.bound.is_some()))
    }

    /// Binds a registered source to its coderd; one that is bound stays so.
    ///
    /// # Errors
    /// The database's. The inner one: this coderd is not the source's; then nothing is changed.
    pub async fn bind_source(&self, source_id: Uuid, found: SourceIdentity) -> Result<Result<(), IdentityRefusal>, sqlx::Error> {
        let mut tx = self.pool.begin().await?;
        sqlx::query("select from ledger for update").execute(&mut *tx).await?;
        if let Some(refusal) = refusal(&bindings(&mut tx).await?, source_id, found) {
            return Ok(Err(refusal));
        }
        bind(&mut tx, source_id, found).await?;
        tx.commit().await?;
        Ok(Ok(()))
    }

    /// Binds a registered source to another coderd than before, as an operator's act. Its collector loses its lease. None: the source is not
    /// registered.
    ///
    /// # Errors
    /// The database's. The inner one: another source is bound to this coderd; then nothing is changed.
    pub async fn accept_identity(
        &self,
        source_id: Uuid,
        found: SourceIdentity,
        act: &NewAct<'_>,
    ) -> Result<Result<Option<i64>, IdentityRefusal>, sqlx::Error> {
        let mut tx = self.pool.begin().await?;
        revoke_collector_lease(&mut tx, source_id).await?;
        sqlx::query("select from ledger for update").execute(&mut *tx).await?;
        let bindings = bindings(&mut tx).await?;
        if let Some(refusal) = other_source(&bindings, source_id, found) {
            return Ok(Err(refusal));
        }
        if !bind(&mut tx, source_id, found).await? {
            return Ok(Ok(None));
        }
        let before = bindings.iter().find(|binding| binding.deployment_id == source_id).and_then(|own| own.bound).map(as_json);
        let detail = serde_json::json!({ "before": before, "after": as_json(found) });
        let act_id = self.act(&mut tx, &NewAct { detail, ..act.clone() }).await?;
        tx.commit().await?;
        Ok(Ok(Some(act_id)))
    }
}

fn as_json(identity: SourceIdentity) -> serde_json::Value {
    serde_json::json!({ "deployment_id": identity.deployment_id, "organization_id": identity.organization_id })
}

async fn bindings(connection: &mut PgConnection) -> Result<Vec<Binding>, sqlx::Error> {
    let query = "select deployment_id, bound_deployment_id, bound_organization_id from source";
    let rows: Vec<(Uuid, Option<Uuid>, Option<Uuid>)> = sqlx::query_as(query).fetch_all(connection).await?;
    let bound = |(deployment_id, organization_id)| SourceIdentity { deployment_id, organization_id };
    Ok(rows.into_iter().map(|(id, own, organization)| Binding { deployment_id: id, bound: own.zip(organization).map(bound) }).collect())
}

/// False where the source is not registered.
async fn bind(tx: &mut PgConnection, source_id: Uuid, found: SourceIdentity) -> Result<bool, sqlx::Error> {
    let query = sqlx::query("update source set bound_deployment_id = $2, bound_organization_id = $3 where deployment_id = $1");
    let changed = query.bind(source_id).bind(found.deployment_id).bind(found.organization_id).execute(tx).await?;
    Ok(changed.rows_affected() == 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWN: Uuid = Uuid::from_u128(1);
    const OTHER: Uuid = Uuid::from_u128(2);

    fn coderd(deployment: Uuid, organization: u128) -> SourceIdentity {
        SourceIdentity { deployment_id: deployment, organization_id: Uuid::from_u128(organization) }
    }

    fn bound(source: Uuid, bound: SourceIdentity) -> Binding {
        Binding { deployment_id: source, bound: Some(bound) }
    }

    #[test]
    fn a_source_is_collected_from_the_coderd_of_its_own_id_only() {
        assert_eq!(refusal(&[], OWN, coderd(OWN, 7)), None);
        let found = coderd(OTHER, 7);
        assert_eq!(refusal(&[], OWN, found), Some(IdentityRefusal::NotItsOwnId { source_id: OWN, found }));
    }

    #[test]
    fn a_bound_source_goes_on_with_the_same_coderd_only() {
        let known = [bound(OWN, coderd(OWN, 7))];
        assert_eq!(refusal(&known, OWN, coderd(OWN, 7)), None, "a dump that was restored elsewhere, or an upgrade");
        for found in [coderd(OWN, 8), coderd(OTHER, 7), coderd(OTHER, 8)] {
            let refused = IdentityRefusal::OtherCoderd { source_id: OWN, bound: coderd(OWN, 7), found };
            assert_eq!(refusal(&known, OWN, found), Some(refused));
        }
    }

    #[test]
    fn one_coderd_is_one_source() {
        let known = [bound(OWN, coderd(OWN, 7))];
        assert_eq!(refusal(&known, OTHER, coderd(OTHER, 8)), None);
        let found = coderd(OTHER, 7);
        assert_eq!(refusal(&known, OTHER, found), Some(IdentityRefusal::OtherSource { source_id: OTHER, other_id: OWN, found }));
        let found = coderd(OWN, 7);
        assert_eq!(refusal(&known, OTHER, found), Some(IdentityRefusal::NotItsOwnId { source_id: OTHER, found }));
    }

    #[test]
    fn a_registered_source_that_is_not_bound_yet_is_not_replaced_by_a_second_one() {
        let unbound = Binding { deployment_id: OWN, bound: None };
        assert_eq!(refusal(&[unbound], OWN, coderd(OWN, 7)), None);
        let found = coderd(OTHER, 7);
        let refused = refusal(&[unbound], OWN, found).unwrap();
        assert_eq!(refused, IdentityRefusal::NotBound { source_id: OWN, found });
        let text = refused.to_string();
        assert!(text.contains(&format!("sources accept {OWN} --accept-new-identity")) && !text.contains("set source"), "{text}");
        let other = IdentityRefusal::OtherSource { source_id: OWN, other_id: OTHER, found };
        assert_eq!(refusal(&[unbound, bound(OTHER, found)], OWN, found), Some(other));
    }

    #[test]
    fn an_accepted_coderd_keeps_its_source() {
        let accepted = [bound(OWN, coderd(OTHER, 7))];
        assert_eq!(refusal(&accepted, OWN, coderd(OTHER, 7)), None);
        let found = coderd(OTHER, 7);
        assert_eq!(refusal(&accepted, OTHER, found), Some(IdentityRefusal::OtherSource { source_id: OTHER, other_id: OWN, found }));
    }
}
