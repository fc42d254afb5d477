//! Rebuilds and rehearsals: what differs is said before it is used, and a rehearsal leaves no trace.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use chrono::{DateTime, Utc};
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use serde_json::{Value, json};
use tallyline::event::{Event, Payload, PublishMarks, Topic, Usage, UsageQuantity};
use tallyline::ledger::{Chain, Ledger, LicenseChange, LicenseState, NewAct, Snapshot};
use tallyline::log::{Log, PostgresLogSettings};
use tallyline::operations::{Actor, Desk, OperationError, RebuildExecution, RebuildPlan, RebuildRequest, RebuildStage};
use tallyline::projection::{self, Folded, Projection, ProjectionSettings, View};
use tallyline::sim::coderd::Signer;
use tallyline::stages::{LicensesState, MetricsState, Stage};
use tempfile::TempDir;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::support::ledger::{DEPLOYMENT, OTHER_DEPLOYMENT, arrival, build, ledger, noon, partition};
use crate::support::process::{Ended, run_tallyline};
use crate::support::tables::tables;
use crate::support::{self, Database, eventually};

const SOON: Duration = Duration::from_secs(30);
const AT: &str = "2025-08-01T12:00:00Z";

/// The key pair of the pipeline's licenses.
const SECRET: [u8; 32] = [7; 32];

struct Site {
    ledger: Ledger,
    file: String,
    folder: TempDir,
    _database: Database,
}

impl Site {
    /// A deployment with the licenses and the usage of [`licenses`] and [`agents`].
    async fn new() -> Site {
        let (database, ledger) = ledger().await;
        Log::postgres(ledger.pool.clone(), PostgresLogSettings::default()).create_topics(1).await.unwrap();
        let source = ledger.register_source(DEPLOYMENT, noon(), None).await.unwrap();
        let lease = ledger.take_lease("collector", "test", SOON).await.unwrap().unwrap();
        ledger.record_licenses(&lease, source.id, &licenses()).await.unwrap();
        record(&ledger, &agents()).await;
        let folder = TempDir::new().unwrap();
        let path = folder.path().join("pipeline.toml");
        let pem = Signer::new(SECRET, "k1").unwrap().public().public_key_pem.clone();
        let lines = format!("roles = ['consume']\nledger.url = '{}'\nlicense.public_keys.'k1' = '''{pem}'''\n", database.url);
        std::fs::write(&path, lines).unwrap();
        Site { ledger, file: path.to_str().unwrap().to_owned(), folder, _database: database }
    }

    async fn run(&self, words: &str) -> Ended {
        let words: Vec<&str> = words.split_whitespace().collect();
        run_tallyline(&[&words[..], &["--pipeline", &self.file, "--output", "json"]].concat(), &[]).await
    }

    /// Runs a command that must end so, and touch nothing.
    async fn rehearse(&self, words: &str, exit: i32) -> Ended {
        let before = tables(&self.ledger.pool).await;
        let ended = self.run(words).await;
        assert_eq!(ended.status.code(), Some(exit), "{ended:?}");
        assert!(tables(&self.ledger.pool).await == before, "{words}: the ledger was touched");
        ended
    }

    fn file(&self, name: &str, text: &str) -> String {
        let path = self.folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    }
}

async fn record(ledger: &Ledger, events: &[Event]) {
    let claim = ledger.claim(partition(Topic::AgentUsage, 0), 0).await.unwrap();
    let arrivals: Vec<_> = (claim.next_offset..).zip(events).map(|(offset, event)| arrival(offset, event.clone())).collect();
    let next_offset = claim.next_offset + i64::try_from(events.len()).unwrap();
    ledger.record(&Chain::Live(claim), &arrivals, next_offset).await.unwrap();
}

