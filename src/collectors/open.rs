//! Opens a collector: takes the source's lease, introduces the source, and finds where the last
//! collector ended.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};

use chrono::{DateTime, SubsecRound, Utc};
use uuid::Uuid;

use super::bounds::{WIDE_INTERVAL, before};
use super::lease::CollectorLease;
use super::proof::Proof;
use super::ranges::Ranges;
use super::seen_ids::SeenIds;
use super::settings::{CollectError, Settings};
use super::{events, identity};
use crate::clock::Clock;
use crate::coderd::{Catalog, Database, IdentityFacts, Reader};
use crate::event::{Message, Payload, Signer, Topic, TopicPartition, build_of, parse_in};
use crate::ledger::{
    Baseline, BaselineRow, Ledger, LicenseChange, Source, collector_lease, cutover, known, leases,
    licenses, passes, positions, retirements, sources,
};
use crate::license::PublicKeys;
use crate::log::{Log, Record};

/// The most ids remembered of each kind: about 100 MB.
pub(super) const SEEN_LIMIT: usize = 1_000_000;
/// The most records of the log that are read for ids in flight.
const IN_FLIGHT_LIMIT: usize = 1_000_000;
/// Records in one read.
const READ_PAGE: usize = 5_000;

/// Counts that differ between coderd and the ledger, by UTC day (days since 1970) and type, whose
/// rows were read since. Rejected and held rows keep them different for good.
pub(super) type ReadDays = BTreeMap<(i64, String), (i64, i64)>;

/// The collector of one source. It holds the source's lease.
pub struct Collector {
    pub(super) settings: Settings,
    pub(super) database: Database,
    pub(super) keys: PublicKeys,
    pub(super) log: Log,
    pub(super) ledger: Ledger,
    pub(super) clock: Clock,
    pub(super) source: Source,
    /// What coderd last reported about itself.
    pub(super) identity: IdentityFacts,
    pub(super) lease: CollectorLease,
    /// None: the next pass connects.
    pub(super) reader: Option<Reader>,
    /// The last catalog.
    pub(super) catalog: Option<Catalog>,
    /// When it was read. None: the next pass reads it.
    pub(super) catalog_read_at: Option<DateTime<Utc>>,
    /// Whether the current pass uses one that an earlier pass has read.
    pub(super) catalog_is_cached: bool,
    pub(super) builds: SeenIds<Uuid>,
    /// Which of the builds of the overlap are known.
    pub(super) ranges: Ranges,
    /// Prebuild claims, by their build, that were in flight when this collector opened. Later ones
    /// are found by their builds.
    pub(super) claims: SeenIds<Uuid>,
    pub(super) usage: SeenIds<String>,
    /// Builds with an unknown value: while there are any, completeness is not reported.
    pub(super) unreadable: HashSet<Uuid>,
    pub(super) licenses: Vec<LicenseChange>,
    /// Where the next pass begins; None: a full sweep is due.
    pub(super) reread_from: Option<DateTime<Utc>>,
    /// The latest completeness that was reported.
    pub(super) reported_until: Option<DateTime<Utc>>,
    /// Whether a full sweep is recorded since the last recovery. Then passes read only rows that
    /// can be new; the continuous audit finds others.
    pub(super) is_swept: bool,
    pub(super) overlapped_at: Option<DateTime<Utc>>,
    /// The start of the last wide pass, or an earlier time: another process may have made it. None:
    /// there was none.
    pub(super) overlapped_widely_at: Option<DateTime<Utc>>,
    pub(super) compared_at: Option<DateTime<Utc>>,
    /// The pass in which the next comparison became due; None: it is not due.
    pub(super) compare_due_in: Option<u64>,
    pub(super) read_days: ReadDays,
    /// Passes of this process, counted from 1.
    pub(super) pass_number: u64,
    /// The latest pass whose records the ledger is known to have read.
    pub(super) pass_in_ledger: u64,
    /// Recorded passes whose records the ledger may not have read yet: number and the ledger's id.
    pub(super) passes_ahead: VecDeque<(u64, i64)>,
    /// Partitions that ended before the ledger's position in the last pass. While there are any,
    /// completeness is not reported.
    pub(super) behind: BTreeSet<TopicPartition>,
    /// The last pass of this process: id and start. A ledger in which it is not the newest was
    /// restored from a backup.
    pub(super) previous: Option<(i64, DateTime<Utc>)>,
    /// The last record of each partition since the last pass, with its offset. Kept only if the log
    /// is in the ledger's database.
    pub(super) last_records: HashMap<TopicPartition, (i64, Message)>,
    pub(super) proof: Proof,
}

