//! Operators' requests over HTTP. Each answer is compared with the document.

use reqwest::Method;
use serde_json::{Value, json};
use tallyline::consumer;
use tallyline::event::{Message, Topic};
use tallyline::ledger::{
    AuditStep, AuditedJoint, Chain, audit_items, publish_marks, snapshots, sources,
};
use tallyline::log::Record;
use uuid::Uuid;

use super::{Contract, Site};
use crate::support::ledger::{
    DEPLOYMENT, OTHER_DEPLOYMENT, build, lease_partition, noon, partition, record_batch,
    take_lease, usage,
};

/// Pauses and resumes consuming.
pub async fn pauses(contract: &mut Contract) {
    let (post, delete) =
        ((Method::POST, "/api/v1/pauses"), (Method::DELETE, "/api/v1/pauses/{operation}"));
    let request = json!({ "operation": "consume", "topic": "tallyline.agent-usage.v1", "reason": "the broker moves" });
    let (status, pause) =
        contract.change(post.0.clone(), post.1, post.1, Some(request.clone())).await;
    assert_eq!(
        (status, &pause["actor"], &pause["reason"]),
        (200, &json!("the-admin"), &json!("the broker moves")),
        "{pause}"
    );
    let (status, refused) = contract.change(post.0.clone(), post.1, post.1, Some(request)).await;
    assert!(
        status == 409 && refused["message"].as_str().unwrap().contains("is paused by the-admin"),
        "{refused}"
    );
    assert_eq!(contract.get("/api/v1/pauses").await.1, json!({ "pauses": [pause] }));
    let resume = "/api/v1/pauses/consume?topic=tallyline.agent-usage.v1&reason=it%20has%20moved";
    assert_eq!(contract.change(delete.0.clone(), delete.1, resume, None).await, (200, pause));
    let (status, refused) = contract.change(delete.0, delete.1, resume, None).await;
    assert!(
        status == 409 && refused["message"].as_str().unwrap().contains("is not paused"),
        "{refused}"
    );
    let (_, acts) = contract.get("/api/v1/audit-log?actor=the-admin").await;
    let acts: Vec<_> = acts["acts"]
        .as_array()
        .unwrap()
        .iter()
        .map(|act| (&act["act"], &act["subject"], &act["reason"]))
        .collect();
    let texts = [("resume", "consume", "it has moved"), ("pause", "consume", "the broker moves")]
        .map(|(a, b, c)| (json!(a), json!(b), json!(c)));
    assert_eq!(acts, texts.iter().map(|(a, b, c)| (a, b, c)).collect::<Vec<_>>());
}