fn licenses() -> Vec<LicenseChange> {
    let license = |id: u8, feature_set: &str, issued_at: &str, not_before: &str, ends: [&str; 2], features: Value| LicenseChange {
        license_id: id.into(),
        jwt_sha256: [id; 32],
        uploaded_at: None,
        state: LicenseState::Verified(json!({
            "issued_at": issued_at, "not_before": not_before, "license_expires": ends[0], "expires_at": ends[1], "token_id": format!("token-{id}"),
            "account_type": "salesforce", "account_id": "1", "feature_set": feature_set, "features": features
        })),
    };
    let limits = |soft: i64, hard: i64| json!({"managed_agent_limit_soft": soft, "managed_agent_limit_hard": hard});
    let (years, months) = (["2026-07-10T00:00:00Z", "2026-08-10T00:00:00Z"], ["2025-11-01T00:00:00Z", "2025-12-01T00:00:00Z"]);
    vec![
        license(1, "enterprise", "2025-07-05T00:00:00Z", "2025-07-10T09:30:00Z", years, limits(40, 60)),
        license(2, "premium", "2025-07-01T00:00:00Z", "2025-07-01T00:00:00Z", years, json!({"user_limit": 10})),
        license(3, "enterprise", "2025-07-20T00:00:00Z", "2025-07-20T06:00:00Z", months, limits(50, 45)),
    ]
}

/// By hand: license 1's window holds 8 + 1 + 48 = 57, license 3's 48; from 2025-07-01 on there are 7 + 16 + 8 + 1 + 48 = 80.
fn agents() -> Vec<Event> {
    let agents = |id: &str, count: u64, at: &str| {
        let (quantity, created_at) = (UsageQuantity::ManagedAgents(count), at.parse().unwrap());
        Event {
            deployment: DEPLOYMENT,
            payload: Payload::Usage(Usage { id: id.into(), quantity, created_at, marks: PublishMarks::default() }),
        }
    };
    vec![
        agents("before any keys", 7, "2025-07-05T00:00:00Z"),
        agents("just before license 1", 16, "2025-07-10T09:29:59.999999Z"),
        agents("at the start of license 1", 8, "2025-07-10T09:30:00Z"),
        agents("just before license 3", 1, "2025-07-20T05:59:59.999999Z"),
        agents("within all", 48, "2025-07-25T00:00:00Z"),
    ]
}

fn json_of(ended: &Ended) -> Value {
    serde_json::from_str(&ended.stdout).unwrap_or_else(|error| panic!("{error}: {ended:?}"))
}

/// Entitlement, soft limit, limit, managed agents, and how many warnings and errors.
fn row(granted: &Value) -> (String, Option<i64>, Option<i64>, Option<i64>, usize, usize) {
    let length = |name: &str| granted[name].as_array().unwrap_or_else(|| panic!("{granted}")).len();
    let number = |name: &str| granted[name].as_i64();
    let entitlement = granted["entitlement"].as_str().unwrap().to_owned();
    (entitlement, number("soft_limit"), number("limit"), number("agents"), length("warnings"), length("errors"))
}

const ENTITLED: &str = "entitled";

