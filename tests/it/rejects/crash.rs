//! Between the acts, the log and the ends of the rejects there is no transaction: wherever it breaks off, nothing is lost and a second
//! resubmission is safe.

use tallyline::event::Topic;
use tallyline::log::{Log, PostgresLogSettings};
use tallyline::operations::{Foreseen, OperationError, Resubmit};

use super::{Backend, Site, as_is, desk, operator, with, with_body};
use crate::support;
use crate::support::ledger::{DEPLOYMENT, build, usage};

const MENDED: &str = r#"{"count": 5}"#;

impl Site {
    /// From now on no reject can be ended, as after a crash just before.
    async fn breaks_before_the_end(&self) {
        let trigger = "create function broken() returns trigger language plpgsql as $$ begin raise exception 'broken off'; end $$;
                       create trigger broken before update on reject for each row execute function broken()";
        sqlx::raw_sql(trigger).execute(&self.database.pool).await.unwrap();
    }

    async fn is_well_again(&self) {
        sqlx::raw_sql("drop trigger broken on reject; drop function broken()").execute(&self.database.pool).await.unwrap();
    }

    async fn one_bad_record(&self) -> i64 {
        assert_eq!(self.take(vec![with_body(&usage(DEPLOYMENT, 1), "broken")]).await.rejects, 1);
        self.list("open").await[0].id
    }

    /// The event is accepted once, as mended, the reject has ended, and the books balance.
    async fn is_accepted_once(&self) {
        assert_eq!(self.number("select count(*) from usage_event where quantity = 5").await, 1);
        assert_eq!(self.number("select count(*) from publication").await, 1);
        assert_eq!(self.list("open").await, []);
        assert_eq!(self.desk.ledger.books().await.unwrap().differences, []);
    }
}

#[tokio::test]
async fn a_crash_after_the_append_leaves_the_reject_open_and_a_second_resubmission_is_a_duplicate() {
    for backend in [Backend::Postgres, Backend::Kafka] {
        let site = Site::new(backend).await;
        let id = site.one_bad_record().await;
        site.breaks_before_the_end().await;
        let broken = site.resubmit(with(id, MENDED)).await;
        assert!(matches!(broken, Err(OperationError::Ledger(_))), "{broken:?}");
        site.is_well_again().await;
        let acts = site.desk.show_reject(id).await.unwrap().reject.acts;
        assert_eq!(acts.iter().map(|act| (act.actor.as_str(), act.ended_it)).collect::<Vec<_>>(), [("operator-1", false)]);

        // the first one is still only in the log
        let again = site.resubmit(with(id, MENDED)).await.unwrap();
        assert_eq!((again.records[0].foreseen, again.records[0].ended), (Foreseen::Accepted, true));
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
        // what was mended otherwise is in conflict with what is accepted
        let other = site.resubmit(with(id, r#"{"count": 6}"#)).await;
        assert!(matches!(other, Err(OperationError::Forbidden(_))), "{other:?}");
        let again = site.resubmit(with(id, MENDED)).await.unwrap();
        assert_eq!((again.records[0].foreseen, &again.records[0].place, again.records[0].ended), (Foreseen::Duplicate, &None, true));
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
    let other = desk(site.desk.ledger.clone(), Log::postgres(elsewhere.pool.clone(), PostgresLogSettings::default()));
    let edit = with(id, MENDED);
    let broken = other.resubmit_rejects(&edit, &operator()).await;
    assert!(matches!(broken, Err(OperationError::Log(_))), "{broken:?}");
    let shown = site.desk.show_reject(id).await.unwrap();
    assert_eq!((shown.reject.state.as_str(), shown.reject.acts.len()), ("open", 1));
    site.resubmit(edit).await.unwrap();
    assert_eq!(site.consume().await.accepted, 1);
    site.is_accepted_once().await;
}

#[tokio::test]
async fn of_several_those_that_the_log_has_are_ended_and_the_others_stay_open() {
    let site = Site::new(Backend::Postgres).await;
    let id = site.one_bad_record().await;
    site.desk.log.append(Topic::WorkspaceBuilds, vec![with_body(&build(DEPLOYMENT, 1), "broken")]).await.unwrap();
    assert_eq!(site.consume().await.rejects, 1);
    let ids: Vec<i64> = site.list("open").await.iter().map(|row| row.id).collect();
    // one of the two topics is gone
    let removal = "delete from log_partition where topic = 'tallyline.workspace-builds.v1'";
    sqlx::raw_sql(removal).execute(&site.database.pool).await.unwrap();
    let some = site.resubmit(Resubmit { force: true, ..as_is(&ids) }).await;
    assert!(matches!(some, Err(OperationError::Log(_))), "{some:?}");
    let open: Vec<i64> = site.list("open").await.iter().map(|row| row.id).collect();
    assert_eq!((ids.len(), open), (2, ids.into_iter().filter(|one| *one != id).collect()));
}
