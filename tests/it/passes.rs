//! Passes of collectors in a real ledger.

use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use tallyline::clock::Clock;
use tallyline::event::{Message, Topic};
use tallyline::ledger::{
    Chain, Lease, LeaseError, Ledger, NewPass, Source, books, collector_lease, collector_requests,
    cutover, passes, snapshots, sources,
};
use tallyline::log::{Log, PostgresLogSettings};

use crate::support::Database;
use crate::support::ledger::{
    DEPLOYMENT, arrival, completeness_of, lease_partition, ledger_at, noon, partition,
    record_batch, take_lease, usage,
};

const HOUR: Duration = Duration::from_secs(3600);

struct Site {
    _database: Database,
    ledger: Ledger,
    source: Source,
    lease: Lease,
}

impl Site {
    async fn new() -> Site {
        let (database, ledger) = ledger_at(Clock::system()).await;
        let source = ledger
            .run(async |conn| {
                sources::register(conn, DEPLOYMENT, noon(), None, ledger.clock.now()).await
            })
            .await
            .unwrap();
        let lease =
            take_lease(&ledger, &collector_lease(DEPLOYMENT), "test", HOUR).await.unwrap().unwrap();
        Site { _database: database, ledger, source, lease }
    }

    /// The pass of that minute, complete until then, with the usage topic's end.
    fn pass(&self, minute: i64, end: i64) -> NewPass {
        NewPass {
            source_id: self.source.id,
            started_at: at(minute),
            complete_until: Some(at(minute)),
            full_sweep: minute == 1,
            offsets: (end > 0)
                .then_some((partition(Topic::AgentUsage, 0), end))
                .into_iter()
                .collect(),
            ..NewPass::default()
        }
    }

    async fn record(&self, pass: &NewPass) -> Result<i64, LeaseError> {
        self.ledger.run(async |conn| passes::record(conn, &self.lease, pass).await).await
    }

    /// Records the next record of the usage topic.
    async fn read_one(&self) {
        let claim =
            lease_partition(&self.ledger, partition(Topic::AgentUsage, 0), 0).await.unwrap();
        let next = claim.next_offset;
        let event = usage(DEPLOYMENT, u32::try_from(next).unwrap());
        record_batch(&self.ledger, &Chain::Live(claim), &[arrival(next, event)], next + 1)
            .await
            .unwrap();
    }

    async fn complete_until(&self) -> Option<DateTime<Utc>> {
        completeness_of(&self.ledger, self.source.id).await.unwrap().complete_until
    }

    /// Rows of all tables that a pass could add to.
    async fn rows(&self) -> i64 {
        let query =
            "select (select count(*) from batch) + (select count(*) from collector_progress) + (select count(*) from collector_pass)
             + (select count(*) from collector_pass_offset)";
        sqlx::query_scalar(query).fetch_one(&self.ledger.pool).await.unwrap()
    }
}

fn at(minute: i64) -> DateTime<Utc> {
    noon() + TimeDelta::minutes(minute)
}

#[tokio::test]
async fn a_thousand_passes_of_an_idle_deployment_add_no_rows() {
    let site = Site::new().await;
    site.read_one().await;
    site.record(&site.pass(1, 1)).await.unwrap();
    let (rows, sequence) =
        (site.rows().await, site.ledger.run(snapshots::head).await.unwrap().number);
    for minute in 2..=1001 {
        assert_eq!(site.record(&site.pass(minute, 1)).await.unwrap(), minute);
    }
    assert_eq!(
        (site.rows().await, site.ledger.run(snapshots::head).await.unwrap().number),
        (rows, sequence)
    );
    assert_eq!(site.complete_until().await, Some(at(1001)));
    assert!(
        site.ledger
            .run(async |conn| passes::is_backfilled(conn, site.source.id).await)
            .await
            .unwrap()
    );
}

#[tokio::test]
async fn an_unreached_pass_counts_once_it_is_reached() {
    let site = Site::new().await;
    let id = site.source.id;
    for minute in 1..=3 {
        site.record(&site.pass(minute, minute)).await.unwrap();
    }
    assert_eq!(
        (
            site.complete_until().await,
            site.ledger.run(async |conn| passes::is_backfilled(conn, id).await).await.unwrap()
        ),
        (None, false)
    );
    for topic in
        site.ledger.run(async |conn| passes::completeness_by_topic(conn, id).await).await.unwrap()
    {
        let expected = (topic.topic != Topic::AgentUsage.name()).then_some(at(3));
        assert_eq!(topic.complete_until, expected, "{}", topic.topic);
    }
    for minute in 1..=3 {
        site.read_one().await;
        assert_eq!(
            (
                site.complete_until().await,
                site.ledger.run(async |conn| passes::is_backfilled(conn, id).await).await.unwrap()
            ),
            (Some(at(minute)), true)
        );
        assert!(
            site.ledger
                .run(async |conn| passes::is_confirmed(conn, id, minute).await)
                .await
                .unwrap()
        );
        assert_eq!(
            site.ledger.run(async |conn| books::later_pass_is_in(conn, id, 0).await).await.unwrap(),
            minute >= 2,
            "the first may have begun before"
        );
    }
    // a pass without completeness revokes nothing, but the next collector reads everything
    site.record(&NewPass { complete_until: None, ..site.pass(4, 3) }).await.unwrap();
    assert_eq!(site.complete_until().await, Some(at(3)));
    let last = site.ledger.run(async |conn| passes::last(conn, id).await).await.unwrap();
    assert_eq!(
        (last.complete_until, last.claimed_until, last.swept_at),
        (None, Some(at(3)), Some(at(1)))
    );
}

