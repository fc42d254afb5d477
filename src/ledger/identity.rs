//! The coderd that each source is bound to. One coderd under two ids would be billed twice.

use chrono::{DateTime, Utc};
use sqlx::Connection as _;
use sqlx::PgConnection;
use uuid::Uuid;

use super::leases::{collector_lease, revoke_leases};
use super::{NewAct, acts};

/// The facts that identify a coderd: its own deployment id and its default organization.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct SourceIdentity {
    pub deployment_id: Uuid,
    pub organization_id: Uuid,
}

/// The identity facts that a coderd reports. None: the fact is missing or may not be read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReportedIdentity {
    pub deployment_id: Option<Uuid>,
    pub organization_id: Option<Uuid>,
}

impl From<SourceIdentity> for ReportedIdentity {
    fn from(identity: SourceIdentity) -> Self {
        ReportedIdentity {
            deployment_id: Some(identity.deployment_id),
            organization_id: Some(identity.organization_id),
        }
    }
}

impl std::fmt::Display for ReportedIdentity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match (self.deployment_id, self.organization_id) {
            (Some(deployment), Some(organization)) => {
                write!(f, "deployment id {deployment} and default organization {organization}")
            }
            (Some(deployment), None) => write!(f, "deployment id {deployment}"),
            (None, Some(organization)) => write!(f, "default organization {organization}"),
            (None, None) => write!(f, "neither its deployment id nor its default organization"),
        }
    }
}

impl ReportedIdentity {
    /// Whether a reported fact belongs to another coderd.
    fn contradicts(self, bound: SourceIdentity) -> bool {
        self.deployment_id.is_some_and(|id| id != bound.deployment_id)
            || self.organization_id.is_some_and(|id| id != bound.organization_id)
    }

    /// Whether a reported fact belongs to this coderd.
    fn shares(self, bound: SourceIdentity) -> bool {
        self.deployment_id == Some(bound.deployment_id)
            || self.organization_id == Some(bound.organization_id)
    }
}

/// Reasons why a source may not use a coderd.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IdentityRefusal {
    /// The source is new, and its id is not coderd's own.
    #[error(
        "source.deployment_id {source_id} is not the id of this coderd: set it to {found}, which coderd reports"
    )]
    NotItsOwnId { source_id: Uuid, found: Uuid },
    /// The source was introduced while coderd's facts could not be read, under an id that is not
    /// coderd's own.
    #[error(
        "source {source_id} is registered, but not yet bound to a coderd, and this coderd reports deployment id {found}: if the source was \
         collected from this coderd, keep its id and bind it with `tallyline sources accept {source_id} --accept-new-identity --reason WHY`; \
         a second source {found} would count and bill everything again; if it was not, correct source.coderd_url"
    )]
    NotBound { source_id: Uuid, found: Uuid },
    /// The source is new, and another source is not bound yet: both could be the same coderd.
    #[error(
        "source {source_id} cannot be introduced while source {unbound_id} of this ledger is not bound to a coderd: if {unbound_id} was \
         collected from this coderd, a second source would count and bill everything again: set source.deployment_id to {unbound_id} and \
         bind it with `tallyline sources accept {unbound_id} --accept-new-identity --reason WHY`; if it is another coderd, run \
         src/coderd/grants.sql there, and its collector binds it; if it is not in use, run `tallyline sources retire {unbound_id} --reason WHY`"
    )]
    UnboundSource {
        source_id: Uuid,
        /// The source that is not bound yet.
        unbound_id: Uuid,
    },
    #[error(
        "source {source_id} is bound to the coderd with {}, but this coderd reports {found}: \
         correct source.coderd_url, or accept this coderd with `tallyline sources accept {source_id} --accept-new-identity --reason WHY`",
        ReportedIdentity::from(*.bound)
    )]
    OtherCoderd {
        source_id: Uuid,
        /// The coderd that the source is bound to.
        bound: SourceIdentity,
        found: ReportedIdentity,
    },
    /// The coderd belongs to another source of this ledger.
    #[error(
        "source {source_id} cannot be collected from this coderd, which is source {other_id} of this ledger ({found}): everything would be \
         billed twice; set source.deployment_id to {other_id}"
    )]
    OtherSource {
        source_id: Uuid,
        /// The source that is bound to this coderd.
        other_id: Uuid,
        found: ReportedIdentity,
    },
}

