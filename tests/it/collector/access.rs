//! The versions of coderd, and the rights that a reader needs.

use chrono::TimeDelta;
use serde_json::json;
use tallyline::coderd;
use tallyline::coderd::CoderdError;
use tallyline::collectors::{CollectError, Settings};
use tallyline_sim::coderd::SchemaVersion;
use uuid::Uuid;

use super::{produced, settings, source_of, store};
use crate::support::coderd::{Build, Coderd};
use crate::support::ledger::completeness_of;

#[tokio::test]
async fn schemas_with_and_without_ai_task_flags_are_read() {
    for (version, flag) in [(SchemaVersion::TasksEra, Some(true)), (SchemaVersion::Sep2026, None)] {
        let (coderd, store) = (Coderd::new(version).await, store().await);
        let id = coderd.creation().await;
        if flag.is_some() {
            sqlx::query("update workspace_builds set has_ai_task = true")
                .execute(&coderd.database.pool)
                .await
                .unwrap();
        }
        store.collector(settings(), &coderd).await.pass().await.unwrap();
        assert_eq!(store.builds().await[&id].has_ai_task, flag);
        let mut reader = source_of(&coderd.database.url).connect().await.unwrap();
        let catalog = reader.catalog().await.unwrap();
        assert_eq!(
            (catalog.has_ai_task, catalog.usage_events, catalog.has_runtime()),
            (flag.is_some(), true, true)
        );
    }
}

#[tokio::test]
async fn an_upgrade_of_coderd_while_collecting_is_noticed() {
    let (coderd, store) = (Coderd::new(SchemaVersion::TasksEra).await, store().await);
    let mut collector = store.collector(settings(), &coderd).await;
    coderd.creation().await;
    collector.pass().await.unwrap();
    sqlx::query("alter table workspace_builds drop column has_ai_task")
        .execute(&coderd.database.pool)
        .await
        .unwrap();
    let id = coderd.creation().await;
    collector.pass().await.unwrap();
    assert_eq!(store.builds().await[&id].has_ai_task, None);
    // without a row to read, a pass notices it within a minute
    coderd.creation().await;
    sqlx::query("alter table workspace_builds rename column reason to why")
        .execute(&coderd.database.pool)
        .await
        .unwrap();
    let error = collector.pass().await.unwrap_err();
    assert!(error.to_string().contains("workspace_builds.reason"), "{error}");
}

/// Creates a role for one test. Returns it with its URL.
pub(super) async fn role(coderd: &Coderd) -> (String, String) {
    let role = format!("reader_{}", Uuid::new_v4().simple());
    sqlx::query(sqlx::AssertSqlSafe(format!("create role {role} login")))
        .execute(&coderd.database.pool)
        .await
        .unwrap();
    let url = coderd.database.url.replace("postgres://postgres@", &format!("postgres://{role}@"));
    assert_ne!(url, coderd.database.url);
    (role, url)
}

/// Runs `grants.sql` for this role, as an administrator does.
pub(super) async fn grant(coderd: &Coderd, role: &str) {
    sqlx::raw_sql(sqlx::AssertSqlSafe(coderd::grants(role)))
        .execute(&coderd.database.pool)
        .await
        .unwrap();
}

pub(super) async fn run(coderd: &Coderd, statements: &str) {
    sqlx::raw_sql(sqlx::AssertSqlSafe(statements.to_owned()))
        .execute(&coderd.database.pool)
        .await
        .unwrap();
}

#[tokio::test]
async fn the_grants_suffice_and_give_no_more() {
    for version in [SchemaVersion::TasksEra, SchemaVersion::Sep2026] {
        let (coderd, store) = (Coderd::new(version).await, store().await);
        coderd.creation().await;
        coderd.usage("one", "dc_managed_agents_v1", json!({"count": 1}), coderd.now().await).await;
        let (role, url) = role(&coderd).await;
        let error = store
            .open(Settings { deployment_id: Some(coderd.deployment), ..settings() }, &url)
            .await
            .unwrap()
            .unwrap()
            .pass()
            .await;
        let Err(CollectError::Coderd(CoderdError::NotGranted { grants })) = error else {
            panic!("{error:?}")
        };
        assert!(
            grants
                .iter()
                .any(|grant| *grant == format!("grant select (id, username) on users to {role};")),
            "{grants:?}"
        );
        grant(&coderd, &role).await;
        let mut collector = store.open(settings(), &url).await.unwrap().unwrap();
        assert_eq!(collector.source().deployment_id, coderd.deployment);
        let report = collector.pass().await.unwrap();
        assert_eq!(produced(&report), (1, 0, 1));
        assert!(report.complete_until.is_some(), "the function sees open transactions");
        coderd.creation().await;
        assert_eq!(produced(&collector.pass().await.unwrap()), (1, 0, 0));
        let as_role = sqlx::PgPool::connect(&url).await.unwrap();
        for forbidden in [
            "select hashed_password from users",
            "select provisioner_state from workspace_builds",
            "select value from site_configs",
            "select input from provisioner_jobs",
        ] {
            assert!(sqlx::query(forbidden).execute(&as_role).await.is_err(), "{forbidden}");
        }
        let stats: bool = sqlx::query_scalar("select pg_has_role('pg_read_all_stats', 'usage')")
            .fetch_one(&as_role)
            .await
            .unwrap();
        assert!(!stats);
        assert!(
            source_of(&url).connect().await.unwrap().missing_rights().await.unwrap().is_empty()
        );
    }
}