/// Three rejects: one is resubmitted, one discarded.
pub async fn rejects(contract: &mut Contract, site: &Site) {
    let claim = lease_partition(&site.ledger, partition(Topic::AgentUsage, 0), 0).await.unwrap();
    let bodies =
        [r#"{"count": 3, "colour": "blue"}"#, r#"{"count": 4, "colour": "blue"}"#, "no JSON"];
    let messages = (0..).zip(bodies).map(|(n, body)| Message {
        payload: Some(body.into()),
        ..usage(DEPLOYMENT, n).to_message()
    });
    let messages: Vec<Message> = messages.collect();
    site.log.append(Topic::AgentUsage, messages.clone()).await.unwrap();
    let arrivals: Vec<_> = (claim.next_offset..)
        .zip(messages)
        .map(|(offset, message)| consumer::read(Record { offset, timestamp: noon(), message }))
        .collect();
    let next_offset = claim.next_offset + 3;
    record_batch(&site.ledger, &Chain::Live(claim), &arrivals, next_offset).await.unwrap();

    let (status, page) = contract.get("/api/v1/rejects?cause=unknown_field").await;
    let ids: Vec<i64> = page["rejects"]
        .as_array()
        .unwrap()
        .iter()
        .map(|reject| reject["id"].as_i64().unwrap())
        .collect();
    assert_eq!((status, ids.len(), &page["next_after"]), (200, 2, &json!(null)), "{page}");
    let (_, first) = contract.get("/api/v1/rejects?limit=1&state=all").await;
    assert_eq!(
        (&first["rejects"][0]["id"], &first["next_after"]),
        (&json!(ids[0]), &json!(ids[0]))
    );
    let (_, counts) = contract.get("/api/v1/rejects/counts?by=cause").await;
    assert_eq!(counts["groups"].as_array().map(Vec::len), Some(2), "{counts}");

    let (template, one) = ("/api/v1/rejects/{id}", format!("/api/v1/rejects/{}", ids[0]));
    let as_admin = Some(super::Scope::Admin);
    let (status, body) = contract.ask(Method::GET, template, &one, as_admin, None).await;
    assert_eq!(
        (status, &body["id"], &body["if_resubmitted"]),
        (200, &json!(ids[0]), &json!("rejected")),
        "{body}"
    );
    for (path, status, field) in
        [("/api/v1/rejects/999999", 404, None), ("/api/v1/rejects/x", 400, Some("id"))]
    {
        let (code, problem) = contract.ask(Method::GET, template, path, as_admin, None).await;
        assert_eq!((code, problem["field"].as_str()), (status, field), "{problem}");
    }

    let (resubmit, discard) = ("/api/v1/rejects/resubmit", "/api/v1/rejects/discard");
    let edited =
        json!({ "ids": [ids[0]], "edit": r#"{"count": 3}"#, "reason": "a field too much" });
    let (status, unchanged) =
        contract.change(Method::POST, resubmit, resubmit, Some(json!({ "ids": [ids[0]] }))).await;
    assert_eq!(status, 409, "it would be refused again: {unchanged}");
    let (status, answer) =
        contract.change(Method::POST, resubmit, resubmit, Some(edited.clone())).await;
    assert_eq!((status, &answer["records"][0]["predicted"]), (200, &json!("accepted")), "{answer}");
    let (status, again) = contract.change(Method::POST, resubmit, resubmit, Some(edited)).await;
    assert!(
        status == 409
            && again["message"]
                .as_str()
                .unwrap()
                .contains("is not open: it was resubmitted by the-admin"),
        "{again}"
    );

    let given_up = json!({ "ids": [ids[1]], "reason": "a test of the producer" });
    let (status, without) =
        contract.change(Method::POST, discard, discard, Some(json!({ "ids": [ids[1]] }))).await;
    assert_eq!((status, without["field"].as_str()), (400, Some("reason")), "{without}");
    assert_eq!(
        contract.change(Method::POST, discard, discard, Some(given_up.clone())).await.0,
        200
    );
    assert_eq!(contract.change(Method::POST, discard, discard, Some(given_up)).await.0, 409);
    let admit = "/api/v1/rejects/admit";
    let (status, admitted) = contract.change(Method::POST, admit, admit, None).await;
    assert_eq!((status, admitted), (200, json!({ "records": 0, "refused": 0, "left": 0 })));
}

/// The life of the one build, and the books.
pub async fn explanation_and_audit(contract: &mut Contract, site: &Site) {
    let template = "/api/v1/events/{event_id}/explain";
    let event_id = build(DEPLOYMENT, 1).id();
    let path = format!("/api/v1/events/{}/explain", event_id.replace(':', "%3A"));
    let as_admin = Some(super::Scope::Admin);
    let (status, explained) = contract.ask(Method::GET, template, &path, as_admin, None).await;
    assert_eq!((status, &explained["event_id"]), (200, &json!(event_id)), "{explained}");
    for (path, status) in [
        ("/api/v1/events/not%2Fa%20known%20id/explain", 404),
        ("/api/v1/events/prebuild_claimed%3Ax/explain", 400),
    ] {
        assert_eq!(
            contract.ask(Method::GET, template, path, as_admin, None).await.0,
            status,
            "{path}"
        );
    }
    for id in [String::new(), "x".repeat(1025), "a%00b".to_owned()] {
        let path = format!("/api/v1/events/{id}/explain");
        let (status, problem) = contract.ask(Method::GET, template, &path, as_admin, None).await;
        assert_eq!((status, &problem["field"]), (400, &json!("event_id")), "{problem}");
    }
    assert_eq!(contract.get("/api/v1/audit").await, (200, json!({ "findings": [] })));
    let request = json!({ "patience_seconds": 0, "deep": true });
    let (status, report) =
        contract.change(Method::POST, "/api/v1/audit", "/api/v1/audit", Some(request)).await;
    let names: Vec<&str> = report["joints"]
        .as_array()
        .unwrap()
        .iter()
        .map(|joint| joint["name"].as_str().unwrap())
        .collect();
    assert_eq!(status, 200, "{report}");
    assert_eq!(
        names[..3],
        ["source and ledger", "log and ledger", "ledger and vendor"],
        "{report}"
    );

    let lease = take_lease(&site.ledger, "audit", "test", super::SOON).await.unwrap().unwrap();
    let sequence = site.ledger.run(snapshots::head).await.unwrap();
    let joint = AuditedJoint {
        joint: "source and ledger",
        deployment: Some(OTHER_DEPLOYMENT),
        sequence,
        seconds: 0.5,
        good_for: super::SOON,
        recent_since: site.ledger.clock.now(),
    };
    let step = AuditStep::default();
    site.ledger
        .run(async |conn| audit_items::record(conn, &lease, &joint, &step).await)
        .await
        .unwrap();
    let (_, body) = contract.get("/api/v1/audit").await;
    assert_eq!(body["findings"][0]["deployment_id"], json!(OTHER_DEPLOYMENT), "{body}");
    let (retire, reinstate) = ("/api/v1/sources/retire", "/api/v1/sources/reinstate");
    let why = json!({ "deployment_id": OTHER_DEPLOYMENT, "reason": "its coderd is gone" });
    assert_eq!(
        contract.change(Method::POST, retire, retire, Some(why.clone())).await.0,
        404,
        "it is not registered"
    );
    site.collected(OTHER_DEPLOYMENT).await;
    let (status, without) = contract
        .change(Method::POST, retire, retire, Some(json!({ "deployment_id": OTHER_DEPLOYMENT })))
        .await;
    assert_eq!((status, without["field"].as_str()), (400, Some("reason")), "{without}");
    assert_eq!(
        contract.change(Method::POST, reinstate, reinstate, Some(why.clone())).await.0,
        409,
        "it is in use"
    );
    let (status, retired) = contract.change(Method::POST, retire, retire, Some(why.clone())).await;
    assert_eq!(
        (status, &retired["retired"]["reason"]),
        (200, &json!("its coderd is gone")),
        "{retired}"
    );
    let (status, again) = contract.change(Method::POST, retire, retire, Some(why.clone())).await;
    assert!(
        status == 409 && again["message"].as_str().unwrap().contains("was retired by the-admin"),
        "{again}"
    );
    assert_eq!(
        contract.get("/api/v1/audit").await,
        (200, json!({ "findings": [] })),
        "its findings are dropped"
    );
    let (_, listed) = contract.get("/api/v1/sources").await;
    let listed: Vec<bool> = listed["sources"]
        .as_array()
        .unwrap()
        .iter()
        .map(|source| source["retired"].is_object())
        .collect();
    assert_eq!(listed, [false, true]);
    let (status, reinstated) =
        contract.change(Method::POST, reinstate, reinstate, Some(why.clone())).await;
    assert_eq!((status, &reinstated["retired"]), (200, &Value::Null), "{reinstated}");
    assert_eq!(
        contract.change(Method::POST, retire, retire, Some(why)).await.0,
        200,
        "one is in use again"
    );
}

/// coderd has published by itself, and an operator has cut that off.
pub async fn coderd_cut_off(contract: &mut Contract, site: &Site) {
    let source =
        site.ledger.run(async |conn| sources::get(conn, DEPLOYMENT).await).await.unwrap().unwrap();
    for mark in [None, Some(noon())] {
        site.ledger
            .run(async |conn| publish_marks::record(conn, source.id, mark).await)
            .await
            .unwrap();
    }
    let path = "/api/v1/publish/coderd-cut-off";
    let request = json!({ "deployment_id": DEPLOYMENT, "reason": "its publisher is disabled" });
    let (status, without) = contract
        .change(Method::POST, path, path, Some(json!({ "deployment_id": DEPLOYMENT })))
        .await;
    assert_eq!((status, without["field"].as_str()), (400, Some("reason")), "{without}");
    let (status, stop) = contract.change(Method::POST, path, path, Some(request.clone())).await;
    assert_eq!((status, &stop["deployment_id"]), (200, &json!(DEPLOYMENT)), "{stop}");
    assert_eq!(contract.change(Method::POST, path, path, Some(request)).await.0, 404);
}

/// No audit has read the ledger here, and an operator publishes nevertheless.
pub async fn unaudited(contract: &mut Contract) {
    let path = "/api/v1/publish/unaudited";
    let (status, without) = contract.change(Method::POST, path, path, Some(json!({}))).await;
    assert_eq!((status, without["field"].as_str()), (400, Some("reason")), "{without}");
    let request = json!({ "reason": "the auditing host is being replaced" });
    let (status, late) = contract.change(Method::POST, path, path, Some(request)).await;
    assert_eq!((status, late["joints"].as_array().map(Vec::len)), (200, Some(2)), "{late}");
    let unknown = json!({ "deployment_id": uuid::Uuid::nil(), "reason": "a test" });
    assert_eq!(contract.change(Method::POST, path, path, Some(unknown)).await.0, 404);
    let (_, status) = contract.get("/api/v1/status").await;
    let by = &status["late_audits"][0]["overridden"]["reason"];
    assert_eq!(by, "the auditing host is being replaced", "{status}");
}

/// Plans a replay of everything and executes it to its end, once. The log has no consumer here, so
/// the resubmitted record is new.
pub async fn replay(contract: &mut Contract) {
    let (plans, plan, execute) =
        ("/api/v1/replays", "/api/v1/plans/{hash}", "/api/v1/plans/{hash}/execute");
    let (status, planned) =
        contract.change(Method::POST, plans, plans, Some(json!({ "from": "earliest" }))).await;
    assert_eq!(status, 200, "{planned}");
    let (status, wrong) =
        contract.change(Method::POST, plans, plans, Some(json!({ "from": "yesterday" }))).await;
    assert_eq!((status, wrong["field"].as_str()), (400, Some("from")), "{wrong}");
    let path = format!("/api/v1/plans/{}", planned["hash"].as_str().unwrap());
    let as_admin = Some(super::Scope::Admin);
    assert_eq!(contract.ask(Method::GET, plan, &path, as_admin, None).await.1["state"], "planned");
    let at = format!("{path}/execute");
    let (status, mut execution) =
        contract.change(Method::POST, execute, &at, Some(json!({ "reason": "to be sure" }))).await;
    assert_eq!(status, 202, "{execution}");
    let begun = std::time::Instant::now();
    while execution["state"] == "running" {
        assert!(begun.elapsed() < super::SOON, "{execution}");
        execution = contract.ask(Method::GET, plan, &path, as_admin, None).await.1;
    }
    assert_eq!(
        (&execution["state"], &execution["replayed"]["accepted"]),
        (&json!("finished"), &json!(1)),
        "{execution}"
    );
    let (status, refused) = contract.change(Method::POST, execute, &at, None).await;
    assert!(
        status == 409 && refused["message"].as_str().unwrap().contains("executed to its end"),
        "{refused}"
    );
    // it does not change
    assert_eq!(contract.ask(Method::GET, plan, &path, as_admin, None).await.1, execution);
    assert_eq!(
        contract.change(Method::POST, execute, "/api/v1/plans/0/execute", None).await.0,
        404
    );
    let (_, acts) = contract.get("/api/v1/audit-log?act=replay").await;
    assert_eq!(
        (&acts["acts"][0]["actor"], &acts["acts"][0]["reason"]),
        (&json!("the-admin"), &json!("to be sure")),
        "{acts}"
    );
}

/// From zero, without a difference.
pub async fn rebuild(contract: &mut Contract) {
    let (plans, execute) = ("/api/v1/rebuilds", "/api/v1/rebuilds/execute");
    let (status, plan) =
        contract.change(Method::POST, plans, plans, Some(json!({ "stage": "metrics" }))).await;
    assert_eq!((status, &plan["differs"]), (200, &json!(false)), "{plan}");
    let (status, rehearsed) = contract
        .change(
            Method::POST,
            plans,
            plans,
            Some(json!({ "stage": "licenses", "rules": "2026-02" })),
        )
        .await;
    assert_eq!(status, 200, "{rehearsed}");
    for (field, value) in [("source", json!(DEPLOYMENT)), ("at", json!("2025-08-01T00:00:00Z"))] {
        let (status, problem) = contract
            .change(Method::POST, plans, plans, Some(json!({ "stage": "licenses", field: value })))
            .await;
        assert_eq!((status, problem["field"].as_str()), (400, Some(field)), "{problem}");
    }
    let with = |hash: &Value| json!({ "rebuild": { "stage": "metrics" }, "hash": hash, "reason": "to be sure" });
    assert_eq!(
        contract.change(Method::POST, execute, execute, Some(with(&json!("0")))).await.0,
        409
    );
    let (status, done) =
        contract.change(Method::POST, execute, execute, Some(with(&plan["hash"]))).await;
    assert_eq!(status, 200, "{done}");
}

/// Of one old plan.
pub async fn prune(contract: &mut Contract, site: &Site) {
    let old = "insert into plan (hash, kind, request, effect, planned_at) values ('old', 'replay', '{}', '{}', '2000-01-01T00:00:00Z')";
    sqlx::query(old).execute(&site.ledger.pool).await.unwrap();
    let (plans, execute) = ("/api/v1/prunes", "/api/v1/prunes/execute");
    let (status, plan) = contract.change(Method::POST, plans, plans, Some(json!({}))).await;
    assert_eq!((status, &plan["kinds"][2]["rows"]), (200, &json!(1)), "{plan}");
    let with = |at: &Value, hash: &Value| json!({ "prune": { "at": at }, "hash": hash, "reason": "to be sure" });
    for (body, expected) in [
        (with(&plan["at"], &json!("0")), 409),
        (with(&json!(null), &plan["hash"]), 400),
        (with(&json!("9000-01-01T00:00:00Z"), &plan["hash"]), 400),
        (with(&plan["at"], &plan["hash"]), 200),
    ] {
        let (status, done) =
            contract.change(Method::POST, execute, execute, Some(body.clone())).await;
        assert_eq!(status, expected, "{body}: {done}");
    }
}

async fn plan_recovery(contract: &mut Contract, lost: &str) -> (u16, Value) {
    let path = "/api/v1/recoveries";
    contract.change(Method::POST, path, path, Some(json!({ "lost": lost }))).await
}

async fn execute_recovery(contract: &mut Contract, plan: &Value) -> (u16, Value) {
    let path = "/api/v1/recoveries/execute";
    contract
        .change(
            Method::POST,
            path,
            path,
            Some(json!({ "hash": plan["hash"], "reason": "the disk died" })),
        )
        .await
}

async fn refuses_recovery(contract: &mut Contract, plan: &Value, why: &str) {
    let (status, refused) = execute_recovery(contract, plan).await;
    assert!(status == 409 && refused["message"].as_str().unwrap().contains(why), "{refused}");
}

/// A topic that is emptied, and then the ledger: plans, executes, and not a second time.
pub async fn recoveries(contract: &mut Contract, site: &Site) {
    let (status, wrong) = plan_recovery(contract, "everything").await;
    assert_eq!((status, wrong["field"].as_str()), (400, Some("lost")), "{wrong}");
    assert_eq!(execute_recovery(contract, &json!({ "hash": "0" })).await.0, 404);
    let (status, nothing) = plan_recovery(contract, "log").await;
    assert_eq!((status, &nothing["effect"]["partitions"]), (200, &json!([])), "{nothing}");
    assert_eq!(nothing["hash"], json!(null), "{nothing}");

    let emptied = "begin;
        delete from log_record using log_partition where id = partition_id and topic = 'tallyline.workspace-builds.v1';
        update log_partition set start_offset = 0, next_offset = 0 where topic = 'tallyline.workspace-builds.v1'; commit";
    sqlx::raw_sql(emptied).execute(&site.ledger.pool).await.unwrap();
    let (status, plan) = plan_recovery(contract, "log").await;
    assert_eq!(
        (status, &plan["effect"]["partitions"][0]["problem"]),
        (200, &json!("beyond_end")),
        "{plan}"
    );
    assert_eq!(execute_recovery(contract, &plan).await, (200, plan.clone()));
    refuses_recovery(contract, &plan, "this plan was executed before").await;

    let (status, plan) = plan_recovery(contract, "ledger").await;
    assert_eq!((status, &plan["effect"]["open"]), (200, &json!(null)), "{plan}");
    assert_eq!(execute_recovery(contract, &plan).await, (200, plan.clone()));
    refuses_recovery(contract, &plan, "this plan was executed before").await;
    let (_, open) = plan_recovery(contract, "ledger").await;
    assert_eq!(open["hash"], json!(null), "{open}");
    let path = "/api/v1/recoveries";
    let without = |id: Uuid| Some(json!({ "lost": "ledger", "without": [id] }));
    assert_eq!(contract.change(Method::POST, path, path, without(Uuid::nil())).await.0, 404);
    let (status, given_up) = contract.change(Method::POST, path, path, without(DEPLOYMENT)).await;
    assert_eq!(
        (status, &given_up["effect"]["not_waited_for"][0]["by_this_plan"]),
        (200, &json!(true)),
        "{given_up}"
    );
    let wrong = contract
        .change(Method::POST, path, path, Some(json!({ "lost": "ledger", "without": "all" })))
        .await;
    assert_eq!((wrong.0, wrong.1["field"].as_str()), (400, Some("without")), "{wrong:?}");
    let (_, body) = contract.get("/api/v1/status").await;
    let recovering = &body["recovering"];
    assert_eq!(*recovering, open["effect"]["open"]);
    assert_eq!(
        [&recovering["actor"], &recovering["reason"]],
        [&json!("the-admin"), &json!("the disk died")]
    );
    let (_, acts) = contract.get("/api/v1/audit-log?act=recover").await;
    let acts: Vec<_> = acts["acts"]
        .as_array()
        .unwrap()
        .iter()
        .map(|act| [&act["actor"], &act["subject"], &act["reason"]])
        .collect();
    let texts =
        ["ledger", "log"].map(|lost| [json!("the-admin"), json!(lost), json!("the disk died")]);
    assert_eq!(acts, texts.iter().map(|act| act.each_ref()).collect::<Vec<_>>());
}

/// One usage event that coderd has lost. The process knows coderd's database, or does not.
pub async fn lost_in_coderd(contract: &mut Contract, known: bool) {
    let (status, plan) = plan_recovery(contract, "coderd").await;
    if !known {
        assert!(
            status == 409
                && plan["message"].as_str().unwrap().contains("source.coderd_url is not set"),
            "{plan}"
        );
        return;
    }
    assert_eq!((status, &plan["effect"]["lost"][0]["events"]), (200, &json!(1)), "{plan}");
    assert_eq!(execute_recovery(contract, &plan).await, (200, plan.clone()));
    refuses_recovery(contract, &plan, "this plan was executed before").await;
    let (_, again) = plan_recovery(contract, "coderd").await;
    assert_eq!(again["effect"]["lost"], json!([]), "{again}");
}

/// One usage event that coderd never had. The process knows coderd's database, or does not.
pub async fn correction(contract: &mut Contract, known: bool) {
    let (plans, execute) = ("/api/v1/corrections", "/api/v1/corrections/execute");
    let request = json!({ "event_ids": ["usage-2"] });
    let (status, plan) = contract.change(Method::POST, plans, plans, Some(request.clone())).await;
    if !known {
        let message = plan["message"].as_str().unwrap();
        assert!(status == 409 && message.contains("source.coderd_url is not set"), "{plan}");
        return;
    }
    assert_eq!((status, &plan["events"][0]["after"]), (200, &json!(null)), "{plan}");
    let unknown = json!({ "event_ids": ["no-such-usage"] });
    assert_eq!(contract.change(Method::POST, plans, plans, Some(unknown)).await.0, 404);
    let mut execution = json!({ "correction": &request, "hash": plan["hash"] });
    let (status, problem) =
        contract.change(Method::POST, execute, execute, Some(execution.clone())).await;
    assert_eq!((status, problem["field"].as_str()), (400, Some("reason")), "{problem}");
    execution["reason"] = json!("forged");
    let (status, corrected) =
        contract.change(Method::POST, execute, execute, Some(execution.clone())).await;
    assert_eq!((status, &corrected["plan"]), (200, &plan), "{corrected}");
    let (status, again) = contract.change(Method::POST, execute, execute, Some(execution)).await;
    assert_eq!((status, &again["sequence"]), (200, &corrected["sequence"]), "{again}");
    let (status, problem) = contract.change(Method::POST, plans, plans, Some(request)).await;
    assert!(
        status == 409 && problem["message"].as_str().unwrap().contains("is corrected already"),
        "{problem}"
    );
}
