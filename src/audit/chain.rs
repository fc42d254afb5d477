//! Recomputes the content of every batch and the chain over all batches, and names the batches and
//! rows that do not fit. A head that was printed earlier also shows removed newest batches and a
//! chain that was recomputed.

use std::collections::{BTreeSet, HashMap};

use sha2::{Digest as _, Sha256};

use super::deep_findings::DeepFindings;
use super::incarnations::Incarnations;
use super::joint::{Audit, Joint};
use crate::event::Topic;
use crate::ledger::parts::{EVENTS, place_of};
use crate::ledger::{
    BatchPart, BatchPlace, ChainedBatch, Head, KeptEvent, NamedRow, OutsideBatch, chain, head,
    restored,
};

const CHAIN: &str = "chain of the ledger";

/// The most batches outside the chain in the list.
const LISTED: i64 = 100;

impl Audit {
    /// The head of the ledger.
    pub async fn head(&self) -> anyhow::Result<Head> {
        Ok(self.ledger.run(head::read).await?)
    }

    /// Recomputes the chain up to `until`, and compares it with `earlier`, a head that was printed
    /// earlier. Reads every row of every batch once, in pages. Calls `progress` with the number of
    /// batches of each page.
    pub async fn chained(
        &self,
        until: Head,
        earlier: Option<Head>,
        progress: impl Fn(u64),
    ) -> anyhow::Result<Joint> {
        let mut walk = Walk::new();
        let ledger = self.ledger.with_statements(chain::STATEMENTS);
        loop {
            let (after, number) = (walk.place, until.sequence.number);
            let page = ledger.run(async |conn| chain::page(conn, after, number).await).await?;
            if page.is_empty() {
                break;
            }
            for batch in &page {
                let fits = walk.link(batch);
                for part in differing_parts(batch) {
                    self.name_rows(batch, &part, fits, &mut walk.found).await?;
                }
                if earlier.is_some_and(|head| head.sequence.number == batch.sequence) {
                    walk.at_earlier.clone_from(&batch.chain);
                }
            }
            walk.batches += page.len();
            progress(u64::try_from(page.len())?);
        }
        walk.end(until);
        for batch in ledger.run(async |conn| chain::outside(conn, LISTED).await).await? {
            walk.found.push(batch.difference());
        }
        let incarnations = Incarnations {
            current: until.sequence.incarnation,
            restores: ledger.run(restored::restores).await?,
        };
        incarnations.check(&mut walk.found);
        if let Some(earlier) = earlier {
            incarnations.compare(earlier, walk.at_earlier.take(), until, &mut walk.found);
        }
        Ok(walk.finish())
    }

    /// Names the rows of a part that do not fit the digest recorded with the batch. The marks of
    /// the part locate them.
    async fn name_rows(
        &self,
        batch: &ChainedBatch,
        part: &str,
        fits: bool,
        found: &mut DeepFindings,
    ) -> anyhow::Result<()> {
        let recorded =
            self.ledger.run(async |conn| chain::marks(conn, batch.id, part).await).await?;
        let place = format!("batch {} (sequence {})", batch.id, batch.sequence);
        let recorded = match recorded {
            None if !fits => {
                let detail = format!("the recorded digest of its {part} is missing");
                found.differs("batch_part_changed", place, detail);
                return Ok(());
            }
            recorded => recorded.unwrap_or_default(),
        };
        let rows = if part == EVENTS {
            batch.events.iter().map(named_event).collect()
        } else {
            self.ledger.run(async |conn| chain::rows(conn, batch.id, part).await).await?
        };
        let misfits = Misfits::of(&recorded, &rows);
        let listed = [
            ("row_changed", misfits.changed, "differs from the digest recorded with"),
            ("row_added", misfits.added, "was added later to"),
        ];
        for (kind, names, words) in listed {
            for name in names {
                found.differs(kind, name, format!("{}: it {words} {place}", row_word(part)));
            }
        }
        for mark in &misfits.removed {
            let detail = format!("{}: it was removed from {place}", row_word(part));
            found.differs("row_removed", removed_name(batch, part, *mark), detail);
        }
        if misfits.none {
            let detail = format!("its {part} do not match the digest recorded with it");
            found.differs("batch_part_changed", place, detail);
        }
        Ok(())
    }
}

