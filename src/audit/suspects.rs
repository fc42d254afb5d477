//! The second reading: judges each id that differed in the first.

use std::collections::{BTreeSet, HashMap, HashSet};

use uuid::Uuid;

use super::joint::{Joint, RECENT_USAGE_DIFFERS, SOURCE_GONE};
use super::sides::{BUILD_TOPICS, BuildDigests, READ_AGAIN, Sides, event_ids};
use crate::event::{Digest, ParseError, Topic};
use crate::ledger::slices::{self, Presence};
use crate::ledger::{
    Difference, RefusedState, RejectState, books, collector_requests, confirmed, known, losses,
    publications,
};

/// Ids in one reading.
const PAGE: usize = 2_000;
/// The most events in the list that coderd no longer has; all are counted.
const GONE_LISTED: i64 = 20;

const GONE: &str = "coderd had it and has since removed it; it remains counted";
/// Without stages, the first build of a workspace shows that the second one is a claim.
const NO_LONGER_A_CLAIM: &str = "coderd has the build, but no longer the first build of its workspace, which made it a claim; it remains counted";
const NEVER_THERE: &str = "the ledger has it, coderd does not, and coderd is not known to have ever had it: `tallyline events correct` sets the event to nothing";
/// coderd never deletes usage.
const USAGE_GONE: &str = "coderd had it and no longer has it: if coderd's database was restored, run `tallyline recover plan --lost coderd`";
/// For usage that `tallyline recover` has recorded as lost.
const LOST: &str = "coderd lost it when its database was restored to an earlier time";
/// The same, if its id was used again.
const REUSED: &str = "coderd lost it when its database was restored to an earlier time, and has reused its id: the accepted event remains";

/// Facts about one suspect, without its digest.
struct Suspect<'a> {
    id: &'a str,
    /// Whether coderd was seen to have the accepted event.
    is_confirmed: bool,
    /// Whether an operator has recorded that coderd lost it.
    is_lost: bool,
    /// Whether and how a record of it was refused.
    refused: Option<&'a RefusedState>,
    /// Whether it was resubmitted from the rejects before the first reading.
    passed_before: bool,
}

/// Facts about a page of suspects.
struct SuspectFacts {
    refused: HashMap<String, RefusedState>,
    lost: HashSet<String>,
}

