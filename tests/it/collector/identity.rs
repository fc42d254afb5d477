//! One coderd is one source, and one source is one coderd.

use std::time::Duration;

use tallyline::clock::Clock;
use tallyline::collectors::{CollectError, Settings, run as run_collector};
use tallyline::event::Topic;
use tallyline::ledger::{
    ActFilter, ActKind, IdentityRefusal, acts, collector_lease, leases, sources,
};
use tallyline::license::PublicKeys;
use tallyline::operations::{Actor, OperationError, Operations, RetireSource};
use tallyline_sim::coderd::SchemaVersion;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::access::{grant, role, run};
use super::{Store, produced, settings, source_of, store};
use crate::support::coderd::Coderd;
use crate::support::eventually;
use crate::support::ledger::{act, operations};

fn named(deployment: Uuid) -> Settings {
    Settings { deployment_id: Some(deployment), ..settings() }
}

async fn refused(store: &Store, settings: Settings, url: &str) -> (IdentityRefusal, String) {
    let error = store.open(settings, url).await.err().expect("refused");
    let text = error.to_string();
    let CollectError::WrongCoderd(refusal) = error else { panic!("{text}") };
    (refusal, text)
}

async fn records(store: &Store) -> usize {
    let mut records = 0;
    for topic in Topic::ALL {
        records += store.records(topic).await.len();
    }
    records
}

#[tokio::test]
async fn a_second_deployment_id_on_the_same_coderd_is_refused_before_anything_is_appended() {
    let (coderd, store) = (Coderd::new(SchemaVersion::Sep2026).await, store().await);
    coderd.creation().await;
    let mistyped = Uuid::new_v4();
    let (refusal, text) = refused(&store, named(mistyped), &coderd.database.url).await;
    assert!(matches!(refusal, IdentityRefusal::NotItsOwnId { .. }), "{text}");
    let mut collector = store.collector(named(coderd.deployment), &coderd).await;
    assert_eq!(produced(&collector.pass().await.unwrap()), (1, 0, 0));
    for id in [&mistyped, &coderd.deployment] {
        let (_, text) = refused(&store, named(mistyped), &coderd.database.url).await;
        assert!(text.contains(&id.to_string()), "{text}");
    }
    // coderd has a new id, as after the loss of its row; its organizations are the same
    collector.close().await;
    sqlx::query("update site_configs set value = $1")
        .bind(mistyped.to_string())
        .execute(&coderd.database.pool)
        .await
        .unwrap();
    let (refusal, text) = refused(&store, named(mistyped), &coderd.database.url).await;
    assert!(
        matches!(refusal, IdentityRefusal::OtherSource { other_id, .. } if other_id == coderd.deployment),
        "{text}"
    );
    let (refusal, text) = refused(&store, named(coderd.deployment), &coderd.database.url).await;
    assert!(
        matches!(refusal, IdentityRefusal::OtherCoderd { .. })
            && text.contains("--accept-new-identity"),
        "{text}"
    );
    assert_eq!(
        (records(&store).await, store.ledger.run(sources::list).await.unwrap().len()),
        (1, 1)
    );
}

#[tokio::test]
async fn the_same_deployment_id_on_another_coderd_is_refused() {
    let (coderd, other, store) = (
        Coderd::new(SchemaVersion::Sep2026).await,
        Coderd::new(SchemaVersion::Sep2026).await,
        store().await,
    );
    store.collector(settings(), &coderd).await.close().await;
    other.creation().await;
    sqlx::query("update site_configs set value = $1")
        .bind(coderd.deployment.to_string())
        .execute(&other.database.pool)
        .await
        .unwrap();
    let (refusal, text) = refused(&store, settings(), &other.database.url).await;
    assert!(
        matches!(refusal, IdentityRefusal::OtherCoderd { source_id, .. } if source_id == coderd.deployment),
        "{text}"
    );
    assert!(
        text.contains(&coderd.organization.to_string())
            && text.contains(&other.organization.to_string()),
        "{text}"
    );
    assert_eq!(records(&store).await, 0);
}

#[tokio::test]
async fn a_coderd_that_becomes_another_while_it_is_collected_is_refused() {
    let (coderd, store) = (Coderd::new(SchemaVersion::Sep2026).await, store().await);
    let mut collector = store.collector(settings(), &coderd).await;
    coderd.creation().await;
    sqlx::query("update organizations set id = gen_random_uuid()")
        .execute(&coderd.database.pool)
        .await
        .unwrap_err();
    sqlx::query("update organizations set is_default = false")
        .execute(&coderd.database.pool)
        .await
        .unwrap();
    sqlx::query(
        "insert into organizations (id, name, description, created_at, updated_at, is_default, display_name, default_org_member_roles)
         values (gen_random_uuid(), 'other', '', now(), now(), true, '', '{}')",
    )
    .execute(&coderd.database.pool)
    .await
    .unwrap();
    assert!(matches!(
        collector.pass().await,
        Err(CollectError::WrongCoderd(IdentityRefusal::OtherCoderd { .. }))
    ));
    assert_eq!(records(&store).await, 0);
}

