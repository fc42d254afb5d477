//! Servers that a schedule stops, kills and restarts: a PostgreSQL on a small disk for the ledger,
//! and a Kafka broker.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use rdkafka::ClientConfig;
use rdkafka::admin::{AdminClient, AdminOptions};
use rdkafka::client::DefaultClientContext;
use sqlx::{Connection, PgConnection};
use tempfile::TempDir;

use crate::support::ports::free_port;
use crate::support::process::{Process, bound};
use crate::support::{eventually, setting};

/// The time for a server to start or stop on a busy machine.
const SOON: Duration = Duration::from_secs(60);
/// Enough for the ledgers of successive schedules, and quick to fill.
const DISK_MEGABYTES: u32 = 256;

pub struct Servers {
    pub postgres: Postgres,
    pub kafka: Kafka,
}

impl Servers {
    pub async fn start() -> Servers {
        let (postgres, kafka) = tokio::join!(Postgres::create(), Kafka::create());
        Servers { postgres, kafka }
    }
}

/// A file system in memory that can become full. It has a mount namespace, which ends with its last
/// process, so no mount remains after a run. Without root it needs a kernel that lets users create
/// namespaces, such as Debian's.
struct SmallDisk {
    holder: Process,
    folder: TempDir,
}

impl SmallDisk {
    async fn mount() -> SmallDisk {
        let folder = TempDir::new().expect("a folder");
        std::fs::set_permissions(folder.path(), Permissions::from_mode(0o711))
            .expect("let PostgreSQL's user pass");
        let mut command = bound("unshare", "KILL");
        if is_root() {
            command.args(["--mount", "--propagation", "private"]);
        } else {
            command.args(["--user", "--map-current-user", "--keep-caps", "--mount"]);
        }
        let mount = format!(
            "mount -t tmpfs -o size={DISK_MEGABYTES}m,mode=1777 tmpfs \"$0\" && echo mounted && exec sleep infinity"
        );
        command.args(["sh", "-c", &mount]).arg(folder.path());
        let mut holder = Process::spawn(command);
        eventually(SOON, "the small disk is mounted", || {
            assert!(
                holder.runs(),
                "no file system can be mounted (root, or namespaces of users, are needed): {}",
                holder.stderr()
            );
            let mounted = holder.stdout() == "mounted\n";
            async move { mounted }
        })
        .await;
        SmallDisk { holder, folder }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A command that sees the disk.
    fn inside(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        if !is_root() {
            command.args(["--user", "--preserve-credentials"]);
        }
        command
            .args(["--mount", "--target", &self.holder.pid().to_string(), program])
            .env("LC_ALL", "C");
        command
    }

    /// Writes until the disk is full.
    fn fill(&self) {
        let to = format!("of={}", self.path("filler").display());
        let filled = self
            .inside("dd")
            .args(["if=/dev/zero", "bs=64k", "status=none", &to])
            .output()
            .expect("run dd");
        let stderr = String::from_utf8_lossy(&filled.stderr).into_owned();
        assert!(
            !filled.status.success() && stderr.contains("No space left on device"),
            "the disk is not full: {stderr}"
        );
    }

    fn empty(&self) {
        let emptied =
            self.inside("rm").arg("-f").arg(self.path("filler")).status().expect("run rm");
        assert!(emptied.success());
    }
}

/// PostgreSQL on the small disk. It may stop after an error; [`Postgres::start`] restarts it.
pub struct Postgres {
    disk: SmallDisk,
    port: u16,
    server: Process,
}

impl Postgres {
    async fn create() -> Postgres {
        let disk = SmallDisk::mount().await;
        let mut command = Postgres::program(&disk, "initdb", "KILL");
        command.args([
            "-U",
            "postgres",
            "-A",
            "trust",
            "-E",
            "UTF8",
            "--locale=C.UTF-8",
            "--no-sync",
            "--wal-segsize=1",
            "-D",
        ]);
        let mut initdb = Process::spawn({
            command.arg(disk.path("data"));
            command
        });
        let status = initdb.ends_within(SOON).await;
        assert!(status.success(), "initdb: {}{}", initdb.stdout(), initdb.stderr());
        let port = free_port();
        let server = Postgres::run(&disk, port);
        let mut postgres = Postgres { disk, port, server };
        postgres.answers().await;
        postgres.keeps_confirmed_rows().await;
        postgres
    }

