//! What operators do over HTTP, each answer held against the document.

use reqwest::Method;
use serde_json::json;
use tallyline::consumer;
use tallyline::event::{Message, Topic};
use tallyline::ledger::Chain;
use tallyline::log::Record;

use super::{Contract, Site};
use crate::support::ledger::{DEPLOYMENT, noon, partition, usage};

/// Pauses consuming and goes on with it.
pub async fn pauses(contract: &mut Contract) {
    let (post, delete) = ((Method::POST, "/api/v1/pauses"), (Method::DELETE, "/api/v1/pauses/{operation}"));
    let request = json!({ "operation": "consume", "topic": "tallyline.agent-usage.v1", "reason": "the broker moves" });
    let (status, pause) = contract.change(post.0.clone(), post.1, post.1, Some(request.clone())).await;
    assert_eq!((status, &pause["actor"], &pause["reason"]), (200, &json!("the-admin"), &json!("the broker moves")), "{pause}");
    let (status, refused) = contract.change(post.0.clone(), post.1, post.1, Some(request)).await;
    assert!(status == 409 && refused["message"].as_str().unwrap().contains("is paused by the-admin"), "{refused}");
    assert_eq!(contract.get("/api/v1/pauses").await.1, json!({ "pauses": [pause] }));
    let resume = "/api/v1/pauses/consume?topic=tallyline.agent-usage.v1&reason=it%20has%20moved";
    assert_eq!(contract.change(delete.0.clone(), delete.1, resume, None).await, (200, pause));
    let (status, refused) = contract.change(delete.0, delete.1, resume, None).await;
    assert!(status == 409 && refused["message"].as_str().unwrap().contains("is not paused"), "{refused}");
    let (_, acts) = contract.get("/api/v1/acts?actor=the-admin").await;
    let acts: Vec<_> = acts["acts"].as_array().unwrap().iter().map(|act| (&act["act"], &act["subject"], &act["reason"])).collect();
    let texts =
        [("resume", "consume", "it has moved"), ("pause", "consume", "the broker moves")].map(|(a, b, c)| (json!(a), json!(b), json!(c)));
    assert_eq!(acts, texts.iter().map(|(a, b, c)| (a, b, c)).collect::<Vec<_>>());
}

/// Three rejects: one is passed through the log again, one given up.
pub async fn rejects(contract: &mut Contract, site: &Site) {
    let claim = site.ledger.claim(partition(Topic::AgentUsage, 0), 0).await.unwrap();
    let bodies = [r#"{"count": 3, "colour": "blue"}"#, r#"{"count": 4, "colour": "blue"}"#, "no JSON"];
    let messages = (0..).zip(bodies).map(|(n, body)| Message { payload: Some(body.into()), ..usage(DEPLOYMENT, n).to_message() });
    let messages: Vec<Message> = messages.collect();
    site.log.append(Topic::AgentUsage, messages.clone()).await.unwrap();
    let arrivals: Vec<_> = (claim.next_offset..)
        .zip(messages)
        .map(|(offset, message)| consumer::read(Record { offset, timestamp: noon(), message }))
        .collect();
    let next_offset = claim.next_offset + 3;
    site.ledger.record(&Chain::Live(claim), &arrivals, next_offset).await.unwrap();

    let (status, page) = contract.get("/api/v1/rejects?cause=unknown_field").await;
    let ids: Vec<i64> = page["rejects"].as_array().unwrap().iter().map(|reject| reject["id"].as_i64().unwrap()).collect();
    assert_eq!((status, ids.len(), &page["next_after"]), (200, 2, &json!(null)), "{page}");
    let (_, first) = contract.get("/api/v1/rejects?limit=1&state=all").await;
    assert_eq!((&first["rejects"][0]["id"], &first["next_after"]), (&json!(ids[0]), &json!(ids[0])));
    let (_, counts) = contract.get("/api/v1/rejects/counts?by=cause").await;
    assert_eq!(counts["groups"].as_array().map(Vec::len), Some(2), "{counts}");

    let (template, one) = ("/api/v1/rejects/{id}", format!("/api/v1/rejects/{}", ids[0]));
    let as_admin = Some(super::Scope::Admin);
    let (status, shown) = contract.ask(Method::GET, template, &one, as_admin, None).await;
    assert_eq!((status, &shown["id"], &shown["if_resubmitted"]), (200, &json!(ids[0]), &json!("rejected")), "{shown}");
    for (path, status, field) in [("/api/v1/rejects/999999", 404, None), ("/api/v1/rejects/x", 400, Some("id"))] {
        let (found, problem) = contract.ask(Method::GET, template, path, as_admin, None).await;
        assert_eq!((found, problem["field"].as_str()), (status, field), "{problem}");
    }

    let (resubmit, discard) = ("/api/v1/rejects/resubmit", "/api/v1/rejects/discard");
    let edited = json!({ "ids": [ids[0]], "edit": r#"{"count": 3}"#, "reason": "a field too much" });
    let (status, unchanged) = contract.change(Method::POST, resubmit, resubmit, Some(json!({ "ids": [ids[0]] }))).await;
    assert_eq!(status, 409, "it would be refused again: {unchanged}");
    let (status, went) = contract.change(Method::POST, resubmit, resubmit, Some(edited.clone())).await;
    assert_eq!((status, &went["records"][0]["foreseen"]), (200, &json!("accepted")), "{went}");
    let (status, again) = contract.change(Method::POST, resubmit, resubmit, Some(edited)).await;
    assert!(status == 409 && again["message"].as_str().unwrap().contains("no longer open: it was resubmitted by the-admin"), "{again}");

    let given_up = json!({ "ids": [ids[1]], "reason": "a test of the producer" });
    let (status, without) = contract.change(Method::POST, discard, discard, Some(json!({ "ids": [ids[1]] }))).await;
    assert_eq!((status, without["field"].as_str()), (400, Some("reason")), "{without}");
    assert_eq!(contract.change(Method::POST, discard, discard, Some(given_up.clone())).await.0, 200);
    assert_eq!(contract.change(Method::POST, discard, discard, Some(given_up)).await.0, 409);
    let admit = "/api/v1/rejects/admit";
    let (status, admitted) = contract.change(Method::POST, admit, admit, None).await;
    assert_eq!((status, admitted), (200, json!({ "records": 0, "refused": 0, "left": 0 })));
}