/// The numbers are worked out from coderd's rules of each era: in 2025-07 a soft and a hard limit, the warning from 75 % of the way between them
/// on, the premium default of 800 and 1000 a user, a hard limit below the soft one an error; in 2026-02 the soft key is the one limit, the hard
/// key is ignored, the premium default is 1000, and the warning begins at the limit.
#[tokio::test]
async fn a_rule_rehearsal_shows_the_difference_between_two_rule_sets_and_touches_nothing() {
    let site = Site::new().await;
    let answer = json_of(&site.rehearse(&format!("rebuild plan licenses --rules 2026-02 --at {AT}"), 0).await);
    assert_eq!(answer["differs"], true);
    let rehearsal = &answer["rehearsal"];
    assert_eq!((&rehearsal["rules_now"], &rehearsal["rules_then"]), (&json!("2025-07"), &json!("2026-02")));
    let deployment = &rehearsal["deployments"][0];
    assert_eq!(deployment["deployment"], json!(DEPLOYMENT));

    // now: license 1 wins over the default; 57 of 60, and 40 + 0.75 × 20 = 55 is near; license 3 is an error
    assert_eq!(row(&deployment["now"]), (ENTITLED.into(), Some(40), Some(60), Some(57), 1, 1));
    let warning = |granted: &Value| granted["warnings"][0].as_str().unwrap().to_owned();
    assert!(warning(&deployment["now"]).starts_with("You are approaching the managed agent limit"));
    assert!(deployment["now"]["errors"][0].as_str().unwrap().contains("token-3"), "{deployment}");
    // then: license 3 is good, and issued last; 48 of 50
    assert_eq!(row(&deployment["then"]), (ENTITLED.into(), None, Some(50), Some(48), 0, 0));

    let window = |index: usize, when: &str| row(&deployment["windows"][index][when]);
    assert_eq!(window(0, "now"), (ENTITLED.into(), Some(40), Some(60), Some(57), 1, 0));
    assert_eq!(window(0, "then"), (ENTITLED.into(), None, Some(40), Some(57), 1, 0));
    assert!(warning(&deployment["windows"][0]["then"]).starts_with("You have built more workspaces with managed agents"));
    assert_eq!(window(1, "now"), (ENTITLED.into(), Some(8_000), Some(10_000), Some(80), 0, 0));
    assert_eq!(window(1, "then"), (ENTITLED.into(), None, Some(1_000), Some(80), 0, 0));
    assert_eq!(window(2, "now"), ("not_entitled".into(), None, None, Some(48), 0, 1));
    assert_eq!(window(2, "then"), (ENTITLED.into(), None, Some(50), Some(48), 0, 0));
    let edges = |index: usize| [&deployment["windows"][index]["then"]["start"], &deployment["windows"][index]["then"]["end"]];
    assert_eq!(edges(0), [&json!("2025-07-10T09:30:00Z"), &json!("2026-08-10T00:00:00Z")]);
    assert_eq!(edges(1), [&json!("2025-07-01T00:00:00Z"), &json!("2125-07-01T00:00:00Z")], "the default's own");

    let table = run_tallyline(&["rebuild", "plan", "licenses", "--rules", "2026-02", "--at", AT, "--pipeline", &site.file], &[]).await;
    for words in ["rules 2025-07 and 2026-02, at 2025-08-01T12:00:00Z", "now: warning: You are approaching", "10000", "not_entitled"] {
        assert!(table.stdout.contains(words), "{words:?} is not in {}", table.stdout);
    }
}