impl Collector {
    /// Connects, takes the lease and introduces a new source. None: another collector has the
    /// source.
    pub async fn open(
        settings: Settings,
        database: Database,
        keys: PublicKeys,
        log: Log,
        ledger: Ledger,
        clock: Clock,
    ) -> Result<Option<Self>, CollectError> {
        let mut reader = database.connect().await?;
        let deployment_id = match settings.deployment_id {
            Some(id) => id,
            None => reader.deployment_id().await?,
        };
        check_use(&log, &ledger, deployment_id).await?;
        let identity = identity::read(&settings, &mut reader, &ledger, deployment_id).await?;
        let name = collector_lease(deployment_id);
        let Some(lease) = ledger
            .run(async |conn| {
                leases::take(conn, &name, &settings.holder, settings.lease_length).await
            })
            .await?
        else {
            return Ok(None);
        };
        let lease = CollectorLease::start(&ledger, lease, settings.lease_length);
        let source = introduce(&settings, &mut reader, &ledger, &clock, deployment_id).await?;
        identity::bind(&ledger, deployment_id, &identity).await?;
        let last = ledger.run(async |conn| passes::last(conn, source.id).await).await?;
        let licenses = ledger.run(async |conn| licenses::present(conn, source.id).await).await?;
        let mut collector = Collector {
            settings,
            database,
            keys,
            log,
            ledger,
            clock,
            source,
            identity,
            lease,
            reader: Some(reader),
            catalog: None,
            catalog_read_at: None,
            catalog_is_cached: false,
            builds: SeenIds::new(SEEN_LIMIT),
            ranges: Ranges::default(),
            claims: SeenIds::new(SEEN_LIMIT),
            usage: SeenIds::new(SEEN_LIMIT),
            unreadable: HashSet::new(),
            licenses,
            reread_from: last.complete_until,
            reported_until: last.claimed_until,
            is_swept: last.swept_at.is_some(),
            overlapped_at: None,
            overlapped_widely_at: last.claimed_until.map(|at| before(at, WIDE_INTERVAL)),
            compared_at: None,
            compare_due_in: None,
            read_days: ReadDays::new(),
            pass_number: 0,
            pass_in_ledger: 0,
            passes_ahead: VecDeque::new(),
            behind: BTreeSet::new(),
            previous: None,
            last_records: HashMap::new(),
            proof: Proof::default(),
        };
        collector.remember_in_flight().await?;
        Ok(Some(collector))
    }

    pub(super) fn next_pass(&self) -> u64 {
        self.pass_number.saturating_add(1)
    }

    #[must_use]
    pub fn source(&self) -> &Source {
        &self.source
    }

    /// Releases the lease.
    pub async fn close(self) {
        if let Some(reader) = self.reader {
            reader.close().await;
        }
        if let Err(error) = self.lease.release(&self.ledger).await {
            tracing::warn!(
                error = crate::cause::text(&error),
                "collector lease not released, it will expire"
            );
        }
    }

    /// Reads the records that the ledger has not read yet: memory and ledger would both miss them.
    /// They belong to the next pass.
    pub(super) async fn remember_in_flight(&mut self) -> Result<(), CollectError> {
        let positions: HashMap<TopicPartition, i64> =
            self.ledger.run(positions::list).await?.into_iter().collect();
        let mut left = IN_FLIGHT_LIMIT;
        // claims first: a build that is a prebuild claim is checked against the claims
        for topic in [Topic::PrebuildClaims, Topic::WorkspaceBuilds, Topic::AgentUsage] {
            for partition in self.log.partitions(topic).await? {
                let partition = TopicPartition { topic, partition };
                let (start, end) = self.log.watermarks(partition).await?;
                // A position beyond the end belongs to a topic that was recreated: the new topic is
                // unread.
                let position =
                    positions.get(&partition).copied().filter(|position| *position <= end);
                let from = position.unwrap_or(start).max(start);
                self.remember_from(partition, from, &mut left).await?;
            }
        }
        if left == 0 {
            tracing::warn!(
                limit = IN_FLIGHT_LIMIT,
                "the ledger is far behind the log: some events will be appended again, as duplicates"
            );
        }
        self.find_dependent_passes().await
    }

    async fn remember_from(
        &mut self,
        partition: TopicPartition,
        mut from: i64,
        left: &mut usize,
    ) -> Result<(), CollectError> {
        while *left > 0 {
            self.lease.check()?;
            let limit = READ_PAGE.min(*left);
            let records = self.log.read(partition, from, limit).await?;
            let Some(last) = records.last() else { return Ok(()) };
            from = last.offset.saturating_add(1);
            *left = left.saturating_sub(records.len());
            let mut claimless = HashMap::new();
            for record in &records {
                self.remember_record(partition, record, &mut claimless);
            }
            let ids: Vec<Uuid> = claimless.keys().copied().collect();
            for id in self
                .ledger
                .run(async |conn| known::claims(conn, self.source.id, &ids).await)
                .await?
                .into_keys()
            {
                self.builds.insert(id, claimless[&id], self.next_pass());
            }
            if records.len() < limit {
                return Ok(());
            }
        }
        Ok(())
    }