#[tokio::test]
async fn a_collector_that_refuses_its_coderd_releases_the_lease() {
    let (coderd, store) = (Coderd::new(SchemaVersion::Sep2026).await, store().await);
    let (stop, database) = (CancellationToken::new(), source_of(&coderd.database.url));
    let settings = Settings { poll_interval: Duration::from_millis(100), ..settings() };
    let (keys, clock) = (PublicKeys::new(), Clock::system());
    let running = tokio::spawn(run_collector(
        settings,
        database,
        keys,
        store.log.clone(),
        store.ledger.clone(),
        clock,
        stop.clone(),
    ));
    let holder = async || {
        store
            .ledger
            .run(async |conn| leases::holder(conn, &collector_lease(coderd.deployment)).await)
            .await
            .unwrap()
    };
    let bound = "select count(*) from source where bound_organization_id is not null";
    eventually(Duration::from_secs(30), "it collects", || async {
        sqlx::query_scalar::<_, i64>(bound).fetch_one(&store.ledger.pool).await.unwrap() == 1
            && holder().await.is_some()
    })
    .await;
    sqlx::query("update site_configs set value = gen_random_uuid()::text")
        .execute(&coderd.database.pool)
        .await
        .unwrap();
    eventually(Duration::from_secs(30), "a right process can take the source", || async {
        holder().await.is_none()
    })
    .await;
    stop.cancel();
    running.await.unwrap();
}

#[tokio::test]
async fn a_collector_of_the_previous_coderd_appends_nothing_once_another_is_accepted() {
    let (coderd, other, store) = (
        Coderd::new(SchemaVersion::Sep2026).await,
        Coderd::new(SchemaVersion::Sep2026).await,
        store().await,
    );
    let mut collector = store.collector(settings(), &coderd).await;
    coderd.creation().await;
    let operations = Operations {
        coderd: Some(source_of(&other.database.url)),
        ..operations(&store.ledger, &store.log)
    };
    let actor = Actor { name: "user-001".to_owned(), reason: "moved".to_owned() };
    operations.accept_identity(coderd.deployment, &actor).await.unwrap();
    let outcome = collector.pass().await;
    assert!(
        matches!(outcome, Err(CollectError::WrongCoderd(IdentityRefusal::OtherCoderd { .. }))),
        "{outcome:?}"
    );
    assert_eq!(records(&store).await, 0);
    // the collector before has not ended
    other.creation().await;
    let settings = Settings { holder: "another".to_owned(), ..named(coderd.deployment) };
    let mut accepted =
        store.open(settings, &other.database.url).await.unwrap().expect("the source is free");
    assert_eq!(produced(&accepted.pass().await.unwrap()), (1, 0, 0));
}

#[tokio::test]
async fn a_dump_restored_on_another_server_is_accepted() {
    let (coderd, store) = (Coderd::new(SchemaVersion::TasksEra).await, store().await);
    let known = coderd.creation().await;
    let mut collector = store.collector(settings(), &coderd).await;
    assert_eq!(produced(&collector.pass().await.unwrap()), (1, 0, 0));
    collector.close().await;
    let folder = tempfile::TempDir::new().unwrap();
    let dump = coderd.database.back_up(folder.path());
    coderd.database.restore(&dump).await;
    // then it is upgraded on its new server
    let pool = sqlx::PgPool::connect(&coderd.database.url).await.unwrap();
    sqlx::query("alter table workspace_builds drop column has_ai_task")
        .execute(&pool)
        .await
        .unwrap();
    let mut collector = store.collector(settings(), &coderd).await;
    assert_eq!(produced(&collector.pass().await.unwrap()), (0, 0, 0));
    assert_eq!(store.builds().await.into_keys().collect::<Vec<_>>(), [known]);
}