#[tokio::test]
async fn a_pass_that_appended_something_is_withdrawn_without_earlier_passes() {
    let site = Site::new().await;
    let unproven = |minute, end, produced| NewPass {
        unproven_after: Some(0),
        produced,
        full_sweep: false,
        ..site.pass(minute, end)
    };
    site.record(&unproven(1, 1, 1)).await.unwrap();
    site.record(&unproven(2, 1, 0)).await.unwrap();
    for _ in 1..=2 {
        site.read_one().await;
    }
    // the ledger read its records before the pass was recorded
    site.record(&unproven(3, 2, 1)).await.unwrap();
    site.record(&unproven(4, 2, 0)).await.unwrap();
    assert_eq!(site.complete_until().await, Some(at(4)));
    site.ledger
        .run(async |conn| passes::void(conn, &site.lease, site.source.id, 2).await)
        .await
        .unwrap();
    assert_eq!(site.complete_until().await, Some(at(2)));
}

/// An attempt that failed may have appended something that the next pass neither appends nor waits
/// for.
#[tokio::test]
async fn an_unproven_pass_is_withdrawn_even_if_it_appended_nothing() {
    let site = Site::new().await;
    site.record(&NewPass { full_sweep: false, produced: 1, ..site.pass(1, 1) }).await.unwrap();
    for minute in 2..=3 {
        site.record(&NewPass { unproven_after: Some(1), ..site.pass(minute, 1) }).await.unwrap();
    }
    site.ledger
        .run(async |conn| passes::void(conn, &site.lease, site.source.id, 1).await)
        .await
        .unwrap();
    site.read_one().await;
    assert_eq!(site.complete_until().await, Some(at(1)));
}

#[tokio::test]
async fn passes_whose_records_may_be_rejected_can_be_withdrawn() {
    let site = Site::new().await;
    site.record(&site.pass(1, 0)).await.unwrap();
    for minute in 2..=3 {
        site.record(&NewPass { unproven_after: Some(1), ..site.pass(minute, 0) }).await.unwrap();
    }
    assert_eq!(site.complete_until().await, Some(at(3)));
    site.ledger
        .run(async |conn| passes::void(conn, &site.lease, site.source.id, 1).await)
        .await
        .unwrap();
    assert_eq!(site.complete_until().await, Some(at(1)));
    assert_eq!(
        site.ledger
            .run(async |conn| passes::last(conn, site.source.id).await)
            .await
            .unwrap()
            .complete_until,
        None
    );
    assert!(
        !site
            .ledger
            .run(async |conn| books::later_pass_is_in(conn, site.source.id, 0).await)
            .await
            .unwrap()
    );
    site.record(&site.pass(4, 0)).await.unwrap();
    assert!(
        site.ledger
            .run(async |conn| books::later_pass_is_in(conn, site.source.id, 0).await)
            .await
            .unwrap()
    );
}

#[tokio::test]
async fn a_requested_sweep_that_is_withdrawn_runs_again() {
    let site = Site::new().await;
    let id = site.source.id;
    site.record(&site.pass(1, 0)).await.unwrap();
    site.ledger.run(async |conn| collector_requests::add_sweep(conn, id).await).await.unwrap();
    let sweep = async |minute: i64| {
        let requested_sweep = Some(
            site.ledger
                .run(async |conn| collector_requests::begin_sweep(conn, id).await)
                .await
                .unwrap()
                .expect("a sweep is requested"),
        );
        let pass = NewPass {
            requested_sweep,
            full_sweep: true,
            unproven_after: Some(1),
            ..site.pass(minute, 0)
        };
        site.record(&pass).await.unwrap()
    };
    assert_eq!(sweep(2).await, 2);
    assert_eq!(
        site.ledger
            .run(async |conn| collector_requests::sweep(conn, id).await)
            .await
            .unwrap()
            .unwrap()
            .pass_id,
        Some(2)
    );
    assert_eq!(
        site.ledger
            .run(async |conn| collector_requests::begin_sweep(conn, id).await)
            .await
            .unwrap(),
        None,
        "the request is answered"
    );
    site.ledger.run(async |conn| passes::void(conn, &site.lease, id, 1).await).await.unwrap();
    assert_eq!(
        site.ledger
            .run(async |conn| collector_requests::sweep(conn, id).await)
            .await
            .unwrap()
            .unwrap()
            .pass_id,
        None
    );
    assert_eq!(sweep(3).await, 3);
    assert_eq!(
        site.ledger
            .run(async |conn| collector_requests::sweep(conn, id).await)
            .await
            .unwrap()
            .unwrap()
            .pass_id,
        Some(3)
    );
}