    /// Remembers the ids of a record in flight. A build that is a prebuild claim goes to
    /// `claimless` unless its claim is in flight too: it is remembered only if the ledger has that
    /// claim.
    fn remember_record(
        &mut self,
        partition: TopicPartition,
        record: &Record,
        claimless: &mut HashMap<Uuid, DateTime<Utc>>,
    ) {
        let (topic, deployment, pass) =
            (partition.topic, self.source.deployment_id, self.next_pass());
        let signer = self.log.signer(topic, &record.message);
        // a foreign record with the id of a row of coderd must not keep that row out
        if self.log.signatures().verify() && signer.is_err() {
            return;
        }
        if signer == Ok(Signer::Collector) && events::id_from(deployment, &record.message).is_some()
        {
            self.proof.in_flight(
                partition,
                record.offset,
                self.log.signatures().is_own_key(&record.message),
            );
        }
        match parse_in(topic, &record.message) {
            Ok(event) if event.deployment != deployment => {}
            Ok(event) => match event.payload {
                Payload::Build(build)
                    if events::claim(&build).is_some()
                        && !self.claims.contains(&build.build_id) =>
                {
                    claimless.insert(build.build_id, build.completed_at);
                }
                Payload::Build(build) => {
                    self.builds.insert(build.build_id, build.completed_at, pass)
                }
                Payload::Usage(usage) => self.usage.insert(usage.id, usage.created_at, pass),
                Payload::Claim(claim) => {
                    self.claims.insert(claim.build_id, claim.completed_at, pass)
                }
            },
            // A row that is not a valid event is in the log, too: the consumer will hold or reject
            // it.
            Err(_) => {
                let id = events::id_from(deployment, &record.message);
                match (topic, id.as_deref().and_then(build_of)) {
                    (Topic::AgentUsage, _) => {
                        id.into_iter().for_each(|id| self.usage.insert(id, record.timestamp, pass))
                    }
                    (Topic::WorkspaceBuilds, Some(build)) => {
                        self.builds.insert(build, record.timestamp, pass)
                    }
                    _ => {}
                }
            }
        }
    }
}

/// Refuses a retired source, and a process without the signing key that its records need.
async fn check_use(log: &Log, ledger: &Ledger, deployment_id: Uuid) -> Result<(), CollectError> {
    if let Some(retirement) =
        ledger.run(async |conn| retirements::of_deployment(conn, deployment_id).await).await?
    {
        return Err(CollectError::Retired(retirement));
    }
    if ledger.run(async |conn| cutover::needs_signing_key(conn, log.signatures()).await).await? {
        return Err(CollectError::NoSigningKey);
    }
    Ok(())
}

/// The source as it was introduced, now or earlier.
async fn introduce(
    settings: &Settings,
    reader: &mut Reader,
    ledger: &Ledger,
    clock: &Clock,
    deployment_id: Uuid,
) -> Result<Source, CollectError> {
    let known = ledger.run(async |conn| sources::get(conn, deployment_id).await).await?;
    // PostgreSQL keeps microseconds.
    let from = settings.from.map(|from| from.trunc_subsecs(6));
    if let Some(known) = &known
        && from.is_some_and(|from| Some(from) != known.baseline_until)
    {
        let since = known.baseline_until;
        tracing::warn!(?from, ?since, "source already introduced, source.backfill_from is ignored");
    }
    let baseline = match from {
        Some(from) if known.is_none() => Some(baseline(settings, reader, from).await?),
        _ => None,
    };
    let introduced_at = settings.introduced_at.unwrap_or_else(|| clock.now());
    Ok(ledger
        .run(async |conn| {
            sources::register(
                conn,
                deployment_id,
                introduced_at,
                baseline.as_ref(),
                ledger.clock.now(),
            )
            .await
        })
        .await?)
}

/// coderd's count of creations before `from`. It must be certain that this count cannot change.
async fn baseline(
    settings: &Settings,
    reader: &mut Reader,
    from: DateTime<Utc>,
) -> Result<Baseline, CollectError> {
    let catalog = reader.catalog().await?;
    let complete = before(
        reader.horizon(&catalog).await?.complete_before().ok_or(CollectError::FromUncertain)?,
        settings.margin,
    );
    if from > complete {
        return Err(CollectError::FromTooRecent { from, complete });
    }
    let rows = reader.creations_before(from).await?.into_iter().map(|row| BaselineRow {
        organization_name: row.organization_name,
        template_name: row.template_name,
        preset_name: row.preset_name,
        creations: row.creations,
    });
    Ok(Baseline {
        until: from,
        creations: rows.collect(),
        started: reader.workspaces_started_before(from).await?,
    })
}
