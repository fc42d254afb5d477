//! The API against its own document. It has each route, and each answer of a process has the
//! promised shape, good or bad.

mod operators;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};

use jsonschema::Validator;
use reqwest::{Client, Method, StatusCode};
use serde_json::{Map, Value, json};
use tallyline::api::Token;
use tallyline::coderd;
use tallyline::config::Scope;
use tallyline::event::Topic;
use tallyline::ledger::{
    ActKind, NewAct, SourceIdentity, Subject, confirmed, identity, rejects, sources,
};
use tallyline_sim::coderd::SchemaVersion;

use super::{Process, SOON, Site};
use crate::support::coderd::Coderd;
use crate::support::eventually;
use crate::support::ledger::{DEPLOYMENT, OTHER_DEPLOYMENT, build, partition, usage};

/// A process whose answers are compared with its document.
struct Contract {
    process: Process,
    /// With every type closed, so that a field outside the document is found.
    document: Value,
    /// The answers of each operation.
    answers: BTreeSet<(String, String)>,
}

/// Before the first instant of PostgreSQL.
const FAR: &str = "-9000-01-01T00:00:00Z";

fn tokens() -> Vec<Token> {
    Scope::ALL.map(|scope| Token::new(&format!("the-{scope}"), scope, scope.name())).to_vec()
}

impl Contract {
    async fn of(process: Process) -> Contract {
        let (status, mut document) = process.get("/openapi.json").await;
        assert_eq!(document, json!(tallyline::api::api_document()), "docs/reference/api.md");
        assert_eq!((status.as_u16(), &document["openapi"]), (200, &json!("3.1.0")));
        let open: BTreeSet<String> = flattened(&document);
        for (name, schema) in document["components"]["schemas"].as_object_mut().unwrap() {
            if !open.contains(name) {
                close(schema);
            }
        }
        Contract { process, document, answers: BTreeSet::new() }
    }

    /// Sends a request as `scope`, or without a token. Checks that the answer matches the
    /// document's `template`, and returns it.
    async fn ask(
        &mut self,
        method: Method,
        template: &str,
        path: &str,
        scope: Option<Scope>,
        body: Option<Value>,
    ) -> (u16, Value) {
        let mut request =
            Client::new().request(method.clone(), format!("{}{path}", self.process.api));
        if let Some(scope) = scope {
            request = request.bearer_auth(scope.name());
        }
        if let Some(body) = body {
            request = request.json(&body);
        }
        let answer = request.send().await.unwrap();
        let status = answer.status();
        assert_eq!(answer.headers()["content-type"], "application/json", "{path}");
        let body: Value = answer.json().await.unwrap();
        self.hold(&method, template, status, &body);
        (status.as_u16(), body)
    }

    /// Sends a change as admin.
    async fn change(
        &mut self,
        method: Method,
        template: &str,
        path: &str,
        body: Option<Value>,
    ) -> (u16, Value) {
        self.ask(method, template, path, Some(Scope::Admin), body).await
    }

    async fn get(&mut self, path: &str) -> (u16, Value) {
        let template = path.split('?').next().unwrap().to_owned();
        self.ask(Method::GET, &template, path, Some(Scope::Admin), None).await
    }

    fn hold(&mut self, method: &Method, template: &str, status: StatusCode, body: &Value) {
        let operation = format!("{method} {template}");
        let responses =
            &self.document["paths"][template][method.as_str().to_lowercase()]["responses"];
        assert!(responses.is_object(), "{operation} is not in the document");
        let code = if responses[status.as_str()].is_object() { status.as_str() } else { "default" };
        assert!(
            code != "default" || !status.is_success(),
            "{operation}: {status} is not in the document"
        );
        let schema = &responses[code]["content"]["application/json"]["schema"];
        if schema.is_object() {
            let faults = self.faults(schema, body);
            assert!(faults.is_empty(), "{operation} {status}: {faults:?}\n{body}");
        }
        let code = code.to_owned();
        self.answers.insert((operation, code));
    }

