//! Without audits, nothing is published: a difference would hold nothing.

use chrono::TimeDelta;
use sqlx::PgPool;
use tallyline::ledger::{HoldScope, holds, late_audits};
use tallyline::operations::{Actor, OperationError, RetireSource, UnauditedPublishing};
use tallyline::publisher::Condition;
use tallyline::status;

use super::books::{Audited, DEADLINE, SOURCE};
use super::world::{DEPLOYMENT, World, start_time, usage};
use crate::support::eventually;
use crate::support::ledger::act;

/// Lets the time until which audits allow publishing pass.
async fn time_passes(world: &World) {
    sqlx::query("update audit_finding set good_until = clock_timestamp()")
        .execute(&world.ledger.pool)
        .await
        .unwrap();
}

async fn late(world: &World) -> Vec<(String, bool)> {
    let late = world.ledger.run(late_audits::list).await.unwrap();
    late.into_iter().map(|late| (late.joint, late.overridden.is_some())).collect()
}

async fn run(pool: &PgPool, statement: &'static str) {
    sqlx::raw_sql(statement).execute(pool).await.unwrap();
}

fn actor() -> Actor {
    Actor { name: "sre-1".to_owned(), reason: "a test".to_owned() }
}

#[tokio::test]
async fn an_impossible_audit_of_a_source_holds_its_usage_until_it_succeeds() {
    let site = Audited::new().await;
    let world = &site.world;
    let mut publisher = world.publisher();
    site.add(usage("a", start_time())).await;
    assert_eq!(publisher.cycle(&world.stop).await.unwrap().accepted, 1);

    // the audit's query fails, the publisher's do not
    run(&world.coderd, "alter table workspace_builds rename to away").await;
    site.add(usage("b", start_time())).await;
    let fails = || async {
        time_passes(world).await;
        late(world).await.contains(&(SOURCE.to_owned(), false))
    };
    eventually(DEADLINE, "the source's audit is late", fails).await;
    let cycle = publisher.cycle(&world.stop).await.unwrap();
    let condition = publisher.condition().get();
    assert!(cycle.requests == 0 && matches!(condition, Condition::Held(_)), "{condition}");
    assert!(condition.to_string().contains("is late"), "{condition}");
    let shown = status::read(&world.ledger, &site.log, DEADLINE).await.unwrap();
    assert!(
        shown.late_audits.iter().any(|late| late.deployment_id == Some(DEPLOYMENT))
            && shown.holds.iter().any(|hold| hold.scope == HoldScope::Source),
        "{shown:?}"
    );
    let text = site.command(&["status"]).await.stdout;
    assert!(text.contains("AUDITS ARE LATE") && text.contains("--unaudited"), "{text}");
    eventually(DEADLINE, "each process shows it", || async {
        time_passes(world).await;
        ["tallyline_audit_late", "tallyline_audit_holds_publishing"]
            .iter()
            .all(|name| site.gauge(0, name, "source_and_ledger", Some(DEPLOYMENT)) == Some(1.0))
    })
    .await;

    run(&world.coderd, "alter table away rename to workspace_builds").await;
    eventually(DEADLINE, "no audit is late", || async { late(world).await.is_empty() }).await;
    assert_eq!(publisher.cycle(&world.stop).await.unwrap().accepted, 1);
    eventually(DEADLINE, "each process shows it", || async {
        site.gauge(0, "tallyline_audit_late", "source_and_ledger", Some(DEPLOYMENT)) == Some(0.0)
    })
    .await;
}

#[tokio::test]
async fn an_operator_publishes_without_a_late_audit_until_its_joint_is_audited() {
    let world = World::new().await;
    let (log, mut publisher) = (world.log().await, world.publisher());
    let operations = world.operations(&log);
    world.add(&[usage("a", start_time())]).await;
    let of_source = UnauditedPublishing { deployment_id: Some(DEPLOYMENT) };
    let of_ledger = UnauditedPublishing { deployment_id: None };
    let refused = act(&operations, &of_source, &actor()).await.unwrap_err();
    assert!(matches!(refused, OperationError::NotFound(_)), "{refused:?}");

    time_passes(&world).await;
    assert_eq!(late(&world).await.len(), 3);
    assert_eq!(act(&operations, &of_source, &actor()).await.unwrap().joints.len(), 1);
    let hold = world.ledger.run(async |conn| holds::of_deployment(conn, DEPLOYMENT).await).await;
    assert_eq!(hold.unwrap().unwrap().scope, HoldScope::Everything, "the ledger's are still late");
    assert_eq!(publisher.cycle(&world.stop).await.unwrap().requests, 0);
    assert_eq!(act(&operations, &of_ledger, &actor()).await.unwrap().joints.len(), 2);
    assert_eq!(publisher.cycle(&world.stop).await.unwrap().accepted, 1);
    let overridden = late(&world).await;
    assert!(overridden.len() == 3 && overridden.iter().all(|(_, by)| *by), "{overridden:?}");

    // the next audits end the override: later ones can be late again
    crate::support::ledger::audited(&world.ledger, &[DEPLOYMENT]).await;
    assert_eq!(late(&world).await, []);
    time_passes(&world).await;
    assert!(late(&world).await.iter().all(|(_, by)| !by));
}

#[tokio::test]
async fn a_retired_source_is_never_late() {
    let world = World::new().await;
    let log = world.log().await;
    time_passes(&world).await;
    act(&world.operations(&log), &RetireSource { deployment_id: DEPLOYMENT }, &actor())
        .await
        .unwrap();
    assert!(late(&world).await.iter().all(|(joint, _)| joint != SOURCE));
}

