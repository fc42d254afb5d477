//! Follows docs/after-an-outage.md. Kafka is down for ten minutes of the given clock. Then the
//! ledger is lost, and an earlier backup replaces it. At the end every number is true.

use chrono::TimeDelta;
use serde_json::{Value as Json, json};
use tallyline::clock::Clock;
use tallyline::event::{Event, Message, Payload, PublishMarks, Topic, Usage, UsageQuantity};
use tallyline::ledger::{passes, snapshots, sources};
use tallyline_sim::coderd::Simulation;
use tallyline_sim::coderd::truth::UsageTruth;

use crate::schedule::Backend;
use crate::servers::Servers;
use crate::settle::SETTLED;
use crate::support::eventually;
use crate::walk::Walk;
use crate::world::{Place, World};

const SEED: u64 = 3;
/// The backup is this much older than the outage.
const HOUR: TimeDelta = TimeDelta::hours(1);
const OUTAGE: TimeDelta = TimeDelta::minutes(10);
const BUILDS_OF_THE_HOUR: usize = 300;
const BUILDS_OF_THE_OUTAGE: usize = 100;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_steps_after_an_outage_restore_every_number() {
    let _turn = crate::TURN.lock().await;
    let mut servers = Servers::start().await;
    let (mut world, mut simulation) =
        World::begin_behind(HOUR + OUTAGE, SEED, Backend::Kafka, &servers).await;
    let (ledger, server) = (world.site.database.url.clone(), servers.postgres.url());
    let role = ledger.split(['/', ':', '@']).nth(3).expect("a role").to_owned();
    let known = [
        ("LEDGER_URL", ledger),
        ("LEDGER_NAME", world.site.database.name.clone()),
        ("LEDGER_ROLE", role),
        ("SERVER_URL", server),
    ];
    let mut walk = Walk::begin(&world.site.pipeline(), known);

    let junk = Message { payload: Some(b"no event".to_vec()), ..Message::default() };
    world.site.log.append(Topic::WorkspaceBuilds, vec![junk]).await.expect("append");
    world.settle(&simulation.truth()).await;
    walk.run("pg_dump").await;
    let delivered = world.tallyman.books().deliveries.len();
    world.say("a backup is taken");

    let bad = an_hour_passes(&mut world, &mut simulation).await;
    kafka_is_away(&mut world, &mut simulation, &mut servers, &mut walk).await;
    let delivered = world.tallyman.books().deliveries.len() - delivered;
    the_ledger_is_restored(&mut world, &mut servers, &mut walk).await;
    world.settle(&simulation.truth()).await;

    walk.run("tallyline replay plan").await;
    walk.run("tallyline replay execute").await;
    rejects_are_corrected(&mut world, &mut walk, &bad).await;
    let truth = simulation.truth();
    world.settle(&truth).await;

    walk.run("tallyline audit").await;
    walk.run("tallyline explain").await;
    walk.end();
    history_is_complete(&world, &bad).await;
    let again = world.every_number_is_true(&truth).await;
    assert!(
        (1..=delivered).contains(&again),
        "{again} delivered again, {delivered} delivered in the lost time"
    );
    assert_eq!(
        count(&world, "select count(*) from usage_event").await,
        i64::try_from(truth.usage.len()).expect("small")
    );
    world.no_series_fell().await;
    world.end_all(&servers).await;
}

/// coderd goes on until `behind` before now.
async fn goes_on(simulation: &mut Simulation, behind: TimeDelta, builds: usize) {
    let until = Clock::system().now() - behind;
    simulation.extend(until, builds);
    simulation.advance_to(until).await.expect("coderd lives");
    simulation.commit_held().await.expect("coderd lives");
}

