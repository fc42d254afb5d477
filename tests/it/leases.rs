//! Leases in a real ledger: one holder at a time, by the database's clock.

use std::time::Duration;

use chrono::{DateTime, Utc};
use tallyline::clock::Clock;
use tallyline::ledger::{LeaseError, Ledger, LicenseChange, LicenseState, NewPass};
use uuid::Uuid;

use crate::support::eventually;
use crate::support::ledger::ledger_at;

const LONG: Duration = Duration::from_secs(600);
const SHORT: Duration = Duration::from_millis(1);

async fn ends_at(ledger: &Ledger) -> DateTime<Utc> {
    sqlx::query_scalar("select expires_at from lease").fetch_one(&ledger.pool).await.unwrap()
}

#[tokio::test]
async fn a_lease_has_one_holder_and_its_epoch_rises_with_each_new_one() {
    let (_database, ledger) = ledger_at(Clock::system()).await;
    let first = ledger.take_lease("metrics", "one", LONG).await.unwrap().unwrap();
    assert_eq!(ledger.take_lease("metrics", "one", LONG).await.unwrap(), Some(first.clone()), "the same holder, the same epoch");
    assert_eq!(ledger.take_lease("metrics", "two", LONG).await.unwrap(), None);
    assert!(ledger.take_lease("collector", "two", LONG).await.unwrap().is_some(), "another lease is free");
    ledger.release_lease(first.clone()).await.unwrap();
    let second = ledger.take_lease("metrics", "two", LONG).await.unwrap().unwrap();
    assert!(second.epoch > first.epoch);
    assert!(!ledger.renew_lease(&first, LONG).await.unwrap(), "what was lost cannot be renewed");
    ledger.release_lease(first).await.unwrap();
    assert!(ledger.renew_lease(&second, LONG).await.unwrap(), "nor given back");
}

#[tokio::test]
async fn a_lease_that_is_not_renewed_ends_and_its_end_never_moves_back() {
    let (_database, ledger) = ledger_at(Clock::system()).await;
    let first = ledger.take_lease("metrics", "one", LONG).await.unwrap().unwrap();
    let end = ends_at(&ledger).await;
    assert!(ledger.renew_lease(&first, SHORT).await.unwrap());
    assert!(ledger.take_lease("metrics", "one", SHORT).await.unwrap().is_some());
    assert_eq!(ends_at(&ledger).await, end);
    ledger.release_lease(first).await.unwrap();
    let brief = ledger.take_lease("metrics", "two", SHORT).await.unwrap().unwrap();
    eventually(Duration::from_secs(10), "the lease ends by itself", async || {
        ledger.take_lease("metrics", "three", LONG).await.unwrap().is_some()
    })
    .await;
    assert!(!ledger.renew_lease(&brief, LONG).await.unwrap());
}

#[tokio::test]
async fn of_many_who_ask_at_once_one_gets_it() {
    let (_database, ledger) = ledger_at(Clock::system()).await;
    let asking = (0..16).map(|number| {
        let ledger = ledger.clone();
        tokio::spawn(async move { ledger.take_lease("metrics", &format!("process {number}"), LONG).await.unwrap() })
    });
    let mut holders = 0;
    for asked in asking.collect::<Vec<_>>() {
        holders += usize::from(asked.await.unwrap().is_some());
    }
    assert_eq!(holders, 1);
}

#[tokio::test]
async fn who_has_lost_the_lease_records_neither_passes_nor_licenses() {
    let (_database, ledger) = ledger_at(Clock::system()).await;
    let source_id = ledger.register_source(Uuid::from_u128(1), DateTime::UNIX_EPOCH, None).await.unwrap().id;
    let pass = NewPass {
        source_id,
        started_at: DateTime::UNIX_EPOCH,
        complete_until: Some(DateTime::UNIX_EPOCH),
        full_sweep: true,
        ..NewPass::default()
    };
    let license = [LicenseChange { license_id: 1, jwt_sha256: [1; 32], uploaded_at: None, state: LicenseState::Refused("no key".into()) }];
    let first = ledger.take_lease("collector", "one", SHORT).await.unwrap().unwrap();
    ledger.record_pass(&first, &pass).await.unwrap();
    ledger.record_licenses(&first, source_id, &license).await.unwrap();
    eventually(Duration::from_secs(10), "another takes it", async || ledger.take_lease("collector", "two", LONG).await.unwrap().is_some())
        .await;
    let end = ledger.head().await.unwrap().number;
    assert!(matches!(ledger.record_pass(&first, &pass).await, Err(LeaseError::Lost(_))));
    assert!(matches!(ledger.record_licenses(&first, source_id, &license).await, Err(LeaseError::Lost(_))));
    assert_eq!(ledger.head().await.unwrap().number, end, "nothing was recorded");
}