impl Sides<'_> {
    /// Requests from the source's collector the rows that the ledger lacks.
    pub(super) async fn fetch_missing(&self, joint: &Joint) -> anyhow::Result<()> {
        let missing = joint.differences.iter().filter(|difference| difference.kind == "missing");
        let ids: Vec<String> = missing.map(|difference| difference.id.clone()).collect();
        for ids in ids.chunks(PAGE) {
            self.ledger
                .run(async |conn| collector_requests::add_fetch(conn, self.source.id, ids).await)
                .await?;
        }
        Ok(())
    }

    async fn known(&self, ids: &[String]) -> anyhow::Result<SuspectFacts> {
        let refused = self
            .ledger
            .run(async |conn| known::refused_states(conn, self.source.deployment_id, ids).await)
            .await?;
        Ok(SuspectFacts {
            refused,
            lost: self
                .ledger
                .run(async |conn| losses::lost_ids(conn, self.source.id, ids).await)
                .await?,
        })
    }

    fn suspect<'a>(&self, id: &'a str, is_confirmed: bool, known: &'a SuspectFacts) -> Suspect<'a> {
        let (is_lost, refused) = (known.lost.contains(id), known.refused.get(id));
        Suspect { id, is_confirmed, is_lost, refused, passed_before: self.passed.contains(id) }
    }

    /// Rereads suspected builds, ledger first.
    pub(super) async fn judge_builds(
        &mut self,
        suspects: &BTreeSet<Uuid>,
        joint: &mut Joint,
    ) -> anyhow::Result<()> {
        let ids: Vec<Uuid> = suspects.iter().copied().collect();
        for ids in ids.chunks(PAGE) {
            let known = self.known(&ids.iter().flat_map(event_ids).collect::<Vec<_>>()).await?;
            let in_ledger = self.ledger_digests(ids).await?;
            let in_source = self.source_digests(ids).await?;
            let confirmed = self
                .ledger
                .run(async |conn| confirmed::builds(conn, self.source.id, ids).await)
                .await?;
            let (mut back, mut gone) = ([const { Vec::new() }; 2], [const { Vec::new() }; 2]);
            for id in ids {
                for (at, name) in event_ids(id).iter().enumerate() {
                    let in_ledger = in_ledger.get(id).and_then(|in_ledger| in_ledger[at]);
                    let is_confirmed =
                        confirmed.get(id).is_some_and(|events| events[at] == Some(true));
                    let in_source = in_source.get(id).copied();
                    match (in_ledger, in_source) {
                        (Some(_), Some(_)) => back[at].push(id.to_string()),
                        (Some(_), None) if is_confirmed => gone[at].push(id.to_string()),
                        _ => {}
                    }
                    let suspect = self.suspect(name, is_confirmed, &known);
                    joint.judge_build(&suspect, at, in_ledger, in_source);
                }
            }
            for (at, topic) in BUILD_TOPICS.into_iter().enumerate() {
                self.mark(topic, &back[at], Presence::Back).await?;
                self.mark(topic, &gone[at], Presence::Gone).await?;
            }
        }
        Ok(())
    }

    /// Rereads suspected usage, ledger first. Holds differing usage back at once. Returns the
    /// differing usage that can still be published, except usage that coderd was never seen to
    /// have.
    pub(super) async fn judge_usage(
        &mut self,
        suspects: &BTreeSet<String>,
        joint: &mut Joint,
    ) -> anyhow::Result<HashSet<String>> {
        let ids: Vec<String> = suspects.iter().cloned().collect();
        let mut recent = HashSet::new();
        for ids in ids.chunks(PAGE) {
            let known = self.known(ids).await?;
            let in_ledger =
                self.ledger.run(async |conn| known::usage(conn, self.source.id, ids).await).await?;
            let in_source = self.source_usage_digests(ids).await?;
            let confirmed = self
                .ledger
                .run(async |conn| confirmed::usage(conn, self.source.id, ids).await)
                .await?;
            let (mut differs, mut counted) = (Vec::new(), Vec::new());
            let accepted = || ids.iter().filter(|id| in_ledger.contains_key(*id));
            let back: Vec<String> =
                accepted().filter(|id| in_source.contains_key(*id)).cloned().collect();
            let gone: Vec<String> = accepted()
                .filter(|id| !in_source.contains_key(*id) && known.lost.contains(*id))
                .cloned()
                .collect();
            self.mark(Topic::AgentUsage, &back, Presence::Back).await?;
            self.mark(Topic::AgentUsage, &gone, Presence::Gone).await?;
            for id in ids {
                let before = joint.differences.len();
                let is_confirmed = confirmed.contains(id);
                joint.judge_usage(
                    &self.suspect(id, is_confirmed, &known),
                    in_ledger.get(id),
                    in_source.get(id),
                );
                let Some(new) =
                    joint.differences[before..].first().filter(|_| in_ledger.contains_key(id))
                else {
                    continue;
                };
                differs.push((new.id.clone(), new.detail.clone()));
                // No operation sends usage that coderd was never seen to have: it holds itself
                // only.
                if is_confirmed || new.kind != "not_in_source" {
                    counted.push(new.id.clone());
                }
            }
            let counted = self
                .ledger
                .run(async |conn| {
                    books::recent_usage_of(conn, self.source.id, &counted, self.recent()).await
                })
                .await?;
            recent.extend(counted);
            self.ledger
                .run(async |conn| {
                    publications::hold(conn, self.source.id, &differs, self.ledger.clock.now())
                        .await
                })
                .await?;
        }
        joint.number(RECENT_USAGE_DIFFERS, recent.len());
        Ok(recent)
    }

    /// Counts the events that coderd no longer has, and lists the first ones.
    pub(super) async fn list_gone(&self, joint: &mut Joint) -> anyhow::Result<()> {
        let source_id = self.source.id;
        let number = self.ledger.run(async |conn| slices::gone(conn, source_id).await).await?;
        joint.number(SOURCE_GONE, number);
        let listed = self
            .ledger
            .run(async |conn| slices::gone_ids(conn, source_id, GONE_LISTED).await)
            .await?;
        joint.remarks.extend(listed.into_iter().map(|(id, is_usage)| {
            difference("source_gone", &id, if is_usage { LOST } else { GONE })
        }));
        Ok(())
    }
}

