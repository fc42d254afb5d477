//! Runs the commands of the steps of docs/install.md, with roles that have only the rights that it
//! grants.

use std::time::Duration;

use tallyline_sim::coderd::SchemaVersion;
use tempfile::TempDir;
use uuid::Uuid;

use crate::support::coderd::Coderd;
use crate::support::process::{Ended, Process, run_tallyline, tallyline};
use crate::support::{self, eventually, ports};

const SOON: Duration = Duration::from_secs(120);

/// The commands of the section, without their comments.
fn commands() -> Vec<String> {
    let page = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/install.md"))
        .expect("the page");
    let section =
        page.split("\n## ").find(|section| section.starts_with("Steps\n")).expect("the section");
    let code = section.lines().filter_map(|line| line.strip_prefix("       "));
    code.map(|line| line.split(" # ").next().unwrap_or(line).trim().to_owned())
        .filter(|line| !line.is_empty())
        .collect()
}

/// A site whose operator follows the page.
struct Install {
    coderd: Coderd,
    ledger: String,
    file: String,
    environment: Vec<(String, String)>,
    api: String,
    _folder: TempDir,
}

impl Install {
    /// The operator has an empty server for the ledger, a coderd without a reader, and one of the
    /// shipped files.
    async fn new(shipped: &str) -> Install {
        let coderd = Coderd::new(SchemaVersion::Sep2026).await;
        for _ in 0..3 {
            coderd.creation().await;
        }
        sqlx::raw_sql("drop schema tallyline cascade")
            .execute(&coderd.database.pool)
            .await
            .unwrap();
        let (folder, kafka, unique) =
            (TempDir::new().unwrap(), support::kafka(), Uuid::new_v4().simple().to_string());
        let file = folder.path().join("site.toml");
        let text =
            std::fs::read_to_string(format!("{}/pipelines/{shipped}", env!("CARGO_MANIFEST_DIR")))
                .unwrap();
        let key =
            "# [license.public_keys]\n# \"2022-07-27\" = \"file:/etc/tallyline/license-key.pem\"\n";
        assert!(text.contains(key), "the file shows where the key goes");
        let own_key =
            "[license.public_keys]\na = \"WGZmZmZmZmZmZmZmZmZmZmZmZmZmZmZmZmZmZmZmZmY=\"\n";
        std::fs::write(
            &file,
            text.replace("kafka-1:9092,kafka-2:9092,kafka-3:9092", &kafka.brokers)
                .replace(key, own_key),
        )
        .unwrap();
        let listen = || format!("127.0.0.1:{}", ports::free_port());
        let (api, metrics) = (listen(), listen());
        let environment = [
            // separates this test's site from those of other tests
            ("TALLYLINE_KAFKA_TOPIC_PREFIX", kafka.prefix.as_str()),
            ("TALLYLINE_SERVE_API_LISTEN", api.as_str()),
            ("TALLYLINE_SERVE_METRICS_LISTEN", metrics.as_str()),
        ];
        let environment =
            environment.map(|(name, value)| (name.to_owned(), value.to_owned())).to_vec();
        Install {
            coderd,
            ledger: unique,
            file: file.display().to_string(),
            environment,
            api,
            _folder: folder,
        }
    }

    fn filled(&self, command: &str) -> String {
        let admin = support::setting("TALLYLINE_TEST_POSTGRES");
        let host = self.coderd.database.url.split(['@', '/']).nth(3).expect("a host").to_owned();
        command
            .replace("CODERD_ADMIN_URL", &self.coderd.database.url)
            .replace("ADMIN_URL", &admin)
            .replace("LEDGER_HOST", &host)
            .replace("CODERD_HOST", &host)
            .replace("/CODERD_DATABASE", &format!("/{}", self.coderd.database.name))
            .replace("tally_ledger", &format!("ledger_{}", self.ledger))
            .replace("tally_reader", &format!("reader_{}", self.ledger))
            .replace("kafka.toml", &self.file)
    }

    fn environment(&self) -> Vec<(&str, &str)> {
        self.environment.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect()
    }

    async fn tallyline(&self, words: &[&str]) -> Ended {
        run_tallyline(words, &self.environment()).await
    }

    /// Runs the commands in order. The last one runs until the test ends.
    async fn follow(&mut self) -> Process {
        let commands: Vec<String> = commands().iter().map(|command| self.filled(command)).collect();
        let kinds =
            |word: &str| commands.iter().filter(|command| command.starts_with(word)).count();
        assert_eq!(
            (kinds("psql "), kinds("export "), kinds("tallyline ")),
            (5, 2, 4),
            "{commands:#?}"
        );
        for command in commands {
            let words: Vec<&str> = command.split_whitespace().collect();
            match words.as_slice() {
                ["export", set] => {
                    let (name, value) = set.split_once('=').expect("a name and a value");
                    self.environment.push((name.to_owned(), value.to_owned()));
                }
                ["psql", ..] => self.psql(&command),
                ["tallyline", "run", rest @ ..] => {
                    return tallyline(&[&["run"], rest].concat(), &self.environment());
                }
                ["tallyline", words @ ..] => {
                    let ended = self.tallyline(words).await;
                    assert!(ended.status.success(), "{command}: {ended:?}");
                }
                _ => panic!("{command}"),
            }
        }
        panic!("no command was run");
    }

    /// Runs it in a shell. Puts the shown deployment id into the pipeline file.
    fn psql(&self, command: &str) {
        let mut shell = std::process::Command::new("sh");
        shell
            .args(["-c", command])
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .envs(self.environment());
        let ended = shell.output().expect("a shell");
        assert!(ended.status.success(), "{command}: {ended:?}");
        if command.contains("deployment_id()") {
            let output = String::from_utf8(ended.stdout).unwrap();
            assert_eq!(output.trim(), self.coderd.deployment.to_string());
            let text = std::fs::read_to_string(&self.file).unwrap();
            std::fs::write(
                &self.file,
                text.replace("00000000-0000-4000-8000-000000000000", output.trim()),
            )
            .unwrap();
        }
    }
}