    fn faults(&self, schema: &Value, body: &Value) -> Vec<String> {
        let mut whole = schema.clone();
        whole["components"] = self.document["components"].clone();
        let validator = Validator::new(&whole).unwrap();
        validator
            .iter_errors(body)
            .map(|error| format!("{}: {error}", error.instance_path()))
            .collect()
    }
}

/// Types that are flattened into others: these close them.
fn flattened(document: &Value) -> BTreeSet<String> {
    let mut references = BTreeSet::new();
    let mut left = vec![document];
    while let Some(value) = left.pop() {
        match value {
            Value::Object(fields) => {
                let parts = fields.get("allOf").and_then(Value::as_array).into_iter().flatten();
                references.extend(parts.filter_map(|part| {
                    part["$ref"].as_str()?.rsplit('/').next().map(str::to_owned)
                }));
                left.extend(fields.values());
            }
            Value::Array(items) => left.extend(items),
            _ => {}
        }
    }
    references
}

/// Allows only the named fields.
fn close(schema: &mut Value) {
    match schema {
        Value::Object(fields) => {
            if fields.contains_key("allOf") {
                fields.insert("unevaluatedProperties".into(), false.into());
                return;
            }
            if fields.contains_key("properties") && fields.get("type") == Some(&json!("object")) {
                fields.entry("additionalProperties").or_insert(false.into());
            }
            fields.values_mut().for_each(close);
        }
        Value::Array(items) => items.iter_mut().for_each(close),
        _ => {}
    }
}

fn operations(document: &Value) -> Vec<(Method, String, Map<String, Value>)> {
    let paths = document["paths"].as_object().unwrap();
    let of_path = |(path, item): (&String, &Value)| {
        let methods = item.as_object().unwrap().clone();
        let path = path.clone();
        methods.into_iter().map(move |(method, operation)| {
            (
                method.to_uppercase().parse().unwrap(),
                path.clone(),
                operation.as_object().unwrap().clone(),
            )
        })
    };
    paths.iter().flat_map(of_path).collect()
}

/// Replaces the parameters in a path with a name that does not exist.
fn filled(path: &str) -> String {
    path.split('/')
        .map(|segment| if segment.starts_with('{') { "0" } else { segment })
        .collect::<Vec<_>>()
        .join("/")
}

#[tokio::test]
async fn every_path_of_the_document_answers_and_asks_for_the_scope_that_it_names() {
    let site = Site::new().await;
    site.collected(DEPLOYMENT).await;
    let process = site.process_with(|settings, _| settings.tokens = tokens().into()).await;
    let mut contract = Contract::of(process).await;
    for (method, path, operation) in operations(&contract.document) {
        let needs = operation
            .get("security")
            .map(|security| security[0]["token"][0].as_str().unwrap().to_owned());
        let needs =
            needs.map(|name| Scope::ALL.into_iter().find(|scope| scope.name() == name).unwrap());
        let at = filled(&path);
        for scope in [None, Some(Scope::Enforce), Some(Scope::Read), Some(Scope::Admin)] {
            let (status, body) = contract.ask(method.clone(), &path, &at, scope, None).await;
            match (needs, scope) {
                (Some(_), None) => assert_eq!(status, 401, "{method} {path}: {body}"),
                (Some(needs), Some(scope)) if !scope.covers(needs) => {
                    assert_eq!(status, 403, "{method} {path} as {scope}: {body}");
                    assert!(
                        body["message"].as_str().unwrap().contains(&format!("scope {needs}")),
                        "{body}"
                    );
                }
                _ => assert!(
                    ![401, 403, 405].contains(&status),
                    "{method} {path} as {scope:?}: {status} {body}"
                ),
            }
        }
    }
    // and an unknown token
    let wrong = Client::new()
        .get(format!("{}/api/v1/status", contract.process.api))
        .bearer_auth("no token")
        .send()
        .await
        .unwrap();
    assert_eq!(
        (wrong.status().as_u16(), wrong.headers()["www-authenticate"].to_str().unwrap()),
        (401, "Bearer")
    );
    // other methods are refused, and the allowed ones are named
    let refused = Client::new()
        .put(format!("{}/api/v1/status", contract.process.api))
        .bearer_auth("admin")
        .send()
        .await
        .unwrap();
    assert_eq!(
        (refused.status().as_u16(), refused.headers()["allow"].to_str().unwrap()),
        (405, "GET,HEAD")
    );
}

