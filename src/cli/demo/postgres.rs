//! A PostgreSQL of the demo's own: its data in the demo's folder, on a free loopback port, gone with the demo.

use std::net::TcpListener;
use std::os::unix::fs::{MetadataExt as _, chown};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, bail};
use sqlx::{Connection as _, PgConnection};
use tokio::process::{Child, Command};
use tokio::time::Instant;

use super::folder::Folder;
use crate::cli::{Exit, Failure};

/// How long PostgreSQL may take to answer after its start, and to end after its stop.
const DEADLINE: Duration = Duration::from_secs(30);

/// A running server. Killed when dropped, stopped in order by [`PrivatePostgres::stop`].
#[derive(Debug)]
pub(super) struct PrivatePostgres {
    server: Child,
    bin: PathBuf,
    data: PathBuf,
    user: Option<(u32, u32)>,
    port: u16,
}

impl PrivatePostgres {
    /// Makes a cluster in the folder and starts it.
    pub async fn start(folder: &Folder, bin: Option<&Path>) -> Result<Self, Failure> {
        Self::begin(folder, bin).await.map_err(|error| Failure::of(Exit::Unreachable, format!("the demo's PostgreSQL: {error:#}")))
    }

    async fn begin(folder: &Folder, bin: Option<&Path>) -> anyhow::Result<Self> {
        let bin = match bin {
            Some(bin) => bin.to_owned(),
            None => find()?,
        };
        let data = folder.path.join("postgres");
        std::fs::create_dir(&data).with_context(|| format!("{} cannot be made", data.display()))?;
        let user = own_user()?;
        if let Some((user, group)) = user {
            chown(&data, Some(user), Some(group)).context("its folder cannot be given to the user postgres")?;
        }
        let run = |program: &str| as_user(&bin.join(program), user);
        let mut initdb = run("initdb");
        initdb.arg("-D").arg(&data).args(["-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C.UTF-8", "--no-sync"]);
        let made = initdb.output().await.with_context(|| format!("{} cannot be run", bin.join("initdb").display()))?;
        if !made.status.success() {
            bail!("initdb failed: {}", String::from_utf8_lossy(&made.stderr).trim());
        }
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let log = std::fs::File::create(folder.path.join("postgres.log"))?;
        let server = run("postgres")
            .arg("-D")
            .arg(&data)
            .args(["-p", &port.to_string(), "-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories="])
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("postgres cannot be started")?;
        let postgres = PrivatePostgres { server, bin, data, user, port };
        postgres.wait().await?;
        Ok(postgres)
    }

    /// The URL of a database in it.
    pub fn url(&self, database: &str) -> String {
        format!("postgres://postgres@127.0.0.1:{}/{database}", self.port)
    }

    /// Makes a database.
    pub async fn create_database(&self, name: &'static str) -> anyhow::Result<()> {
        let mut connection = PgConnection::connect(&self.url("postgres")).await?;
        // the name is one of ours, not a user's
        sqlx::raw_sql(sqlx::AssertSqlSafe(format!("create database {name}"))).execute(&mut connection).await?;
        Ok(connection.close().await?)
    }

    async fn wait(&self) -> anyhow::Result<()> {
        let deadline = Instant::now() + DEADLINE;
        loop {
            match PgConnection::connect(&self.url("postgres")).await {
                Ok(connection) => return Ok(connection.close().await?),
                Err(error) if Instant::now() >= deadline => {
                    return Err(error).context("it does not answer; see postgres.log in the folder");
                }
                Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
            }
        }
    }

    /// Ends it in order.
    pub async fn stop(mut self) {
        let mut stop = as_user(&self.bin.join("pg_ctl"), self.user);
        stop.arg("stop").arg("-D").arg(&self.data).args(["-m", "fast", "-w", "-t", "20"]).stdout(Stdio::null()).stderr(Stdio::null());
        let stopped = stop.status().await.is_ok_and(|status| status.success());
        if !stopped || tokio::time::timeout(DEADLINE, self.server.wait()).await.is_err() {
            tracing::warn!("PostgreSQL did not stop in order and is killed");
            let _ = self.server.kill().await;
        }
    }
}

/// A program of PostgreSQL's, under its own user where we are root, and out of reach of the terminal's Ctrl-C, which is ours to handle.
fn as_user(program: &Path, user: Option<(u32, u32)>) -> Command {
    let mut command = Command::new(program);
    command.stdin(Stdio::null()).kill_on_drop(true).process_group(0).current_dir("/");
    if let Some((user, group)) = user {
        command.uid(user).gid(group);
    }
    command
}

/// PostgreSQL refuses to run as root: then it is the user that its package made. None where we are not root.
fn own_user() -> anyhow::Result<Option<(u32, u32)>> {
    if std::fs::metadata("/proc/self")?.uid() != 0 {
        return Ok(None);
    }
    let users = std::fs::read_to_string("/etc/passwd")?;
    let ids = users.lines().find_map(|line| {
        let mut fields = line.split(':');
        (fields.next() == Some("postgres")).then_some(())?;
        Some((fields.nth(1)?.parse().ok()?, fields.next()?.parse().ok()?))
    });
    ids.map(Some).context("PostgreSQL refuses to run as root, and there is no user postgres: install Debian's package postgresql")
}

/// The newest version that Debian's packages have installed.
fn find() -> anyhow::Result<PathBuf> {
    let versions = std::fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    let found = versions.filter_map(|entry| {
        let version: u32 = entry.file_name().to_str()?.parse().ok()?;
        let bin = entry.path().join("bin");
        bin.join("initdb").exists().then_some((version, bin))
    });
    let newest = found.max_by_key(|(version, _)| *version);
    newest
        .map(|(_, bin)| bin)
        .context("no PostgreSQL is installed: install Debian's package postgresql, or name its folder by --postgres-bin")
}
