//! Corrections of usage in each state of its publication.

use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use tallyline::event::UsageQuantity;
use tallyline::ledger::{
    ActKind, Attempt, AttemptVerdict, Correction, NewAct, NewCorrection, NewRequest,
    PublicationState, RequestOutcome, Subject, books, corrections, publication_requests,
    publications,
};
use tallyline::operations::{
    Corrected, CorrectionExecution, CorrectionPlan, CorrectionRequest, OperationError, Operations,
    VendorNote,
};
use tallyline_sim::tallyman::{Behaviour, CutMoment, Cuts, EventRule, Switches};
use uuid::Uuid;

use super::operator;
use crate::publisher::world::{DEPLOYMENT, World, start_time, usage};
use crate::support::ledger::{act, ask};

/// Events that the ledger accepts as true ones.
async fn accepted(world: &World, ids: &[&str]) {
    let usages: Vec<_> = ids.iter().map(|id| usage(id, start_time())).collect();
    world.add(&usages).await;
}

/// coderd has never had these events.
async fn never_there(world: &World, ids: &[&str]) {
    for id in ids {
        sqlx::query("delete from usage_events where id = $1")
            .bind(id)
            .execute(&world.coderd)
            .await
            .unwrap();
    }
}

/// coderd has this quantity instead.
async fn has(world: &World, id: &str, quantity: u64) {
    sqlx::query("update usage_events set event_data = jsonb_build_object('count', $2::bigint) where id = $1")
        .bind(id)
        .bind(i64::try_from(quantity).unwrap())
        .execute(&world.coderd)
        .await
        .unwrap();
}

async fn operations(world: &World) -> Operations {
    world.operations(&world.log().await)
}

fn request(ids: &[&str]) -> CorrectionRequest {
    CorrectionRequest {
        event_ids: ids.iter().map(|id| (*id).to_owned()).collect(),
        source: None,
        allow_confirmed: false,
    }
}

async fn plan(world: &World, ids: &[&str]) -> CorrectionPlan {
    ask(&operations(world).await, &request(ids)).await.unwrap()
}

async fn execute(
    world: &World,
    ids: &[&str],
    plan: &CorrectionPlan,
) -> Result<Corrected, OperationError> {
    let execution = CorrectionExecution { correction: request(ids), hash: plan.hash.clone() };
    act(&operations(world).await, &execution, &operator()).await
}

async fn correct(world: &World, ids: &[&str]) -> CorrectionPlan {
    let plan = plan(world, ids).await;
    execute(world, ids, &plan).await.unwrap().plan.unwrap()
}

/// As accepted, coderd's row equal, and published.
async fn published(world: &World, ids: &[&str]) {
    accepted(world, ids).await;
    assert_eq!(world.cycle().await.accepted, ids.len());
}

/// The quantity that the vendor bills, according to the ledger.
async fn billed(world: &World, id: &str) -> String {
    let ids = [id.to_owned()];
    let billed =
        world.ledger.run(async |conn| corrections::billed(conn, world.source.id, &ids).await);
    billed.await.unwrap()[id].1.clone()
}

/// Writes a request of the leased event down.
async fn begin(world: &World, id: Uuid, event_id: &str) {
    let request = NewRequest {
        id,
        source_id: world.source.id,
        license_sha256: [1; 32],
        event_ids: vec![event_id],
        holder: "a publisher",
        lease: Duration::from_secs(60),
    };
    let begun = world
        .ledger
        .run(async |conn| publication_requests::begin(conn, &request, world.clock.now()).await);
    begun.await.unwrap();
}

/// The vendor's answer to the request arrives.
async fn answer(world: &World, id: Uuid, event_id: &str, verdict: AttemptVerdict) {
    let attempt = Attempt {
        event_id: event_id.to_owned(),
        verdict,
        message: None,
        next_attempt_at: start_time(),
        unanswered: false,
        held_for: None,
    };
    let outcome = RequestOutcome {
        id,
        source_id: world.source.id,
        holder: "a publisher",
        answered_at: Some(start_time()),
        status: Some(200),
        error: None,
        attempts: vec![attempt],
        lease: None,
    };
    let recorded = world.ledger.run(async |conn| {
        publication_requests::record_outcome(conn, &outcome, world.clock.now()).await
    });
    recorded.await.unwrap();
}

