//! Decides from the audit's findings which usage is not published.

use chrono::{DateTime, Utc};
use sqlx::PgConnection;
use uuid::Uuid;

use super::{Finding, LateAudit, findings, late_audits};

/// Above this share of differing usage in the last 30 days the whole source is held.
const LARGEST_SHARE_PERCENT: i128 = 1;

/// The scope of a hold.
#[derive(
    Clone,
    Copy,
    Debug,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    serde::Serialize,
    serde::Deserialize,
    utoipa::ToSchema,
)]
#[serde(rename_all = "lowercase")]
pub enum HoldScope {
    Everything,
    Source,
    Event,
}

/// Usage that is not published, with the reason and the condition that ends the hold.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize, utoipa::ToSchema)]
pub struct Hold {
    /// The scope of the hold.
    pub scope: HoldScope,
    /// The source; absent where the hold covers all sources.
    pub deployment_id: Option<Uuid>,
    /// The usage event, where the hold covers only one.
    pub event_id: Option<String>,
    /// When the hold began.
    pub since: Option<DateTime<Utc>>,
    /// The reason.
    pub why: String,
    /// The condition that ends the hold.
    pub ends: String,
}

/// The policy that maps findings and late audits to holds. A contradiction between the ledger and the
/// log or the vendor holds everything. A source is held if over 1 % of its usage of the last 30 days
/// differs; otherwise each event that differs is held by itself. Builds hold nothing. Usage that
/// coderd does not have, and was never seen to have, holds only itself. A late audit holds what its
/// findings could hold, until the joint is audited or an operator publishes without it.
#[must_use]
pub fn holds(findings: &[Finding], late: &[LateAudit]) -> Vec<Hold> {
    findings
        .iter()
        .filter_map(Finding::hold)
        .chain(late.iter().filter_map(LateAudit::hold))
        .collect()
}

impl LateAudit {
    /// The hold that follows from the late audit, unless an operator has overridden it.
    #[must_use]
    pub fn hold(&self) -> Option<Hold> {
        let scope = self.deployment_id.map_or(HoldScope::Everything, |_| HoldScope::Source);
        self.overridden.is_none().then(|| Hold {
            scope,
            deployment_id: self.deployment_id,
            event_id: None,
            since: self.since,
            why: self.to_string(),
            ends: self.hold_end(),
        })
    }
}

impl Finding {
    /// The hold that follows from the finding, if any.
    #[must_use]
    pub fn hold(&self) -> Option<Hold> {
        let scope = self.hold_scope()?;
        let (why, ends) = (self.hold_reason(scope), self.hold_end(scope));
        Some(Hold {
            scope,
            deployment_id: self.deployment_id,
            event_id: None,
            since: self.differs_since,
            why,
            ends,
        })
    }

    fn hold_scope(&self) -> Option<HoldScope> {
        let share_is_too_large = i128::from(self.recent_usage_differs) * 100
            > i128::from(self.recent_usage) * LARGEST_SHARE_PERCENT;
        match self.deployment_id {
            None if self.differences > 0 => Some(HoldScope::Everything),
            Some(_) if share_is_too_large => Some(HoldScope::Source),
            _ => None,
        }
    }
}