impl Joint {
    /// Judges one event of a build. `in_ledger` is its digest in the ledger. `in_source` is None if
    /// coderd does not have the build, and `Some(None)` if this version cannot read its row.
    fn judge_build(
        &mut self,
        suspect: &Suspect<'_>,
        at: usize,
        in_ledger: Option<Digest>,
        in_source: Option<Option<BuildDigests>>,
    ) {
        let id = suspect.id;
        match (in_ledger, in_source.map(|in_source| in_source.map(|in_source| in_source[at]))) {
            (None, None | Some(Some(None))) => {}
            (Some(in_ledger), Some(Some(Some(in_source)))) if in_ledger == in_source => {}
            (Some(_), Some(Some(Some(_)))) => {
                self.remarks.push(difference(
                    "source_changed",
                    id,
                    "coderd has changed the row since it was accepted",
                ));
            }
            (_, Some(None)) if at > 0 => {}
            (_, Some(None)) => self.open.push(difference(
                "unreadable",
                id,
                "this version cannot read coderd's row",
            )),
            (None, Some(_)) => self.not_accepted(suspect, false),
            // gone: marked, and counted with the other gone events
            (Some(_), None) if suspect.is_confirmed => {}
            (Some(_), Some(Some(None))) if suspect.is_confirmed => {
                self.remarks.push(difference("source_changed", id, NO_LONGER_A_CLAIM));
            }
            (Some(_), None | Some(Some(None))) => {
                self.differences.push(difference("not_in_source", id, NEVER_THERE))
            }
        }
    }

    /// Judges one usage event. coderd never rewrites the fields of its digest and never deletes its
    /// row.
    fn judge_usage(
        &mut self,
        suspect: &Suspect<'_>,
        in_ledger: Option<&Digest>,
        in_source: Option<&Result<Digest, ParseError>>,
    ) {
        let id = suspect.id;
        match (in_ledger, in_source) {
            (Some(in_ledger), Some(Ok(in_source))) if in_ledger == in_source => {}
            // coderd's row never was a valid event, and the accepted event was resubmitted from the
            // rejects
            (Some(_), Some(Err(_))) if suspect.refused.is_some_and(|refused| refused.passed) => {
                let detail = "coderd's row is not a valid event; an operator has resubmitted a corrected one";
                self.remarks.push(difference("mended", id, detail));
            }
            (Some(_), Some(_)) if suspect.is_lost => {
                self.remarks.push(difference("source_changed", id, REUSED))
            }
            (Some(_), Some(_)) => self.differences.push(difference(
                "differs",
                id,
                "coderd's row differs from the accepted event: `tallyline events correct` sets the event to coderd's row",
            )),
            (None, Some(in_source)) => self
                .not_accepted(suspect, matches!(in_source, Err(ParseError::UnknownEventType(_)))),
            (Some(_), None) if suspect.is_lost => {}
            (Some(_), None) if suspect.is_confirmed => {
                self.differences.push(difference("not_in_source", id, USAGE_GONE))
            }
            (Some(_), None) => self.differences.push(difference("not_in_source", id, NEVER_THERE)),
            (None, None) => {}
        }
    }

