//! Compares source and ledger. The ledger has each completed build and usage row of coderd with its
//! id and digest, and no others.
//!
//! With live traffic both sides are never at the same instant. So ids that differ are kept until
//! the ledger has a later collector pass. Then only these ids are reread, ledger first, source
//! last.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::time::Duration;

use anyhow::Context as _;
use chrono::{DateTime, Utc};
use uuid::Uuid;

use super::joint::{Audit, Joint, RECENT, RECENT_USAGE, SOURCE, SOURCE_GONE};
use super::step::{self, Item, Step};
use crate::coderd::{BuildKey, Catalog, CoderdError, Database, Reader};
use crate::collectors::events::{self, InvalidRow};
use crate::event::{Digest, Event, ParseError, Payload, Topic};
use crate::ledger::{Difference, Ledger, Source, books, confirmed, identity, known, sources};

/// Ids in one comparison.
const PAGE: i64 = 2_000;

/// The most second claimants of a first successful start in the list.
const CLAIMANTS_LISTED: i64 = 100;

/// Prefixes of the ids of a build's events.
const EVENTS: [&str; 2] = ["workspace_build_completed", "prebuild_claimed"];

/// Digests of a build and of its prebuild claim.
pub(super) type BuildDigests = [Option<Digest>; 2];
const NOTHING: BuildDigests = [None, None];
/// Digest for a row that is not a valid event and is among the rejects.
const NO_EVENT: Digest = [0; 32];

/// 1 if the differences were reread after a later collector pass.
pub(super) const READ_AGAIN: &str = "read_again_after_a_later_pass";

/// Ids that differ, by table.
#[derive(Default)]
pub(super) struct Suspects {
    pub builds: BTreeSet<Uuid>,
    pub usage: BTreeSet<String>,
}

pub(super) struct Sides<'a> {
    pub ledger: &'a Ledger,
    pub source: Source,
    reader: Reader,
    catalog: Catalog,
    /// Suspects that were resubmitted from the rejects before the awaited pass began.
    pub passed: HashSet<String>,
}

pub(super) async fn compare(audit: &Audit) -> anyhow::Result<Joint> {
    let mut joint = Joint::new(SOURCE);
    let Some((database, deployment)) = &audit.source else {
        joint.remarks.push(remark("not_compared", "source", "no coderd database is configured"));
        return Ok(joint);
    };
    let Some(source) = audit.ledger.run(async |conn| sources::get(conn, *deployment).await).await?
    else {
        let detail = "the ledger does not know this deployment: no collector has registered it yet"
            .to_owned();
        joint.differences.push(Difference {
            kind: "source_unknown".into(),
            id: deployment.to_string(),
            detail,
        });
        return Ok(joint);
    };
    joint.number(SOURCE_GONE, 0);
    let mut sides = Sides::open(&audit.ledger, database, source).await?;
    sides.identify().await?;
    let suspects = sides.suspects(&mut joint).await?;
    joint.number(
        RECENT_USAGE,
        audit
            .ledger
            .run(async |conn| books::recent_usage(conn, sides.source.id, sides.recent()).await)
            .await?,
    );
    if !suspects.builds.is_empty() || !suspects.usage.is_empty() {
        sides.passed = sides.passed(&suspects).await?;
        // Read last: a pass that begins from now on covers all earlier reads, which may have taken
        // many passes.
        let newest_pass =
            audit.ledger.run(async |conn| books::newest_pass(conn, sides.source.id).await).await?;
        let fresh = wait_for_pass(audit, sides.source.id, newest_pass).await?;
        joint.number("differed_at_first", suspects.builds.len() + suspects.usage.len());
        joint.number(READ_AGAIN, i64::from(fresh));
        sides.judge_builds(&suspects.builds, &mut joint).await?;
        sides.judge_usage(&suspects.usage, &mut joint).await?;
        if fresh {
            sides.fetch_missing(&joint).await?;
        }
    }
    joint.remarks.extend(
        audit
            .ledger
            .run(async |conn| {
                books::second_first_starts(conn, sides.source.id, CLAIMANTS_LISTED).await
            })
            .await?,
    );
    sides.reader.close().await;
    Ok(joint)
}