async fn run_it_counts_builds(shipped: &str) {
    let mut install = Install::new(shipped).await;
    let mut process = install.follow().await;
    let database = install.filled("tally_ledger");
    let url = support::setting("TALLYLINE_TEST_POSTGRES").rsplit_once('/').unwrap().0.to_owned()
        + "/"
        + &database;
    let pool = sqlx::PgPool::connect(&url).await.unwrap();
    let counted = async || -> (i64, bool) {
        let query = "select (select count(*) from workspace_build), exists (select from collector_progress where complete_until is not null)";
        sqlx::query_as(query).fetch_one(&pool).await.unwrap()
    };
    eventually(SOON, "builds are counted, and complete", async || counted().await == (3, true))
        .await;
    let entitlements = format!("http://{}/api/v2/entitlements", install.api);
    eventually(SOON, "it is ready and answers", async || {
        reqwest::get(&entitlements).await.is_ok_and(|answer| answer.status().is_success())
    })
    .await;
    let (sessions, superusers): (i64, i64) = sqlx::query_as(
        "select count(*) filter (where datname = current_database()), count(*) filter (where rolsuper)
         from pg_stat_activity join pg_roles on rolname = usename where usename like '%' || $1",
    )
    .bind(&install.ledger)
    .fetch_one(&pool)
    .await
    .unwrap();
    // 13 for the roles, and one listener for each of two folds
    assert!((1..=15).contains(&sessions), "{sessions} sessions");
    assert_eq!(superusers, 0);
    let connected = install.tallyline(&["check", "--connect", "--pipeline", &install.file]).await;
    let warnings = connected.stdout.matches("warning: ").count();
    assert!(
        connected.status.success()
            && warnings == 1
            && connected.stdout.contains("log.verification_keys"),
        "{connected:?}"
    );
    assert!(process.runs(), "{}", process.stderr());
    process.terminate(Duration::from_secs(60)).await;
}

#[tokio::test]
async fn the_steps_of_the_install_page_count_builds_on_kafka() {
    run_it_counts_builds("kafka.toml").await;
}

#[tokio::test]
async fn the_steps_of_the_install_page_count_builds_on_postgres() {
    run_it_counts_builds("single.toml").await;
}

#[tokio::test]
async fn check_connect_lists_every_missing_grant_with_its_statement() {
    let mut install = Install::new("kafka.toml").await;
    drop(install.follow().await);
    let reader = install.filled("tally_reader");
    let statements = format!(
        "revoke select (username) on users from {reader}; revoke select (is_default) on organizations from {reader};
         revoke execute on function tallyline.oldest_transaction() from {reader}"
    );
    sqlx::raw_sql(sqlx::AssertSqlSafe(statements))
        .execute(&install.coderd.database.pool)
        .await
        .unwrap();
    let unused = ports::free_port();
    let brokers = format!("kafka.brokers=127.0.0.1:{unused}");
    let ended = install
        .tallyline(&["check", "--connect", "--pipeline", &install.file, "--set", &brokers])
        .await;
    assert_eq!(ended.status.code(), Some(2), "{ended:?}");
    for problem in [
        format!("grant select (is_default) on organizations to {reader};"),
        format!("grant select (username) on users to {reader};"),
        format!("grant execute on function tallyline.oldest_transaction() to {reader};"),
        format!("127.0.0.1:{unused}"),
    ] {
        assert!(ended.stdout.contains(&problem), "{problem}: {ended:?}");
    }
    let sole = install
        .tallyline(&[
            "check",
            "--connect",
            "--pipeline",
            &install.file,
            "--set",
            "publish.mode=sole",
        ])
        .await;
    assert!(sole.stdout.contains("sole refuses to start"), "{sole:?}");
    // the readable id is enough
    let mistyped = Uuid::new_v4();
    let set = format!("source.deployment_id={mistyped}");
    let ended = install
        .tallyline(&["check", "--connect", "--pipeline", &install.file, "--set", &set])
        .await;
    let advice = format!(" to {}", install.coderd.deployment);
    let corrected = ended
        .stdout
        .lines()
        .any(|line| line.contains(&mistyped.to_string()) && line.contains(&advice));
    assert!(corrected, "{ended:?}");
}

#[tokio::test]
async fn a_ledger_role_without_rights_gets_the_statements_that_grant_them() {
    let install = Install::new("single.toml").await;
    let (role, database) = (install.filled("tally_ledger"), support::database().await);
    sqlx::raw_sql(sqlx::AssertSqlSafe(format!("create role {role} login")))
        .execute(&database.pool)
        .await
        .unwrap();
    let url = database.url.replace("postgres://postgres@", &format!("postgres://{role}@"));
    let set = format!("ledger.url={url}");
    let arguments = [
        "--pipeline",
        install.file.as_str(),
        "--set",
        &set,
        "--set",
        &format!("source.coderd_url={}", install.coderd.database.url),
    ];
    let needed = format!("grant create on schema public to {role};");
    let migrated = install.tallyline(&[&["migrate"][..], &arguments].concat()).await;
    assert!(migrated.status.code() == Some(3) && migrated.stderr.contains(&needed), "{migrated:?}");
    let checked = install.tallyline(&[&["check", "--connect"][..], &arguments].concat()).await;
    assert!(checked.status.code() == Some(2) && checked.stdout.contains(&needed), "{checked:?}");
}
