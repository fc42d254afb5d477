//! `tallyline status` of a working site.

use serde_json::Value;
use tallyline::clock::Clock;
use tallyline::event::{Message, Topic};
use tallyline::ledger::{Ledger, LedgerSettings};

use super::{Kind, SOON, Site, append_builds, eventually_some};
use crate::support::process::tallyline;

/// A record that is not an event.
fn garbage() -> Message {
    Message { key: Some(b"k".to_vec()), payload: Some(b"no event".to_vec()), ..Message::default() }
}

#[tokio::test]
async fn status_shows_the_state_of_everything() {
    let mut site = Site::new(Kind::Postgres).await;
    let coderd = site.with_coderd().await;
    site.set("roles", "['collect', 'consume', 'serve']");
    site.set("audit.interval_seconds", "0.5");
    let mut running = site.start("");
    running.ready().await;
    site.log().append(Topic::AgentUsage, vec![garbage(), garbage()]).await.unwrap();
    let answer =
        eventually_some(SOON, "the source is complete and the rejects are there", async || {
            let answer = site.status().await;
            let lag: i64 = answer["partitions"]
                .as_array()
                .unwrap()
                .iter()
                .map(|row| row["lag"].as_i64().unwrap())
                .sum();
            let complete = answer["sources"][0]["complete_until"].is_string();
            let audited = answer["audit"].as_array().is_some_and(|joints| joints.len() == 3);
            (lag == 0 && complete && audited && answer["open_rejects"][0]["records"] == 2)
                .then_some(answer)
        })
        .await;
    let deployment = coderd.simulation.deployment().id.to_string();
    let source = &answer["sources"][0];
    assert_eq!(
        (&source["deployment_id"], &source["retired"]),
        (&Value::from(deployment.clone()), &false.into())
    );
    assert_eq!(
        (&answer["open_rejects"][0]["disposition"], answer["open_rejects"][0]["cause"].is_string()),
        (&"rejected".into(), true)
    );
    let until =
        |name: &str| source[name].as_str().unwrap_or_else(|| panic!("{name}: {answer}")).to_owned();
    for kind in ["builds_complete_until", "claims_complete_until", "usage_complete_until"] {
        assert!(until(kind) >= until("complete_until"), "{kind}: {answer}");
    }
    let queue = &answer["queues"][0];
    let pending: i64 = answer["publications"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|row| row["state"] == "pending")
        .map(|row| row["events"].as_i64().unwrap())
        .sum();
    assert_eq!(
        (&queue["deployment_id"], queue["pending"].as_i64()),
        (&source["deployment_id"], Some(pending)),
        "{answer}"
    );
    let rate = answer["rates"]["records_per_second_10m"].as_f64().unwrap();
    let read: i64 = answer["partitions"]
        .as_array()
        .unwrap()
        .iter()
        .map(|row| row["records"].as_i64().unwrap_or(0))
        .sum();
    assert!(
        (rate * 600.0 - read as f64).abs() < 1e-6,
        "all was read in the last ten minutes: {answer}"
    );
    let edge = &answer["next_license_edge"];
    assert!(
        edge["at"].as_str().unwrap() > answer["at"].as_str().unwrap() && edge["what"].is_string(),
        "{answer}"
    );
    let usage = i64::try_from(coderd.simulation.usage_rows()).unwrap();
    let queue: i64 = answer["publications"]
        .as_array()
        .unwrap()
        .iter()
        .map(|row| row["events"].as_i64().unwrap())
        .sum();
    assert_eq!(queue, usage, "{answer}");
    for joint in answer["audit"].as_array().unwrap() {
        assert!(
            joint["differences"] == 0
                && joint["differs_since"].is_null()
                && joint["audited_at"].is_string(),
            "{joint}"
        );
    }
    // an audit and a round of retention hold their leases only while they run
    let leases: Vec<&Value> = answer["leases"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|lease| lease["name"] != "audit" && lease["name"] != "prune")
        .collect();
    let names: Vec<&str> = leases.iter().map(|lease| lease["name"].as_str().unwrap()).collect();
    assert_eq!(names, [format!("collector:{deployment}").as_str(), "metrics"]);
    for lease in leases {
        assert!(lease["held"] == true && !lease["holder"].as_str().unwrap().is_empty(), "{lease}");
    }
    // the API reports the same
    let (_, over_http) = running.get("/api/v1/status").await;
    assert!(over_http["leases"].as_array().unwrap().len() >= 2, "{over_http}");

    let table = site.command("status").await.stdout;
    for words in [
        "LAG",
        "COMPLETE UNTIL",
        "PUBLICATION",
        "pending",
        "OPEN REJECTS",
        "rejected",
        "LEASE",
        "collector:",
        "metrics",
        "AUDIT",
        "balanced",
        &deployment,
    ] {
        assert!(table.contains(words), "{words:?} is not in\n{table}");
    }
    running.ends_in_order().await;
    // released: they have no holder, and the status shows it
    let after = site.status().await;
    assert!(
        after["leases"].as_array().unwrap().iter().all(|lease| lease["held"] == false),
        "{after}"
    );
}

