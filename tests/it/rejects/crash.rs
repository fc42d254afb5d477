//! No transaction spans the acts, the log and the ends of the rejects. After an interruption at any
//! point nothing is lost, and a second resubmission is safe.

use tallyline::event::{Event, Topic};
use tallyline::ledger::{Difference, books, rejects};
use tallyline::log::{Log, PostgresLogSettings};
use tallyline::operations::recover::{
    Lost, RecoverEffect, RecoverExecution, RecoverPlan, RecoverRequest,
};
use tallyline::operations::{OperationError, PredictedDisposition, Resubmit, ShowReject};

use super::{Backend, Site, as_is, operations, operator, with, with_body};
use crate::support;
use crate::support::ledger::{DEPLOYMENT, OTHER_DEPLOYMENT, act, ask, build, claim, usage};

const MENDED: &str = r#"{"count": 5}"#;

impl Site {
    /// From now on no reject can be ended, as after a crash just before.
    async fn breaks_before_the_end(&self) {
        let trigger = "create function broken() returns trigger language plpgsql as $$ begin raise exception 'broken off'; end $$;
                       create trigger broken before update on reject for each row execute function broken()";
        sqlx::raw_sql(trigger).execute(&self.database.pool).await.unwrap();
    }

    async fn is_well_again(&self) {
        sqlx::raw_sql("drop trigger broken on reject; drop function broken()")
            .execute(&self.database.pool)
            .await
            .unwrap();
    }

    async fn one_bad_record(&self) -> i64 {
        assert_eq!(self.take(vec![with_body(&usage(DEPLOYMENT, 1), "broken")]).await.rejects, 1);
        self.list("open").await[0].id
    }

    /// Records an invalid record in the event's own topic. Returns its reject's number.
    async fn broken(&self, event: &Event) -> i64 {
        self.operations.log.append(event.topic(), vec![with_body(event, "broken")]).await.unwrap();
        assert_eq!(self.consume().await.rejects, 1);
        self.list("open").await.last().unwrap().id
    }

    async fn plan_recovery(&self) -> RecoverPlan {
        let request = RecoverRequest { lost: Lost::Log, without: Vec::new() };
        ask(&self.operations, &request).await.unwrap()
    }

    async fn execute_recovery(&self, plan: &RecoverPlan) -> Result<RecoverPlan, OperationError> {
        let execution = RecoverExecution { hash: plan.hash.clone().unwrap() };
        act(&self.operations, &execution, &operator()).await
    }

    async fn differences(&self) -> Vec<Difference> {
        self.operations.ledger.run(books::add_up).await.unwrap().differences
    }

    /// Checks that the corrected event is accepted once, the reject has ended, and the books
    /// balance.
    async fn is_accepted_once(&self) {
        assert_eq!(self.number("select count(*) from usage_event where quantity = 5").await, 1);
        assert_eq!(self.number("select count(*) from publication").await, 1);
        assert_eq!(self.list("open").await, []);
        assert_eq!(self.operations.ledger.run(books::add_up).await.unwrap().differences, []);
    }
}

#[tokio::test]
async fn a_crash_after_the_append_leaves_the_reject_open_and_a_second_resubmission_is_a_duplicate()
{
    for backend in [Backend::Postgres, Backend::Kafka] {
        let site = Site::new(backend).await;
        let id = site.one_bad_record().await;
        site.breaks_before_the_end().await;
        let broken = site.resubmit(with(id, MENDED)).await;
        assert!(matches!(broken, Err(OperationError::Ledger(_))), "{broken:?}");
        site.is_well_again().await;
        let acts = ask(&site.operations, &ShowReject { id }).await.unwrap().reject.acts;
        assert_eq!(
            acts.iter().map(|act| (act.actor.as_str(), act.ended_it)).collect::<Vec<_>>(),
            [("operator-1", false)]
        );

        // the first one is still only in the log
        let again = site.resubmit(with(id, MENDED)).await.unwrap();
        assert_eq!(
            (again.records[0].predicted, again.records[0].ended),
            (PredictedDisposition::Accepted, true)
        );
        let counts = site.consume().await;
        assert_eq!((counts.records, counts.accepted, counts.duplicates), (2, 1, 1));
        site.is_accepted_once().await;
    }
}

