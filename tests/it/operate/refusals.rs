//! Errors that no retry can fix end the process, with a clear message and its exit code.

use std::net::TcpListener;

use super::{Kind, SOON, Site};
use crate::support::ports::free_port;
use crate::support::process::run_tallyline;

#[tokio::test]
async fn a_schema_that_is_newer_ends_the_run() {
    let site = Site::new(Kind::Postgres).await;
    sqlx::query(
        "insert into _sqlx_migrations (version, description, success, checksum, execution_time)
         values (9999, 'of a later version', true, '', 0)",
    )
    .execute(&site.ledger.pool)
    .await
    .unwrap();
    for roles in ["--role consume", "--role serve", "--role consume --role serve"] {
        let mut running = site.start(roles);
        let status = running.process.ends_within(SOON).await;
        let stderr = running.process.stderr();
        assert!(
            status.code() == Some(4) && stderr.contains("newer than this binary's"),
            "{roles}: {status} {stderr}"
        );
    }
    let migrated = site.command("migrate").await;
    assert!(
        migrated.status.code() == Some(4) && migrated.stderr.contains("newer than this binary's"),
        "{migrated:?}"
    );
    assert_eq!(site.count("select count(*) from lease").await, 0);
}

#[tokio::test]
async fn a_port_that_is_taken_ends_the_run() {
    let mut site = Site::new(Kind::Postgres).await;
    for key in ["serve.api_listen", "serve.metrics_listen"] {
        let port = free_port();
        let _taken = TcpListener::bind(("127.0.0.1", port)).unwrap();
        site.set(key, &format!("'127.0.0.1:{port}'"));
        let mut running = site.start("");
        let status = running.process.ends_within(SOON).await;
        let stderr = running.process.stderr();
        assert_eq!(status.code(), Some(2), "{stderr}");
        for words in [key, &format!("127.0.0.1:{port}"), "in use"] {
            assert!(stderr.contains(words), "{words:?} is not in {stderr}");
        }
        site.set(key, "'127.0.0.1:0'");
    }
}

#[tokio::test]
async fn nothing_is_served_beyond_loopback() {
    let mut site = Site::new(Kind::Postgres).await;
    for (key, token) in
        [("serve.api_listen", false), ("serve.metrics_listen", false), ("serve.api_listen", true)]
    {
        site.set(key, "'0.0.0.0:0'");
        if token {
            site.set("serve.tokens.a", "'read the-token'");
        }
        let mut running = site.start("");
        let status = running.process.ends_within(SOON).await;
        let stderr = running.process.stderr();
        assert!(
            status.code() == Some(2) && stderr.contains(key) && stderr.contains("loopback"),
            "{status} {stderr}"
        );
        assert!(!stderr.contains("the-token"));
        site.set(key, "'127.0.0.1:0'");
    }
}

#[tokio::test]
async fn the_shipped_pipelines_have_no_mistake() {
    let needed = [
        ("LEDGER_DATABASE_URL", "postgres://tallyline@127.0.0.1/tallyline"),
        ("CODERD_DATABASE_URL", "postgres://tallyline@127.0.0.1/coder"),
    ];
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/pipelines");
    let mut files: Vec<_> =
        std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    let names: Vec<_> =
        files.iter().map(|file| file.file_name().unwrap().to_str().unwrap().to_owned()).collect();
    assert!(
        ["kafka.toml", "single.toml"].iter().all(|name| names.iter().any(|file| file == name)),
        "{names:?}"
    );
    for file in files {
        let file = file.to_str().unwrap();
        let checked = run_tallyline(&["check", "--secrets", "--pipeline", file], &needed).await;
        assert!(checked.status.success() && checked.stdout.contains("no mistake"), "{checked:?}");
        let unset = run_tallyline(&["check", "--secrets", "--pipeline", file], &needed[..1]).await;
        assert!(
            unset.status.code() == Some(2)
                && unset.stdout.contains("CODERD_DATABASE_URL is not set"),
            "{unset:?}"
        );
    }
}

#[tokio::test]
async fn reading_an_empty_database_writes_nothing_and_concurrent_migrations_succeed() {
    let site = Site::bare(Kind::Postgres).await;
    let answers = futures::future::join_all((0..4).map(|_| site.command("status"))).await;
    for answer in answers {
        assert!(
            answer.status.code() == Some(3) && answer.stderr.contains("run `tallyline migrate`"),
            "{answer:?}"
        );
    }
    assert_eq!(site.count("select count(*) from pg_tables where schemaname = 'public'").await, 0);
    for migrated in futures::future::join_all((0..4).map(|_| site.command("migrate"))).await {
        assert!(migrated.status.success(), "{migrated:?}");
    }
}
