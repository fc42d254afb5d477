//! coderd's database is restored to an earlier time. The ledger keeps the lost rows, and
//! unpublished ones are published.

use serde_json::Value as Json;
use tempfile::TempDir;

use super::world::{SOON, World, ends};
use crate::journey::site::Backend;
use crate::support::eventually;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn events_lost_by_coderd_stay_counted_and_are_published_after_a_recovery() {
    let mut world = World::begin_with_keys(Backend::Postgres).await;
    let folder = TempDir::new().unwrap();
    let mut collect = world.collect();
    let mut consume = world.site.start("consume", &[]);
    let mut publish = world.site.start("publish", &[]);
    world.all_is_in().await;
    let pending = "select count(*) from publication where state = 'pending'";
    eventually(SOON, "every event is published", || async { world.count(pending).await == 0 })
        .await;
    let backup = world.coderd.back_up(folder.path());
    let earlier = world.simulation.truth();

    // a part of the lost rows is already published, a part is not
    world.goes_on_to(0.55).await;
    world.all_is_in().await;
    eventually(SOON, "every event is published", || async { world.count(pending).await == 0 })
        .await;
    ends(&mut publish).await;
    let published = world.simulation.truth();
    world.goes_on_to(0.6).await;
    world.all_is_in().await;
    let truth = world.simulation.truth();
    let lost_usage = (truth.usage.len() - earlier.usage.len()) as i64;
    let lost_pending = (truth.usage.len() - published.usage.len()) as i64;
    let lost_builds = (truth.builds.len() - earlier.builds.len()) as i64;
    assert!(
        lost_builds > 10 && lost_pending > 5 && lost_usage > lost_pending,
        "{lost_builds} {lost_usage} {lost_pending}"
    );
    assert_eq!(world.count(pending).await, lost_pending);

    world.balanced().await; // it confirms the events that coderd has
    world.coderd.restore(&backup).await;
    let differs = world.site.command(&["audit", "--patience", "5", "--output", "json"]).await;
    assert_eq!(differs.status.code(), Some(1), "{differs:?}");
    let mut publish = world.site.start("publish", &[]);
    eventually(SOON, "usage without its row is held back", || async {
        world
            .count("select count(*) from publication where held_for = 'coderd_differs' and last_message like 'coderd no longer has%'")
            .await
            == lost_pending
    })
    .await;

    let plan = world.plan("coderd").await;
    let effect = &plan["effect"];
    let lost = |field: &str, of: &dyn Fn(&str) -> bool| -> i64 {
        let rows = effect["lost"]
            .as_array()
            .unwrap()
            .iter()
            .filter(|row| of(row["event_type"].as_str().unwrap()));
        rows.map(|row| row[field].as_i64().unwrap()).sum()
    };
    let is_usage = |kind: &str| kind.starts_with("dc_") || kind.starts_with("hb_");
    assert_eq!(lost("events", &is_usage), lost_usage, "{plan}");
    assert_eq!(
        (lost("pending", &is_usage), lost("published", &is_usage)),
        (lost_pending, lost_usage - lost_pending),
        "{plan}"
    );
    let gone_builds = effect["gone_builds"].as_i64().unwrap();
    assert!(gone_builds >= lost_builds && effect["unconfirmed"] == 0, "{plan}");
    assert_eq!(
        (lost("events", &|_| true), &effect["to_list"]),
        (lost_usage, &Json::from(lost_usage)),
        "builds are only counted: {plan}"
    );
    let units: u128 = effect["lost"]
        .as_array()
        .unwrap()
        .iter()
        .filter_map(|row| row["units"].as_str())
        .map(|units| units.parse::<u128>().unwrap())
        .sum();
    let known: std::collections::BTreeSet<&str> =
        earlier.usage.iter().map(|row| row.id.as_str()).collect();
    let expected: i64 = truth
        .usage
        .iter()
        .filter(|row| !known.contains(row.id.as_str()))
        .map(|row| row.quantity)
        .sum();
    assert_eq!(units, u128::try_from(expected).unwrap());

    let sweep = "select swept_pass_id from collector_progress";
    let swept_before = world.count(sweep).await;
    let executed = world.execute(&plan).await;
    assert!(executed.status.success(), "{executed:?}");
    eventually(SOON, "every event is published", || async { world.count(pending).await == 0 })
        .await;
    let billed = world.tallyman.books().billed;
    assert!(billed.iter().all(|billed| billed.times == 1));
    assert_eq!(billed.len(), truth.usage.iter().filter(|row| row.published_at.is_none()).count());
    let report = world.balanced().await;
    assert_eq!(report["joints"][0]["numbers"]["source_gone"], lost_usage + gone_builds, "{report}");
    assert_eq!(
        world.acts().await,
        [("sre-1".to_owned(), "coderd".to_owned(), "the disk is gone".to_owned())]
    );
    eventually(SOON, "the running collector reads everything again", || async {
        world.count(sweep).await > swept_before
    })
    .await;

    // an id that coderd uses again, with other content
    let again = truth
        .usage
        .iter()
        .rfind(|row| row.id.starts_with("hb_") || !row.id.contains('-'))
        .map_or(&truth.usage.last().unwrap().id, |row| &row.id);
    sqlx::query(
        "insert into usage_events (id, event_type, event_data, created_at) values ($1, 'hb_ai_seats_v1', '{\"count\": 77777}', now())",
    )
    .bind(again)
    .execute(&world.coderd.pool)
    .await
    .unwrap();
    let plan = world.plan("coderd").await;
    assert_eq!(
        (&plan["effect"]["ids_used_again"], &plan["effect"]["lost"]),
        (&Json::from(1), &serde_json::json!([])),
        "{plan}"
    );
    // an id that coderd used again before its loss was known: an operator records it, and the books
    // balance
    let earlier_id = &earlier.usage[0].id;
    sqlx::query("update usage_events set event_type = 'hb_ai_seats_v1', event_data = '{\"count\": 77777}' where id = $1")
        .bind(earlier_id)
        .execute(&world.coderd.pool)
        .await
        .unwrap();
    let differs = world.site.command(&["audit", "--patience", "5", "--output", "json"]).await;
    assert_eq!(differs.status.code(), Some(1), "{differs:?}");
    let plan = world.plan("coderd").await;
    assert_eq!(
        (&plan["effect"]["ids_used_again"], &plan["effect"]["lost"]),
        (&Json::from(2), &serde_json::json!([])),
        "{plan}"
    );
    let executed = world.execute(&plan).await;
    assert!(executed.status.success(), "{executed:?}");
    let report = world.balanced().await;
    let remarks = report["joints"][0]["remarks"].as_array().unwrap();
    let changed: Vec<&Json> = remarks
        .iter()
        .filter(|row| row["kind"] == "source_changed")
        .map(|row| &row["id"])
        .collect();
    world.nothing_is_lost("coderd", "there is nothing to recover").await;
    assert!(
        changed.contains(&&Json::from(again.as_str()))
            && changed.contains(&&Json::from(earlier_id.as_str())),
        "{report}"
    );
    for process in [&mut collect, &mut consume, &mut publish] {
        ends(process).await;
    }
}