#[tokio::test]
async fn without_tokens_loopback_may_read_and_no_client_may_change() {
    let site = Site::new().await;
    site.collected(DEPLOYMENT).await;
    let mut contract = Contract::of(site.process().await).await;
    for (method, path, operation) in operations(&contract.document) {
        let open = operation
            .get("security")
            .is_none_or(|security| security.as_array().unwrap().contains(&json!({})));
        let (status, body) = contract.ask(method.clone(), &path, &filled(&path), None, None).await;
        assert_ne!(status, 401, "{method} {path}");
        assert_eq!(status == 403, !open, "{method} {path}: {status} {body}");
        assert!(open || body["message"].as_str().unwrap().contains("serve.tokens"), "{body}");
    }
}

#[tokio::test]
async fn answers_match_the_document() {
    let site = Site::new().await;
    let source = site.collected(DEPLOYMENT).await;
    site.record(Topic::WorkspaceBuilds, vec![build(DEPLOYMENT, 1)]).await;
    site.pass(&source, 0).await;
    for subject in ["consume", "publish"] {
        let detail = json!({ "topic": null });
        let act = NewAct {
            actor: "user-001",
            act: ActKind::Pause,
            subject: Subject::Named(subject),
            reason: "maintenance",
            detail,
        };
        site.ledger
            .run(async |conn| rejects::begin_acts(conn, &[act], site.ledger.clock.now()).await)
            .await
            .unwrap();
    }
    let stopped = Arc::new(Mutex::new(BTreeMap::from([(
        partition(Topic::AgentUsage, 0),
        "the log was recreated".to_owned(),
    )])));
    let process = site
        .process_with(|settings, api| {
            settings.tokens = tokens().into();
            api.own.stopped_partitions = Some(Arc::clone(&stopped));
        })
        .await;
    let mut contract = Contract::of(process).await;
    assert_eq!(contract.get("/readyz").await.0, 503);
    stopped.lock().unwrap().clear();
    eventually(SOON, "the process is ready", || async {
        contract.process.get("/readyz").await.0 == 200
    })
    .await;
    for path in [
        "/healthz",
        "/readyz",
        "/openapi.json",
        "/api/v2/entitlements",
        "/api/v1/status",
        "/api/v1/audit-log",
        "/api/v1/pauses",
    ] {
        let (status, body) = contract.get(path).await;
        assert_eq!(status, 200, "{path}: {body}");
    }
    let (status, _) = contract
        .get("/api/v1/managed-agents/count?start=2025-01-01T00:00:00Z&end=2026-01-01T00:00:00Z")
        .await;
    assert_eq!(status, 200);
    for (path, field) in [
        ("/api/v1/managed-agents/count", "start"),
        ("/api/v2/entitlements?source=x", "source"),
        ("/api/v1/audit-log?actr=user-001", "actr"),
        ("/api/v1/audit-log?limit=0", "limit"),
        ("/api/v1/audit-log?reason=x", "reason"),
        ("/api/v1/sources?all=true", "all"),
        ("/api/v1/audit-log?act=burn", "act"),
    ] {
        let (status, body) = contract.get(path).await;
        assert_eq!((status, body["field"].as_str()), (400, Some(field)), "{path}: {body}");
    }
    assert_eq!(
        contract.get(&format!("/api/v2/entitlements?source={OTHER_DEPLOYMENT}")).await.0,
        404
    );
    operators::pauses(&mut contract).await;
    operators::rejects(&mut contract, &site).await;
    operators::explanation_and_audit(&mut contract, &site).await;
    operators::coderd_cut_off(&mut contract, &site).await;
    operators::unaudited(&mut contract).await;
    operators::replay(&mut contract).await;
    operators::rebuild(&mut contract).await;
    operators::prune(&mut contract, &site).await;
    operators::recoveries(&mut contract, &site).await;
    let coderd = Coderd::new(SchemaVersion::TasksEra).await;
    let other = site_of(&coderd).await;
    let mut beside = process_beside(&other, &coderd, true).await;
    operators::correction(&mut beside, true).await;
    contract.answers.append(&mut beside.answers);
    // every additional, missing or wrong field is noticed
    let (_, mut status) = contract.get("/api/v1/status").await;
    let schema = json!({ "$ref": "#/components/schemas/Status" });
    for (change, at) in [
        (json!(1), "/partitions/0/more"),
        (json!("x"), "/partitions/0/partition"),
        (json!(1), "/at"),
        (json!(1), "/more"),
    ] {
        let before = status.clone();
        let (parent, field) = at.rsplit_once('/').unwrap();
        status.pointer_mut(parent).unwrap()[field] = change;
        assert!(!contract.faults(&schema, &status).is_empty(), "{at}");
        status = before;
    }
    status.as_object_mut().unwrap().remove("leases");
    assert!(!contract.faults(&schema, &status).is_empty());
    // each answer in the document was seen
    let named = operations(&contract.document).into_iter().flat_map(|(method, path, operation)| {
        let codes: Vec<String> =
            operation["responses"].as_object().unwrap().keys().cloned().collect();
        let schema = |code: &String| {
            operation["responses"][code]["content"]["application/json"]["schema"].is_object()
        };
        codes
            .into_iter()
            .filter(schema)
            .filter(|code| code != "default")
            .map(move |code| (format!("{method} {path}"), code))
            .collect::<Vec<_>>()
    });
    let unseen: Vec<_> = named.filter(|named| !contract.answers.contains(named)).collect();
    assert!(unseen.is_empty(), "{unseen:?}");
}