    /// PostgreSQL refuses root: then it runs as the user of its package.
    fn program(disk: &SmallDisk, name: &str, signal: &str) -> Command {
        let mut command = disk.inside("setpriv");
        if is_root() {
            command.args(["--reuid=postgres", "--regid=postgres", "--init-groups"]);
        }
        command
            .args(["--pdeathsig", signal])
            .arg(Path::new(&setting("TALLYLINE_TEST_POSTGRES_BIN")).join(name))
            .current_dir("/");
        command
    }

    fn run(disk: &SmallDisk, port: u16) -> Process {
        let mut command = Postgres::program(disk, "postgres", "QUIT");
        command.args(["-h", "127.0.0.1", "-p", &port.to_string(), "-D"]).arg(disk.path("data"));
        // log segments are created on demand, so that a full disk is noticed soon
        let settings = [
            "unix_socket_directories=",
            "max_connections=200",
            "shared_buffers=64MB",
            "max_wal_size=16MB",
            "min_wal_size=2MB",
            "wal_recycle=off",
            "log_line_prefix=%m [%p] %d %a ",
        ];
        command.args(settings.iter().flat_map(|setting| ["-c", setting]));
        Process::spawn(command)
    }

    async fn keeps_confirmed_rows(&self) {
        let mut connection = PgConnection::connect(&self.url()).await.expect("the server answers");
        let query = "select count(*) = 3 from pg_settings where setting = 'on'
             and name in ('fsync', 'synchronous_commit', 'full_page_writes')";
        let keeps: bool = sqlx::query_scalar(query).fetch_one(&mut connection).await.unwrap();
        assert!(keeps, "a killed server keeps confirmed rows");
    }

    /// The URL of its database `postgres`.
    pub fn url(&self) -> String {
        format!("postgres://postgres@127.0.0.1:{}/postgres", self.port)
    }

    /// Starts it unless it runs, and waits until it answers: after a crash it recovers first. After
    /// a kill, its memory is free only when the last session has noticed.
    pub async fn start(&mut self) {
        self.answers().await;
    }