#[tokio::test]
async fn lag_is_shown_in_records_and_seconds_with_the_time_until_records_expire() {
    for kind in [Kind::Postgres, Kind::Kafka] {
        let site = Site::registered(kind).await;
        let log = site.log();
        append_builds(&log, 0..100).await;
        let lag = |status: &Value| -> i64 {
            status["partitions"]
                .as_array()
                .unwrap()
                .iter()
                .map(|row| row["lag"].as_i64().unwrap_or_else(|| panic!("{status}")))
                .sum()
        };
        let status = site.status().await;
        assert_eq!(lag(&status), 100, "no record is read: {status}");
        let day = 24 * 3600;
        for row in status["partitions"].as_array().unwrap() {
            let (lag, behind, loss) =
                (row["lag"].as_i64(), row["lag_seconds"].as_i64(), row["loss_in_seconds"].as_i64());
            match (kind, lag) {
                (_, Some(0)) => assert_eq!((behind, loss), (Some(0), None), "{row}"),
                (Kind::Postgres, _) => {
                    assert!(
                        (0..120).contains(&behind.unwrap()) && loss.is_none(),
                        "the log keeps unread records: {row}"
                    )
                }
                // each is rounded down to whole seconds
                (Kind::Kafka, _) => assert!(
                    (35 * day - 1..=35 * day).contains(&(loss.unwrap() + behind.unwrap())),
                    "{row}"
                ),
            }
        }
        let mut running = site.start("");
        site.builds(100).await;
        let caught_up = eventually_some(SOON, "nothing waits", async || {
            Some(site.status().await).filter(|status| lag(status) == 0)
        })
        .await;
        assert!(
            caught_up["partitions"].as_array().unwrap().iter().all(|row| row["lag_seconds"] == 0),
            "{caught_up}"
        );
        running.ends_in_order().await;
    }
}

#[tokio::test]
async fn a_watch_repeats_its_answer_until_a_signal() {
    let site = Site::registered(Kind::Postgres).await;
    let mut watch = tallyline(
        &["status", "--watch", "1s", "--output", "json", "--pipeline", &site.file()],
        &[],
    );
    eventually_some(SOON, "three answers", async || {
        (watch.stdout().lines().count() >= 3).then_some(())
    })
    .await;
    watch.signal("INT");
    assert_eq!(watch.ends_within(SOON).await.code(), Some(0), "{}", watch.stderr());
    let answers: Vec<Value> =
        watch.stdout().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let times: Vec<&str> = answers.iter().map(|answer| answer["at"].as_str().unwrap()).collect();
    assert!(times.is_sorted() && times[0] < times[2], "{times:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn records_appended_during_status_are_not_in_an_open_transaction() {
    let site = Site::registered(Kind::Postgres).await;
    let log = site.log();
    let ledger = Ledger::open(
        &LedgerSettings { url: site.ledger.url.clone(), connections: 2 },
        Clock::system(),
    )
    .unwrap();
    let appending = tokio::spawn({
        let log = log.clone();
        async move {
            for _ in 0..400 {
                log.append(Topic::AgentUsage, vec![garbage()]).await.unwrap();
            }
        }
    });
    while !appending.is_finished() {
        let status = tallyline::status::read(&ledger, &log, SOON).await.unwrap();
        assert!(
            status.partitions.iter().all(|partition| partition.in_open_transaction == Some(0)),
            "{:?}",
            status.partitions
        );
    }
    appending.await.unwrap();
}