/// A registered source and the coderd that it is bound to. None: coderd's facts have not been read
/// yet.
#[derive(Clone, Copy, Debug, sqlx::FromRow)]
struct Binding {
    deployment_id: Uuid,
    #[sqlx(json(nullable))]
    bound: Option<SourceIdentity>,
    retired: bool,
}

/// The reason why a source may not use the coderd that reports `found`, if any. A fact that is not
/// reported contradicts nothing.
fn refusal(
    bindings: &[Binding],
    source_id: Uuid,
    found: ReportedIdentity,
) -> Option<IdentityRefusal> {
    let own = bindings.iter().find(|binding| binding.deployment_id == source_id);
    if let Some(bound) = own.and_then(|own| own.bound)
        && found.contradicts(bound)
    {
        return Some(IdentityRefusal::OtherCoderd { source_id, bound, found });
    }
    let other = other_source(bindings, source_id, found);
    let reported = found.deployment_id.filter(|id| *id != source_id);
    match own {
        Some(Binding { bound: Some(_), .. }) => other,
        Some(_) => other.or(reported.map(|found| IdentityRefusal::NotBound { source_id, found })),
        None => {
            let unbound =
                if other.is_none() { unbound_source(bindings, source_id, found) } else { None };
            unbound
                .or(reported.map(|found| IdentityRefusal::NotItsOwnId { source_id, found }))
                .or(other)
        }
    }
}

fn other_source(
    bindings: &[Binding],
    source_id: Uuid,
    found: ReportedIdentity,
) -> Option<IdentityRefusal> {
    let shares = |binding: &&Binding| {
        binding.deployment_id != source_id && binding.bound.is_some_and(|bound| found.shares(bound))
    };
    let other = bindings.iter().find(shares)?;
    Some(IdentityRefusal::OtherSource { source_id, other_id: other.deployment_id, found })
}

/// The refusal of a new source beside an unbound one, unless the unbound source has the id that
/// coderd reports.
fn unbound_source(
    bindings: &[Binding],
    source_id: Uuid,
    found: ReportedIdentity,
) -> Option<IdentityRefusal> {
    let unbound = bindings.iter().find(|binding| binding.bound.is_none() && !binding.retired)?;
    let unbound_id = Some(unbound.deployment_id).filter(|id| found.deployment_id != Some(*id))?;
    Some(IdentityRefusal::UnboundSource { source_id, unbound_id })
}

impl ReportedIdentity {
    /// The reason why a source of this id cannot be introduced from this coderd, for a ledger
    /// without sources.
    #[must_use]
    pub fn refusal_of_new(self, source_id: Uuid) -> Option<IdentityRefusal> {
        refusal(&[], source_id, self)
    }
}

/// The reason why the source of this id, registered or not, may not use the coderd that reports
/// `found`. None: it may.
pub async fn refusal_of(
    conn: &mut PgConnection,
    source_id: Uuid,
    found: ReportedIdentity,
) -> Result<Option<IdentityRefusal>, sqlx::Error> {
    Ok(refusal(&bindings(conn).await?, source_id, found))
}

pub async fn is_bound(conn: &mut PgConnection, source_id: Uuid) -> Result<bool, sqlx::Error> {
    Ok(bindings(conn)
        .await?
        .iter()
        .any(|binding| binding.deployment_id == source_id && binding.bound.is_some()))
}

/// Binds a registered source to its coderd. A source that is bound stays bound.
///
/// # Errors
/// The inner error means that this coderd is not the source's; nothing is changed.
pub async fn bind(
    conn: &mut PgConnection,
    source_id: Uuid,
    found: SourceIdentity,
) -> Result<Result<(), IdentityRefusal>, sqlx::Error> {
    if refusal(&bindings(&mut *conn).await?, source_id, found.into()).is_none() {
        set_binding(&mut *conn, source_id, found, false).await?;
    }
    // also where an operator has bound it meanwhile
    Ok(refusal(&bindings(conn).await?, source_id, found.into()).map_or(Ok(()), Err))
}