/// One step of the continuous audit.
pub(super) async fn step(
    audit: &Audit,
    known: Vec<Item>,
    _progress: Option<serde_json::Value>,
) -> anyhow::Result<Step> {
    let mut joint = compare(audit).await?;
    let unsettled = joint.drop_unsettled();
    if unsettled > 0 && joint.differences.is_empty() {
        anyhow::bail!("no collector pass ended in time, so missing rows may be in flight");
    }
    Ok(step::whole(&joint, &known))
}

/// Waits until the ledger has a pass newer than `after`. False: none came in time.
async fn wait_for_pass(audit: &Audit, source_id: i16, after: i64) -> anyhow::Result<bool> {
    let deadline = tokio::time::Instant::now() + audit.patience;
    loop {
        if audit
            .ledger
            .run(async |conn| books::later_pass_is_in(conn, source_id, after).await)
            .await?
        {
            return Ok(true);
        }
        if tokio::time::Instant::now() >= deadline {
            return Ok(false);
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

/// The possible event ids of a build.
pub(super) fn event_ids(id: &Uuid) -> [String; 2] {
    EVENTS.map(|event| format!("{event}:{id}"))
}

impl<'a> Sides<'a> {
    async fn open(ledger: &'a Ledger, database: &Database, source: Source) -> anyhow::Result<Self> {
        let mut reader = database.connect().await.context("reading coderd's database")?;
        let catalog = reader.catalog().await.context("reading coderd's database")?;
        Ok(Sides { ledger, source, reader, catalog, passed: HashSet::new() })
    }

    /// Refuses a coderd that does not belong to this source: its rows are not a side of these
    /// books. A coderd that does not report its identity can be compared only while the source is
    /// not bound.
    async fn identify(&mut self) -> anyhow::Result<()> {
        let source_id = self.source.deployment_id;
        let facts = self.reader.identity_facts().await.context("reading coderd's database")?;
        if let Some(refusal) = self
            .ledger
            .run(async |conn| identity::refusal_of(conn, source_id, (&facts).into()).await)
            .await?
        {
            return Err(refusal.into());
        }
        match facts.problem {
            Some(problem)
                if self
                    .ledger
                    .run(async |conn| identity::is_bound(conn, source_id).await)
                    .await? =>
            {
                Err(CoderdError::UnknownIdentity(problem).into())
            }
            _ => Ok(()),
        }
    }

    /// The instant from which usage can still be published.
    pub(super) fn recent(&self) -> DateTime<Utc> {
        self.ledger.clock.now() - RECENT
    }

    fn is_in_baseline(&self, key: &BuildKey) -> bool {
        self.source.baseline_until.is_some_and(|until| key.completed_at < until.into())
    }

    /// Reads both sides completely, in pages, and keeps the ids that differ.
    async fn suspects(&mut self, joint: &mut Joint) -> anyhow::Result<Suspects> {
        let mut suspects = Suspects::default();
        joint.number("source_builds", self.source_builds(&mut suspects).await?);
        let ledger_builds = self.ledger_builds(&mut suspects, joint).await?;
        joint.number("ledger_builds", ledger_builds);
        if self.catalog.usage_events {
            joint.number("source_usage", self.source_usage(&mut suspects).await?);
            joint.number("ledger_usage", self.ledger_usage(&mut suspects).await?);
        }
        Ok(suspects)
    }

    /// The suspects that were resubmitted from the rejects.
    async fn passed(&self, suspects: &Suspects) -> anyhow::Result<HashSet<String>> {
        let builds = suspects.builds.iter().flat_map(event_ids);
        let names: Vec<String> = builds.chain(suspects.usage.iter().cloned()).collect();
        let mut passed = HashSet::new();
        for names in names.chunks(4_000) {
            let refused = self
                .ledger
                .run(async |conn| {
                    known::refused_states(conn, self.source.deployment_id, names).await
                })
                .await?;
            passed.extend(
                refused.into_iter().filter(|(_, refused)| refused.passed).map(|(name, _)| name),
            );
        }
        Ok(passed)
    }

    async fn source_builds(&mut self, suspects: &mut Suspects) -> anyhow::Result<usize> {
        let (mut after, mut seen) = (Uuid::nil(), 0);
        loop {
            let keys = self.reader.build_keys(after, PAGE).await?;
            let Some(last) = keys.last() else { return Ok(seen) };
            after = last.job_id;
            let ids: Vec<Uuid> = keys
                .iter()
                .filter(|key| !self.is_in_baseline(key))
                .filter_map(|key| key.build_id)
                .collect();
            seen += ids.len();
            let in_ledger = self.ledger_digests(&ids).await?;
            let in_source = self.source_digests(&ids).await?;
            self.confirm_builds(&in_ledger, &in_source).await?;
            let differs = |id: &Uuid| {
                in_source.get(id).is_some_and(|in_source| {
                    in_source.as_ref() != Some(in_ledger.get(id).unwrap_or(&NOTHING))
                })
            };
            suspects.builds.extend(ids.into_iter().filter(differs));
        }
    }

    /// Confirms the events that are equal in coderd.
    async fn confirm_builds(
        &self,
        in_ledger: &HashMap<Uuid, BuildDigests>,
        in_source: &HashMap<Uuid, Option<BuildDigests>>,
    ) -> anyhow::Result<()> {
        let equal = |at: usize| -> Vec<String> {
            let same = |(id, in_ledger): &(&Uuid, &BuildDigests)| {
                in_ledger[at].is_some()
                    && in_source.get(id).is_some_and(|in_source| {
                        in_source.is_some_and(|in_source| in_source[at] == in_ledger[at])
                    })
            };
            in_ledger.iter().filter(same).map(|(id, _)| id.to_string()).collect()
        };
        self.ledger
            .run(async |conn| {
                confirmed::record(
                    conn,
                    Topic::WorkspaceBuilds,
                    self.source.id,
                    &equal(0),
                    self.ledger.clock.now(),
                )
                .await
            })
            .await?;
        self.ledger
            .run(async |conn| {
                confirmed::record(
                    conn,
                    Topic::PrebuildClaims,
                    self.source.id,
                    &equal(1),
                    self.ledger.clock.now(),
                )
                .await
            })
            .await?;
        Ok(())
    }

    /// Counts confirmed builds that coderd no longer has; other missing builds become suspects.
    async fn ledger_builds(
        &mut self,
        suspects: &mut Suspects,
        joint: &mut Joint,
    ) -> anyhow::Result<usize> {
        let (mut after, mut seen) = (Uuid::nil(), 0);
        loop {
            let ids = self
                .ledger
                .run(async |conn| books::build_ids(conn, self.source.id, after, PAGE).await)
                .await?;
            let Some(last) = ids.last() else { return Ok(seen) };
            after = *last;
            seen += ids.len();
            let in_source: HashSet<Uuid> = self
                .reader
                .builds(&self.catalog, &ids)
                .await?
                .into_iter()
                .map(|row| row.build_id)
                .collect();
            let gone: Vec<Uuid> = ids.into_iter().filter(|id| !in_source.contains(id)).collect();
            let confirmed = self
                .ledger
                .run(async |conn| confirmed::builds(conn, self.source.id, &gone).await)
                .await?;
            for id in gone {
                match confirmed.get(&id) {
                    Some(events) if !events.contains(&Some(false)) => joint.gone_build(&id, events),
                    _ => drop(suspects.builds.insert(id)),
                }
            }
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
            let in_ledger = self
                .ledger
                .run(async |conn| known::usage(conn, self.source.id, &ids).await)
                .await?;
            let in_source = self.source_usage_digests(&ids).await?;
            let same = |(id, in_ledger): &(&String, &Digest)| matches!(in_source.get(*id), Some(Ok(in_source)) if in_source == *in_ledger);
            let equal: Vec<String> =
                in_ledger.iter().filter(same).map(|(id, _)| id.clone()).collect();
            self.ledger
                .run(async |conn| {
                    confirmed::record(
                        conn,
                        Topic::AgentUsage,
                        self.source.id,
                        &equal,
                        self.ledger.clock.now(),
                    )
                    .await
                })
                .await?;
            suspects.usage.extend(ids.into_iter().filter(|id| {
                in_source.get(id).is_some_and(|digest| {
                    digest.is_err() || digest.as_ref().ok() != in_ledger.get(id)
                })
            }));
        }
    }

    async fn ledger_usage(&mut self, suspects: &mut Suspects) -> anyhow::Result<usize> {
        let (mut after, mut seen) = (String::new(), 0);
        loop {
            let ids = self
                .ledger
                .run(async |conn| books::usage_ids(conn, self.source.id, &after, PAGE).await)
                .await?;
            let Some(last) = ids.last() else { return Ok(seen) };
            after = last.clone();
            seen += ids.len();
            let in_source: HashSet<String> =
                self.reader.usage(&ids).await?.into_iter().map(|row| row.id).collect();
            suspects.usage.extend(ids.into_iter().filter(|id| !in_source.contains(id)));
        }
    }

    pub(super) async fn ledger_digests(
        &self,
        ids: &[Uuid],
    ) -> anyhow::Result<HashMap<Uuid, BuildDigests>> {
        let mut builds =
            self.ledger.run(async |conn| known::builds(conn, self.source.id, ids).await).await?;
        let mut claims =
            self.ledger.run(async |conn| known::claims(conn, self.source.id, ids).await).await?;
        let known = ids.iter().map(|id| (*id, [builds.remove(id), claims.remove(id)]));
        Ok(known.filter(|(_, digests)| *digests != NOTHING).collect())
    }

    /// The digests of these rows in coderd; None for a row that this version cannot read.
    pub(super) async fn source_digests(
        &mut self,
        ids: &[Uuid],
    ) -> anyhow::Result<HashMap<Uuid, Option<BuildDigests>>> {
        let mut digests = HashMap::with_capacity(ids.len());
        for row in self.reader.builds(&self.catalog, ids).await? {
            let id = row.build_id;
            let read = match events::build(self.source.deployment_id, row) {
                Ok(build) => {
                    let claim = events::claim(&build)
                        .map(|claim| self.digest(Payload::Claim(Box::new(claim))));
                    Some([Some(self.digest(Payload::Build(Box::new(build)))), claim])
                }
                Err(InvalidRow::Time { .. }) => Some([Some(NO_EVENT), None]),
                Err(InvalidRow::UnknownWord { .. }) => None,
            };
            digests.insert(id, read);
        }
        Ok(digests)
    }

    fn digest(&self, payload: Payload) -> Digest {
        Event { deployment: self.source.deployment_id, payload }.digest()
    }

    /// The digests of these usage rows; an error for a row that this version cannot read as an
    /// event.
    pub(super) async fn source_usage_digests(
        &mut self,
        ids: &[String],
    ) -> anyhow::Result<HashMap<String, Result<Digest, ParseError>>> {
        let deployment = self.source.deployment_id;
        let rows = self.reader.usage(ids).await?;
        Ok(rows
            .into_iter()
            .map(|row| (row.id.clone(), events::usage_digest(deployment, row)))
            .collect())
    }
}

fn remark(kind: &'static str, id: &str, detail: &str) -> Difference {
    Difference { kind: kind.into(), id: id.to_owned(), detail: detail.to_owned() }
}