#[tokio::test]
async fn rehearsed_rules_are_used_by_their_hash_only_and_with_an_act() {
    let site = Site::new().await;
    let words = format!("licenses --rules 2026-02 --at {AT}");
    let planned = json_of(&site.rehearse(&format!("rebuild plan {words}"), 0).await);
    let hash = planned["hash"].as_str().unwrap();
    let refused = site.rehearse(&format!("rebuild execute {words} --plan 00ff"), 4).await;
    assert!(refused.stderr.contains("no longer the planned one"), "{refused:?}");
    for (words, exit, problem) in [
        ("licenses --rules 2027-01", 2, "no rule set \"2027-01\""),
        ("metrics --rules 2026-02", 2, "metrics have no rules"),
        ("licenses --rules 2026-02 --source 00000000-0000-0000-0000-0000000000ff", 4, "has no deployment"),
        ("licenses --source 00000000-0000-0000-0000-0000000000d1", 2, "source: --source is only for a rehearsal"),
        ("licenses --at 2025-08-01", 2, "at: --at is only for a rehearsal"),
        ("metrics --at 2025-08-01", 2, "at: --at is only for a rehearsal"),
    ] {
        let ended = site.rehearse(&format!("rebuild plan {words}"), exit).await;
        assert!(ended.stderr.contains(problem), "{ended:?}");
    }
    // usage that changes no limit and no warning leaves the plan as it is
    let event = |id: &str, count| {
        let (quantity, created_at) = (UsageQuantity::ManagedAgents(count), "2025-07-26T00:00:00Z".parse().unwrap());
        Event {
            deployment: DEPLOYMENT,
            payload: Payload::Usage(Usage { id: id.into(), quantity, created_at, marks: PublishMarks::default() }),
        }
    };
    record(&site.ledger, &[event("one more", 1)]).await;
    let again = json_of(&site.rehearse(&format!("rebuild plan {words}"), 0).await);
    assert_eq!((again["hash"].as_str().unwrap(), row(&again["rehearsal"]["deployments"][0]["then"]).3), (hash, Some(49)));
    // usage that takes license 3 to its limit changes the effect
    record(&site.ledger, &[event("and one", 1)]).await;
    site.rehearse(&format!("rebuild execute {words} --plan {hash}"), 4).await;

    let planned = json_of(&site.rehearse(&format!("rebuild plan {words}"), 0).await);
    // the command as it was printed, from behind the program's name
    let command: Vec<&str> =
        planned["execute"].as_str().unwrap().split(' ').skip(1).chain(["--as", "sre-1", "--reason", "renewal"]).collect();
    let executed = run_tallyline(&command, &[]).await;
    assert!(executed.status.success() && executed.stdout.contains("2026-02"), "{executed:?}");
    assert_eq!(site.ledger.choice("license.rules").await.unwrap().as_deref(), Some("2026-02"));
    let act: (String, String, String, Value) =
        sqlx::query_as("select actor, subject, reason, detail from operator_act where act = 'rebuild'")
            .fetch_one(&site.ledger.pool)
            .await
            .unwrap();
    assert_eq!((act.0.as_str(), act.1.as_str(), act.2.as_str()), ("sre-1", "license.rules", "renewal"));
    assert_eq!((&act.3["from"], &act.3["to"]), (&json!("2025-07"), &json!("2026-02")));
    // from now on these are the rules that others are compared with, and the way back is the same
    let back = json_of(&site.rehearse(&format!("rebuild plan licenses --rules 2025-07 --at {AT}"), 0).await);
    assert_eq!(row(&back["rehearsal"]["deployments"][0]["now"]), (ENTITLED.into(), None, Some(50), Some(50), 1, 0));
}

/// A token of the key `kid`, signed with that secret.
fn token(kid: &str, secret: [u8; 32], claims: &Value) -> String {
    // before the 32 secret bytes in an Ed25519 key's PKCS #8 form (RFC 8410)
    let head = [0x30, 0x2e, 0x02, 0x01, 0x00, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x04, 0x22, 0x04, 0x20];
    let key = EncodingKey::from_ed_der(&[head.as_slice(), &secret].concat());
    jsonwebtoken::encode(&Header { kid: Some(kid.to_owned()), ..Header::new(Algorithm::EdDSA) }, claims, &key).unwrap()
}

/// From 2025-09-01 on for a year, with limits of 1000 and 2000.
fn candidate(deployment_ids: &Value) -> Value {
    let seconds = |text: &str| text.parse::<DateTime<Utc>>().unwrap().timestamp();
    json!({
        "iss": "test", "jti": "token-9", "iat": seconds("2025-07-25T00:00:00Z"), "nbf": seconds("2025-09-01T00:00:00Z"),
        "license_expires": seconds("2026-09-01T00:00:00Z"), "exp": seconds("2026-10-01T00:00:00Z"), "version": 3, "account_type": "salesforce",
        "account_id": "1", "deployment_ids": deployment_ids, "feature_set": "enterprise",
        "features": {"managed_agent_limit_soft": 1000, "managed_agent_limit_hard": 2000}
    })
}