#[tokio::test]
async fn a_wrong_change_request_gets_the_reason_and_changes_nothing() {
    let site = Site::new().await;
    let process = site.process_with(|settings, _| settings.tokens = tokens().into()).await;
    let mut contract = Contract::of(process).await;
    let (method, path) = (Method::POST, "/api/v1/pauses");
    for (body, field) in [
        (json!({ "operation": "consume" }), "reason"),
        (json!({ "operation": "consume", "reason": "" }), "reason"),
        (json!({ "operation": "consume", "reason": 1 }), "reason"),
        (json!({ "reason": "x" }), "operation"),
        (json!({ "operation": "burn", "reason": "x" }), "operation"),
        (
            json!({ "operation": "publish", "reason": "x", "topic": "tallyline.agent-usage.v1" }),
            "topic",
        ),
        (
            json!({ "operation": "consume", "reason": "x", "topics": "tallyline.agent-usage.v1" }),
            "topics",
        ),
    ] {
        let (status, problem) =
            contract.change(method.clone(), path, path, Some(body.clone())).await;
        assert_eq!((status, problem["field"].as_str()), (400, Some(field)), "{body}: {problem}");
    }
    for (path, body, field) in [
        ("/api/v1/rebuilds", json!({ "stage": "licenses", "at": FAR }), "at"),
        (
            "/api/v1/rebuilds/execute",
            json!({ "stage": "licenses", "at": FAR, "hash": "00ff" }),
            "at",
        ),
        ("/api/v1/replays", json!({ "from": FAR }), "from"),
        ("/api/v1/replays", json!({ "from": "P99999999D" }), "from"),
        ("/api/v1/replays", json!({ "from": "earliest", "until": FAR }), "until"),
    ] {
        let (status, problem) =
            contract.change(method.clone(), path, path, Some(body.clone())).await;
        assert_eq!(
            (status, problem["field"].as_str()),
            (400, Some(field)),
            "{path} {body}: {problem}"
        );
    }
    let url = format!("{}{path}", contract.process.api);
    let json = ("content-type", "application/json");
    let right = json!({ "operation": "consume", "reason": "x" }).to_string();
    let large = json!({ "operation": "consume", "reason": "x".repeat(1024 * 1024) }).to_string();
    let doubled = right.replace("\"consume\"", "\"consume\", \"operation\": \"consume\"");
    for (query, (name, value), body, status, field) in [
        ("", ("content-type", "text/plain"), right.clone(), 415, None),
        ("", ("accept", "*/*"), right.clone(), 415, None),
        ("", json, "[]".to_owned(), 400, None),
        ("", json, "{".to_owned(), 400, None),
        ("", json, format!("{right}{right}"), 400, None),
        ("", json, doubled, 400, Some("operation")),
        ("?operation=consume", json, right, 400, None),
        ("", json, large, 413, None),
    ] {
        let request = Client::new()
            .post(format!("{url}{query}"))
            .bearer_auth("admin")
            .header(name, value)
            .body(body.clone());
        let answer = request.send().await.unwrap();
        let code = answer.status();
        let problem: Value = answer.json().await.unwrap();
        assert_eq!(
            (code.as_u16(), problem["field"].as_str()),
            (status, field),
            "{query} {value} {}: {problem}",
            &body[..body.len().min(80)]
        );
        contract.hold(&method, path, code, &problem);
    }
    let nothing = json!({ "pauses": [] });
    assert_eq!(contract.get("/api/v1/pauses").await.1, nothing);
    // nor with a smaller scope
    for scope in [None, Some(Scope::Enforce), Some(Scope::Read)] {
        let body = json!({ "operation": "consume", "reason": "x" });
        let (status, _) = contract.ask(method.clone(), path, path, scope, Some(body)).await;
        assert_eq!(status, if scope.is_none() { 401 } else { 403 });
    }
    assert_eq!(contract.get("/api/v1/pauses").await.1, nothing);
}

