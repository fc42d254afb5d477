//! A publisher that is killed with a request in flight.

use std::time::Duration;

use tallyline_sim::tallyman::Switches;

use super::world::{World, start_time, usage};
use crate::support::eventually;

/// The request timeout of [`World::process`].
const REQUEST_TIMEOUT: Duration = Duration::from_secs(3);
const SOON: Duration = Duration::from_secs(60);

#[tokio::test]
async fn the_events_of_a_killed_publisher_are_sent_by_another_within_two_request_timeouts() {
    let world = World::new().await;
    let log = world.log().await;
    let mut first = world.process(&world.vendor.ingest_url());
    let count = async |query: &'static str| {
        sqlx::query_scalar::<_, i64>(query).fetch_one(&world.ledger.pool).await.unwrap()
    };
    let working =
        "select count(*) from process where standing->'publish'->>'condition' = 'working'";
    eventually(SOON, "the first works", || async { count(working).await == 1 }).await;
    world.vendor.set_switches(Switches { latency_ms: 60_000, ..Switches::default() }).unwrap();
    world.add_with(&log, &[usage("a", start_time())]).await;
    eventually(SOON, "its request is in flight", || async {
        count("select count(*) from publication_request").await >= 1
    })
    .await;
    first.kill();
    world.vendor.set_switches(Switches::default()).unwrap();
    let _second = world.process(&world.vendor.ingest_url());
    eventually(2 * REQUEST_TIMEOUT, "the event is published", || async {
        world.number_in("published").await == 1
    })
    .await;
    assert_eq!(world.times_billed("a"), 1);
}
