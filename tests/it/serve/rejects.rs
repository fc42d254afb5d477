//! A serving process shows open rejects on `/metrics`.

use chrono::TimeDelta;
use tallyline::consumer;
use tallyline::event::{Message, Topic};
use tallyline::ledger::{ActKind, Chain, NewAct, Subject, rejects};
use tallyline::log::Record;

use super::{SOON, Site};
use crate::support::eventually;
use crate::support::ledger::{DEPLOYMENT, lease_partition, noon, partition, record_batch, usage};

#[tokio::test]
async fn open_rejects_unbilled_amounts_and_the_oldest_age_are_gauges() {
    let site = Site::new().await;
    let process = site.process().await;
    let shows = async |series: &'static str, value: f64| {
        eventually(SOON, series, || async { process.scrape("").await.get(series) == Some(&value) })
            .await;
    };
    shows("tallyline_rejects_unbilled_units{unit=\"agents\"}", 0.0).await;
    let claim = lease_partition(&site.ledger, partition(Topic::AgentUsage, 0), 0).await.unwrap();
    let bodies =
        [r#"{"count": 3, "colour": "blue"}"#, r#"{"count": 4, "colour": "blue"}"#, "no JSON"];
    let arrivals = (0..).zip(bodies).map(|(offset, body)| {
        let event = usage(DEPLOYMENT, u32::try_from(offset).unwrap());
        let message = Message { payload: Some(body.into()), ..event.to_message() };
        consumer::read(Record { offset, timestamp: noon(), message })
    });
    let arrivals: Vec<_> = arrivals.collect();
    record_batch(&site.ledger, &Chain::Live(claim), &arrivals, 3).await.unwrap();
    shows("tallyline_rejects_unbilled_units{unit=\"agents\"}", 7.0).await;
    shows("tallyline_rejects_open{cause=\"unknown_field\",disposition=\"rejected\"}", 2.0).await;
    shows("tallyline_rejects_open{cause=\"json\",disposition=\"rejected\"}", 1.0).await;
    site.ledger.clock.set(noon() + TimeDelta::seconds(90));
    shows("tallyline_rejects_oldest_age_seconds", 90.0).await;

    let ids: Vec<i64> = sqlx::query_scalar("select id from reject order by id")
        .fetch_all(&site.ledger.pool)
        .await
        .unwrap();
    let act = || NewAct {
        actor: "operator-1",
        act: ActKind::Discard,
        subject: Subject::Named("all"),
        reason: "a test",
        detail: serde_json::json!({}),
    };
    let discarded = site
        .ledger
        .run(async |conn| {
            rejects::discard(conn, &ids, &[act(), act(), act()], site.ledger.clock.now()).await
        })
        .await
        .unwrap();
    assert_eq!(discarded.map(|acts| acts.len()), Some(3));
    shows("tallyline_rejects_unbilled_units{unit=\"agents\"}", 0.0).await;
    shows("tallyline_rejects_open{cause=\"unknown_field\",disposition=\"rejected\"}", 0.0).await;
    shows("tallyline_rejects_oldest_age_seconds", 0.0).await;
    process.end().await;
}