#[tokio::test]
async fn a_candidate_license_is_rehearsed_before_it_is_installed() {
    let site = Site::new().await;
    let file = site.file("new.jwt", &(token("k1", SECRET, &candidate(&json!([DEPLOYMENT]))) + "\n"));
    let answer = json_of(&site.rehearse(&format!("rebuild plan licenses --license {file} --at {AT}"), 0).await);
    assert_eq!((&answer["hash"], &answer["execute"], &answer["rehearsal"]["notes"]), (&Value::Null, &Value::Null, &json!([])));
    let deployment = &answer["rehearsal"]["deployments"][0];
    assert_eq!(deployment["now"], deployment["then"], "it begins later");
    let window = &deployment["windows"][3];
    assert_eq!((&window["license_id"], &window["candidate"], &window["validity"]), (&json!(4), &json!(true), &json!("not_yet_valid")));
    assert_eq!((&window["now"], row(&window["then"])), (&Value::Null, (ENTITLED.into(), Some(1_000), Some(2_000), Some(0), 0, 0)));

    let later = json_of(&site.rehearse(&format!("rebuild plan licenses --license {file} --without 3 --at 2025-09-01T00:00:00Z"), 0).await);
    let deployment = &later["rehearsal"]["deployments"][0];
    // license 1 as before beside the refused 3; then the one that was issued last, with nothing used in its window yet
    assert_eq!(row(&deployment["now"]), (ENTITLED.into(), Some(40), Some(60), Some(57), 1, 1));
    assert_eq!(row(&deployment["then"]), (ENTITLED.into(), Some(1_000), Some(2_000), Some(0), 0, 0));
    assert_eq!((&deployment["windows"][2]["then"], &deployment["windows"][3]["validity"]), (&Value::Null, &json!("valid")));

    let foreign = site.file("foreign.jwt", &token("k1", SECRET, &candidate(&json!([OTHER_DEPLOYMENT]))));
    let answer = json_of(&site.rehearse(&format!("rebuild plan licenses --license {foreign}"), 0).await);
    assert!(answer["rehearsal"]["notes"][0].as_str().unwrap().contains("coderd will refuse it"), "{answer}");
    let table = run_tallyline(&["rebuild", "plan", "licenses", "--license", &file, "--pipeline", &site.file], &[]).await;
    assert!(table.stdout.contains("4 (candidate)") && table.stdout.contains("nothing to execute"), "{table:?}");
}

#[tokio::test]
async fn a_candidate_that_is_no_good_is_refused_with_the_reason_and_never_shown() {
    let site = Site::new().await;
    let good = candidate(&json!([]));
    let mut old = good.clone();
    old["version"] = json!(2);
    for (name, text, problem) in [
        ("tampered", token("k1", [8; 32], &good), "the signature does not match the key \"k1\""),
        ("unknown", token("k2", SECRET, &good), "names the key \"k2\", which is not configured"),
        ("version", token("k1", SECRET, &old), "claim version is 2"),
        ("text", "no token".to_owned(), "not three parts"),
    ] {
        let file = site.file(name, &text);
        let ended = site.rehearse(&format!("rebuild plan licenses --license {file}"), 2).await;
        assert!(ended.stderr.contains(problem) && !ended.stderr.contains(&text), "{name}: {ended:?}");
    }
    let missing = site.rehearse("rebuild plan licenses --license no/such/file", 2).await;
    assert!(missing.stderr.contains("no/such/file"), "{missing:?}");
    let unknown = site.rehearse("rebuild plan licenses --without 9", 2).await;
    assert!(unknown.stderr.contains("no license with id 9"), "{unknown:?}");
}

/// A fold that runs as in a serving process.
struct Running<S> {
    view: View<S>,
    stop: CancellationToken,
    task: JoinHandle<()>,
}

impl<S: Stage> Running<S> {
    fn start(ledger: &Ledger) -> Self {
        let settings = ProjectionSettings { poll: Duration::from_millis(50), snapshot: Duration::from_secs(3600), last_snapshot: SOON };
        let projection = Projection::<S>::new(ledger.clone(), settings);
        let (view, stop) = (projection.view(), CancellationToken::new());
        let heard = stop.clone();
        Running { view, stop, task: tokio::spawn(async move { projection.run(&heard).await.unwrap() }) }
    }