#[tokio::test]
async fn a_coderd_without_a_readable_identity_is_collected_with_a_warning_unless_its_usage_is_published()
 {
    let (coderd, store) = (Coderd::new(SchemaVersion::Sep2026).await, store().await);
    sqlx::query("update organizations set is_default = false")
        .execute(&coderd.database.pool)
        .await
        .unwrap();
    coderd.creation().await;
    let required = Settings { identity_required: true, ..settings() };
    let error = store.open(required.clone(), &coderd.database.url).await.err().unwrap().to_string();
    assert!(error.contains("default organization"), "{error}");
    let mut collector = store.collector(settings(), &coderd).await;
    assert_eq!(produced(&collector.pass().await.unwrap()), (1, 0, 0));
    assert!(collector.warning().is_some_and(|warning| warning.contains("default organization")));
    // it is bound as soon as both facts are known
    sqlx::query("update organizations set is_default = true")
        .execute(&coderd.database.pool)
        .await
        .unwrap();
    collector.pass().await.unwrap();
    assert_eq!(collector.warning(), None);
    collector.close().await;
    store.collector(required, &coderd).await.close().await;
    let bound: Option<Uuid> = sqlx::query_scalar("select bound_organization_id from source")
        .fetch_one(&store.ledger.pool)
        .await
        .unwrap();
    assert_eq!(bound, Some(coderd.organization));
}

/// A role that may read everything except these facts.
async fn role_without(coderd: &Coderd, facts: &[&str]) -> String {
    let (role, url) = role(coderd).await;
    grant(coderd, &role).await;
    for fact in facts {
        run(coderd, &format!("revoke {fact} from {role}")).await;
    }
    url
}

const DEFAULT_ORGANIZATION: &str = "select (is_default) on organizations";
const DEPLOYMENT_ID: &str = "execute on function tallyline.deployment_id()";

#[tokio::test]
async fn a_readable_fact_refuses_another_coderd_though_the_other_fact_is_hidden() {
    let (coderd, other, store) = (
        Coderd::new(SchemaVersion::Sep2026).await,
        Coderd::new(SchemaVersion::Sep2026).await,
        store().await,
    );
    store.collector(settings(), &coderd).await.close().await;
    other.creation().await;
    for (hidden, reported) in
        [(DEFAULT_ORGANIZATION, other.deployment), (DEPLOYMENT_ID, other.organization)]
    {
        let url = role_without(&other, &[hidden]).await;
        let (refusal, text) = refused(&store, named(coderd.deployment), &url).await;
        assert!(
            matches!(refusal, IdentityRefusal::OtherCoderd { .. })
                && text.contains(&reported.to_string()),
            "{text}"
        );
    }
    run(&other, "delete from site_configs where key = 'deployment_id'").await;
    let (refusal, text) = refused(&store, named(coderd.deployment), &other.database.url).await;
    assert!(
        matches!(refusal, IdentityRefusal::OtherCoderd { .. })
            && text.contains(&other.organization.to_string()),
        "{text}"
    );
    // also during collection
    let mut collector = store.collector(named(coderd.deployment), &coderd).await;
    coderd.creation().await;
    run(&coderd, "update organizations set is_default = false; update site_configs set value = gen_random_uuid()::text").await;
    assert!(matches!(
        collector.pass().await,
        Err(CollectError::WrongCoderd(IdentityRefusal::OtherCoderd { .. }))
    ));
    assert_eq!(records(&store).await, 0);
}

#[tokio::test]
async fn a_mistyped_id_is_refused_where_only_the_organization_shows_the_coderd_of_another_source() {
    let (coderd, store) = (Coderd::new(SchemaVersion::Sep2026).await, store().await);
    store.collector(settings(), &coderd).await.close().await;
    let url = role_without(&coderd, &[DEPLOYMENT_ID]).await;
    let (refusal, text) = refused(&store, named(Uuid::new_v4()), &url).await;
    assert!(
        matches!(refusal, IdentityRefusal::OtherSource { other_id, .. } if other_id == coderd.deployment),
        "{text}"
    );
    assert_eq!(store.ledger.run(sources::list).await.unwrap().len(), 1);
    let collector = store.open(named(coderd.deployment), &url).await.unwrap().unwrap();
    assert!(collector.warning().is_some(), "what can be read does not contradict");
}

#[tokio::test]
async fn a_corrected_id_introduces_no_source_beside_the_unbound_one() {
    let (coderd, store) = (Coderd::new(SchemaVersion::Sep2026).await, store().await);
    let hidden = role_without(&coderd, &[DEPLOYMENT_ID]).await;
    coderd.creation().await;
    let mistyped = Uuid::new_v4();
    let mut collector = store.open(named(mistyped), &hidden).await.unwrap().unwrap();
    assert_eq!(produced(&collector.pass().await.unwrap()), (1, 0, 0));
    collector.close().await;
    for url in [&hidden, &coderd.database.url] {
        let (refusal, text) = refused(&store, named(coderd.deployment), url).await;
        assert!(
            matches!(refusal, IdentityRefusal::UnboundSource { unbound_id, .. } if unbound_id == mistyped),
            "{text}"
        );
        for way in ["accept", "retire"] {
            assert!(text.contains(&format!("`tallyline sources {way} {mistyped} ")), "{text}");
        }
    }
    assert_eq!(
        (records(&store).await, store.ledger.run(sources::list).await.unwrap().len()),
        (1, 1)
    );
    let actor =
        Actor { name: "user-001".to_owned(), reason: "a typing mistake, not in use".to_owned() };
    act(&operations(&store.ledger, &store.log), &RetireSource { deployment_id: mistyped }, &actor)
        .await
        .unwrap();
    let mut collector = store.open(named(coderd.deployment), &hidden).await.unwrap().unwrap();
    assert_eq!(produced(&collector.pass().await.unwrap()), (1, 0, 0));
}