async fn lease(world: &World, holder: &str) {
    let (length, now) = (Duration::from_secs(60), world.clock.now());
    let leased = world.ledger.run(async |conn| {
        publications::lease(
            conn,
            world.source.id,
            holder,
            DateTime::<Utc>::UNIX_EPOCH,
            10,
            length,
            now,
        )
        .await
    });
    assert_eq!(leased.await.unwrap().len(), 1);
}

#[tokio::test]
async fn a_queued_event_is_withdrawn_or_sent_with_the_corrected_content() {
    let world = World::new().await;
    accepted(&world, &["gone", "other"]).await;
    never_there(&world, &["gone"]).await;
    has(&world, "other", 30).await;
    let cycle = world.cycle().await;
    assert_eq!((cycle.accepted, cycle.held_back), (0, 2), "both are held until then");

    let plan = correct(&world, &["gone", "other"]).await;
    assert_eq!(plan.vendor, []);
    assert_eq!(world.states(&["gone", "other"]).await, ["withdrawn", "pending"]);
    assert_eq!(world.held_for("other").await, None);
    assert_eq!(world.cycle().await.accepted, 1, "it is due at once");
    assert_eq!(world.states(&["gone", "other"]).await, ["withdrawn", "published"]);
    assert_eq!((world.times_billed("gone"), world.delivered()), (0, vec!["other".to_owned()]));
    assert_eq!(billed(&world, "other").await, "30");
    world.pass(TimeDelta::days(40));
    world.cycle().await;
    assert_eq!(world.state("gone").await.0, "withdrawn", "it does not expire");
}

#[tokio::test]
async fn a_published_event_stays_published_and_is_listed_for_the_vendor() {
    let world = World::new().await;
    published(&world, &["gone", "other", "true"]).await;
    never_there(&world, &["gone"]).await;
    has(&world, "other", 30).await;
    let plan = correct(&world, &["gone", "other"]).await;
    let note = |id: &str, truth: Option<&str>| VendorNote {
        event_id: id.into(),
        state: PublicationState::Published,
        billed: true,
        event_type: "dc_managed_agents_v1".into(),
        quantity_billed: "1".into(),
        true_event_type: truth.map(|_| "dc_managed_agents_v1".into()),
        quantity_true: truth.map(str::to_owned),
    };
    assert_eq!(plan.vendor, [note("gone", None), note("other", Some("30"))]);
    assert_eq!(world.states(&["gone", "other"]).await, ["published", "published"]);
    world.cycle().await;
    assert_eq!(["gone", "other"].map(|id| world.times_billed(id)), [1, 1]);

    // a second correction still lists what was billed
    has(&world, "other", 31).await;
    let again = CorrectionRequest { allow_confirmed: true, ..request(&["other"]) };
    let again = ask(&operations(&world).await, &again).await.unwrap();
    assert_eq!(again.vendor, [note("other", Some("31"))]);
}

#[tokio::test]
async fn an_event_that_the_vendor_may_have_is_not_called_withdrawn() {
    let world = World::with(Switches {
        cuts: Cuts { moment: CutMoment::AfterAccepting, next: 1, ..Cuts::default() },
        ..Switches::default()
    })
    .await;
    accepted(&world, &["gone"]).await;
    assert!(world.cycle().await.failure.is_some());
    world.end_leases().await;
    never_there(&world, &["gone"]).await;
    let plan = correct(&world, &["gone"]).await;
    assert_eq!(
        plan.vendor.iter().map(|note| (note.billed, note.state)).collect::<Vec<_>>(),
        [(false, PublicationState::Pending)]
    );
    assert_eq!(world.state("gone").await.0, "unknown");
}