    /// Waits until all that the ledger has now is folded.
    async fn caught_up(&self, ledger: &Ledger) {
        let end = ledger.last_sequence().await.unwrap();
        eventually(SOON, "all is folded", || async { self.view.caught_up_to() >= end }).await;
    }

    fn bytes(&self) -> Vec<u8> {
        self.view.with(|state, _| serde_json::to_vec(state).unwrap()).unwrap()
    }

    /// Ends in order, so that a snapshot is kept.
    async fn end(self) {
        self.stop.cancel();
        self.task.await.unwrap();
    }
}

async fn builds(ledger: &Ledger, numbers: std::ops::Range<u32>) {
    let claim = ledger.claim(partition(Topic::WorkspaceBuilds, 0), 0).await.unwrap();
    let arrivals: Vec<_> = (claim.next_offset..).zip(numbers).map(|(offset, n)| arrival(offset, build(DEPLOYMENT, n))).collect();
    let next_offset = claim.next_offset + i64::try_from(arrivals.len()).unwrap();
    ledger.record(&Chain::Live(claim), &arrivals, next_offset).await.unwrap();
}

/// Puts another number of creations into the first series of the newest snapshot.
async fn tamper(ledger: &Ledger, change: impl Fn(u64) -> u64) -> (u64, u64) {
    let found = ledger.load_snapshot(MetricsState::NAME, MetricsState::RULES_VERSION, i64::MAX).await.unwrap().expect("a snapshot");
    let mut state: Value = serde_json::from_slice(&found.state).unwrap();
    let value = &mut state["deployments"][DEPLOYMENT.to_string()]["creations"][0][1]["value"];
    let (before, after) = (value.as_u64().unwrap(), change(value.as_u64().unwrap()));
    *value = json!(after);
    sqlx::query("update snapshot set state = $1 where stage = 'metrics'")
        .bind(serde_json::to_vec(&state).unwrap())
        .execute(&ledger.pool)
        .await
        .unwrap();
    (before, after)
}

fn desk(ledger: &Ledger) -> Desk {
    support::ledger::desk(ledger, &Log::postgres(ledger.pool.clone(), PostgresLogSettings::default()))
}

fn plain(stage: RebuildStage) -> RebuildRequest {
    RebuildRequest { stage, rules: None, license: None, without: Vec::new(), source: None, at: None }
}

async fn execute(ledger: &Ledger, plan: &RebuildPlan, may_fall: bool) -> Result<String, OperationError> {
    let hash = plan.hash.clone().unwrap();
    let request = RebuildExecution { rebuild: plain(RebuildStage::Metrics), hash, may_fall };
    let actor = Actor { name: "sre-1".into(), reason: "the snapshot was changed by hand".into() };
    desk(ledger).execute_rebuild(&request, &actor, |_, _| {}).await.map(|rebuilt| rebuilt.done)
}

/// A ledger whose newest snapshot of the metrics is wrong, and a process that began from it. Answers the true and the shown number.
async fn wrong(change: impl Fn(u64) -> u64) -> (Database, Ledger, Running<MetricsState>, (u64, u64)) {
    let (database, ledger) = ledger().await;
    builds(&ledger, 0..200).await;
    let first = Running::<MetricsState>::start(&ledger);
    first.caught_up(&ledger).await;
    first.end().await;
    let numbers = tamper(&ledger, change).await;
    let running = Running::start(&ledger);
    builds(&ledger, 200..210).await;
    running.caught_up(&ledger).await;
    (database, ledger, running, numbers)
}

