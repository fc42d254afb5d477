//! Source and ledger: every completed build and usage row of coderd is there under its id with its digest, and nothing that coderd never had.
//!
//! Beside live traffic the two sides are never the same instant. Ids that differ are kept; once a collector pass that began afterwards is in
//! the ledger, only they are read again, ledger first, source last.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::time::Duration;

use anyhow::Context as _;
use chrono::{DateTime, Utc};
use uuid::Uuid;

use super::{Audit, Joint, SOURCE};
use crate::coderd::{Catalog, Database, Reader};
use crate::collectors::events;
use crate::event::{self, Digest, Event, ParseError, Payload};
use crate::ledger::{Difference, Ledger, RefusedState, Source};

/// Ids compared at a time.
const PAGE: i64 = 2_000;

/// Digests of a build and of the claim that it may be.
type BuildDigests = [Option<Digest>; 2];
const NOTHING: BuildDigests = [None, None];
/// What the ids of their events begin with.
const EVENTS: [&str; 2] = ["workspace_build_completed", "prebuild_claimed"];

/// What is known of an event since `tallyline recover`.
const LOST: &str = "coderd lost it when its database was restored to an earlier time";
/// The same of usage whose id it has given again.
const USED_AGAIN: &str =
    "coderd lost it when its database was restored to an earlier time, and has used its id again: the accepted event stands";
/// 1 where what differed was read again after a collector pass that began later.
const READ_AGAIN: &str = "read_again_after_a_later_pass";

/// Ids that differ, by table.
#[derive(Default)]
struct Suspects {
    builds: BTreeSet<Uuid>,
    usage: BTreeSet<String>,
}

struct Sides<'a> {
    ledger: &'a Ledger,
    source: Source,
    reader: Reader,
    catalog: Catalog,
    /// Suspects that had gone through the log again from the rejects before the pass that was waited for began.
    passed: HashSet<String>,
}

pub(super) async fn compare(audit: &Audit) -> anyhow::Result<Joint> {
    let mut joint = Joint::new(SOURCE);
    let Some((database, deployment)) = &audit.source else {
        joint.remarks.push(remark("not_compared", "source", "no coderd database is configured"));
        return Ok(joint);
    };
    let Some(source) = audit.ledger.in_time(audit.ledger.source(*deployment)).await? else {
        let detail = "the ledger has not been introduced to this deployment: no collector pass yet".to_owned();
        joint.differences.push(Difference { kind: "source_unknown".into(), id: deployment.to_string(), detail });
        return Ok(joint);
    };
    let mut sides = Sides::open(&audit.ledger, database, source).await?;
    let suspects = sides.suspects(&mut joint).await?;
    if !suspects.builds.is_empty() || !suspects.usage.is_empty() {
        sides.passed = sides.passed(&suspects).await?;
        // Asked last: what was read before, which may have taken many passes, is all in a pass that begins from now on.
        let newest_pass = audit.ledger.in_time(audit.ledger.newest_pass(sides.source.id)).await?;
        let fresh = wait_for_pass(audit, sides.source.id, newest_pass).await?;
        joint.number("differed_at_first", suspects.builds.len() + suspects.usage.len());
        joint.number(READ_AGAIN, i64::from(fresh));
        sides.builds(&suspects.builds, &mut joint).await?;
        sides.usage(&suspects.usage, &mut joint).await?;
    }
    sides.reader.close().await;
    Ok(joint)
}