#[tokio::test]
async fn a_thousand_passes_that_wait_for_one_partition_keep_no_rows_of_the_others() {
    let site = Site::new().await;
    let read = partition(Topic::AgentUsage, 1);
    lease_partition(&site.ledger, read, 1).await.unwrap();
    let rows = site.rows().await;
    for minute in 1..=1000 {
        let pass = site.pass(minute, 1);
        site.record(&NewPass { offsets: [pass.offsets.clone(), vec![(read, 1)]].concat(), ..pass })
            .await
            .unwrap();
    }
    assert_eq!(
        (site.rows().await - rows, site.complete_until().await),
        (2, None),
        "one pass and its end"
    );
    assert!(
        !site
            .ledger
            .run(async |conn| passes::is_confirmed(conn, site.source.id, 1000).await)
            .await
            .unwrap()
    );
    site.read_one().await;
    assert_eq!(site.complete_until().await, Some(at(1000)));
    site.record(&site.pass(1001, 1)).await.unwrap();
    assert_eq!(site.rows().await - rows, 1, "the batch that was read");
    assert_eq!(site.complete_until().await, Some(at(1001)));
}

#[tokio::test]
async fn passes_that_rely_on_records_beyond_the_cutover_are_void() {
    let site = Site::new().await;
    let (id, place) = (site.source.id, partition(Topic::AgentUsage, 0));
    for minute in 1..=3 {
        site.record(&site.pass(minute, minute)).await.unwrap();
    }
    assert_eq!(
        site.ledger
            .run(async |conn| passes::last_before(conn, id, &[(place, 1)]).await)
            .await
            .unwrap(),
        Some(1)
    );
    assert_eq!(
        site.ledger
            .run(async |conn| passes::last_before(conn, id, &[(place, 3)]).await)
            .await
            .unwrap(),
        None
    );
    site.read_one().await;
    site.ledger
        .run(async |conn| cutover::begin(conn, &[(place, 2)], site.ledger.clock.now()).await)
        .await
        .unwrap();
    assert!(matches!(site.record(&site.pass(4, 3)).await, Err(LeaseError::Lost(_))));
    for _ in 2..=3 {
        site.read_one().await;
    }
    let last = site.ledger.run(async |conn| passes::last(conn, id).await).await.unwrap();
    assert_eq!(
        (last.complete_until, last.claimed_until, site.complete_until().await),
        (None, Some(at(2)), Some(at(2)))
    );
    assert!(
        !site.ledger.run(async |conn| books::later_pass_is_in(conn, id, 0).await).await.unwrap()
    );
}

#[tokio::test]
async fn a_collector_goes_on_only_from_its_own_last_pass() {
    let site = Site::new().await;
    let first = site.record(&site.pass(1, 0)).await.unwrap();
    let next = NewPass { previous: Some((first, at(1))), ..site.pass(2, 0) };
    // a backup has other passes, or none, in the place of this one
    for (id, minute) in [(first, 0), (first + 1, 1), (first - 1, 1)] {
        let refused =
            site.record(&NewPass { previous: Some((id, at(minute))), ..next.clone() }).await;
        assert!(matches!(refused, Err(LeaseError::Lost(_))), "{refused:?}");
    }
    assert_eq!(site.record(&next).await.unwrap(), first + 1);
}

#[tokio::test]
async fn completeness_excludes_records_lost_in_a_log_failover() {
    let site = Site::new().await;
    let log = Log::postgres(site.ledger.pool.clone(), PostgresLogSettings::default());
    log.create_topics(1).await.unwrap();
    let messages: Vec<Message> = (0..3).map(|n| usage(DEPLOYMENT, n).to_message()).collect();
    let append = async |message: &Message| {
        log.append(Topic::AgentUsage, vec![message.clone()]).await.unwrap()
    };
    append(&messages[0]).await;
    append(&messages[1]).await;
    let pass = |last: usize| NewPass {
        last_records: vec![(
            partition(Topic::AgentUsage, 0),
            i64::try_from(last).unwrap(),
            messages[last].clone(),
        )],
        ..site.pass(1, 2)
    };
    // the standby has only the first record; another process appends later
    sqlx::raw_sql("delete from log_record where record_offset = 1; update log_partition set next_offset = 1 where next_offset = 2")
        .execute(&site.ledger.pool)
        .await
        .unwrap();
    assert!(matches!(site.record(&pass(1)).await, Err(LeaseError::Lost(_))));
    append(&messages[2]).await;
    assert!(
        matches!(site.record(&pass(1)).await, Err(LeaseError::Lost(_))),
        "another record has its place"
    );
    assert_eq!(
        site.ledger.run(async |conn| books::newest_pass(conn, site.source.id).await).await.unwrap(),
        0
    );
    site.record(&pass(0)).await.unwrap();
}
