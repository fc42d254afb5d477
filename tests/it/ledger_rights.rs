//! The rights that `migrate` and `check --connect` require in the ledger's database: on Tallyline's
//! own tables, as the role resolves them.

use tallyline::clock::Clock;
use tallyline::event::Topic;
use tallyline::ledger::{Chain, Ledger, LedgerSettings, rights, sources};
use tallyline_sim::coderd::{SchemaVersion, create_schema};
use uuid::Uuid;

use crate::cli::{assert_refused, code, pipeline};
use crate::support::ledger::{
    DEPLOYMENT, arrival, build, lease_partition, noon, partition, record_batch,
};
use crate::support::{Database, database};

/// A role without ownership, its ledger, and its URL.
async fn role(database: &Database) -> (String, Ledger, String) {
    let role = format!("ledger_{}", Uuid::new_v4().simple());
    run(database, &format!("create role {role} login")).await;
    let (_, address) = database.url.split_once('@').unwrap();
    let url = format!("postgres://{role}@{address}");
    let settings = LedgerSettings { url: url.clone(), connections: 2 };
    (role, Ledger::open(&settings, Clock::manual(noon())).unwrap(), url)
}

async fn run(database: &Database, statements: &str) {
    sqlx::raw_sql(sqlx::AssertSqlSafe(statements.to_owned()))
        .execute(&database.pool)
        .await
        .unwrap();
}

async fn migrate(url: &str) -> crate::support::process::Ended {
    pipeline(&format!("roles = ['consume']\nledger.url = '{url}'\n")).run("migrate").await
}

#[tokio::test]
async fn tables_of_another_application_need_no_right() {
    let database = database().await;
    let (role, ledger, url) = role(&database).await;
    run(
        &database,
        &format!(
            "create table spatial_ref_sys (srid integer); grant create on schema public to {role}"
        ),
    )
    .await;
    let ended = migrate(&url).await;
    assert_eq!(code(&ended), 0, "{ended:?}");
    assert!(ledger.run(async |conn| rights::missing(conn, false).await).await.unwrap().is_empty());
}

#[tokio::test]
async fn a_current_schema_needs_no_right_to_create() {
    let database = database().await;
    let (role, ledger, url) = role(&database).await;
    let grants = format!("grant create on schema public to {role};");
    assert_refused(&migrate(&url).await, 3, &grants);
    run(&database, &grants).await;
    assert_eq!(code(&migrate(&url).await), 0);
    run(&database, &format!("revoke create on schema public from {role}")).await;
    let ended = migrate(&url).await;
    assert_eq!(code(&ended), 0, "{ended:?}");
    run(&database, "update _sqlx_migrations set checksum = 'x' where version = 1").await;
    assert!(
        ledger.migrate().await.unwrap_err().to_string().contains('1'),
        "a changed migration is noticed all the same"
    );
}

#[tokio::test]
async fn a_role_with_a_schema_of_its_own_needs_nothing_in_public() {
    let database = database().await;
    let (role, ledger, url) = role(&database).await;
    run(&database, "drop schema public cascade").await;
    let grants = format!("create schema {role} authorization {role};");
    assert_eq!(
        ledger.run(async |conn| rights::missing(conn, true).await).await.unwrap(),
        std::slice::from_ref(&grants)
    );
    assert_refused(&migrate(&url).await, 3, &grants);
    run(
        &database,
        &format!(
            "create schema books authorization {role}; alter role {role} set search_path = books"
        ),
    )
    .await;
    let ended = migrate(&url).await;
    assert_eq!(code(&ended), 0, "{ended:?}");
    let schema: String = sqlx::query_scalar(
        "select schemaname::text from pg_tables where tablename = 'workspace_build'",
    )
    .fetch_one(&database.pool)
    .await
    .unwrap();
    assert_eq!(schema, "books");
}