    /// Judges a row of coderd without an accepted event. A refused row is in the books: an operator
    /// must decide on the reject, or has discarded it. A row that was resubmitted after the first
    /// reading may be in flight.
    fn not_accepted(&mut self, suspect: &Suspect<'_>, unknown_type: bool) {
        let id = suspect.id;
        match suspect.refused.map(|refused| refused.state) {
            None => self.differences.push(difference(
                "missing",
                id,
                "coderd has it, the ledger does not",
            )),
            Some(RejectState::Open) if unknown_type => {
                self.open.push(difference(
                    "held",
                    id,
                    "the ledger holds the row for a version that knows its type",
                ));
            }
            Some(RejectState::Open) => {
                self.open.push(difference("rejected", id, "the ledger has it among its rejects"))
            }
            Some(RejectState::Discarded) => self.remarks.push(difference(
                "discarded",
                id,
                "the ledger refused it, and an operator discarded it",
            )),
            Some(_) if !suspect.passed_before => {
                self.open.push(difference(
                    "resubmitted",
                    id,
                    "it was resubmitted from the rejects during this audit",
                ));
            }
            Some(_) => {
                let detail = "it was resubmitted from the rejects, but the ledger does not have it";
                self.differences.push(difference("resubmitted", id, detail));
            }
        }
    }

    /// Removes differences that may be in flight, and returns their ids: missing rows, if no later
    /// collector pass came in time. Before the first pass all of them may be in flight.
    pub(super) fn drop_unsettled(&mut self) -> BTreeSet<String> {
        let unread = self.numbers.get(READ_AGAIN) == Some(&0);
        let is_unsettled = |found: &mut Difference| unread && is_missing(&found.kind);
        self.differences.extract_if(.., is_unsettled).map(|found| found.id).collect()
    }
}

/// Whether the ledger lacks the row. It may be in flight.
pub(super) fn is_missing(kind: &str) -> bool {
    matches!(kind, "missing" | "resubmitted")
}

fn difference(kind: &'static str, id: &str, detail: &str) -> Difference {
    Difference { kind: kind.into(), id: id.to_owned(), detail: detail.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::audit::joint::SOURCE;

    fn joint(passed_before: bool, read_again: i64) -> Joint {
        let mut joint = Joint::new(SOURCE);
        joint.number(READ_AGAIN, read_again);
        let refused = RefusedState { state: RejectState::Resubmitted, passed: true };
        let suspect = Suspect {
            id: "a",
            is_confirmed: false,
            is_lost: false,
            refused: Some(&refused),
            passed_before,
        };
        joint.not_accepted(&suspect, false);
        joint
    }

    #[test]
    fn a_record_resubmitted_during_the_audit_is_in_flight() {
        let found = |passed_before, read_again| {
            let mut joint = joint(passed_before, read_again);
            let unsettled = joint.drop_unsettled();
            (joint.differences.len(), joint.open.len(), unsettled.len())
        };
        assert_eq!(found(false, 1), (0, 1, 0), "resubmitted during the audit");
        assert_eq!(found(true, 1), (1, 0, 0), "lost");
        assert_eq!(
            found(true, 0),
            (0, 0, 1),
            "the log may not have been read since: consuming may be paused"
        );
    }

    #[test]
    fn a_claim_without_a_stage_outlives_the_first_build_of_its_workspace() {
        let judged = |is_confirmed| {
            let mut joint = Joint::new(SOURCE);
            let suspect = Suspect {
                id: "prebuild_claimed:a",
                is_confirmed,
                is_lost: false,
                refused: None,
                passed_before: false,
            };
            joint.judge_build(&suspect, 1, Some([1; 32]), Some(Some([Some([2; 32]), None])));
            let kinds = |found: &[Difference]| {
                found.iter().map(|found| found.kind.to_string()).collect::<Vec<_>>()
            };
            (kinds(&joint.differences), kinds(&joint.remarks))
        };
        assert_eq!(judged(true), (vec![], vec!["source_changed".to_owned()]));
        assert_eq!(judged(false), (vec!["not_in_source".to_owned()], vec![]), "it may be forged");
    }

    #[test]
    fn a_difference_remains_beside_rows_in_flight() {
        let mut joint = joint(true, 0);
        joint.differences.push(difference("not_in_source", "b", ""));
        assert_eq!(joint.drop_unsettled().len(), 1);
        assert_eq!(
            joint.differences.iter().map(|difference| &*difference.kind).collect::<Vec<_>>(),
            ["not_in_source"]
        );
    }
}