#[tokio::test]
async fn an_event_in_flight_is_settled_first() {
    let world = World::new().await;
    accepted(&world, &["gone"]).await;
    never_there(&world, &["gone"]).await;
    let plan = plan(&world, &["gone"]).await;
    lease(&world, "a publisher").await;
    let one = NewCorrection {
        event_id: "gone".into(),
        topic: tallyline::event::Topic::AgentUsage,
        build_id: None,
        accepted_batch_id: 1,
        before: Some(tallyline::event::Event {
            deployment: DEPLOYMENT,
            payload: tallyline::event::Payload::Usage(usage("gone", start_time())),
        }),
        after: None,
        publication: None,
    };
    let new = NewAct {
        actor: "sre-1",
        act: ActKind::Correct,
        subject: Subject::Named("a plan"),
        reason: "a test",
        detail: serde_json::json!({}),
    };
    let recorded = world.ledger.run(async |conn| {
        corrections::record(
            conn,
            world.source.id,
            std::slice::from_ref(&one),
            &new,
            world.clock.now(),
        )
        .await
    });
    assert_eq!(recorded.await.unwrap(), Correction::InFlight("gone".into()));

    let request = Uuid::from_u128(1);
    begin(&world, request, "gone").await;
    let mut executed = std::pin::pin!(execute(&world, &["gone"], &plan));
    let early = tokio::time::timeout(Duration::from_secs(1), &mut executed).await;
    assert!(early.is_err(), "it waits for the answer: {early:?}");
    answer(&world, request, "gone", AttemptVerdict::RefusedForNow).await;
    assert_eq!(executed.await.unwrap().plan.as_ref(), Some(&plan));
    assert_eq!(world.state("gone").await.0, "withdrawn");
}

#[tokio::test]
async fn a_late_answer_is_about_the_content_that_was_sent() {
    let world = World::new().await;
    accepted(&world, &["late", "unanswered"]).await;
    for (number, id) in [(1, "late"), (2, "unanswered")] {
        let (length, now) = (Duration::from_secs(60), world.clock.now());
        let leased = world.ledger.run(async |conn| {
            let (after, source_id) = (DateTime::<Utc>::UNIX_EPOCH, world.source.id);
            publications::lease(conn, source_id, "a publisher", after, 1, length, now).await
        });
        assert_eq!(leased.await.unwrap()[0].event_id, id);
        begin(&world, Uuid::from_u128(number), id).await;
        has(&world, id, 30).await;
    }
    world.end_leases().await;
    correct(&world, &["late", "unanswered"]).await;
    assert_eq!(world.states(&["late", "unanswered"]).await, ["pending"; 2]);

    answer(&world, Uuid::from_u128(1), "late", AttemptVerdict::Accepted).await;
    assert_eq!(billed(&world, "late").await, "1", "the request had this quantity");
    // the vendor does not tell a duplicate from a new event
    assert_eq!(world.cycle().await.accepted, 1);
    assert_eq!(world.states(&["late", "unanswered"]).await, ["published"; 2]);
    assert_eq!(billed(&world, "unanswered").await, "1", "the first request may have arrived");
}

#[tokio::test]
async fn a_refused_event_that_coderd_has_with_other_content_is_sent_again() {
    let rule = EventRule {
        behaviour: Behaviour::RefuseForEver,
        ids: vec!["false".into(), "gone".into()],
        fraction: 0.0,
        until: None,
        times: Some(1),
    };
    let world = World::with(Switches { events: vec![rule], ..Switches::default() }).await;
    accepted(&world, &["false", "gone"]).await;
    assert_eq!(world.cycle().await.refused, 2);
    has(&world, "false", 30).await;
    never_there(&world, &["gone"]).await;
    let plan = correct(&world, &["false", "gone"]).await;
    assert_eq!(plan.vendor, []);
    assert_eq!(world.states(&["false", "gone"]).await, ["pending", "refused"]);
    let differences = async || world.ledger.run(books::add_up).await.unwrap().differences;
    assert_eq!(differences().await, []);
    assert_eq!(world.cycle().await.accepted, 1);
    assert_eq!(world.states(&["false", "gone"]).await, ["published", "refused"]);
    assert_eq!((billed(&world, "false").await.as_str(), world.times_billed("false")), ("30", 1));
    assert_eq!(differences().await, []);
}

#[tokio::test]
async fn an_expired_event_that_coderd_dates_later_returns_to_the_queue() {
    let world = World::new().await;
    let mut old = usage("late", start_time() - TimeDelta::days(40));
    old.quantity = UsageQuantity::ManagedAgents(9);
    world.add(&[old]).await;
    world.cycle().await;
    assert_eq!(world.state("late").await.0, "expired");
    sqlx::query("update usage_events set created_at = $1")
        .bind(start_time())
        .execute(&world.coderd)
        .await
        .unwrap();
    correct(&world, &["late"]).await;
    assert_eq!(world.cycle().await.accepted, 1);
    assert_eq!(world.state("late").await.0, "published");
}