#[tokio::test]
async fn a_crash_after_the_append_that_is_recorded_meanwhile_ends_without_another_append() {
    for backend in [Backend::Postgres, Backend::Kafka] {
        let site = Site::new(backend).await;
        let id = site.one_bad_record().await;
        site.breaks_before_the_end().await;
        site.resubmit(with(id, MENDED)).await.unwrap_err();
        site.is_well_again().await;
        assert_eq!(site.consume().await.accepted, 1);
        // another correction is in conflict with the accepted one
        let other = site.resubmit(with(id, r#"{"count": 6}"#)).await;
        assert!(matches!(other, Err(OperationError::Forbidden(_))), "{other:?}");
        let again = site.resubmit(with(id, MENDED)).await.unwrap();
        assert_eq!(
            (again.records[0].predicted, &again.records[0].place, again.records[0].ended),
            (PredictedDisposition::Duplicate, &None, true)
        );
        assert_eq!(site.consume().await.records, 0);
        site.is_accepted_once().await;
    }
}

#[tokio::test]
async fn a_log_that_takes_nothing_leaves_the_reject_open() {
    let site = Site::new(Backend::Postgres).await;
    let id = site.one_bad_record().await;
    // a log without topics
    let elsewhere = support::database().await;
    let other = operations(
        &site.operations.ledger,
        &Log::postgres(elsewhere.pool.clone(), PostgresLogSettings::default()),
    );
    let edit = with(id, MENDED);
    let broken = act(&other, &edit, &operator()).await;
    assert!(matches!(broken, Err(OperationError::Log(_))), "{broken:?}");
    let shown = ask(&site.operations, &ShowReject { id }).await.unwrap();
    assert_eq!((shown.reject.state.as_str(), shown.reject.acts.len()), ("open", 1));
    site.resubmit(edit).await.unwrap();
    assert_eq!(site.consume().await.accepted, 1);
    site.is_accepted_once().await;
}

#[tokio::test]
async fn of_several_resubmissions_those_in_the_log_are_closed_and_the_others_stay_open() {
    let site = Site::new(Backend::Postgres).await;
    let id = site.one_bad_record().await;
    site.operations
        .log
        .append(Topic::WorkspaceBuilds, vec![with_body(&build(DEPLOYMENT, 1), "broken")])
        .await
        .unwrap();
    assert_eq!(site.consume().await.rejects, 1);
    let ids: Vec<i64> = site.list("open").await.iter().map(|row| row.id).collect();
    // one of the two topics is deleted
    let removal = "delete from log_partition where topic = 'tallyline.workspace-builds.v1'";
    sqlx::raw_sql(removal).execute(&site.database.pool).await.unwrap();
    let some = site.resubmit(Resubmit { force: true, ..as_is(&ids) }).await;
    assert!(matches!(some, Err(OperationError::Log(_))), "{some:?}");
    let open: Vec<i64> = site.list("open").await.iter().map(|row| row.id).collect();
    assert_eq!((ids.len(), open), (2, ids.into_iter().filter(|one| *one != id).collect()));
}

/// The number of rejects that a recovery would reopen, by partition.
fn reopened(plan: &RecoverPlan) -> Vec<i64> {
    let RecoverEffect::Log(effect) = &plan.effect else { panic!("{plan:?}") };
    effect.partitions.iter().map(|one| one.reopened).collect()
}

#[tokio::test]
async fn a_resubmission_lost_unread_with_its_topic_is_open_again_after_the_recovery() {
    let site = Site::new(Backend::Postgres).await;
    let (read, lost, late) =
        (usage(DEPLOYMENT, 1), usage(OTHER_DEPLOYMENT, 2), usage(DEPLOYMENT, 4));
    let edit = |id: i64, event: &Event| with(id, &event.to_structured().to_string());
    let id = site.broken(&read).await;
    site.resubmit(edit(id, &read)).await.unwrap();
    assert_eq!(site.consume().await.accepted, 1);
    let (id, late_id) = (site.broken(&lost).await, site.broken(&late).await);
    site.resubmit(edit(id, &lost)).await.unwrap();
    assert_eq!(site.differences().await, [], "it waits in the log");

    let emptied = "delete from log_record using log_partition where id = partition_id and topic = 'tallyline.agent-usage.v1';
        update log_partition set start_offset = 0, next_offset = 0 where topic = 'tallyline.agent-usage.v1'";
    sqlx::raw_sql(emptied).execute(&site.database.pool).await.unwrap();
    let plan = site.plan_recovery().await;
    assert_eq!(reopened(&plan), [1]);
    // if the generation ended and the reject did not reopen, the audit names it
    let named = "insert into past_position select topic, partition, generation, start_offset, next_offset, records, (select max(id) from operator_act)
        from position where topic like '%usage%'";
    sqlx::raw_sql(named).execute(&site.database.pool).await.unwrap();
    let lost_ids = site.differences().await.into_iter().filter(|one| one.kind == "passed_and_gone");
    assert_eq!(lost_ids.map(|one| one.id).collect::<Vec<_>>(), ["usage-2"]);
    sqlx::raw_sql("delete from past_position").execute(&site.database.pool).await.unwrap();

    site.execute_recovery(&plan).await.unwrap();
    assert_eq!(site.list("open").await.iter().map(|row| row.id).collect::<Vec<_>>(), [id, late_id]);
    assert_eq!((site.list("resubmitted").await.len(), site.differences().await), (1, vec![]));
    let acts = ask(&site.operations, &ShowReject { id }).await.unwrap().reject.acts;
    assert_eq!(
        acts.iter().map(|act| act.ended_it).collect::<Vec<_>>(),
        [false],
        "the first act remains"
    );
    site.resubmit(edit(id, &lost)).await.unwrap();
    assert_eq!(site.consume().await.accepted, 1);
    assert_eq!(site.differences().await, []);
    assert!(
        site.operations
            .ledger
            .run(async |conn| rejects::accepted(conn, OTHER_DEPLOYMENT, "usage-2").await)
            .await
            .unwrap()
            .is_some()
    );
}

#[tokio::test]
async fn a_resubmission_still_in_the_log_after_its_start_moved_is_not_open_again() {
    let site = Site::new(Backend::Postgres).await;
    let mut refused = Vec::new();
    for event in [usage(DEPLOYMENT, 1), usage(DEPLOYMENT, 2)] {
        refused.push((site.broken(&event).await, event));
    }
    for (id, event) in &refused {
        site.resubmit(with(*id, &event.to_structured().to_string())).await.unwrap();
    }
    // retention removes the first of them unread
    let expired =
        "delete from log_record using log_partition where id = partition_id and topic = 'tallyline.agent-usage.v1' and record_offset = 2;
        update log_partition set start_offset = 3 where topic = 'tallyline.agent-usage.v1'";
    sqlx::raw_sql(expired).execute(&site.database.pool).await.unwrap();
    let plan = site.plan_recovery().await;
    assert_eq!(reopened(&plan), [1]);
    site.execute_recovery(&plan).await.unwrap();
    assert_eq!(site.consume().await.accepted, 1);
    assert_eq!(
        site.list("open").await.iter().map(|row| row.id).collect::<Vec<_>>(),
        [refused[0].0]
    );
    assert_eq!(site.differences().await, []);
}

#[tokio::test]
async fn a_lost_resubmission_is_named_for_every_event_type_and_deployment() {
    let site = Site::new(Backend::Postgres).await;
    for event in
        [build(OTHER_DEPLOYMENT, 1), claim(OTHER_DEPLOYMENT, 2), usage(OTHER_DEPLOYMENT, 4)]
    {
        let id = site.broken(&event).await;
        site.resubmit(with(id, &event.to_structured().to_string())).await.unwrap();
        assert_eq!(site.consume().await.accepted, 1);
    }
    assert_eq!(site.differences().await, []);

    for event in
        [build(OTHER_DEPLOYMENT, 5), claim(OTHER_DEPLOYMENT, 6), usage(OTHER_DEPLOYMENT, 8)]
    {
        let id = site.broken(&event).await;
        let resubmitted =
            site.resubmit(with(id, &event.to_structured().to_string())).await.unwrap();
        let offset = resubmitted.records[0].place.as_ref().unwrap().offset;
        // as after a leader's unclean election: another record has its place
        for undone in [
            "delete from log_record using log_partition where id = partition_id and topic = $1 and record_offset = $2",
            "update log_partition set next_offset = $2 where topic = $1",
        ] {
            sqlx::query(undone)
                .bind(event.topic().name())
                .bind(offset)
                .execute(&site.database.pool)
                .await
                .unwrap();
        }
        assert_eq!(site.differences().await, [], "the consumer has not read it yet");
        let other = crate::support::ledger::event(event.topic(), 100);
        site.operations.log.append(event.topic(), vec![other.to_message()]).await.unwrap();
        assert_eq!(site.consume().await.accepted, 1);
        let kinds: Vec<_> =
            site.differences().await.into_iter().map(|one| (one.kind, one.id)).collect();
        assert_eq!(kinds, [("passed_and_gone".into(), event.id())]);
        let forced = Resubmit { force: true, ..with(id, &event.to_structured().to_string()) };
        site.resubmit(forced).await.unwrap();
        assert_eq!((site.differences().await, site.consume().await.accepted), (vec![], 1));
        assert_eq!(site.differences().await, []);
    }
}

#[tokio::test]
async fn an_event_that_came_in_another_topic_is_resubmitted_to_its_own() {
    let site = Site::new(Backend::Postgres).await;
    let event = usage(DEPLOYMENT, 1);
    site.operations.log.append(Topic::WorkspaceBuilds, vec![event.to_message()]).await.unwrap();
    assert_eq!(site.consume().await.rejects, 1);
    let [stray] = site.list("open").await.try_into().unwrap();
    assert_eq!(
        (stray.cause.as_str(), stray.event_id.as_deref()),
        ("foreign_topic", Some("usage-1"))
    );
    let resubmitted = site.resubmit(as_is(&[stray.id])).await.unwrap();
    assert_eq!(resubmitted.records[0].place.as_ref().unwrap().topic, Topic::AgentUsage.name());
    assert_eq!(site.consume().await.accepted, 1);
    assert_eq!(site.differences().await, []);
}
