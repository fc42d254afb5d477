//! `tallyline status` of a site that works.

use serde_json::Value;
use tallyline::event::{Message, Topic};

use super::{Kind, SOON, Site, found};

/// A record that is no event.
fn garbage() -> Message {
    Message { key: Some(b"k".to_vec()), headers: Vec::new(), payload: Some(b"no event".to_vec()) }
}

#[tokio::test]
async fn status_shows_where_everything_stands() {
    let mut site = Site::new(Kind::Postgres).await;
    let coderd = site.with_coderd().await;
    site.set("roles", "['collect', 'consume', 'serve']");
    site.set("serve.audit_seconds", "0.5");
    let mut running = site.start("");
    running.ready().await;
    site.log().append(Topic::AgentUsage, vec![garbage(), garbage()]).await.unwrap();
    let answer = found(SOON, "the source is complete and the rejects are there", async || {
        let answer = site.status().await;
        let lag: i64 = answer["partitions"].as_array().unwrap().iter().map(|row| row["lag"].as_i64().unwrap()).sum();
        let complete = answer["sources"][0]["complete_until"].is_string();
        let audited = answer["audit"].as_array().is_some_and(|joints| joints.len() == 3);
        (lag == 0 && complete && audited && answer["refused"][0]["records"] == 2).then_some(answer)
    })
    .await;
    let deployment = coderd.simulation.deployment().id.to_string();
    let source = &answer["sources"][0];
    assert_eq!((&source["deployment_id"], &source["collected"]), (&Value::from(deployment.clone()), &true.into()));
    assert_eq!((&answer["refused"][0]["verdict"], answer["refused"][0]["cause"].is_string()), (&"rejected".into(), true));
    let usage = i64::try_from(coderd.simulation.usage_rows()).unwrap();
    let queue: i64 = answer["publications"].as_array().unwrap().iter().map(|row| row["events"].as_i64().unwrap()).sum();
    assert_eq!(queue, usage, "{answer}");
    for joint in answer["audit"].as_array().unwrap() {
        assert!(joint["differences"] == 0 && joint["differs_since"].is_null() && joint["audited_at"].is_string(), "{joint}");
    }
    let leases: Vec<&str> = answer["leases"].as_array().unwrap().iter().map(|lease| lease["name"].as_str().unwrap()).collect();
    assert_eq!(leases, ["audit", format!("collector:{deployment}").as_str(), "metrics"]);
    for lease in answer["leases"].as_array().unwrap() {
        // the audit's is held only while there is one
        assert!((lease["held"] == true && !lease["holder"].as_str().unwrap().is_empty()) || lease["name"] == "audit", "{lease}");
    }
    // the API says the same
    let (_, over_http) = running.get("/api/v1/status").await;
    assert_eq!(over_http["leases"].as_array().map(Vec::len), Some(3), "{over_http}");

    let table = site.command("status").await.stdout;
    for words in [
        "LAG",
        "COMPLETE UNTIL",
        "PUBLICATION",
        "pending",
        "REFUSED",
        "rejected",
        "LEASE",
        "AUDIT",
        "balanced",
        "collector:",
        "metrics",
        &deployment,
    ] {
        assert!(table.contains(words), "{words:?} is not in\n{table}");
    }
    running.ends_in_order().await;
    // given back: nobody holds them, and that is shown
    let after = site.status().await;
    assert!(after["leases"].as_array().unwrap().iter().all(|lease| lease["held"] == false), "{after}");
}