/// Makes the role the owner of coderd's tables, like coderd's own role.
async fn own(coderd: &Coderd, role: &str) {
    let statements = format!(
        "do $$ declare name text; begin
             for name in select tablename from pg_tables where schemaname = 'public' loop
                 execute format('alter table %I owner to {role}', name);
             end loop;
         end $$;
         drop schema tallyline cascade"
    );
    run(coderd, &statements).await;
}

#[tokio::test]
async fn earlier_grants_are_revoked_except_those_that_monitoring_may_share() {
    let coderd = Coderd::new(SchemaVersion::Sep2026).await;
    let ((admin, admin_url), (role, url)) = (role(&coderd).await, role(&coderd).await);
    own(&coderd, &admin).await;
    let earlier_grants = format!(
        "grant create on database {} to {admin}; grant usage on schema public to {admin}; grant pg_read_all_stats to {admin}, {role};
         grant select (input) on provisioner_jobs to {role}",
        coderd.database.name
    );
    run(&coderd, &earlier_grants).await;
    // without the right to revoke a role from others
    let as_admin = sqlx::PgPool::connect(&admin_url).await.unwrap();
    sqlx::raw_sql(sqlx::AssertSqlSafe(coderd::grants(&role))).execute(&as_admin).await.unwrap();
    let as_role = sqlx::PgPool::connect(&url).await.unwrap();
    let remaining: (bool, bool, bool) = sqlx::query_as(
        "select pg_has_role('pg_read_all_stats', 'usage'), has_column_privilege('provisioner_jobs', 'input', 'select'),
             tallyline.deployment_id() is not null and (select sees_all from tallyline.oldest_transaction())",
    )
    .fetch_one(&as_role)
    .await
    .unwrap();
    assert_eq!(remaining, (true, false, true));
    assert!(source_of(&url).connect().await.unwrap().missing_rights().await.unwrap().is_empty());
}

#[tokio::test]
async fn the_owner_of_coderds_tables_needs_no_grants() {
    for version in [SchemaVersion::TasksEra, SchemaVersion::Sep2026] {
        let (coderd, store) = (Coderd::new(version).await, store().await);
        let (owner, url) = role(&coderd).await;
        own(&coderd, &owner).await;
        let workspace = coderd.workspace().await;
        coderd.build(&Build { stage: 2, ..coderd.first_start(workspace).await }).await;
        let required = Settings { identity_required: true, ..settings() };
        let mut collector = store.open(required.clone(), &url).await.unwrap().unwrap();
        assert_eq!(collector.source().deployment_id, coderd.deployment);
        let report = collector.pass().await.unwrap();
        assert_eq!(
            (produced(&report), report.complete_until),
            ((1, 1, 0), None),
            "a claim; other sessions are not seen"
        );
        let rights = source_of(&url).connect().await.unwrap().missing_rights().await.unwrap();
        assert_eq!(
            rights,
            [format!("psql --set reader={owner} --file src/coderd/grants.sql CODERD_DATABASE_URL")]
        );
        collector.close().await;
        run(&coderd, &format!("grant pg_read_all_stats to {owner}")).await;
        for url in [&url, &coderd.database.url] {
            let mut collector = store.open(required.clone(), url).await.unwrap().unwrap();
            assert!(collector.pass().await.unwrap().complete_until.is_some());
            collector.close().await;
            assert!(
                source_of(url).connect().await.unwrap().missing_rights().await.unwrap().is_empty()
            );
        }
        // an open transaction is also seen without the function
        let mut open = coderd.database.pool.begin().await.unwrap();
        let opened_at: chrono::DateTime<chrono::Utc> =
            sqlx::query_scalar("select now()").fetch_one(&mut *open).await.unwrap();
        let mut reader = source_of(&url).connect().await.unwrap();
        let catalog = reader.catalog().await.unwrap();
        assert!(reader.horizon(&catalog).await.unwrap().complete_before().unwrap() <= opened_at);
        open.rollback().await.unwrap();
    }
}

