//! Leases in a real ledger: one holder at a time, by the database's clock.

use std::time::Duration;

use chrono::{DateTime, Utc};
use tallyline::clock::Clock;
use tallyline::ledger::{
    LeaseError, Ledger, LicenseChange, LicenseState, NewPass, leases, licenses, passes, snapshots,
    sources,
};
use uuid::Uuid;

use crate::support::eventually;
use crate::support::ledger::{ledger_at, take_lease};

const LONG: Duration = Duration::from_secs(600);
const SHORT: Duration = Duration::from_millis(1);

async fn ends_at(ledger: &Ledger) -> DateTime<Utc> {
    sqlx::query_scalar("select expires_at from lease").fetch_one(&ledger.pool).await.unwrap()
}

#[tokio::test]
async fn a_lease_has_one_holder_and_its_epoch_rises_with_each_new_one() {
    let (_database, ledger) = ledger_at(Clock::system()).await;
    let first = take_lease(&ledger, "metrics", "one", LONG).await.unwrap().unwrap();
    assert_eq!(
        take_lease(&ledger, "metrics", "one", LONG).await.unwrap(),
        Some(first.clone()),
        "the same holder, the same epoch"
    );
    assert_eq!(take_lease(&ledger, "metrics", "two", LONG).await.unwrap(), None);
    assert!(
        take_lease(&ledger, "collector", "two", LONG).await.unwrap().is_some(),
        "another lease is free"
    );
    ledger.run(async |conn| leases::release(conn, first.clone()).await).await.unwrap();
    let second = take_lease(&ledger, "metrics", "two", LONG).await.unwrap().unwrap();
    assert!(second.epoch > first.epoch);
    assert!(
        !ledger.run(async |conn| leases::renew(conn, &first, LONG).await).await.unwrap(),
        "a lost lease cannot be renewed"
    );
    ledger.run(async |conn| leases::release(conn, first).await).await.unwrap();
    assert!(
        ledger.run(async |conn| leases::renew(conn, &second, LONG).await).await.unwrap(),
        "a lost lease cannot be released"
    );
}

#[tokio::test]
async fn a_lease_that_is_not_renewed_ends_and_its_end_never_moves_back() {
    let (_database, ledger) = ledger_at(Clock::system()).await;
    let first = take_lease(&ledger, "metrics", "one", LONG).await.unwrap().unwrap();
    let end = ends_at(&ledger).await;
    assert!(ledger.run(async |conn| leases::renew(conn, &first, SHORT).await).await.unwrap());
    assert!(take_lease(&ledger, "metrics", "one", SHORT).await.unwrap().is_some());
    assert_eq!(ends_at(&ledger).await, end);
    ledger.run(async |conn| leases::release(conn, first).await).await.unwrap();
    let brief = take_lease(&ledger, "metrics", "two", SHORT).await.unwrap().unwrap();
    eventually(Duration::from_secs(10), "the lease ends by itself", async || {
        take_lease(&ledger, "metrics", "three", LONG).await.unwrap().is_some()
    })
    .await;
    assert!(!ledger.run(async |conn| leases::renew(conn, &brief, LONG).await).await.unwrap());
}

#[tokio::test]
async fn of_many_concurrent_requests_one_gets_the_lease() {
    let (_database, ledger) = ledger_at(Clock::system()).await;
    let asking = (0..16).map(|number| {
        let ledger = ledger.clone();
        tokio::spawn(async move {
            take_lease(&ledger, "metrics", &format!("process {number}"), LONG).await.unwrap()
        })
    });
    let mut holders = 0;
    for request in asking.collect::<Vec<_>>() {
        holders += usize::from(request.await.unwrap().is_some());
    }
    assert_eq!(holders, 1);
}

#[tokio::test]
async fn a_former_holder_records_neither_passes_nor_licenses() {
    let (_database, ledger) = ledger_at(Clock::system()).await;
    let source_id = ledger
        .run(async |conn| {
            sources::register(
                conn,
                Uuid::from_u128(1),
                DateTime::UNIX_EPOCH,
                None,
                ledger.clock.now(),
            )
            .await
        })
        .await
        .unwrap()
        .id;
    let pass = NewPass {
        source_id,
        started_at: DateTime::UNIX_EPOCH,
        complete_until: Some(DateTime::UNIX_EPOCH),
        full_sweep: true,
        ..NewPass::default()
    };
    let license = [LicenseChange {
        license_id: 1,
        jwt_sha256: [1; 32],
        uploaded_at: None,
        state: LicenseState::Refused("no key".into()),
    }];
    let first = take_lease(&ledger, "collector", "one", SHORT).await.unwrap().unwrap();
    ledger.run(async |conn| passes::record(conn, &first, &pass).await).await.unwrap();
    ledger
        .run(async |conn| {
            licenses::record(conn, &first, source_id, &license, ledger.clock.now()).await
        })
        .await
        .unwrap();
    eventually(Duration::from_secs(10), "another takes it", async || {
        take_lease(&ledger, "collector", "two", LONG).await.unwrap().is_some()
    })
    .await;
    let end = ledger.run(snapshots::head).await.unwrap().number;
    assert!(matches!(
        ledger.run(async |conn| passes::record(conn, &first, &pass).await).await,
        Err(LeaseError::Lost(_))
    ));
    assert!(matches!(
        ledger
            .run(async |conn| licenses::record(
                conn,
                &first,
                source_id,
                &license,
                ledger.clock.now()
            )
            .await)
            .await,
        Err(LeaseError::Lost(_))
    ));
    assert_eq!(ledger.run(snapshots::head).await.unwrap().number, end, "nothing was recorded");
}
