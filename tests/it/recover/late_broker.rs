//! A broker that is down when processes start. Parts without need of the log go on; nothing is sent
//! before marks are compared.

use tallyline::ledger::PROGRAM;
use tempfile::TempDir;

use super::ledger::lost_part;
use super::world::{SOON, World, ends};
use crate::journey::site::{Backend, Serve};
use crate::operate::proxy;
use crate::support::eventually;

const OPENED: &str = "select count(*) from recovery";
const CLOSED: &str = "select count(*) from recovery where closed_at is not null";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restored_ledger_is_detected_when_the_broker_returns_and_before_anything_is_sent() {
    let folder = TempDir::new().unwrap();
    let mut world = World::begin(Backend::Kafka).await;
    let backup = lost_part(&mut world, &folder).await;
    world.site.database.restore(&backup).await;
    let (_turn, mut proxy) = proxy::kafka().await;
    let brokers = format!("kafka.brokers={}", proxy.address);
    let through = ["--set", brokers.as_str()];
    let mut serve = Serve::start_with(&world.site, &through);
    let mut others = ["collect", "consume", "publish"].map(|role| world.site.start(role, &through));

    eventually(SOON, "the series are shown without the broker", || async {
        !serve.domain_lines().await.is_empty()
    })
    .await;
    assert_eq!((world.count(OPENED).await, world.tallyman.books().requests), (0, 0));

    proxy.open().await;
    eventually(SOON * 2, "the restore is detected", || async {
        let sent = world.tallyman.books().requests;
        let is_detected = world.count(OPENED).await == 1;
        assert!(is_detected || sent == 0, "sent before the restore is detected");
        is_detected
    })
    .await;
    let (actor, _, reason) = world.acts().await.remove(0);
    assert_eq!(actor, PROGRAM);
    // and the reach of the lost time
    assert!(
        reason.contains(" (a record of ") && reason.ends_with("which this ledger lacks"),
        "{reason}"
    );
    eventually(SOON * 2, "it has caught up", || async {
        let sent = world.tallyman.books().requests;
        let done = world.count(CLOSED).await == 1;
        assert!(done || sent == 0, "sent before the ledger has caught up");
        done
    })
    .await;
    world.all_is_in().await;
    world.everything_is_there().await;
    eventually(SOON, "the series are shown", || async { !serve.domain_lines().await.is_empty() })
        .await;
    world.balanced().await;
    let [collect, consume, publish] = &mut others;
    for process in [collect, consume, publish, &mut serve.process] {
        assert!(
            process
                .stderr()
                .contains("acts of operators after the backup are missing from this ledger"),
            "{}",
            process.stderr()
        );
        ends(process).await;
    }
}