#[tokio::test]
async fn only_the_stage_of_workspace_builds_is_read_of_job_inputs() {
    let coderd = Coderd::new(SchemaVersion::Sep2026).await;
    let workspace = coderd.workspace().await;
    let build = coderd.build(&Build { stage: 2, ..coderd.first_start(workspace).await }).await;
    let job: Uuid = sqlx::query_scalar("select job_id from workspace_builds where id = $1")
        .bind(build)
        .fetch_one(&coderd.database.pool)
        .await
        .unwrap();
    let (role, url) = role(&coderd).await;
    grant(&coderd, &role).await;
    let as_role = sqlx::PgPool::connect(&url).await.unwrap();
    let stages = async || -> Vec<(Uuid, Option<String>)> {
        sqlx::query_as("select job_id, stage from tallyline.job_stages($1)")
            .bind(vec![job])
            .fetch_all(&as_role)
            .await
            .unwrap()
    };
    assert_eq!(stages().await, [(job, Some("2".to_owned()))]);
    run(&coderd, "update provisioner_jobs set type = 'template_version_import'").await;
    assert_eq!(stages().await, []);
}

#[tokio::test]
async fn coderds_migrations_may_drop_and_rename_every_column_that_is_read() {
    let read: &[(&str, &[&str])] = &[
        (
            "provisioner_jobs",
            &[
                "created_at",
                "started_at",
                "completed_at",
                "organization_id",
                "type",
                "input",
                "worker_id",
                "job_status",
                "id",
            ],
        ),
        (
            "workspace_builds",
            &[
                "workspace_id",
                "template_version_id",
                "build_number",
                "transition",
                "initiator_id",
                "reason",
                "job_id",
                "id",
            ],
        ),
        (
            "workspace_builds",
            &["daily_cost", "template_version_preset_id", "has_external_agent", "has_ai_task"],
        ),
        ("workspaces", &["owner_id", "organization_id", "template_id", "name", "id"]),
        ("organizations", &["name", "is_default", "id"]),
        ("templates", &["name", "id"]),
        ("template_versions", &["name", "id"]),
        ("template_version_presets", &["name", "id"]),
        ("users", &["username", "id"]),
        ("licenses", &["uploaded_at", "jwt", "exp", "uuid", "id"]),
        (
            "usage_events",
            &[
                "event_type",
                "event_data",
                "created_at",
                "publish_started_at",
                "published_at",
                "failure_message",
                "id",
            ],
        ),
        ("site_configs", &["value", "key"]),
    ];
    // Only the grants are under test, not the columns' own keys and indexes. The outcome must be
    // the same without grants.
    let (bare, granted) =
        (Coderd::new(SchemaVersion::TasksEra).await, Coderd::new(SchemaVersion::TasksEra).await);
    run(&bare, "drop schema tallyline cascade").await;
    let (role, _) = role(&granted).await;
    grant(&granted, &role).await;
    for (table, columns) in read {
        for column in *columns {
            for statement in [
                format!("alter table {table} rename column {column} to renamed"),
                format!("alter table {table} rename column renamed to {column}"),
                format!("alter table {table} rename to renamed"),
                format!("alter table renamed rename to {table}"),
                format!("alter table {table} alter column {column} type text using {column}::text"),
                format!("alter table {table} drop column {column}"),
                format!("alter table {table} drop column {column} cascade"),
            ] {
                let refused = async |coderd: &Coderd| {
                    let done = sqlx::raw_sql(sqlx::AssertSqlSafe(statement.clone()))
                        .execute(&coderd.database.pool)
                        .await;
                    done.err().map(|error| error.to_string())
                };
                assert_eq!(refused(&granted).await, refused(&bare).await, "{statement}");
            }
            let dropped: bool =
                sqlx::query_scalar("select not exists (select from pg_attribute where attrelid = $1::regclass and attname = $2)")
                    .bind(table)
                    .bind(column)
                    .fetch_one(&granted.database.pool)
                    .await
                    .unwrap();
            assert!(dropped, "{table}.{column}");
        }
    }
}