/// Waits until a pass that began after what was read is in the ledger. False when none came in time.
async fn wait_for_pass(audit: &Audit, source_id: i16, after: i64) -> anyhow::Result<bool> {
    let deadline = tokio::time::Instant::now() + audit.patience;
    loop {
        if audit.ledger.in_time(audit.ledger.later_pass_is_in(source_id, after)).await? {
            return Ok(true);
        }
        if tokio::time::Instant::now() >= deadline {
            return Ok(false);
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

impl<'a> Sides<'a> {
    async fn open(ledger: &'a Ledger, database: &Database, source: Source) -> anyhow::Result<Self> {
        let mut reader = database.connect().await.context("coderd's database")?;
        let catalog = reader.catalog().await.context("coderd's database")?;
        Ok(Sides { ledger, source, reader, catalog, passed: HashSet::new() })
    }

    fn baseline(&self) -> DateTime<Utc> {
        self.source.baseline_until.unwrap_or(DateTime::<Utc>::MIN_UTC)
    }

    /// Reads both sides whole, in pages, and keeps the ids that are not the same on both.
    async fn suspects(&mut self, joint: &mut Joint) -> anyhow::Result<Suspects> {
        let mut suspects = Suspects::default();
        joint.number("source_builds", self.source_builds(&mut suspects).await?);
        joint.number("ledger_builds", self.ledger_builds(&mut suspects).await?);
        if self.catalog.usage_events {
            joint.number("source_usage", self.source_usage(&mut suspects).await?);
            joint.number("ledger_usage", self.ledger_usage(&mut suspects).await?);
        }
        Ok(suspects)
    }

    /// Which of the suspects' records went through the log again from the rejects.
    async fn passed(&self, suspects: &Suspects) -> anyhow::Result<HashSet<String>> {
        let builds = suspects.builds.iter().flat_map(names);
        let names: Vec<String> = builds.chain(suspects.usage.iter().cloned()).collect();
        let mut passed = HashSet::new();
        for names in names.chunks(4_000) {
            let refused = self.ledger.in_time(self.ledger.refused_states(self.source.deployment_id, names)).await?;
            passed.extend(refused.into_iter().filter(|(_, refused)| refused.passed).map(|(name, _)| name));
        }
        Ok(passed)
    }

    async fn source_builds(&mut self, suspects: &mut Suspects) -> anyhow::Result<usize> {
        let (mut after, mut seen) = (Uuid::nil(), 0);
        loop {
            let keys = self.reader.build_keys(after, PAGE).await?;
            let Some(last) = keys.last() else { return Ok(seen) };
            after = last.job_id;
            let baseline = self.baseline();
            let ids: Vec<Uuid> = keys.iter().filter(|key| key.completed_at >= baseline).filter_map(|key| key.build_id).collect();
            seen += ids.len();
            let here = self.ledger_digests(&ids).await?;
            let there = self.source_digests(&ids).await?;
            let differs = |id: &Uuid| there.get(id).is_some_and(|there| there.as_ref() != Some(here.get(id).unwrap_or(&NOTHING)));
            suspects.builds.extend(ids.into_iter().filter(differs));
        }
    }

    async fn ledger_builds(&mut self, suspects: &mut Suspects) -> anyhow::Result<usize> {
        let (mut after, mut seen) = (Uuid::nil(), 0);
        loop {
            let ids = self.ledger.in_time(self.ledger.build_ids(self.source.id, after, PAGE)).await?;
            let Some(last) = ids.last() else { return Ok(seen) };
            after = *last;
            seen += ids.len();
            let there: HashSet<Uuid> = self.reader.builds(&self.catalog, &ids).await?.into_iter().map(|row| row.build_id).collect();
            suspects.builds.extend(ids.into_iter().filter(|id| !there.contains(id)));
        }
    }

    async fn source_usage(&mut self, suspects: &mut Suspects) -> anyhow::Result<usize> {
        let (mut after, mut seen) = (String::new(), 0);
        loop {
            let keys = self.reader.usage_keys(&after, PAGE).await?;
            let Some(last) = keys.last() else { return Ok(seen) };
            after = last.id.clone();
            seen += keys.len();
            let ids: Vec<String> = keys.into_iter().map(|key| key.id).collect();
            let here = self.ledger.in_time(self.ledger.known_usage(self.source.id, &ids)).await?;
            let there = self.source_usage_digests(&ids).await?;
            suspects.usage.extend(
                ids.into_iter().filter(|id| there.get(id).is_some_and(|digest| digest.is_err() || digest.as_ref().ok() != here.get(id))),
            );
        }
    }

    async fn ledger_usage(&mut self, suspects: &mut Suspects) -> anyhow::Result<usize> {
        let (mut after, mut seen) = (String::new(), 0);
        loop {
            let ids = self.ledger.in_time(self.ledger.usage_ids(self.source.id, &after, PAGE)).await?;
            let Some(last) = ids.last() else { return Ok(seen) };
            after = last.clone();
            seen += ids.len();
            let there: HashSet<String> = self.reader.usage(&ids).await?.into_iter().map(|row| row.id).collect();
            suspects.usage.extend(ids.into_iter().filter(|id| !there.contains(id)));
        }
    }

    async fn ledger_digests(&self, ids: &[Uuid]) -> anyhow::Result<HashMap<Uuid, BuildDigests>> {
        let mut builds = self.ledger.in_time(self.ledger.known_builds(self.source.id, ids)).await?;
        let mut claims = self.ledger.in_time(self.ledger.known_claims(self.source.id, ids)).await?;
        let known = ids.iter().map(|id| (*id, [builds.remove(id), claims.remove(id)]));
        Ok(known.filter(|(_, digests)| *digests != NOTHING).collect())
    }

    /// None for a row that this version cannot read.
    async fn source_digests(&mut self, ids: &[Uuid]) -> anyhow::Result<HashMap<Uuid, Option<BuildDigests>>> {
        let mut digests = HashMap::with_capacity(ids.len());
        for row in self.reader.builds(&self.catalog, ids).await? {
            let id = row.build_id;
            let read = events::build(row).ok().map(|build| {
                let claim = events::claim(&build).map(|claim| self.digest(Payload::Claim(Box::new(claim))));
                [Some(self.digest(Payload::Build(Box::new(build)))), claim]
            });
            digests.insert(id, read);
        }
        Ok(digests)
    }

    fn digest(&self, payload: Payload) -> Digest {
        Event { deployment: self.source.deployment_id, payload }.digest()
    }

    /// An error for a row that is no event that this version can read.
    async fn source_usage_digests(&mut self, ids: &[String]) -> anyhow::Result<HashMap<String, Result<Digest, ParseError>>> {
        let deployment = self.source.deployment_id;
        let rows = self.reader.usage(ids).await?;
        let digest = |message| event::parse(&message).map(|event| event.digest());
        Ok(rows.into_iter().map(|row| (row.id.clone(), digest(events::usage(deployment, row)))).collect())
    }

    /// Reads suspected builds again, ledger first, and says what each is.
    async fn builds(&mut self, suspects: &BTreeSet<Uuid>, joint: &mut Joint) -> anyhow::Result<()> {
        let ids: Vec<Uuid> = suspects.iter().copied().collect();
        for ids in ids.chunks(2_000) {
            let names: Vec<String> = ids.iter().flat_map(names).collect();
            let refused = self.ledger.in_time(self.ledger.refused_states(self.source.deployment_id, &names)).await?;
            let here = self.ledger_digests(ids).await?;
            let there = self.source_digests(ids).await?;
            let parentless = self.parentless(ids).await?;
            let lost = self.ledger.in_time(self.ledger.lost_ids(self.source.id, &names)).await?;
            for id in ids {
                for (at, event) in EVENTS.iter().enumerate() {
                    let name = format!("{event}:{id}");
                    let here = here.get(id).and_then(|here| here[at]);
                    match (here, there.get(id).map(|there| there.map(|there| there[at]))) {
                        (None, None | Some(Some(None))) => {}
                        (Some(here), Some(Some(Some(there)))) if here == there => {}
                        (Some(_), Some(Some(Some(_)))) => {
                            joint.remarks.push(remark("source_changed", &name, "coderd has rewritten the row since it was accepted"));
                        }
                        (_, Some(None)) if at > 0 => {}
                        (_, Some(None)) => joint.open.push(difference("unreadable", &name, "this version cannot read coderd's row")),
                        (None, Some(_)) => joint.not_accepted(&name, refused.get(&name), false, &self.passed),
                        (Some(_), None) if lost.contains(&name) => joint.remarks.push(remark("source_gone", &name, LOST)),
                        (Some(_), None) if parentless.contains(id) => {
                            let detail = "coderd has removed its workspace or template version, and it with them";
                            joint.remarks.push(remark("source_gone", &name, detail));
                        }
                        (Some(_), None | Some(Some(None))) => {
                            joint.differences.push(difference("not_in_source", &name, "coderd does not have it, the ledger does"));
                        }
                    }
                }
            }
        }
        Ok(())
    }

    /// Builds whose workspace or template version coderd no longer has: it removes builds only with these.
    async fn parentless(&mut self, ids: &[Uuid]) -> anyhow::Result<HashSet<Uuid>> {
        let parents = self.ledger.in_time(self.ledger.build_parents(self.source.id, ids)).await?;
        let workspaces: Vec<Uuid> = parents.iter().map(|(_, workspace, _)| *workspace).collect();
        let versions: Vec<Uuid> = parents.iter().map(|(_, _, version)| *version).collect();
        let there = self.reader.parents_present(&workspaces, &versions).await?;
        let gone = parents.into_iter().filter(|(_, workspace, version)| !there.contains(workspace) || !there.contains(version));
        Ok(gone.map(|(build, _, _)| build).collect())
    }

    async fn usage(&mut self, suspects: &BTreeSet<String>, joint: &mut Joint) -> anyhow::Result<()> {
        let ids: Vec<String> = suspects.iter().cloned().collect();
        for ids in ids.chunks(2_000) {
            let refused = self.ledger.in_time(self.ledger.refused_states(self.source.deployment_id, ids)).await?;
            let here: BTreeMap<String, Digest> =
                self.ledger.in_time(self.ledger.known_usage(self.source.id, ids)).await?.into_iter().collect();
            let there = self.source_usage_digests(ids).await?;
            let lost = self.ledger.in_time(self.ledger.lost_ids(self.source.id, ids)).await?;
            for id in ids {
                match (here.get(id), there.get(id)) {
                    (Some(here), Some(Ok(there))) if here == there => {}
                    // coderd's row never was an event, and what is accepted went through the log from the rejects
                    (Some(_), Some(Err(_))) if refused.get(id).is_some_and(|refused| refused.passed) => {
                        joint.remarks.push(remark(
                            "mended",
                            id,
                            "coderd's row is no event; an operator has passed a mended one through the log",
                        ));
                    }
                    (Some(_), Some(_)) if lost.contains(id) => joint.remarks.push(remark("source_changed", id, USED_AGAIN)),
                    // coderd never rewrites what the digest of usage covers
                    (Some(_), Some(_)) => joint.differences.push(difference("differs", id, "coderd's row tells something else")),
                    (None, Some(there)) => {
                        let unknown_type = matches!(there, Err(ParseError::UnknownEventType(_)));
                        joint.not_accepted(id, refused.get(id), unknown_type, &self.passed);
                    }
                    (Some(_), None) if lost.contains(id) => joint.remarks.push(remark("source_gone", id, LOST)),
                    // usage_events has no deletion: a row that is not there never was
                    (Some(_), None) => joint.differences.push(difference("not_in_source", id, "coderd does not have it, the ledger does")),
                    (None, None) => {}
                }
            }
        }
        Ok(())
    }
}

impl Joint {
    /// What coderd has and is no accepted event. What the ledger refused is in the books: among the rejects, which are an operator's work, or
    /// given up by one. What went through the log again only after the first reading may be on its way.
    fn not_accepted(&mut self, id: &str, refused: Option<&RefusedState>, unknown_type: bool, passed: &HashSet<String>) {
        match refused.map(|refused| refused.state.as_str()) {
            None => self.differences.push(difference("missing", id, "coderd has it, the ledger does not")),
            Some("open") if unknown_type => {
                self.open.push(difference("held", id, "the ledger holds the row raw, for a version that knows its type"));
            }
            Some("open") => self.open.push(difference("rejected", id, "the ledger has it among its rejects")),
            Some("discarded") => self.remarks.push(remark("discarded", id, "the ledger refused it, and an operator has discarded it")),
            Some(_) if !passed.contains(id) => {
                self.open.push(difference("resubmitted", id, "it went through the log again from the rejects just now"));
            }
            Some(_) => {
                let detail = "it went through the log again from the rejects, and the ledger does not have it";
                self.differences.push(difference("resubmitted", id, detail));
            }
        }
    }

    /// Whether what this joint calls missing may only be on its way: no collector pass that began after the first reading came in time. Before
    /// the first pass all of it is.
    pub(super) fn awaits_a_pass(&self) -> bool {
        let has = |kind: &str| self.differences.iter().any(|difference| difference.kind == kind);
        has("source_unknown") || self.numbers.get(READ_AGAIN) == Some(&0) && (has("missing") || has("resubmitted"))
    }
}

/// The names of the events that a build may be.
fn names(id: &Uuid) -> [String; 2] {
    EVENTS.map(|event| format!("{event}:{id}"))
}

fn difference(kind: &'static str, id: &str, detail: &str) -> Difference {
    Difference { kind: kind.into(), id: id.to_owned(), detail: detail.to_owned() }
}

fn remark(kind: &'static str, id: &str, detail: &str) -> Difference {
    difference(kind, id, detail)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn joint(passed_before: bool, read_again: i64) -> Joint {
        let mut joint = Joint::new(SOURCE);
        joint.number(READ_AGAIN, read_again);
        let passed = if passed_before { HashSet::from(["a".to_owned()]) } else { HashSet::new() };
        joint.not_accepted("a", Some(&RefusedState { state: "resubmitted".into(), passed: true }), false, &passed);
        joint
    }

    #[test]
    fn what_goes_through_the_log_again_while_the_audit_reads_is_on_its_way() {
        let just_now = joint(false, 1);
        assert_eq!((just_now.differences.len(), just_now.open.len(), just_now.awaits_a_pass()), (0, 1, false));
        let lost = joint(true, 1);
        assert_eq!((lost.differences.len(), lost.open.len(), lost.awaits_a_pass()), (1, 0, false));
        assert!(joint(true, 0).awaits_a_pass(), "the log may not have been read since: consuming may be paused");
    }
}
