//! Commands and the ledger's database: error messages, time limits, and hidden secrets.

use crate::cli::{Pipeline, assert_refused, code, json, pipeline};
use crate::support::database;

#[tokio::test]
async fn a_database_error_is_reported_once_and_without_postgres_source_lines() {
    let database = database().await;
    let role = format!("r{}", uuid::Uuid::new_v4().simple());
    let run = async |statement: String| {
        sqlx::raw_sql(sqlx::AssertSqlSafe(statement)).execute(&database.pool).await.unwrap()
    };
    run(format!("create role {role} nologin")).await;
    let (_, address) = database.url.split_once('@').unwrap();
    let locked_out =
        pipeline(&format!("roles = ['consume']\nledger.url = 'postgres://{role}@{address}'\n"));
    let nowhere = pipeline(&format!("roles = ['consume']\nledger.url = '{}_not'\n", database.url));
    for (pipeline, command, exit, words) in [
        (&locked_out, "migrate", 3, "is not permitted to log in"),
        (&nowhere, "status", 3, "does not exist"),
    ] {
        let ended = pipeline.run(command).await;
        assert_refused(&ended, exit, words);
        assert_eq!(ended.stderr.matches(words).count(), 1, "{ended:?}");
        for noise in [" at line ", "error returned from database"] {
            assert!(!ended.stderr.contains(noise), "{noise:?} is in {ended:?}");
        }
    }
    run(format!("drop role {role}")).await;
}

#[tokio::test]
async fn a_migration_may_take_as_long_as_it_needs() {
    let database = database().await;
    sqlx::raw_sql(
        "create table noted (statement_timeout text);
         create function note() returns event_trigger language plpgsql as
             $$ begin insert into noted values (current_setting('statement_timeout')); end $$;
         create event trigger noting on ddl_command_end when tag in ('CREATE TABLE') execute function note()",
    )
    .execute(&database.pool)
    .await
    .unwrap();
    assert_eq!(code(&Pipeline::on(&database).run("migrate").await), 0);
    let limits: Vec<String> = sqlx::query_scalar("select distinct statement_timeout from noted")
        .fetch_all(&database.pool)
        .await
        .unwrap();
    assert_eq!(limits, ["0"]);
}

#[tokio::test]
async fn status_hides_processes_that_ended_an_hour_ago() {
    let database = database().await;
    let pipeline = Pipeline::on(&database);
    assert_eq!(code(&pipeline.run("migrate").await), 0);
    sqlx::query(
        "insert into process (id, host, pid, version, roles, started_at, seen_at)
         select gen_random_uuid(), 'host-' || minutes, minutes, '0', '{collect}', now() - interval '1 day', now() - make_interval(mins => minutes)
         from unnest(array[0, 59, 61]) as minutes",
    )
    .execute(&database.pool)
    .await
    .unwrap();
    let processes = async |command: &str| {
        let status = json(&pipeline.run(&format!("{command} --output json")).await);
        let rows = status["processes"].as_array().unwrap().iter();
        let mut processes: Vec<(i64, bool)> =
            rows.map(|row| (row["pid"].as_i64().unwrap(), row["gone"] == true)).collect();
        processes.sort_unstable();
        processes
    };
    assert_eq!(processes("status").await, [(0, false), (59, true)]);
    assert_eq!(processes("status --all").await, [(0, false), (59, true), (61, true)]);
}