/// The chain up to a batch.
struct Walk {
    /// The sequence of that batch; 0 before the first.
    sequence: i64,
    /// The place of the last batch that was read.
    place: BatchPlace,
    /// Its recorded chain; none: it was removed.
    chain: Option<Vec<u8>>,
    /// The recorded chain at the earlier head's sequence.
    at_earlier: Option<Vec<u8>>,
    batches: usize,
    found: DeepFindings,
}

impl Walk {
    fn new() -> Self {
        let empty = vec![0; 32];
        Walk {
            sequence: 0,
            place: (0, i64::MAX),
            chain: Some(empty),
            at_earlier: None,
            batches: 0,
            found: DeepFindings { joint: Joint::new(CHAIN), differences: 0 },
        }
    }

    /// Compares a batch's chain with its content and with the batch before it. Returns whether it
    /// fits. The next batch is compared with the recorded chain, so that each misfit is reported
    /// once.
    fn link(&mut self, batch: &ChainedBatch) -> bool {
        self.place = (batch.sequence, batch.id);
        if batch.sequence == self.sequence {
            let batch = OutsideBatch { id: batch.id, sequence: Some(batch.sequence) };
            self.found.push(batch.difference());
            return false;
        }
        let follows = batch.sequence == self.sequence + 1;
        let expected = self.chain.as_ref().map(|before| {
            Sha256::new().chain_update(before).chain_update(&batch.content).finalize().to_vec()
        });
        let fits = follows && batch.chain.is_some() && batch.chain == expected;
        if !follows {
            self.missing(batch.sequence - 1);
        } else if !fits {
            self.found.differs(
                "batch_off_chain",
                format!("batch {}", batch.id),
                format!(
                    "sequence {}: its columns and the recorded digests of its rows do not give its chain",
                    batch.sequence
                ),
            );
        }
        (self.sequence, self.chain) = (batch.sequence, batch.chain.clone());
        fits
    }

    fn missing(&mut self, until: i64) {
        let detail = format!("no batch has the sequences {} to {until}", self.sequence + 1);
        self.found.differs("batch_missing", format!("sequence {}", self.sequence + 1), detail);
    }

    fn end(&mut self, until: Head) {
        if self.sequence < until.sequence.number {
            self.missing(until.sequence.number);
        } else if self.chain.as_deref() != Some(until.chain.as_slice()) {
            self.found.differs(
                "head_off_chain",
                until.sequence.to_string(),
                "the ledger's head differs from the chain of its newest batch",
            );
        }
    }

    fn finish(mut self) -> Joint {
        self.found.joint.number("batches_in_the_chain", self.batches);
        self.found.joint.number("differences", self.found.differences);
        self.found.joint
    }
}

/// The parts whose rows do not match the digests recorded with the batch.
fn differing_parts(batch: &ChainedBatch) -> BTreeSet<String> {
    let mut differing: BTreeSet<String> =
        batch.stored.keys().chain(batch.current.keys()).cloned().collect();
    differing.retain(|part| part != EVENTS && batch.stored.get(part) != batch.current.get(part));
    let rows: Option<Vec<_>> = batch.events.iter().map(|(_, event)| event.part_row()).collect();
    let events = rows.map(|rows| BatchPart { marks: Vec::new(), ..BatchPart::of(rows.iter()) });
    let recorded = batch.stored.get(EVENTS);
    let fits = match (&events, recorded) {
        (Some(events), Some(recorded)) => events == recorded,
        (Some(events), None) => events.rows == 0,
        (None, _) => false,
    };
    if !fits {
        differing.insert(EVENTS.to_owned());
    }
    differing
}