/// Restarts the processes, as for a new version. A foreign producer appends a usage row first, with
/// an additional field. Returns this row.
async fn an_hour_passes(world: &mut World, simulation: &mut Simulation) -> UsageTruth {
    let before = simulation.truth().usage.len();
    world.end_each().await;
    goes_on(simulation, OUTAGE, BUILDS_OF_THE_HOUR).await;
    let truth = simulation.truth();
    let (old, of_build) =
        (count(world, "select count(*) from usage_event").await, |row: &&UsageTruth| {
            row.build_id.is_some()
        });
    assert_eq!(usize::try_from(old), Ok(before), "all older rows are in the ledger");
    let row = truth
        .usage
        .iter()
        .filter(of_build)
        .max_by_key(|row| row.inserted_at)
        .expect("an agent")
        .clone();
    let quantity = UsageQuantity::ManagedAgents(u64::try_from(row.quantity).expect("a count"));
    let usage = Usage {
        id: row.id.clone(),
        quantity,
        created_at: row.created_at,
        marks: PublishMarks::default(),
    };
    let event = Event { deployment: truth.deployment_id, payload: Payload::Usage(usage) };
    let body = format!("{{\"count\": {}, \"colour\": \"blue\"}}", row.quantity).into_bytes();
    let bad = Message { payload: Some(body), ..event.to_message() };
    world.site.log.append(Topic::AgentUsage, vec![bad]).await.expect("append");
    world.start_each(OUTAGE);
    world.settle(&truth).await;
    assert_eq!(count(world, OPEN_REJECTS).await, 2);
    world.say("an hour has passed");
    row
}

const OPEN_REJECTS: &str = "select count(*) from reject where state = 'open'";

/// Kafka is down for ten minutes. Then the processes restart: only a restart moves their clocks.
/// When Kafka is back, all go on.
async fn kafka_is_away(
    world: &mut World,
    simulation: &mut Simulation,
    servers: &mut Servers,
    walk: &mut Walk,
) {
    servers.kafka.stop().await;
    world.say("Kafka is down");
    let complete_until = complete_until(world).await;
    let accepted = world.site.accepted().await;
    let watch = walk.start("tallyline status");
    goes_on(simulation, TimeDelta::zero(), BUILDS_OF_THE_OUTAGE).await;
    world.end_each().await;
    world.start_each(TimeDelta::zero());
    eventually(SETTLED, "status shows the log as unreachable, and all processes", || async {
        let page = last_page(&watch.process.stdout());
        page.contains("\nthe log: ") && page.matches(" alive ").count() == Place::ALL.len()
    })
    .await;
    let page = last_page(&watch.process.stdout());
    let partitions: Vec<Vec<&str>> = page
        .lines()
        .filter(|line| line.starts_with("tallyline."))
        .map(|line| line.split_whitespace().collect())
        .collect();
    assert!(
        !partitions.is_empty() && partitions.iter().all(|row| row[3] == "-" && row[4] == "-"),
        "{page}"
    );
    assert_eq!(
        (self::complete_until(world).await, world.site.accepted().await),
        (complete_until.clone(), accepted)
    );
    assert!(page.contains(&complete_until), "{complete_until} is not in {page}");

    servers.kafka.start().await;
    world.say("Kafka is back");
    let truth = simulation.truth();
    world.settle(&truth).await;
    eventually(SETTLED, "status shows the log as read to its end", || async {
        let page = last_page(&watch.process.stdout());
        let mut partitions = page.lines().filter(|line| line.starts_with("tallyline.")).peekable();
        !page.contains("\nthe log: ")
            && partitions.peek().is_some()
            && partitions.all(|line| line.split_whitespace().nth(4) == Some("0"))
    })
    .await;
    walk.interrupt(watch).await;
    assert!(self::complete_until(world).await > complete_until);
    assert!(world.site.accepted().await > accepted);
}

/// The last page of a watch.
fn last_page(output: &str) -> String {
    let begin = output.rfind("\n\nledger ").map_or(0, |newline| newline + 2);
    output[begin..].to_owned()
}

/// The completeness in `status`.
async fn complete_until(world: &World) -> String {
    let deployment: uuid::Uuid = sqlx::query_scalar("select deployment_id from source")
        .fetch_one(&world.site.database.pool)
        .await
        .expect("a source");
    let source = world
        .site
        .ledger
        .run(async |conn| sources::get(conn, deployment).await)
        .await
        .expect("an answer")
        .expect("introduced");
    let until = world
        .site
        .ledger
        .run(async |conn| passes::completeness(conn, source.id).await)
        .await
        .expect("an answer")
        .complete_until
        .expect("complete");
    until.to_rfc3339_opts(chrono::SecondsFormat::Millis, true)
}