/// Binds a registered source to another coderd, by an operator's act. Its collector loses its
/// lease. None: it is not registered.
///
/// # Errors
/// The inner error means that another source is bound to this coderd; nothing is changed.
pub async fn accept(
    conn: &mut PgConnection,
    source_id: Uuid,
    found: SourceIdentity,
    act: &NewAct<'_>,
    now: DateTime<Utc>,
) -> Result<Result<Option<i64>, IdentityRefusal>, sqlx::Error> {
    let mut tx = conn.begin().await?;
    revoke_leases(&mut tx, &collector_lease(source_id)).await?;
    let bindings = bindings(&mut tx).await?;
    if let Some(refusal) = other_source(&bindings, source_id, found.into()) {
        return Ok(Err(refusal));
    }
    if !set_binding(&mut tx, source_id, found, true).await? {
        return Ok(Ok(None));
    }
    let before = bindings
        .iter()
        .find(|binding| binding.deployment_id == source_id)
        .and_then(|own| own.bound);
    let detail = serde_json::json!({ "before": before, "after": found });
    let act_id = acts::insert(&mut tx, &NewAct { detail, ..act.clone() }, now).await?;
    tx.commit().await?;
    Ok(Ok(Some(act_id)))
}

async fn bindings(connection: &mut PgConnection) -> Result<Vec<Binding>, sqlx::Error> {
    sqlx::query_as(
        "select deployment_id, retired_act_id is not null as retired, case when bound_deployment_id is not null then
             jsonb_build_object('deployment_id', bound_deployment_id, 'organization_id', bound_organization_id) end as bound
         from source order by id",
    )
    .fetch_all(connection)
    .await
}