#[tokio::test]
async fn a_missing_function_is_named_with_the_command_that_creates_it() {
    let (coderd, store) = (Coderd::new(SchemaVersion::Sep2026).await, store().await);
    let (role, url) = role(&coderd).await;
    grant(&coderd, &role).await;
    run(&coderd, &format!("revoke execute on function tallyline.job_stages(uuid[]) from {role}"))
        .await;
    let settings = Settings { deployment_id: Some(coderd.deployment), ..settings() };
    let mut collector = store.open(settings, &url).await.unwrap().unwrap();
    let error = collector.pass().await.unwrap_err().to_string();
    assert!(
        error.ends_with(&format!(
            "grant execute on function tallyline.job_stages(uuid[]) to {role};"
        )),
        "{error}"
    );
    run(&coderd, "drop schema tallyline cascade").await;
    let error = collector.pass().await.unwrap_err().to_string();
    assert!(
        error.ends_with(&format!(
            "psql --set reader={role} --file src/coderd/grants.sql CODERD_DATABASE_URL"
        )),
        "{error}"
    );
    run(&coderd, &format!("revoke select (is_default) on organizations from {role}")).await;
    let rights = source_of(&url).connect().await.unwrap().missing_rights().await.unwrap();
    let expected = [
        format!("grant select (is_default) on organizations to {role};"),
        format!("psql --set reader={role} --file src/coderd/grants.sql CODERD_DATABASE_URL"),
    ];
    assert_eq!(rights, expected);
}

#[tokio::test]
async fn a_forbidden_schema_or_database_is_named_with_its_grant() {
    let (coderd, store) = (Coderd::new(SchemaVersion::Sep2026).await, store().await);
    let (role, url) = role(&coderd).await;
    grant(&coderd, &role).await;
    run(&coderd, &format!("revoke usage on schema public from public, {role}; revoke select (is_default) on organizations from {role}"))
        .await;
    let schema = format!("grant usage on schema public to {role};");
    let settings = Settings { deployment_id: Some(coderd.deployment), ..settings() };
    let mut collector = store.open(settings, &url).await.unwrap().unwrap();
    let default_organization = format!("grant select (is_default) on organizations to {role};");
    let warning = collector.warning().unwrap();
    assert!(warning.ends_with(&format!("{schema} {default_organization}")), "{warning}");
    let Err(CollectError::Coderd(CoderdError::NotGranted { grants })) = collector.pass().await
    else {
        panic!("a pass without rights")
    };
    assert_eq!(grants, std::slice::from_ref(&schema));
    let rights = source_of(&url).connect().await.unwrap().missing_rights().await.unwrap();
    assert_eq!(rights, [schema, default_organization]);
    run(&coderd, &rights.concat()).await;
    assert!(source_of(&url).connect().await.unwrap().missing_rights().await.unwrap().is_empty());

    let name = &coderd.database.name;
    run(&coderd, &format!("revoke connect on database {name} from public")).await;
    let Err(CoderdError::NotGranted { grants }) = source_of(&url).connect().await else {
        panic!("connected")
    };
    assert_eq!(grants, [format!("grant connect on database {name} to {role};")]);
}

#[tokio::test]
async fn without_the_right_to_see_other_sessions_completeness_is_not_reported() {
    let (coderd, store) = (Coderd::new(SchemaVersion::Sep2026).await, store().await);
    let (role, url) = role(&coderd).await;
    grant(&coderd, &role).await;
    run(&coderd, &format!("revoke execute on function tallyline.oldest_transaction() from {role}"))
        .await;
    let settings = Settings { deployment_id: Some(coderd.deployment), ..settings() };
    let mut collector = store.open(settings.clone(), &url).await.unwrap().unwrap();
    coderd.creation().await;
    let report = collector.pass().await.unwrap();
    assert_eq!((produced(&report), report.complete_until), ((1, 0, 0), None));
    // The overlap still finds a commit that comes late.
    let build = Build {
        completed_at: coderd.now().await - TimeDelta::minutes(50),
        ..coderd.first_start(coderd.workspace().await).await
    };
    coderd.build(&build).await;
    let report = collector.pass().await.unwrap();
    assert_eq!((produced(&report), report.full_sweep, report.late), ((1, 0, 0), false, 0));
    store.consume().await;
    let source = collector.source().id;
    assert_eq!(completeness_of(&store.ledger, source).await.unwrap().complete_until, None);
    let from = Settings { from: Some(coderd.now().await - TimeDelta::days(1)), ..settings };
    let another = super::store().await;
    assert!(matches!(another.open(from, &url).await, Err(CollectError::FromUncertain)));
}

#[tokio::test]
async fn the_connection_cannot_write() {
    let coderd = Coderd::new(SchemaVersion::Sep2026).await;
    let mut reader = source_of(&coderd.database.url).connect().await.unwrap();
    assert!(reader.licenses().await.is_ok());
    // A table that records its readers: the reader's query would write.
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
