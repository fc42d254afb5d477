//! What versions of coderd have, and what its database lets us read.

use chrono::TimeDelta;
use serde_json::json;
use tallyline::coderd;
use tallyline::coderd::CoderdError;
use tallyline::collectors::{CollectError, Settings};
use tallyline::sim::coderd::SchemaVersion;
use uuid::Uuid;

use super::{ours, produced, settings, source_of};
use crate::support::coderd::{Build, Coderd};

#[tokio::test]
async fn schemas_with_and_without_ai_task_flags_are_read() {
    for (version, flag) in [(SchemaVersion::TasksEra, Some(true)), (SchemaVersion::Sep2026, None)] {
        let (coderd, ours) = (Coderd::new(version).await, ours().await);
        let id = coderd.creation().await;
        if flag.is_some() {
            sqlx::query("update workspace_builds set has_ai_task = true").execute(&coderd.database.pool).await.unwrap();
        }
        ours.collector(settings(), &coderd).await.pass().await.unwrap();
        assert_eq!(ours.builds().await[&id].has_ai_task, flag);
        let mut reader = source_of(&coderd.database.url).connect().await.unwrap();
        let catalog = reader.catalog().await.unwrap();
        assert_eq!((catalog.has_ai_task, catalog.usage_events, catalog.has_runtime()), (flag.is_some(), true, true));
        assert_eq!(catalog.build_reasons.iter().any(|reason| reason == "task_resume"), flag.is_some());
    }
}

#[tokio::test]
async fn an_upgrade_of_coderd_while_collecting_is_noticed() {
    let (coderd, ours) = (Coderd::new(SchemaVersion::TasksEra).await, ours().await);
    let mut collector = ours.collector(settings(), &coderd).await;
    coderd.creation().await;
    collector.pass().await.unwrap();
    sqlx::query("alter table workspace_builds drop column has_ai_task").execute(&coderd.database.pool).await.unwrap();
    let id = coderd.creation().await;
    collector.pass().await.unwrap();
    assert_eq!(ours.builds().await[&id].has_ai_task, None);
    sqlx::query("alter table workspace_builds rename column reason to why").execute(&coderd.database.pool).await.unwrap();
    let error = collector.pass().await.unwrap_err();
    assert!(error.to_string().contains("workspace_builds.reason"), "{error}");
}

/// A role of its own for a test, and the url to log in with it.
async fn role(coderd: &Coderd) -> (String, String) {
    let role = format!("reader_{}", Uuid::new_v4().simple());
    sqlx::query(sqlx::AssertSqlSafe(format!("create role {role} login"))).execute(&coderd.database.pool).await.unwrap();
    let url = coderd.database.url.replace("postgres://postgres@", &format!("postgres://{role}@"));
    assert_ne!(url, coderd.database.url);
    (role, url)
}

#[tokio::test]
async fn the_grants_suffice_and_give_no_more() {
    for version in [SchemaVersion::TasksEra, SchemaVersion::Sep2026] {
        let (coderd, ours) = (Coderd::new(version).await, ours().await);
        coderd.creation().await;
        coderd.usage("one", "dc_managed_agents_v1", json!({"count": 1}), coderd.now().await).await;
        let (role, url) = role(&coderd).await;
        let error = ours.open(Settings { deployment_id: Some(coderd.deployment), ..settings() }, &url).await.unwrap().unwrap().pass().await;
        let Err(CollectError::Coderd(CoderdError::NotGranted { grants })) = error else { panic!("{error:?}") };
        assert!(grants.iter().any(|grant| *grant == format!("grant select (id, username) on users to {role};")), "{grants:?}");
        let script = coderd::GRANTS.replace(" to tallyline;", &format!(" to {role};"));
        sqlx::raw_sql(sqlx::AssertSqlSafe(script)).execute(&coderd.database.pool).await.unwrap();
        let error = ours.open(settings(), &url).await.err().unwrap();
        assert!(matches!(error, CollectError::Coderd(CoderdError::NoDeploymentId { .. })), "{error}");
        let mut collector = ours.open(Settings { deployment_id: Some(coderd.deployment), ..settings() }, &url).await.unwrap().unwrap();
        let report = collector.pass().await.unwrap();
        assert_eq!(produced(&report), (1, 0, 1));
        assert!(report.complete_until.is_some(), "pg_read_all_stats is among the grants");
        coderd.creation().await;
        assert_eq!(produced(&collector.pass().await.unwrap()), (1, 0, 0));
        let as_role = sqlx::PgPool::connect(&url).await.unwrap();
        for forbidden in
            ["select hashed_password from users", "select provisioner_state from workspace_builds", "select value from site_configs"]
        {
            assert!(sqlx::query(forbidden).execute(&as_role).await.is_err(), "{forbidden}");
        }
    }
}

#[tokio::test]
async fn without_the_right_to_see_other_sessions_nothing_is_claimed() {
    let (coderd, ours) = (Coderd::new(SchemaVersion::Sep2026).await, ours().await);
    let (role, url) = role(&coderd).await;
    let script = coderd::GRANTS.replace("grant pg_read_all_stats to tallyline;", "").replace(" to tallyline;", &format!(" to {role};"));
    sqlx::raw_sql(sqlx::AssertSqlSafe(script)).execute(&coderd.database.pool).await.unwrap();
    let settings = Settings { deployment_id: Some(coderd.deployment), ..settings() };
    let mut collector = ours.open(settings.clone(), &url).await.unwrap().unwrap();
    coderd.creation().await;
    let report = collector.pass().await.unwrap();
    assert_eq!((produced(&report), report.complete_until), ((1, 0, 0), None));
    // A commit that comes late is found all the same, within the overlap.
    let build = Build { completed_at: coderd.now().await - TimeDelta::minutes(50), ..coderd.first_start(coderd.workspace().await).await };
    coderd.build(&build).await;
    let report = collector.pass().await.unwrap();
    assert_eq!((produced(&report), report.full_sweep, report.late), ((1, 0, 0), false, 0));
    ours.consume().await;
    let source = collector.source().id;
    assert_eq!(ours.ledger.completeness(source).await.unwrap().complete_until, None);
    let from = Settings { from: Some(coderd.now().await - TimeDelta::days(1)), deployment_id: Some(Uuid::new_v4()), ..settings };
    assert!(matches!(ours.open(from, &url).await, Err(CollectError::FromUncertain)));
}

#[tokio::test]
async fn the_connection_cannot_write() {
    let coderd = Coderd::new(SchemaVersion::Sep2026).await;
    let mut reader = source_of(&coderd.database.url).connect().await.unwrap();
    assert!(reader.licenses().await.is_ok());
    // A table that notes who reads it: what the reader asks for would write.
    sqlx::raw_sql(
        "create table note (at timestamptz);
         create function note() returns boolean language sql volatile as 'insert into note values (now()) returning true';
         alter table licenses rename to license_rows;
         create view licenses as select * from license_rows where note();
         insert into license_rows (uploaded_at, jwt, exp, uuid) values (now(), 'a.b.c', now(), gen_random_uuid())",
    )
    .execute(&coderd.database.pool)
    .await
    .unwrap();
    let error = reader.licenses().await.unwrap_err();
    assert!(error.to_string().contains("read-only transaction"), "{error}");
    let sessions: i64 =
        sqlx::query_scalar("select count(*) from pg_stat_activity where datname = current_database() and application_name = 'tallyline'")
            .fetch_one(&coderd.database.pool)
            .await
            .unwrap();
    assert_eq!(sessions, 1);
}