/// A ledger with two usage events of this coderd: the first is confirmed, and coderd has neither.
async fn site_of(coderd: &Coderd) -> Site {
    let site = Site::new().await;
    site.collected(coderd.deployment).await;
    let identity =
        SourceIdentity { deployment_id: coderd.deployment, organization_id: coderd.organization };
    site.ledger
        .run(async |conn| identity::bind(conn, coderd.deployment, identity).await)
        .await
        .unwrap()
        .unwrap();
    let lost = usage(coderd.deployment, 1);
    let forged = usage(coderd.deployment, 2);
    site.record(Topic::AgentUsage, vec![lost.clone(), forged]).await;
    let source = site
        .ledger
        .run(async |conn| sources::get(conn, coderd.deployment).await)
        .await
        .unwrap()
        .unwrap();
    site.ledger
        .run(async |conn| {
            confirmed::record(
                conn,
                Topic::AgentUsage,
                source.id,
                &[lost.id()],
                site.ledger.clock.now(),
            )
            .await
        })
        .await
        .unwrap();
    site
}

/// A process that knows coderd's database, or does not.
async fn process_beside(site: &Site, coderd: &Coderd, known: bool) -> Contract {
    let url = &coderd.database.url;
    let process = site
        .process_with(|settings, api| {
            settings.tokens = tokens().into();
            api.operations.coderd = known.then(|| coderd::Database::new(url, SOON).unwrap());
            api.operations.deployment = Some(coderd.deployment);
        })
        .await;
    Contract::of(process).await
}