#[tokio::test]
async fn a_rebuild_says_what_is_shown_wrongly_and_puts_it_right_in_running_processes_and_in_later_ones() {
    let (_database, ledger, running, (truth, shown)) = wrong(|value| value - 1).await;
    let stale = ledger.load_snapshot(MetricsState::NAME, MetricsState::RULES_VERSION, i64::MAX).await.unwrap().unwrap();
    let before = tables(&ledger.pool).await;
    let plan = desk(&ledger).plan_rebuild(&plain(RebuildStage::Metrics), |_, _| {}).await.unwrap();
    assert!(tables(&ledger.pool).await == before, "a plan writes nothing");
    let numbers: Vec<_> =
        plan.differences.iter().map(|one| (one.what.as_str(), one.rebuilt.unwrap().count - one.shown.unwrap().count)).collect();
    assert_eq!((plan.differs, plan.falling, numbers), (true, 0, vec![("coderd_workspace_creation_total", truth - shown)]));
    // events that come in meanwhile raise both sides: it is the same effect
    builds(&ledger, 210..230).await;
    assert_eq!(desk(&ledger).plan_rebuild(&plain(RebuildStage::Metrics), |_, _| {}).await.unwrap().hash, plan.hash);

    execute(&ledger, &plan, false).await.unwrap();
    builds(&ledger, 230..240).await;
    running.caught_up(&ledger).await;
    let from_zero = async || serde_json::to_vec(&projection::fold_to::<MetricsState>(&ledger, i64::MAX).await.unwrap().state).unwrap();
    assert!(running.bytes() == from_zero().await, "a process that ran on");
    // one that hangs saves what it had: whoever begins there comes to the act and begins again
    ledger.save_snapshot(MetricsState::NAME, MetricsState::RULES_VERSION, &stale).await.unwrap();
    let restarted = Running::<MetricsState>::start(&ledger);
    restarted.caught_up(&ledger).await;
    assert!(restarted.bytes() == from_zero().await, "a process that began from a stale snapshot");
    restarted.end().await;
    let again = desk(&ledger).plan_rebuild(&plain(RebuildStage::Metrics), |_, _| {}).await.unwrap();
    assert_eq!((again.differs, again.differences), (false, vec![]));
    assert!(matches!(execute(&ledger, &plan, false).await, Err(OperationError::Forbidden(_))), "the effect is another now");
    running.end().await;
}

#[tokio::test]
async fn no_shown_series_falls_unless_it_is_allowed() {
    let (_database, ledger, running, (truth, shown)) = wrong(|value| value + 5).await;
    let plan = desk(&ledger).plan_rebuild(&plain(RebuildStage::Metrics), |_, _| {}).await.unwrap();
    assert_eq!((plan.differs, plan.falling, plan.differences.len()), (true, 1, 1));
    assert_eq!(shown - truth, 5);
    let before = tables(&ledger.pool).await;
    let refused = execute(&ledger, &plan, false).await.unwrap_err();
    assert!(matches!(&refused, OperationError::Forbidden(message) if message.contains("1 shown series would fall")), "{refused:?}");
    assert!(tables(&ledger.pool).await == before);
    execute(&ledger, &plan, true).await.unwrap();
    running.caught_up(&ledger).await;
    let from_zero: Folded<MetricsState> = projection::fold_to(&ledger, i64::MAX).await.unwrap();
    assert!(running.bytes() == serde_json::to_vec(&from_zero.state).unwrap());
    running.end().await;
}

