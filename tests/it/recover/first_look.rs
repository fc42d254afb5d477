//! A broker that is away as processes begin: until its marks can be asked for, nobody knows whether the ledger went back.

use tallyline::ledger::OURSELVES;
use tempfile::TempDir;

use super::ledger::lost_part;
use super::world::{SOON, World, ends};
use crate::journey::site::{Backend, Serve};
use crate::operate::proxy;
use crate::support::eventually;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restored_ledger_is_seen_by_a_broker_that_comes_later_and_nothing_is_shown_sent_or_read_before() {
    let folder = TempDir::new().unwrap();
    let mut world = World::begin(Backend::Kafka).await;
    let backup = lost_part(&mut world, &folder).await;
    world.site.database.restore(&backup).await;
    let (_turn, mut proxy) = proxy::kafka().await;
    let brokers = format!("kafka.brokers={}", proxy.address);
    let through = ["--set", brokers.as_str()];
    let mut serve = Serve::start_with(&world.site, &through);
    let mut others = ["collect", "consume", "publish"].map(|role| world.site.start(role, &through));
    let before = read(&world).await;

    // the log does not answer: longer than anybody would wait for it once
    for process in [&serve.process, &others[0], &others[1], &others[2]] {
        eventually(SOON * 2, "it says what it waits for", || async {
            process.stderr().contains("nothing is shown, sent or read before the log says it")
        })
        .await;
    }
    let unready: serde_json::Value = reqwest::get(format!("{}/readyz", serve.api)).await.unwrap().json().await.unwrap();
    assert_eq!((&unready["ready"], &unready["checks"]["first_look"]["ok"]), (&false.into(), &false.into()), "{unready}");
    assert_eq!(world.count("select count(*) from recovery").await, 0);
    assert_eq!((serve.domain_lines().await.as_str(), read(&world).await), ("", before));
    assert_eq!(world.tallyman.books().requests, 0);

    proxy.open().await;
    eventually(SOON, "it is seen", || async { world.count("select count(*) from recovery").await == 1 }).await;
    assert_eq!(serve.domain_lines().await, "", "nothing is shown before it has caught up");
    let (actor, _, reason) = world.acts().await.remove(0);
    assert_eq!(actor, OURSELVES);
    // and how far the lost time reaches
    assert!(reason.contains(", a record of ") && reason.ends_with("and stands before it"), "{reason}");
    eventually(SOON * 2, "it has caught up", || async {
        world.count("select count(*) from recovery where closed_at is not null").await == 1
    })
    .await;
    world.all_is_in().await;
    world.everything_is_there().await;
    eventually(SOON, "the series are shown", || async { !serve.domain_lines().await.is_empty() }).await;
    world.balanced().await;
    let [collect, consume, publish] = &mut others;
    for process in [collect, consume, publish, &mut serve.process] {
        assert!(process.stderr().contains("what operators did after the backup is not in this ledger"), "{}", process.stderr());
        ends(process).await;
    }
}

/// What would move if the log or coderd were read.
async fn read(world: &World) -> (i64, i64) {
    let positions = world.site.ledger.positions().await.unwrap();
    (positions.iter().map(|(_, next)| next).sum(), world.count("select count(*) from collector_pass").await)
}