#[tokio::test]
async fn recovery_of_coderd_is_planned_and_executed_where_its_database_is_known() {
    let coderd = Coderd::new(SchemaVersion::TasksEra).await;
    let site = site_of(&coderd).await;
    for known in [false, true] {
        let mut contract = process_beside(&site, &coderd, known).await;
        operators::lost_in_coderd(&mut contract, known).await;
        operators::correction(&mut contract, known).await;
    }
}

#[tokio::test]
async fn the_audit_log_is_paged_and_filtered() {
    let site = Site::new().await;
    for (actor, act, subject) in [
        ("user-001", ActKind::Pause, "consume"),
        ("user-002", ActKind::Pause, "publish"),
        ("user-001", ActKind::Resume, "consume"),
    ] {
        let act = NewAct {
            actor,
            act,
            subject: Subject::Named(subject),
            reason: "because",
            detail: json!({}),
        };
        site.ledger
            .run(async |conn| rejects::begin_acts(conn, &[act], site.ledger.clock.now()).await)
            .await
            .unwrap();
    }
    let process = site.process().await;
    let acts = async |query: &str| {
        let (status, body) = process.get(&format!("/api/v1/audit-log{query}")).await;
        assert_eq!(status, 200, "{body}");
        let acts = body["acts"].as_array().unwrap().iter();
        let acts: Vec<String> = acts
            .map(|act| {
                format!("{} {} {}", act["actor"], act["act"], act["subject"]).replace('"', "")
            })
            .collect();
        (acts, body["next_before"].as_i64())
    };
    let all = ["user-001 resume consume", "user-002 pause publish", "user-001 pause consume"];
    assert_eq!(acts("").await, (all.map(String::from).to_vec(), None));
    let (first, next) = acts("?limit=2").await;
    assert_eq!(first, all[..2]);
    assert_eq!(
        acts(&format!("?limit=2&before={}", next.unwrap())).await,
        (vec![all[2].to_owned()], None)
    );
    assert_eq!(acts("?actor=user-001&act=pause").await.0, all[2..]);
    assert_eq!(acts("?subject=publish").await.0, all[1..2]);
    // the clock is at noon
    assert_eq!(acts("?from=2025-08-01T12:00:00Z").await.0.len(), 3);
    assert_eq!(acts("?to=2025-08-01T12:00:00Z").await.0.len(), 0);
    for field in ["from", "to"] {
        let (status, problem) = process.get(&format!("/api/v1/audit-log?{field}={FAR}")).await;
        assert_eq!((status.as_u16(), problem["field"].as_str()), (400, Some(field)), "{problem}");
    }
    let words = sqlx::query_scalar::<_, String>(
        "select pg_get_constraintdef(oid) from pg_constraint where conname = 'operator_act_is_known'",
    );
    let words = words.fetch_one(&site.ledger.pool).await.unwrap();
    let known: Vec<&str> = words.split('\'').skip(1).step_by(2).collect();
    assert_eq!(known, ActKind::ALL.map(ActKind::as_str));
}

#[tokio::test]
async fn paths_of_earlier_versions_answer_and_no_document_shows_them() {
    let site = Site::new().await;
    let process = site.process().await;
    let (_, document) = process.get("/openapi.json").await;
    let paths = &document["paths"];
    for (old, new) in [
        ("/api/v1/acts", "/api/v1/audit-log"),
        ("/api/v1/events/{event_id}/proof", "/api/v1/events/{event_id}/explain"),
    ] {
        assert!(paths[old].is_null() && paths[new].is_object(), "{old}, {new}");
        let [old, new] = [old, new].map(|path| path.replace("{event_id}", "usage-7"));
        let (was, is) = (process.get(&old).await, process.get(&new).await);
        assert_eq!(was, is, "{old}");
        // an unknown path also answers 404, with other words
        let known = is.0 == 200
            || is.1["message"].as_str().unwrap().starts_with("usage-7 is known nowhere");
        assert!(known, "{is:?}");
    }
}