/// A change by hand, its end, and the difference.
struct Tampering {
    change: &'static str,
    mend: &'static str,
    kind: &'static str,
}

const TAMPERED: [Tampering; 9] = [
    Tampering {
        change: "update batch set first_offset = first_offset + 1 where id = (select max(id) from batch where kind = 'log')",
        mend: "update batch set first_offset = first_offset - 1 where id = (select max(id) from batch where kind = 'log')",
        kind: "chain_broken",
    },
    Tampering {
        change: "update batch set duplicates = duplicates + 1, records = records + 1 where id = (select max(id) from batch where kind = 'log')",
        mend: "update batch set duplicates = duplicates - 1, records = records - 1 where id = (select max(id) from batch where kind = 'log')",
        kind: "position_off_its_chain",
    },
    Tampering {
        change: "update batch set accepted = accepted + 1, duplicates = duplicates - 1 where id = (select max(id) from batch where kind = 'log')",
        mend: "update batch set accepted = accepted - 1, duplicates = duplicates + 1 where id = (select max(id) from batch where kind = 'log')",
        kind: "batch_without_its_events",
    },
    Tampering {
        change: "update batch set rejects = rejects + 1, duplicates = duplicates - 1 where id = (select max(id) from batch where kind = 'log')",
        mend: "update batch set rejects = rejects - 1, duplicates = duplicates + 1 where id = (select max(id) from batch where kind = 'log')",
        kind: "batch_without_its_rejects",
    },
    Tampering {
        change: "update usage_event set batch_id = batch_id + 1000000 where batch_id = (select max(batch_id) from usage_event)",
        mend: "update usage_event set batch_id = batch_id - 1000000 where batch_id > 1000000",
        kind: "event_without_its_batch",
    },
    Tampering {
        change: "alter table batch drop constraint if exists batch_sequence_is_positive;
                 update batch set sequence = -sequence where sequence = (select max(sequence) from batch)",
        mend: "update batch set sequence = -sequence where sequence < 0",
        kind: "sequence_broken",
    },
    Tampering {
        change: "with b as (select * from batch where kind = 'log' order by id desc limit 1),
                      a as (insert into operator_act (batch_id, acted_at, actor, act, subject, reason) select id, now(), 'test', 'resubmit', 'x', '' from b returning id)
                 insert into reject (batch_id, topic, partition, generation, log_offset, disposition, cause, detail, event_id, state, act_id,
                     passed_topic, passed_partition, passed_generation, passed_offset, headers, recorded_at)
                 select -1, topic, partition, generation, -1, 'rejected', 'json', '', 'lost', 'resubmitted', a.id, topic, partition, generation, first_offset, '', now() from a, b",
        mend: "delete from reject",
        kind: "passed_and_gone",
    },
    Tampering {
        change: "create table saved as select * from publication; delete from publication where event_id = (select max(event_id) from publication)",
        mend: "insert into publication select * from saved on conflict do nothing; drop table saved",
        kind: "usage_without_publication",
    },
    Tampering {
        change: "update publication set state = 'refused' where event_id = (select max(event_id) from publication)",
        mend: "update publication set state = 'pending' where state = 'refused'",
        kind: "publication_without_its_answer",
    },
];

impl Tampering {
    /// Waits for the difference, and for its end after the repair.
    async fn is_found_and_ends(&self, site: &Audited, when: &str) {
        let kinds = || async {
            sqlx::query_scalar::<_, String>("select kind from audit_item where joint <> $1")
                .bind(SOURCE)
                .fetch_all(&site.world.ledger.pool)
                .await
                .unwrap()
        };
        let what = format!("{} is found in {when}", self.kind);
        eventually(DEADLINE, &what, || async {
            kinds().await.iter().any(|kind| kind == self.kind)
        })
        .await;
        run(&site.world.ledger.pool, self.mend).await;
        let what = format!("{} in {when} has ended", self.kind);
        eventually(DEADLINE, &what, || async { kinds().await.is_empty() }).await;
    }
}

#[tokio::test]
async fn each_difference_is_found_in_new_batches_and_ends_when_it_is_mended() {
    let site = Audited::new().await;
    for (number, tampering) in TAMPERED.iter().enumerate() {
        let audits = crate::support::ledger::stop_audits(&site.world.ledger).await;
        let id = format!("new-{number}");
        // the second record is a duplicate
        site.world.add_with(&site.log, &[usage(&id, start_time())]).await;
        site.world.add_again(&site.log, &usage(&id, start_time())).await;
        run(&site.world.ledger.pool, tampering.change).await;
        crate::support::ledger::go_on(&site.world.ledger, audits).await;
        tampering.is_found_and_ends(&site, "a new batch").await;
    }
}

#[tokio::test]
async fn each_difference_is_found_in_old_batches_and_ends_when_it_is_mended() {
    let site = Audited::new().await;
    site.world.add_with(&site.log, &[usage("old", start_time())]).await;
    site.world.add_again(&site.log, &usage("old", start_time())).await;
    for tampering in &TAMPERED {
        let audited = || async {
            let head = "select (select bool_and(sequence = next_sequence - 1) from audit_finding where joint <> $1) from ledger";
            sqlx::query_scalar::<_, bool>(head)
                .bind(SOURCE)
                .fetch_one(&site.world.ledger.pool)
                .await
                .unwrap()
        };
        eventually(DEADLINE, "all batches are audited", audited).await;
        run(&site.world.ledger.pool, tampering.change).await;
        site.world.pass(TimeDelta::days(31));
        tampering.is_found_and_ends(&site, "an old batch").await;
    }
}