fn named_event((topic, event): &(Topic, KeptEvent)) -> NamedRow {
    let digest = event.part_row().map(|row| row.digest.to_vec()).unwrap_or_default();
    let place = place_of(event.log_offset).to_vec();
    NamedRow { name: event.id(*topic), place, digest }
}

/// Rows of a part that do not fit its marks.
#[derive(Debug, Default, PartialEq, Eq)]
struct Misfits {
    changed: Vec<String>,
    added: Vec<String>,
    /// The places of rows that are missing.
    removed: Vec<[u8; 4]>,
    /// No row can be named.
    none: bool,
}

impl Misfits {
    fn of(recorded: &BatchPart, rows: &[NamedRow]) -> Self {
        let mut marks: HashMap<[u8; 4], Vec<[u8; 4]>> = HashMap::new();
        for (place, digest) in recorded.marks() {
            marks.entry(place).or_default().push(digest);
        }
        let mut others = Vec::new();
        for row in rows {
            let place = <[u8; 4]>::try_from(row.place.as_slice()).unwrap_or_default();
            let of_place = marks.get_mut(&place);
            let own = of_place.as_ref().and_then(|digests| {
                digests.iter().position(|digest| row.digest.starts_with(digest))
            });
            match (of_place, own) {
                (Some(digests), Some(own)) => drop(digests.swap_remove(own)),
                _ => others.push((place, row.name.clone())),
            }
        }
        let mut misfits = Misfits::default();
        for (place, name) in others {
            match marks.get_mut(&place).and_then(Vec::pop) {
                Some(_) => misfits.changed.push(name),
                None => misfits.added.push(name),
            }
        }
        let rest = marks.into_iter();
        misfits.removed =
            rest.flat_map(|(place, digests)| digests.into_iter().map(move |_| place)).collect();
        misfits.removed.sort_unstable();
        misfits.none =
            misfits.changed.is_empty() && misfits.added.is_empty() && misfits.removed.is_empty();
        misfits
    }
}

fn row_word(part: &str) -> &'static str {
    match part {
        EVENTS => "accepted event",
        "rejects" => "reject",
        "requests" | "attempts" => "request to the vendor, or its verdict",
        "settlements" => "settlement",
        _ => "fact",
    }
}

/// The place in the log of a removed event or reject. Of another row only its batch is known.
fn removed_name(batch: &ChainedBatch, part: &str, place: [u8; 4]) -> String {
    match (&batch.topic, batch.partition, batch.first_offset) {
        (Some(topic), Some(partition), Some(first)) if part == EVENTS || part == "rejects" => {
            let [_, _, _, _, low @ ..] = first.to_be_bytes();
            let after = u32::from_be_bytes(place).wrapping_sub(u32::from_be_bytes(low));
            format!("{topic}/{partition}@{}", first.saturating_add(after.into()))
        }
        _ => format!("{part} of batch {}", batch.id),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::PartRow;

    fn row(name: &str, place: u8, digest: u8) -> NamedRow {
        NamedRow { name: name.to_owned(), place: vec![0, 0, 0, place], digest: vec![digest; 32] }
    }

    fn recorded(rows: &[NamedRow]) -> BatchPart {
        let rows: Vec<PartRow> = rows
            .iter()
            .map(|row| PartRow {
                place: row.place.clone().try_into().expect("4 bytes"),
                digest: row.digest.clone().try_into().expect("32 bytes"),
            })
            .collect();
        BatchPart::of(rows.iter())
    }

    #[test]
    fn marks_name_each_row_that_does_not_fit() {
        let part = recorded(&[row("a", 1, 1), row("b", 2, 2), row("c", 3, 3), row("d", 3, 4)]);
        let now = [row("a", 1, 1), row("b", 2, 9), row("d", 3, 4), row("e", 5, 5)];
        let misfits = Misfits::of(&part, &now);
        let expected = Misfits {
            changed: vec!["b".into()],
            added: vec!["e".into()],
            removed: vec![[0, 0, 0, 3]],
            none: false,
        };
        assert_eq!(misfits, expected);
        assert!(Misfits::of(&BatchPart::default(), &[]).none);
    }
}