    async fn answers(&mut self) {
        let url = self.url();
        let waited = async {
            loop {
                if !self.server.runs() {
                    self.server = Postgres::run(&self.disk, self.port);
                }
                if let Ok(connection) = PgConnection::connect(&url).await {
                    let _ = connection.close().await;
                    return;
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        let answered = tokio::time::timeout(SOON, waited).await;
        assert!(answered.is_ok(), "PostgreSQL does not answer: {}", self.server.stderr());
    }

    /// Like `pg_ctl stop -m immediate`.
    pub async fn stop(&mut self) {
        self.server.signal("QUIT");
        self.server.ends_within(SOON).await;
    }

    /// `kill -9` of the postmaster; its sessions end when they notice.
    pub fn kill(&mut self) {
        self.server.kill();
    }

    pub fn fill_disk(&self) {
        self.disk.fill();
    }

    pub fn empty_disk(&self) {
        self.disk.empty();
    }

    /// How often it reported a full disk since its last start.
    pub fn refusals(&self) -> usize {
        self.server.stderr().matches("No space left on device").count()
    }

    /// Makes room for the next schedule.
    pub async fn drop_database(&self, name: &str) {
        drop_database(&self.url(), name).await;
    }
}

/// Drops a database, even with open connections.
pub async fn drop_database(server: &str, name: &str) {
    let mut connection = PgConnection::connect(server).await.expect("the server answers");
    let drop = format!("drop database {name} with (force)");
    sqlx::query(sqlx::AssertSqlSafe(drop))
        .execute(&mut connection)
        .await
        .expect("drop the database");
    connection.close().await.expect("close");
}

/// A broker with the settings of `scripts/test`, at other ports.
pub struct Kafka {
    folder: TempDir,
    pub brokers: String,
    server: Process,
}

impl Kafka {
    async fn create() -> Kafka {
        let folder = TempDir::new().expect("a folder");
        let (broker, controller) = (free_port(), free_port());
        let brokers = format!("127.0.0.1:{broker}");
        let settings = std::fs::read_to_string(setting("TALLYLINE_TEST_KAFKA_PROPERTIES"))
            .expect("the properties of scripts/test");
        // the last of two equal names applies; a site with the new group protocol must shorten the
        // session of 45 s
        let overrides = format!(
            "controller.quorum.voters=1@127.0.0.1:{controller}
listeners=PLAINTEXT://{brokers},CONTROLLER://127.0.0.1:{controller}
advertised.listeners=PLAINTEXT://{brokers}
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT
log.dirs={}
group.consumer.min.session.timeout.ms=6000
group.consumer.session.timeout.ms=6000
group.consumer.min.heartbeat.interval.ms=1000
group.consumer.heartbeat.interval.ms=1000
",
            folder.path().join("data").display()
        );
        std::fs::write(folder.path().join("kafka.properties"), settings + &overrides)
            .expect("write the properties");
        let format = ["kafka.tools.StorageTool", "format", "-t", "MkU3OEVBNTcwNTJENDM2Qg", "-c"];
        let mut formatted = Kafka::program(&folder, &format);
        let status = formatted.ends_within(SOON).await;
        assert!(
            status.success(),
            "formatting Kafka's storage: {}{}",
            formatted.stdout(),
            formatted.stderr()
        );
        let server = Kafka::program(&folder, &["kafka.Kafka"]);
        let mut kafka = Kafka { folder, brokers, server };
        kafka.answers().await;
        kafka
    }

    fn program(folder: &TempDir, words: &[&str]) -> Process {
        let mut command = bound(&setting("TALLYLINE_TEST_KAFKA_PROGRAM"), "KILL");
        command.args(words).arg(folder.path().join("kafka.properties"));
        // it restarts often: a quick start matters more than speed
        command.env(
            "KAFKA_JAVA_OPTIONS",
            "-Xms256m -Xmx512m -XX:+UseSerialGC -XX:TieredStopAtLevel=1",
        );
        Process::spawn(command)
    }

    pub async fn start(&mut self) {
        self.server = Kafka::program(&self.folder, &["kafka.Kafka"]);
        self.answers().await;
    }

    async fn answers(&mut self) {
        let admin = self.admin();
        let waited = async {
            loop {
                assert!(self.server.runs(), "Kafka ended: {}", self.server.stdout());
                let metadata = tokio::task::block_in_place(|| {
                    admin.inner().fetch_metadata(None, Duration::from_millis(500))
                });
                if metadata.is_ok_and(|answer| !answer.brokers().is_empty()) {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        let answered = tokio::time::timeout(SOON, waited).await;
        assert!(answered.is_ok(), "Kafka does not answer: {}", self.server.stdout());
    }

    /// An orderly stop, as in an upgrade.
    pub async fn stop(&mut self) {
        self.server.terminate(SOON).await;
    }

    pub fn kill(&mut self) {
        self.server.kill();
    }

    /// Makes room for the next schedule.
    pub async fn delete_topics(&self, names: &[String]) {
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let deleted = self
            .admin()
            .delete_topics(&names, &AdminOptions::new())
            .await
            .expect("the broker answers");
        assert!(deleted.iter().all(Result::is_ok), "{deleted:?}");
    }

    fn admin(&self) -> AdminClient<DefaultClientContext> {
        ClientConfig::new().set("bootstrap.servers", &self.brokers).create().expect("a client")
    }
}

fn is_root() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").expect("Linux");
    let user = status.lines().find_map(|line| line.strip_prefix("Uid:")).expect("a user");
    user.split_whitespace().nth(1) == Some("0")
}
