//! What every process does about a ledger that was restored from a backup: sees it, opens the recovery, and closes it when all is caught up.
//!
//! Whatever is done here is done once, whichever process does it.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};
use uuid::Uuid;

use super::super::{Desk, OperationError};
use super::ledger::{is_of, marked_as_published};
use crate::event::{Topic, TopicPartition};
use crate::ledger::{Acquaintance, Landmark, Recovering, Restored, Settlement};
use crate::log::{LogError, Mark};

/// How often it looks.
const LOOK: Duration = Duration::from_secs(1);
/// Publications settled in one transaction.
const SETTLED_AT_ONCE: usize = 500;
/// So many looks in a row fail before it is told.
const TOLD_AFTER: u32 = 10;
/// How long a starting process waits for the log's word before it shows what the ledger says.
const PATIENCE: Duration = Duration::from_secs(30);

/// One process's lookout.
pub struct Lookout {
    desk: Desk,
    /// The consumers' group, whose marks in the log may prove that the ledger was further.
    group: String,
    /// Names this process where it settles publications.
    holder: String,
    looked: Arc<OnceLock<()>>,
    landmark: Option<Landmark>,
    /// When the ledger first answered.
    begun: Option<Instant>,
}

impl Lookout {
    /// A lookout that has not looked yet. `looked` is set once it knows whether the ledger went back before this process began.
    #[must_use]
    pub fn new(desk: Desk, group: &str, looked: Arc<OnceLock<()>>) -> Self {
        Lookout { desk, group: group.to_owned(), holder: Uuid::new_v4().to_string(), looked, landmark: None, begun: None }
    }

    /// Looks until `stop`.
    pub async fn keep(mut self, stop: &CancellationToken) {
        let mut failures = 0;
        loop {
            match stop.run_until_cancelled(self.look()).await {
                None => return,
                Some(Ok(())) => failures = 0,
                Some(Err(error)) => {
                    failures += 1;
                    // what is away is told by whoever works with it; a new group's coordinator takes a moment
                    if failures == TOLD_AFTER {
                        warn!(%error, "whether the ledger was restored is not known, or it does not catch up");
                    }
                }
            }
            if stop.run_until_cancelled(tokio::time::sleep(LOOK)).await.is_none() {
                return;
            }
        }
    }

    async fn look(&mut self) -> Result<(), OperationError> {
        self.recognise().await?;
        if self.looked.get().is_none() {
            self.look_at_marks().await?;
        }
        let ledger = &self.desk.ledger;
        if let Some(recovering) = ledger.in_time(ledger.recovering()).await? {
            self.tend(&recovering).await?;
        }
        Ok(())
    }

    /// Whether the ledger is where it was, and has the batch by which it is known; then one further on is remembered.
    async fn recognise(&mut self) -> Result<(), OperationError> {
        let ledger = &self.desk.ledger;
        if let Some((incarnation, place)) = ledger.in_time(ledger.place_before()).await? {
            ledger.in_time(ledger.note_went_back(&Restored::Place { incarnation, place })).await?;
            return Ok(());
        }
        let (head, acquaintance) = ledger.in_time(ledger.head_seen_from(self.landmark.as_ref())).await?;
        if let (Acquaintance::WentBack, Some(landmark)) = (acquaintance, self.landmark) {
            ledger.in_time(ledger.note_went_back(&Restored::Batch(landmark))).await?;
            return Ok(());
        }
        let further = ledger.in_time(ledger.landmark(head.sequence)).await?;
        // asked again: what was lost in between does not come back
        let (_, acquaintance) = ledger.in_time(ledger.head_seen_from(self.landmark.as_ref())).await?;
        if acquaintance != Acquaintance::WentBack {
            self.landmark = further.or(self.landmark);
        }
        Ok(())
    }

    /// At a start nothing is remembered, but the group was told how far its partitions were read, after that was committed.
    async fn look_at_marks(&mut self) -> Result<(), OperationError> {
        let begun = *self.begun.get_or_insert_with(Instant::now);
        let marks = match self.desk.log.marks(&self.group).await {
            Ok(marks) => marks,
            Err(error) if begun.elapsed() < PATIENCE => return Err(error.into()),
            Err(error) => {
                warn!(%error, "the log does not say whether the ledger was restored: going on without its word");
                Vec::new()
            }
        };
        let ledger = &self.desk.ledger;
        let lives = ledger.in_time(ledger.lives()).await?;
        let signature = lives.mark();
        let standings = ledger.in_time(ledger.standings()).await?;
        let behind =
            |mark: &Mark| standings.iter().any(|stands| stands.partition == mark.partition && stands.next_offset < mark.next_offset);
        let proof = marks.into_iter().find(|mark| mark.signature == signature && behind(mark));
        if let Some(Mark { partition, next_offset, .. }) = proof {
            let restored = Restored::Position { incarnation: lives.incarnation, partition, next_offset };
            ledger.in_time(ledger.note_went_back(&restored)).await?;
        }
        self.looked.get_or_init(|| ());
        Ok(())
    }

    /// Does what the open recovery waits for and this process can do, and closes it once nothing is left.
    async fn tend(&self, recovering: &Recovering) -> Result<(), OperationError> {
        let ledger = &self.desk.ledger;
        if !recovering.log_ends_known {
            let ends = self.ends().await?;
            ledger.in_time(ledger.target_recovery(recovering.id, &ends)).await?;
            return Ok(());
        }
        if recovering.records_to_read > 0 || recovering.sources_to_read > 0 {
            return Ok(());
        }
        if recovering.sources_to_compare > 0 {
            self.compare(recovering).await?;
        }
        if ledger.in_time(ledger.close_recovery(recovering.id)).await? {
            info!("the restored ledger has caught up: series are shown and usage is published again");
        }
        Ok(())
    }

    async fn ends(&self) -> Result<Vec<(TopicPartition, i64)>, LogError> {
        let mut ends = Vec::new();
        for topic in Topic::ALL {
            for partition in self.desk.log.partitions(topic).await? {
                let partition = TopicPartition { topic, partition };
                let (_, end) = self.desk.log.watermarks(partition).await?;
                ends.push((partition, end));
            }
        }
        Ok(ends)
    }

    /// What coderd has marked as published is not ours to send, whoever sent it in the lost time.
    async fn compare(&self, recovering: &Recovering) -> Result<(), OperationError> {
        let Some(database) = &self.desk.coderd else { return Ok(()) };
        let ledger = &self.desk.ledger;
        for source in ledger.in_time(ledger.sources_to_compare(recovering.id)).await? {
            if self.desk.deployment.is_some_and(|configured| configured != source.deployment_id)
                || self.desk.deployment.is_none() && !is_of(database, source.deployment_id).await
            {
                continue;
            }
            let mut not_ours = 0;
            for ids in marked_as_published(&self.desk, database, source.id).await?.chunks(SETTLED_AT_ONCE) {
                let settled = ledger.settle_publications(source.id, &self.holder, ids, Settlement::NotOurs);
                not_ours += ledger.in_time(settled).await?.not_ours;
            }
            ledger.in_time(ledger.recovery_compared(recovering.id, source.id)).await?;
            info!(source = %source.deployment_id, not_ours, "pending publications compared with coderd's publish marks");
        }
        Ok(())
    }
}