/// The hold on this deployment's usage by the audits; none: at most single events are held. After an
/// error it is not known whether usage is held.
///
/// Late audits are read first: if an audit ends between the two reads, its differences are among the
/// findings.
pub async fn of_deployment(
    conn: &mut PgConnection,
    deployment: Uuid,
) -> Result<Option<Hold>, sqlx::Error> {
    let concerns =
        |hold: &Hold| hold.scope == HoldScope::Everything || hold.deployment_id == Some(deployment);
    let late = late_audits::list(conn).await?;
    Ok(holds(&findings::list(conn).await?, &late).into_iter().find(concerns))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::Sequence;

    const SOURCE: Uuid = Uuid::from_u128(0xd);

    fn finding(
        deployment_id: Option<Uuid>,
        differences: i64,
        recent_usage_differs: i64,
        recent_usage: i64,
    ) -> Finding {
        Finding {
            joint: "a joint".into(),
            deployment_id,
            differences,
            open: 0,
            gone: 0,
            recent_usage_differs,
            recent_usage,
            examples: Vec::new(),
            sequence: Sequence { incarnation: Uuid::nil(), number: 1 },
            audited_at: DateTime::UNIX_EPOCH,
            age_seconds: 0.0,
            seconds: 0.0,
            differs_since: (differences > 0).then_some(DateTime::UNIX_EPOCH),
            recent_turn_ended_at: None,
            recent_turn_due_at: None,
            whole_turn_ended_at: None,
            whole_turn_due_at: None,
        }
    }

    #[test]
    fn a_late_audit_holds_its_source_or_everything_until_an_operator_overrides_it() {
        let late = |deployment_id, overridden| LateAudit {
            joint: "a joint".into(),
            deployment_id,
            audited_at: None,
            since: Some(DateTime::UNIX_EPOCH),
            overridden,
        };
        let by = super::super::AuditOverride {
            actor: "sre-1".into(),
            reason: "a test".into(),
            acted_at: DateTime::UNIX_EPOCH,
        };
        let found = holds(&[], &[late(None, None), late(Some(SOURCE), None)]);
        let [all, source] = found.as_slice() else { panic!("{found:?}") };
        assert_eq!((all.scope, source.scope), (HoldScope::Everything, HoldScope::Source));
        assert!(all.ends.contains("--unaudited ledger"), "{all:?}");
        assert!(source.ends.contains(&format!("--unaudited {SOURCE}")), "{source:?}");
        assert_eq!(holds(&[], &[late(None, Some(by.clone())), late(Some(SOURCE), Some(by))]), []);
    }

    #[test]
    fn the_policy_sets_the_scope_of_a_hold() {
        use HoldScope::{Everything, Source};
        let of_ledger = |differences| finding(None, differences, 0, 0);
        let of_source =
            |differences, differs, usage| finding(Some(SOURCE), differences, differs, usage);
        for (finding, expected, why) in [
            (of_ledger(0), None, "log or vendor agrees"),
            (of_ledger(1), Some(Everything), "log or vendor contradicts the ledger"),
            (of_source(0, 0, 0), None, "a source without usage"),
            (of_source(500, 0, 0), None, "builds alone"),
            (of_source(500, 0, 1000), None, "builds beside usage that agrees"),
            (of_source(1, 1, 100), None, "exactly 1 % holds itself"),
            (of_source(1, 1, 99), Some(Source), "over 1 %"),
            (of_source(11, 11, 1000), Some(Source), "over 1 %"),
            (of_source(10, 10, 1000), None, "exactly 1 %"),
            (of_source(1, 1, 1), Some(Source), "all of it"),
            (of_source(i64::MAX, i64::MAX, i64::MAX), Some(Source), "no overflow"),
        ] {
            assert_eq!(finding.hold().map(|hold| hold.scope), expected, "{why}");
        }
    }

    #[test]
    fn a_hold_has_scope_begin_reason_and_end() {
        let found = holds(&[finding(None, 0, 0, 0), finding(Some(SOURCE), 3, 2, 10)], &[]);
        let [hold] = found.as_slice() else { panic!("{found:?}") };
        assert_eq!(
            (hold.scope, hold.deployment_id, hold.since),
            (HoldScope::Source, Some(SOURCE), Some(DateTime::UNIX_EPOCH))
        );
        assert!(hold.why.contains("2 of 10 usage events"), "{hold:?}");
        assert!(hold.ends.contains("at most 1 %") && !hold.ends.contains("retire"), "{hold:?}");
    }

    #[test]
    fn a_hold_of_a_source_without_a_recent_audit_names_its_retirement() {
        let found = Finding { age_seconds: 7200.0, ..finding(Some(SOURCE), 3, 2, 10) };
        let ends = found.hold().expect("it holds").ends;
        assert!(ends.contains(&format!("`tallyline sources retire {SOURCE}`")), "{ends}");
    }
}