/// Returns false if the source is not registered, or is bound and must not be bound again.
async fn set_binding(
    tx: &mut PgConnection,
    source_id: Uuid,
    found: SourceIdentity,
    again: bool,
) -> Result<bool, sqlx::Error> {
    let query = sqlx::query(
        "update source set bound_deployment_id = $2, bound_organization_id = $3
         where deployment_id = $1 and ($4 or bound_deployment_id is null)",
    );
    let changed = query
        .bind(source_id)
        .bind(found.deployment_id)
        .bind(found.organization_id)
        .bind(again)
        .execute(tx)
        .await?;
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
        Binding { deployment_id: source, bound: Some(bound), retired: false }
    }

    fn unbound(source: Uuid) -> Binding {
        Binding { deployment_id: source, bound: None, retired: false }
    }

    fn refused(
        bindings: &[Binding],
        source_id: Uuid,
        found: impl Into<ReportedIdentity>,
    ) -> Option<IdentityRefusal> {
        refusal(bindings, source_id, found.into())
    }

    /// The reports of a coderd that hides one of the two facts, for each fact.
    fn halves(identity: SourceIdentity) -> [ReportedIdentity; 2] {
        let whole = ReportedIdentity::from(identity);
        [
            ReportedIdentity { organization_id: None, ..whole },
            ReportedIdentity { deployment_id: None, ..whole },
        ]
    }

    #[test]
    fn a_source_is_collected_from_the_coderd_of_its_own_id_only() {
        assert_eq!(refused(&[], OWN, coderd(OWN, 7)), None);
        let expected = Some(IdentityRefusal::NotItsOwnId { source_id: OWN, found: OTHER });
        let [id, organization] = halves(coderd(OTHER, 7));
        assert_eq!(
            (refused(&[], OWN, coderd(OTHER, 7)), refused(&[], OWN, id)),
            (expected.clone(), expected)
        );
        assert_eq!(
            (refused(&[], OWN, organization), refused(&[], OWN, ReportedIdentity::default())),
            (None, None)
        );
    }

    #[test]
    fn a_bound_source_continues_only_with_the_same_coderd() {
        let known = [bound(OWN, coderd(OWN, 7))];
        assert_eq!(
            refused(&known, OWN, coderd(OWN, 7)),
            None,
            "a dump that was restored elsewhere, or an upgrade"
        );
        for found in [coderd(OWN, 8), coderd(OTHER, 7), coderd(OTHER, 8)] {
            let expected = IdentityRefusal::OtherCoderd {
                source_id: OWN,
                bound: coderd(OWN, 7),
                found: found.into(),
            };
            assert_eq!(refused(&known, OWN, found), Some(expected));
        }
    }

    #[test]
    fn each_fact_refuses_by_itself() {
        let known = [bound(OWN, coderd(OWN, 7))];
        for found in halves(coderd(OTHER, 8)) {
            let refusal = refused(&known, OWN, found).unwrap();
            assert_eq!(
                refusal,
                IdentityRefusal::OtherCoderd { source_id: OWN, bound: coderd(OWN, 7), found }
            );
            let reported = found.deployment_id.or(found.organization_id).unwrap();
            assert!(refusal.to_string().contains(&reported.to_string()), "{refusal}");
        }
        for found in halves(coderd(OWN, 7)) {
            assert_eq!(refused(&known, OWN, found), None);
            let expected = IdentityRefusal::OtherSource { source_id: OTHER, other_id: OWN, found };
            assert_eq!(refused(&[known[0], unbound(OTHER)], OTHER, found), Some(expected));
        }
        let [id, organization] = halves(coderd(OWN, 7));
        let expected =
            IdentityRefusal::OtherSource { source_id: OTHER, other_id: OWN, found: organization };
        assert_eq!(refused(&known, OTHER, organization), Some(expected));
        assert_eq!(
            refused(&known, OTHER, id),
            Some(IdentityRefusal::NotItsOwnId { source_id: OTHER, found: OWN })
        );
        assert_eq!(
            refused(&known, OWN, ReportedIdentity::default()),
            None,
            "no fact contradicts the source"
        );
    }

    #[test]
    fn one_coderd_is_one_source() {
        let known = [bound(OWN, coderd(OWN, 7))];
        assert_eq!(refused(&known, OTHER, coderd(OTHER, 8)), None);
        let found = ReportedIdentity::from(coderd(OTHER, 7));
        let other = Some(IdentityRefusal::OtherSource { source_id: OTHER, other_id: OWN, found });
        assert_eq!(refused(&known, OTHER, found), other);
        assert_eq!(
            refused(&[known[0], unbound(Uuid::from_u128(3))], OTHER, found),
            other,
            "the coderd belongs to a known source"
        );
        let own = Some(IdentityRefusal::NotItsOwnId { source_id: OTHER, found: OWN });
        assert_eq!(refused(&known, OTHER, coderd(OWN, 7)), own);
    }

    #[test]
    fn a_registered_source_that_is_not_bound_yet_is_not_replaced_by_a_second_one() {
        assert_eq!(refused(&[unbound(OWN)], OWN, coderd(OWN, 7)), None);
        let found = coderd(OTHER, 7);
        let refusal = refused(&[unbound(OWN)], OWN, found).unwrap();
        assert_eq!(refusal, IdentityRefusal::NotBound { source_id: OWN, found: OTHER });
        let text = refusal.to_string();
        assert!(
            text.contains(&format!("sources accept {OWN} --accept-new-identity"))
                && !text.contains("set source"),
            "{text}"
        );
        let other =
            IdentityRefusal::OtherSource { source_id: OWN, other_id: OTHER, found: found.into() };
        assert_eq!(refused(&[unbound(OWN), bound(OTHER, found)], OWN, found), Some(other));
    }

    #[test]
    fn no_source_is_introduced_beside_one_that_is_in_use_and_not_bound() {
        let found = ReportedIdentity::from(coderd(OTHER, 7));
        for found in
            halves(coderd(OTHER, 7)).into_iter().chain([found, ReportedIdentity::default()])
        {
            let refusal = refused(&[unbound(OWN)], OTHER, found).unwrap();
            assert_eq!(
                refusal,
                IdentityRefusal::UnboundSource { source_id: OTHER, unbound_id: OWN }
            );
            let text = refusal.to_string();
            for way in ["sources accept", "sources retire"] {
                assert!(
                    text.contains(&format!("`tallyline {way} {OWN} "))
                        && text.contains("grants.sql"),
                    "{text}"
                );
            }
            assert_eq!(refused(&[Binding { retired: true, ..unbound(OWN) }], OTHER, found), None);
            assert_eq!(
                refused(&[unbound(OWN), unbound(OTHER)], OTHER, found),
                None,
                "both are registered"
            );
        }
        let own = Some(IdentityRefusal::NotItsOwnId { source_id: OTHER, found: OWN });
        assert_eq!(
            refused(&[unbound(OWN)], OTHER, coderd(OWN, 7)),
            own,
            "the unbound one has coderd's own id"
        );
    }

    #[test]
    fn an_accepted_coderd_keeps_its_source() {
        let accepted = [bound(OWN, coderd(OTHER, 7))];
        let found = coderd(OTHER, 7);
        assert_eq!(refused(&accepted, OWN, found), None);
        let expected =
            IdentityRefusal::OtherSource { source_id: OTHER, other_id: OWN, found: found.into() };
        assert_eq!(refused(&accepted, OTHER, found), Some(expected));
    }
}