#[tokio::test]
async fn a_role_that_owns_no_table_gets_grants_for_each_table_and_the_batch_sequence() {
    let database = database().await;
    let (role, ledger, _) = role(&database).await;
    assert_eq!(code(&migrate(&database.url).await), 0);
    run(
        &database,
        &format!("grant select, insert, update, delete on all tables in schema public to {role}"),
    )
    .await;
    run(&database, &format!("revoke insert on replay from {role}")).await;
    ledger
        .run(async |conn| {
            sources::register(conn, DEPLOYMENT, noon(), None, ledger.clock.now()).await
        })
        .await
        .unwrap();
    let claim = lease_partition(&ledger, partition(Topic::WorkspaceBuilds, 0), 0).await.unwrap();
    let (chain, arrivals) = (Chain::Live(claim), [arrival(0, build(DEPLOYMENT, 1))]);
    assert!(
        record_batch(&ledger, &chain, &arrivals, 1).await.is_err(),
        "a batch takes its id from the sequence"
    );
    let grants = ledger.run(async |conn| rights::missing(conn, false).await).await.unwrap();
    let expected = [
        format!("grant select, insert, update, delete on replay to {role};"),
        format!("grant usage on sequence public.batch_id_seq to {role};"),
    ];
    assert_eq!(grants, expected);
    run(&database, &grants.concat()).await;
    assert!(ledger.run(async |conn| rights::missing(conn, false).await).await.unwrap().is_empty());
    assert_eq!(record_batch(&ledger, &chain, &arrivals, 1).await.unwrap().accepted, 1);
}

#[tokio::test]
async fn a_role_that_did_not_migrate_gets_grants_for_the_migrations_and_the_connection() {
    let database = database().await;
    let (role, ledger, url) = role(&database).await;
    assert_eq!(code(&migrate(&database.url).await), 0);
    let all = "grant select, insert, update, delete on all tables in schema public to";
    run(
        &database,
        &format!("{all} {role}; grant usage on all sequences in schema public to {role}; revoke all on _sqlx_migrations from {role}"),
    )
    .await;
    let grants = format!("grant select on _sqlx_migrations to {role};");
    assert_eq!(
        ledger.run(async |conn| rights::missing(conn, false).await).await.unwrap(),
        std::slice::from_ref(&grants)
    );
    let error = ledger.check_schema().await.unwrap_err().to_string();
    assert!(error.ends_with(&format!("let an administrator run:\n{grants}")), "{error}");
    assert_refused(&migrate(&url).await, 3, &grants);
    run(&database, &grants).await;
    assert_eq!(code(&migrate(&url).await), 0);

    run(&database, &format!("revoke connect on database {} from public", database.name)).await;
    assert_refused(
        &migrate(&url).await,
        3,
        &format!("grant connect on database {} to {role};", database.name),
    );
}

#[tokio::test]
async fn coderds_own_database_is_refused_as_the_ledger() {
    let database = database().await;
    create_schema(&mut database.pool.acquire().await.unwrap(), SchemaVersion::Sep2026)
        .await
        .unwrap();
    let (_, _, url) = role(&database).await;
    run(&database, "revoke usage on schema public from public").await;
    for url in [&database.url, &url] {
        let site = pipeline(&format!(
            "roles = ['collect', 'consume']\nledger.url = '{url}'\nsource.coderd_url = '{}'\n",
            database.url
        ));
        let refusal = "ledger.url names coderd's own database";
        assert_refused(&site.run("migrate").await, 2, refusal);
        assert_refused(&site.run("run").await, 2, refusal);
        let checked = site.run("check --connect").await;
        assert!(
            code(&checked) == 2
                && checked.stdout.contains(refusal)
                && !checked.stdout.contains("grant "),
            "{checked:?}"
        );
    }
    let ledger_table: Option<String> = sqlx::query_scalar("select to_regclass('ledger')::text")
        .fetch_one(&database.pool)
        .await
        .unwrap();
    assert_eq!(ledger_table, None);
}