#[tokio::test]
async fn a_source_that_was_introduced_under_a_mistyped_id_is_bound_and_not_replaced() {
    let (coderd, store) = (Coderd::new(SchemaVersion::Sep2026).await, store().await);
    let (role, url) = role(&coderd).await;
    grant(&coderd, &role).await;
    run(&coderd, &format!("revoke execute on function tallyline.deployment_id() from {role}"))
        .await;
    coderd.creation().await;
    let mistyped = Uuid::new_v4();
    let mut collector = store.open(named(mistyped), &url).await.unwrap().unwrap();
    assert_eq!(produced(&collector.pass().await.unwrap()), (1, 0, 0));
    assert!(collector.warning().is_some());
    run(&coderd, &format!("grant execute on function tallyline.deployment_id() to {role}")).await;
    let Err(CollectError::WrongCoderd(refusal)) = collector.pass().await else {
        panic!("not refused")
    };
    assert!(matches!(refusal, IdentityRefusal::NotBound { .. }), "{refusal}");
    collector.close().await;
    let (_, text) = refused(&store, named(mistyped), &url).await;
    let advice =
        format!("`tallyline sources accept {mistyped} --accept-new-identity --reason WHY`");
    assert!(text.contains(&advice) && text.contains("count and bill everything again"), "{text}");
    let operations =
        Operations { coderd: Some(source_of(&url)), ..operations(&store.ledger, &store.log) };
    let actor = Actor { name: "user-001".to_owned(), reason: "a typing mistake".to_owned() };
    operations.accept_identity(mistyped, &actor).await.unwrap();
    let mut collector = store.open(named(mistyped), &url).await.unwrap().unwrap();
    assert_eq!(
        (produced(&collector.pass().await.unwrap()), collector.warning()),
        ((0, 0, 0), None)
    );
    collector.close().await;
    let (refusal, text) = refused(&store, named(coderd.deployment), &url).await;
    assert!(
        matches!(refusal, IdentityRefusal::OtherSource { other_id, .. } if other_id == mistyped),
        "{text}"
    );
    assert_eq!(
        (records(&store).await, store.ledger.run(sources::list).await.unwrap().len()),
        (1, 1)
    );
}

#[tokio::test]
async fn an_operator_accepts_the_new_identity_of_a_coderd_with_a_reason() {
    let (coderd, store) = (Coderd::new(SchemaVersion::Sep2026).await, store().await);
    let mut collector = store.collector(settings(), &coderd).await;
    coderd.creation().await;
    sqlx::query("update site_configs set value = gen_random_uuid()::text")
        .execute(&coderd.database.pool)
        .await
        .unwrap();
    assert!(matches!(
        collector.pass().await,
        Err(CollectError::WrongCoderd(IdentityRefusal::OtherCoderd { .. }))
    ));
    let operations = Operations {
        coderd: Some(source_of(&coderd.database.url)),
        ..operations(&store.ledger, &store.log)
    };
    let actor = |reason: &str| Actor { name: "user-001".to_owned(), reason: reason.to_owned() };
    let error = operations.accept_identity(coderd.deployment, &actor(" ")).await.unwrap_err();
    assert!(matches!(error, OperationError::Invalid { field: "reason", .. }), "{error}");
    let error = operations.accept_identity(Uuid::new_v4(), &actor("a test")).await.unwrap_err();
    assert!(
        matches!(error, OperationError::Forbidden(_)),
        "this coderd is bound to another source: {error}"
    );
    assert!(collector.pass().await.is_err());
    operations.accept_identity(coderd.deployment, &actor("the row was lost")).await.unwrap();
    let mut collector = store.collector(named(coderd.deployment), &coderd).await;
    assert_eq!(produced(&collector.pass().await.unwrap()), (1, 0, 0));
    let acts = store
        .ledger
        .run(async |conn| {
            acts::list(conn, &ActFilter { act: Some(ActKind::Accept), ..ActFilter::default() }, 10)
                .await
        })
        .await
        .unwrap();
    assert_eq!(
        (acts.len(), acts[0].subject.clone(), acts[0].reason.as_str()),
        (1, coderd.deployment.to_string(), "the row was lost")
    );
    assert_eq!(acts[0].detail["before"]["deployment_id"], coderd.deployment.to_string());
}
