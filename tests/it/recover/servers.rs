//! A PostgreSQL and its streaming standby, for one test.

use std::fs::Permissions;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use sqlx::{Connection, PgConnection};
use tempfile::TempDir;

use super::world::SOON;
use crate::support::ports::free_port;
use crate::support::process::Process;
use crate::support::{eventually, setting};

/// Whether a commit waits for the standby.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Replication {
    Synchronous,
    Asynchronous,
}

/// Both servers. After a failover the standby has the primary's address.
pub struct Pair {
    port: u16,
    primary: Process,
    standby: Option<Process>,
    folder: TempDir,
}

impl Pair {
    pub async fn start(replication: Replication) -> Pair {
        let folder = TempDir::new().expect("a folder");
        std::fs::set_permissions(folder.path(), Permissions::from_mode(0o777))
            .expect("let PostgreSQL's user in");
        let (port, beside) = (free_port(), free_port());
        let data = data(&folder, "primary");
        runs(
            "initdb",
            &[
                "-U",
                "postgres",
                "-A",
                "trust",
                "-E",
                "UTF8",
                "--locale=C.UTF-8",
                "--no-sync",
                "-D",
                &data,
            ],
        )
        .await;
        let primary = server(&data, port, &[]);
        answers(port).await;
        let copy = self::data(&folder, "standby");
        let from = format!("postgres://postgres@127.0.0.1:{port}/postgres");
        runs(
            "pg_basebackup",
            &["-d", &from, "-D", &copy, "-R", "-X", "stream", "--checkpoint=fast", "--no-sync"],
        )
        .await;
        let standby = server(&copy, beside, &["cluster_name=standby"]);
        answers(beside).await;
        let pair = Pair { port, primary, standby: Some(standby), folder };
        let keeps_confirmed_rows = "select count(*) = 3 from pg_settings where setting = 'on'
             and name in ('fsync', 'synchronous_commit', 'full_page_writes')";
        assert!(pair.run(keeps_confirmed_rows).await, "the servers keep confirmed rows");
        if replication == Replication::Synchronous {
            pair.run("alter system set synchronous_standby_names = 'standby'").await;
            pair.run("select pg_reload_conf()").await;
        }
        let state = if replication == Replication::Synchronous { "sync" } else { "async" };
        eventually(SOON, "the standby follows", || async {
            let query = "select exists (select from pg_stat_replication where state = 'streaming' and sync_state = $1)";
            sqlx::query_scalar(query).bind(state).fetch_one(&mut pair.connection().await).await.expect("an answer")
        })
        .await;
        pair
    }

    /// The URL of the primary's database `postgres`.
    pub fn url(&self) -> String {
        format!("postgres://postgres@127.0.0.1:{}/postgres", self.port)
    }

    /// From now on commits do not reach the standby.
    pub async fn standby_falls_behind(&mut self) {
        let mut standby = self.standby.take().expect("it follows");
        standby.signal("INT");
        assert!(standby.ends_within(SOON).await.success(), "{}", standby.stderr());
    }

    /// The primary dies, and the standby is promoted at its address.
    pub async fn fail_over(&mut self) {
        self.primary.signal("QUIT");
        self.primary.ends_within(SOON).await;
        if self.standby.is_some() {
            self.standby_falls_behind().await;
        }
        self.primary = server(&data(&self.folder, "standby"), self.port, &["primary_conninfo="]);
        answers(self.port).await;
        assert!(self.run("select pg_promote()").await, "not promoted: {}", self.primary.stderr());
    }

    async fn connection(&self) -> PgConnection {
        PgConnection::connect(&self.url()).await.expect("the server answers")
    }

    /// Whether the first column of the first row is true; false without a row.
    async fn run(&self, statement: &'static str) -> bool {
        let answer =
            sqlx::query_scalar(statement).fetch_optional(&mut self.connection().await).await;
        answer.expect("the server obeys").unwrap_or(false)
    }
}

fn data(folder: &TempDir, name: &str) -> String {
    folder.path().join(name).display().to_string()
}

/// PostgreSQL refuses root: then it runs as the user of its package. It ends with the test.
fn program(name: &str, signal: &str) -> Command {
    let mut command = Command::new("setpriv");
    if std::fs::metadata("/proc/self").expect("a process").uid() == 0 {
        command.args(["--reuid=postgres", "--regid=postgres", "--init-groups"]);
    }
    let program: PathBuf = Path::new(&setting("TALLYLINE_TEST_POSTGRES_BIN")).join(name);
    command.args(["--pdeathsig", signal]).arg(program).current_dir("/").env("LC_ALL", "C");
    command
}

async fn runs(name: &str, arguments: &[&str]) {
    let mut command = program(name, "KILL");
    command.args(arguments);
    let mut process = Process::spawn(command);
    let status = process.ends_within(SOON).await;
    assert!(status.success(), "{name}: {}{}", process.stdout(), process.stderr());
}

fn server(data: &str, port: u16, more: &[&str]) -> Process {
    let mut command = program("postgres", "QUIT");
    command.args(["-D", data, "-h", "127.0.0.1", "-p", &port.to_string()]);
    let settings = ["unix_socket_directories=", "max_connections=200", "shared_buffers=64MB"];
    command.args(settings.iter().chain(more).flat_map(|setting| ["-c", setting]));
    Process::spawn(command)
}

async fn answers(port: u16) {
    let url = format!("postgres://postgres@127.0.0.1:{port}/postgres");
    eventually(SOON, "PostgreSQL answers", || async { PgConnection::connect(&url).await.is_ok() })
        .await;
}
