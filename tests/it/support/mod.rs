//! The test environment: a database and topics for each test, real processes, and a wait with a
//! deadline.

// Some test uses each part; which of its methods are used depends on the tests.
#![allow(dead_code)]

pub mod coderd;
pub mod ledger;
pub mod ports;
pub mod process;
pub mod prometheus;
pub mod snapshots;
pub mod tables;

use std::future::Future;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use sqlx::postgres::PgPoolOptions;
use sqlx::{Connection as _, PgConnection, PgPool};
use uuid::Uuid;

/// A setting that `scripts/test` makes when it starts the servers. A missing one is a failure: no
/// test is skipped.
pub fn setting(name: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| {
        panic!("{name} is not set: run scripts/test, or scripts/with-servers cargo test …, which start the servers that this test needs")
    })
}

/// Checks that docs/reference/metrics.md has every family of a text page of `/metrics`.
pub fn assert_described(page: &str) {
    let reference = include_str!("../../../docs/reference/metrics.md");
    for family in page.lines().filter_map(|line| line.strip_prefix("# TYPE ")) {
        let (name, kind) = family.split_once(' ').expect("a name and a type");
        let row = format!("\n| `{name}` | {kind} |");
        assert!(reference.contains(&row), "{name}, a {kind}, is not in docs/reference/metrics.md");
    }
}

/// A database for one test, owned by a superuser. If the server's data is in memory, the next test
/// that creates a database drops it. Otherwise it is removed with the server.
pub struct Database {
    pub name: String,
    pub url: String,
    /// At most five connections, each acquired within ten seconds.
    pub pool: PgPool,
}

/// Creates a database on the server of `scripts/test`.
pub async fn database() -> Database {
    database_on(&setting("TALLYLINE_TEST_POSTGRES")).await
}

/// Creates a database on the server of this database URL.
pub async fn database_on(server: &str) -> Database {
    database_like(server, "template1").await
}

/// Creates a copy of the database `template`, to which nothing is connected.
pub async fn database_like(server: &str, template: &str) -> Database {
    let name = format!("test_{}", Uuid::new_v4().simple());
    let mut connection = PgConnection::connect(server).await.expect("the server answers");
    if in_memory() {
        drop_finished(&mut connection, address(server)).await;
    }
    sqlx::query(sqlx::AssertSqlSafe(format!("create database {name} template {template}")))
        .execute(&mut connection)
        .await
        .expect("create a database");
    connection.close().await.expect("close");
    let url = format!("{}/{name}", address(server));
    Database { pool: pool(&url).await, name, url }
}

/// Whether the data of the server of `scripts/test` is in memory.
pub fn in_memory() -> bool {
    std::env::var_os("TALLYLINE_TEST_POSTGRES_IN_MEMORY").is_some()
}

/// Drops the databases of finished tests on this server. That includes a checkpoint, which is fast
/// in memory only, and waits for every session: one that is blocked by a frozen client can delay
/// it.
async fn drop_finished(connection: &mut PgConnection, address: &str) {
    let finished: Vec<String> =
        FINISHED.lock().unwrap().extract_if(.., |url| self::address(url) == address).collect();
    let timeout = sqlx::query("set statement_timeout = '10s'").execute(&mut *connection).await;
    timeout.expect("the server answers");
    for url in finished {
        let name = &url[address.len() + 1..];
        let drop = format!("drop database if exists {name} with (force)");
        if sqlx::query(sqlx::AssertSqlSafe(drop)).execute(&mut *connection).await.is_err() {
            // the next test tries again
            FINISHED.lock().unwrap().push(url);
        }
    }
    let reset = sqlx::query("reset statement_timeout").execute(connection).await;
    reset.expect("the server answers");
}

/// URLs of the databases of finished tests.
static FINISHED: Mutex<Vec<String>> = Mutex::new(Vec::new());

impl Drop for Database {
    fn drop(&mut self) {
        FINISHED.lock().unwrap().push(self.url.clone());
    }
}

/// A database's URL without its name: the server's.
fn address(url: &str) -> &str {
    url.rsplit_once('/').expect("a database's URL ends in its name").0
}

async fn pool(url: &str) -> PgPool {
    PgPoolOptions::new()
        .max_connections(5)
        .acquire_timeout(Duration::from_secs(10))
        .connect(url)
        .await
        .unwrap_or_else(|error| panic!("PostgreSQL at {url}: {error}"))
}

impl Database {
    /// Keeps the database until the end of the run, without connections. Returns its name for
    /// copies.
    pub async fn into_template(self) -> String {
        self.pool.close().await;
        std::mem::ManuallyDrop::new(self).name.clone()
    }

    /// A backup as an operator takes it, during any activity: `pg_dump` into a file of this folder.
    pub fn back_up(&self, folder: &Path) -> PathBuf {
        let file = folder.join(format!("{}.dump", Uuid::new_v4().simple()));
        let dumped = Command::new("pg_dump")
            .args(["--format=custom", "--file"])
            .arg(&file)
            .arg(&self.url)
            .output()
            .expect("run pg_dump");
        assert!(dumped.status.success(), "{dumped:?}");
        file
    }

    /// Restores a backup beside the database and replaces it, ending all its connections. Later
    /// changes are lost.
    pub async fn restore(&self, backup: &Path) {
        let server = setting("TALLYLINE_TEST_POSTGRES");
        let (admin, beside) = (pool(&server).await, format!("{}_restored", self.name));
        let address = address(&server);
        let run = async |statement: String| {
            sqlx::query(sqlx::AssertSqlSafe(statement))
                .execute(&admin)
                .await
                .expect("the server obeys")
        };
        run(format!("create database {beside}")).await;
        let url = format!("{address}/{beside}");
        let restored = Command::new("pg_restore")
            .args(["--exit-on-error", "--dbname", &url])
            .arg(backup)
            .output()
            .expect("run pg_restore");
        assert!(restored.status.success(), "{restored:?}");
        let (name, lost) = (&self.name, format!("lost_{}", Uuid::new_v4().simple()));
        run(format!("alter database {name} allow_connections false")).await;
        run(format!(
            "select pg_terminate_backend(pid) from pg_stat_activity where datname = '{name}'"
        ))
        .await;
        run(format!("alter database {name} rename to {lost}")).await;
        run(format!("alter database {beside} rename to {name}")).await;
        FINISHED.lock().unwrap().push(format!("{address}/{lost}"));
        admin.close().await;
    }
}

/// The broker, and the prefix that separates one test's topics and groups from others.
pub struct Kafka {
    /// `bootstrap.servers`.
    pub brokers: String,
    /// The prefix of every topic and group name: `t0123….`.
    pub prefix: String,
}

/// The broker of `scripts/test`, with a new prefix.
pub fn kafka() -> Kafka {
    Kafka {
        brokers: setting("TALLYLINE_TEST_KAFKA"),
        prefix: format!("t{}.", Uuid::new_v4().simple()),
    }
}

impl Kafka {
    /// A topic's or group's name with this test's prefix.
    pub fn name(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }
}

/// Repeats until the condition holds.
///
/// # Panics
/// With `what` if it does not hold within `deadline`, or if one answer alone takes longer than
/// that.
pub async fn eventually<F, Answer>(deadline: Duration, what: &str, mut condition: F)
where
    F: FnMut() -> Answer,
    Answer: Future<Output = bool>,
{
    let waited = async {
        while !condition().await {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let begun = Instant::now();
    assert!(
        tokio::time::timeout(deadline, waited).await.is_ok(),
        "not within {:?}: {what}",
        begun.elapsed()
    );
}
