//! The demo's private PostgreSQL, with its data in the demo's folder. Other users of the machine
//! cannot log in: it listens on a socket in a closed folder and requires a password.

use std::io::Write as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{MetadataExt as _, chown};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, bail};
use sqlx::{Connection as _, PgConnection};
use tallyline::cause;
use tallyline::cli::{Exit, Failure};
use tokio::process::{Child, Command};
use tokio::time::Instant;
use uuid::Uuid;

use super::folder::Folder;

/// Maximum time for PostgreSQL to answer after its start, and to end after its stop.
const DEADLINE: Duration = Duration::from_secs(30);

/// Linux's limit for the path of a socket.
const SOCKET_PATH_BYTES: usize = 107;

/// A running server. Dropping it kills the server; [`PrivatePostgres::stop`] stops it in order.
pub(super) struct PrivatePostgres {
    server: Child,
    bin: PathBuf,
    data: PathBuf,
    user: Option<(u32, u32)>,
    password: String,
}

impl PrivatePostgres {
    /// Creates a cluster in the folder and starts it.
    pub async fn start(folder: &Folder, bin: Option<&Path>) -> Result<Self, Failure> {
        Self::begin(folder, bin).await.map_err(|error| {
            Failure::of(
                Exit::Unreachable,
                format!("the demo's PostgreSQL: {}", cause::text(error.as_ref())),
            )
        })
    }

    async fn begin(folder: &Folder, bin: Option<&Path>) -> anyhow::Result<Self> {
        let bin = match bin {
            Some(bin) => bin.to_owned(),
            None => find()?,
        };
        let data = folder.path.join("postgres");
        let socket = data.join(".s.PGSQL.5432");
        if socket.as_os_str().len() > SOCKET_PATH_BYTES {
            bail!(
                "{} has more than {SOCKET_PATH_BYTES} bytes, too many for a socket: choose a shorter --data",
                socket.display()
            );
        }
        std::fs::create_dir(&data)
            .with_context(|| format!("{}: cannot be created", data.display()))?;
        let user = own_user()?;
        if let Some((user, group)) = user {
            chown(&data, Some(user), Some(group))
                .context("its folder cannot be given to the user postgres")?;
        }
        let run = |program: &str| as_user(&bin.join(program), user);
        let password = Uuid::new_v4().simple().to_string();
        make_cluster(run("initdb"), folder, &data, user, &password).await?;
        let (_, log) = folder.create("postgres.log")?;
        let mut postgres = run("postgres");
        // the socket is in the data folder
        postgres.arg("-D").arg(&data).args([
            "-p",
            "5432",
            "-c",
            "listen_addresses=",
            "-c",
            "unix_socket_directories=.",
        ]);
        let server = postgres
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("postgres cannot be started")?;
        let postgres = PrivatePostgres { server, bin, data, user, password };
        postgres.wait().await?;
        Ok(postgres)
    }

    /// The URL of a database on this server.
    pub fn url(&self, database: &str) -> String {
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"/-_.".contains(&byte);
        let encoded = |byte: &u8| {
            if plain(*byte) { char::from(*byte).to_string() } else { format!("%{byte:02X}") }
        };
        let folder: String = self.data.as_os_str().as_bytes().iter().map(encoded).collect();
        format!("postgres://postgres:{}@localhost:5432/{database}?host={folder}", self.password)
    }

    pub async fn create_database(&self, name: &'static str) -> anyhow::Result<()> {
        let mut connection = PgConnection::connect(&self.url("postgres")).await?;
        // the name is a constant, not user input
        sqlx::raw_sql(sqlx::AssertSqlSafe(format!("create database {name}")))
            .execute(&mut connection)
            .await?;
        Ok(connection.close().await?)
    }

    async fn wait(&self) -> anyhow::Result<()> {
        let deadline = Instant::now() + DEADLINE;
        loop {
            match PgConnection::connect(&self.url("postgres")).await {
                Ok(connection) => return Ok(connection.close().await?),
                Err(error) if Instant::now() >= deadline => {
                    return Err(error)
                        .context("PostgreSQL: no answer; see postgres.log in the folder");
                }
                Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
            }
        }
    }

    /// Stops the server in order.
    pub async fn stop(mut self) {
        let mut stop = as_user(&self.bin.join("pg_ctl"), self.user);
        stop.arg("stop")
            .arg("-D")
            .arg(&self.data)
            .args(["-m", "fast", "-w", "-t", "20"])
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let stopped = stop.status().await.is_ok_and(|status| status.success());
        if !stopped || tokio::time::timeout(DEADLINE, self.server.wait()).await.is_err() {
            tracing::warn!("PostgreSQL did not stop in order and is killed");
            let _ = self.server.kill().await;
        }
    }
}

/// Runs `initdb`, which restricts the folder to its owner.
async fn make_cluster(
    mut initdb: Command,
    folder: &Folder,
    data: &Path,
    user: Option<(u32, u32)>,
    password: &str,
) -> anyhow::Result<()> {
    let (path, mut file) = folder.create("postgres.password")?;
    file.write_all(password.as_bytes())?;
    chown(&path, user.map(|(user, _)| user), None)?;
    initdb.arg("-D").arg(data).arg("--pwfile").arg(&path);
    initdb.args([
        "-U",
        "postgres",
        "-A",
        "scram-sha-256",
        "-E",
        "UTF8",
        "--locale=C.UTF-8",
        "--no-sync",
    ]);
    let output = initdb.output().await.context("initdb cannot be run")?;
    if !output.status.success() {
        bail!("initdb failed: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(std::fs::remove_file(&path)?)
}

/// A command for a program of PostgreSQL. Root runs it as PostgreSQL's user. It does not get the
/// terminal's Ctrl-C, which the demo handles.
fn as_user(program: &Path, user: Option<(u32, u32)>) -> Command {
    let mut command = Command::new(program);
    command.stdin(Stdio::null()).kill_on_drop(true).process_group(0).current_dir("/");
    if let Some((user, group)) = user {
        command.uid(user).gid(group);
    }
    command
}

/// The user of PostgreSQL's package, because PostgreSQL refuses to run as root. `None` if we are
/// not root.
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
    ids.map(Some).context("user postgres: not in /etc/passwd, and PostgreSQL refuses to run as root: install Debian's package postgresql")
}

/// The program folder of the newest PostgreSQL from Debian's packages.
fn find() -> anyhow::Result<PathBuf> {
    let versions = std::fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    let installed = versions.filter_map(|entry| {
        let version: u32 = entry.file_name().to_str()?.parse().ok()?;
        let bin = entry.path().join("bin");
        bin.join("initdb").exists().then_some((version, bin))
    });
    let newest = installed.max_by_key(|(version, _)| *version);
    newest
        .map(|(_, bin)| bin)
        .context("no PostgreSQL is installed: install Debian's package postgresql, or name its folder by --postgres-bin")
}