#[tokio::test]
async fn a_rebuilt_state_comes_in_one_step_and_no_reader_sees_less_before() {
    let (_database, ledger, running, _) = wrong(|value| value - 1).await;
    let (view, seen, looks) = (running.view.clone(), CancellationToken::new(), Arc::new(AtomicU32::new(0)));
    let watching = tokio::spawn({
        let (seen, looks) = (seen.clone(), looks.clone());
        async move {
            let mut last = (0, 0);
            let mut changes = view.watch();
            while seen.run_until_cancelled(changes.changed()).await.is_some_and(|changed| changed.is_ok()) {
                let now = view.with(|state, standing| {
                    let sum = state.deployment(DEPLOYMENT).map_or(0, |one| one.creations().iter().map(|(_, counter)| counter.value).sum());
                    assert!(standing.as_of.is_some(), "it is as fresh as before");
                    (standing.sequence, sum)
                });
                let now: (i64, u64) = now.expect("there is always a state");
                assert!(now.0 >= last.0 && now.1 >= last.1, "from {last:?} to {now:?}");
                last = now;
                looks.fetch_add(1, Ordering::SeqCst);
            }
        }
    });
    for n in 0..5 {
        let act = NewAct { actor: "sre-1", act: "rebuild", subject: MetricsState::NAME, reason: "", detail: json!({}) };
        ledger.rebuild(MetricsState::NAME, &act).await.unwrap();
        let before = looks.load(Ordering::SeqCst);
        builds(&ledger, 300 + n * 10..310 + n * 10).await;
        running.caught_up(&ledger).await;
        eventually(SOON, "the reader has looked", || async { looks.load(Ordering::SeqCst) > before }).await;
    }
    seen.cancel();
    watching.await.unwrap();
    running.end().await;
}

#[tokio::test]
async fn the_command_ends_with_one_where_what_is_shown_differs() {
    let site = Site::new().await;
    let licenses = Running::<LicensesState>::start(&site.ledger);
    licenses.caught_up(&site.ledger).await;
    licenses.end().await;
    for stage in ["metrics", "licenses"] {
        let answer = json_of(&site.rehearse(&format!("rebuild plan {stage}"), 0).await);
        assert_eq!((&answer["differs"], answer["hash"].is_string()), (&json!(false), true));
    }
    // 48 at 2025-07-25 become 50
    let snapshot =
        "update snapshot set state = convert_to(replace(convert_from(state, 'UTF8'), ',48]', ',50]'), 'UTF8') where stage = 'licenses'";
    assert_eq!(sqlx::query(snapshot).execute(&site.ledger.pool).await.unwrap().rows_affected(), 1);
    let answer = json_of(&site.rehearse("rebuild plan licenses", 1).await);
    let differences: Vec<_> = answer["differences"].as_array().unwrap().iter().map(|one| one["what"].as_str().unwrap()).collect();
    assert_eq!(differences, ["license 1", "license 2", "license 3", "managed agents"], "{answer}");
    let first = &answer["differences"][0];
    assert_eq!((&first["shown"]["count"], &first["rebuilt"]["count"]), (&json!(59), &json!(57)));
    let table = run_tallyline(&["rebuild", "plan", "licenses", "--pipeline", &site.file], &[]).await;
    assert!(table.status.code() == Some(1) && table.stdout.contains("NOT what the ledger says"), "{table:?}");
    assert!(table.stderr.contains(&format!("folding: {0} of {0} batches", answer["sequence"])), "{table:?}");
    let hash = answer["hash"].as_str().unwrap();
    assert!(site.run(&format!("rebuild execute licenses --plan {hash}")).await.status.success());
    site.rehearse("rebuild plan licenses", 0).await;
}

#[tokio::test]
async fn a_snapshot_that_is_only_older_is_no_difference() {
    let (_database, ledger) = ledger().await;
    builds(&ledger, 0..100).await;
    let folded: Folded<MetricsState> = projection::fold_to(&ledger, i64::MAX).await.unwrap();
    let state = serde_json::to_vec(&folded.state).unwrap();
    let snapshot = Snapshot { incarnation: folded.incarnation, sequence: folded.sequence, state };
    ledger.save_snapshot(MetricsState::NAME, MetricsState::RULES_VERSION, &snapshot).await.unwrap();
    builds(&ledger, 100..200).await;
    let plan = desk(&ledger).plan_rebuild(&plain(RebuildStage::Metrics), |_, _| {}).await.unwrap();
    assert_eq!((plan.differs, plan.sequence), (false, folded.sequence + 1));
}