/// PostgreSQL loses its disk; the backup replaces it.
async fn the_ledger_is_restored(world: &mut World, servers: &mut Servers, walk: &mut Walk) {
    let (accepted, sequence) = (
        world.site.accepted().await,
        world.site.ledger.run(snapshots::head).await.expect("a sequence").number,
    );
    servers.postgres.kill();
    world.end_each().await;
    servers.postgres.start().await;
    for program in ["dropdb", "createdb", "pg_restore"] {
        walk.run(program).await;
    }
    let restored = world.site.ledger.run(snapshots::head).await.expect("a sequence").number;
    let lost = accepted - world.site.accepted().await;
    assert!(
        restored < sequence && lost > 100,
        "{lost} events lost, from sequence {sequence} to {restored}"
    );
    world.say(&format!("restored: {lost} events are lost"));

    let ends = world.site.ends().await;
    let unread: i64 =
        world.behind(&ends).await.iter().map(|(_, position, end)| end - position).sum();
    let plan = walk.run("tallyline recover plan").await;
    let records = plan
        .lines()
        .find_map(|line| line.strip_prefix("records of the log to read"))
        .expect("the page shows it");
    assert_eq!(records.trim().parse(), Ok(unread), "{plan}");
    walk.run("tallyline recover execute").await;
    walk.run("tallyline status").await;
    world.start_each(TimeDelta::zero());
    eventually(SETTLED, "the recovery is over", || async {
        let page = walk.again().await;
        !page.contains("the ledger was restored from a backup") && !page.contains("RECOVERY")
    })
    .await;
    world.say("the recovery is over");
}

async fn rejects_are_corrected(world: &mut World, walk: &mut Walk, bad: &UsageTruth) {
    walk.run("tallyline rejects list").await;
    assert_eq!(
        (walk.value("EVENT_ID"), walk.value("UNITS")),
        (bad.id.as_str(), bad.quantity.to_string().as_str())
    );
    walk.run("tallyline rejects show").await;
    walk.run("echo").await;
    walk.run("tallyline rejects resubmit").await;
    walk.run("tallyline rejects discard").await;
    assert_eq!(count(world, OPEN_REJECTS).await, 0);
}

/// It was refused, resubmitted by an operator with a reason, accepted once, and published in a
/// request that the vendor knows.
async fn history_is_complete(world: &World, bad: &UsageTruth) {
    let answer = world.site.command(&["explain", &bad.id, "--output", "json"]).await;
    let explained: Json =
        serde_json::from_str(&answer.stdout).unwrap_or_else(|error| panic!("{error}: {answer:?}"));
    let [refusal] = explained["refusals"].as_array().expect("refusals").as_slice() else {
        panic!("{explained}")
    };
    let act = &refusal["acts"][0];
    assert_eq!(
        json!([refusal["cause"], refusal["state"], act["act"], act["reason"]]),
        json!(["unknown_field", "resubmitted", "resubmit", "a field too many"])
    );
    let accepted = &explained["accepted"];
    assert_eq!(
        json!([
            explained["source"]["state"],
            accepted["log"]["state"],
            accepted["publication"]["state"]
        ]),
        json!(["same", "same", "published"])
    );
    let [attempt] = accepted["publication"]["attempts"].as_array().expect("attempts").as_slice()
    else {
        panic!("{explained}")
    };
    assert_eq!(
        (&attempt["status"], attempt["request_id"].is_string()),
        (&json!(200), true),
        "{explained}"
    );
    let books = world.tallyman.books();
    assert_eq!(books.deliveries.iter().filter(|delivery| delivery.id == bad.id).count(), 1);
}

async fn count(world: &World, query: &'static str) -> i64 {
    sqlx::query_scalar(query).fetch_one(&world.site.database.pool).await.expect("a count")
}
