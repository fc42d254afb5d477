//! Runs the commands through the real binary. Checks exit codes, and that stdout contains only the
//! answer.

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use chrono::TimeDelta;
use serde_json::Value;
use sha2::{Digest as _, Sha256};
use tallyline::clock::Clock;
use tallyline::event::{Topic, TopicPartition};
use tallyline::ledger::{Head, Ledger, LedgerSettings, Sequence, head, snapshots};
use tallyline::log::{KafkaSettings, Log, PostgresLogSettings};
use tempfile::TempDir;

use crate::export::record;
use crate::support::ledger::{
    DEPLOYMENT, OTHER_DEPLOYMENT, noon, register, register_retired, usage,
};
use crate::support::process::{Ended, run_tallyline};
use crate::support::{self, Database, database, eventually};

/// A pipeline file in its own folder.
pub struct Pipeline {
    pub folder: TempDir,
    pub file: String,
}

pub fn pipeline(text: &str) -> Pipeline {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("pipeline.toml");
    std::fs::write(&path, text).unwrap();
    Pipeline { file: path.to_str().unwrap().to_owned(), folder }
}

impl Pipeline {
    pub fn on(database: &Database) -> Pipeline {
        pipeline(&format!(
            "roles = ['consume']\nledger.url = '{}'\nlog.partitions = 2\n",
            database.url
        ))
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Runs a command on this file. Blanks separate its words.
    pub async fn run(&self, words: &str) -> Ended {
        let words: Vec<&str> = words.split_whitespace().collect();
        run_tallyline(&[&words[..], &["--pipeline", &self.file]].concat(), &[]).await
    }
}

pub fn code(ended: &Ended) -> i32 {
    ended.status.code().unwrap_or_else(|| panic!("no exit code: {ended:?}"))
}

/// The whole of stdout as JSON.
pub fn json(ended: &Ended) -> Value {
    serde_json::from_str(&ended.stdout).unwrap_or_else(|error| panic!("{error}: {ended:?}"))
}

/// Checks the exit code, an empty stdout and these words on stderr.
pub fn assert_refused(ended: &Ended, exit: i32, words: &str) {
    assert_eq!((code(ended), ended.stdout.as_str()), (exit, ""), "{ended:?}");
    assert!(ended.stderr.contains(words), "{words:?} is not in {ended:?}");
}

#[tokio::test]
async fn help_is_an_answer_and_a_wrong_command_line_is_not() {
    let help = run_tallyline(&["--help"], &[]).await;
    assert_eq!((code(&help), help.stderr.as_str()), (0, ""));
    for word in [
        "run",
        "check",
        "migrate",
        "export",
        "explain",
        "rebuild",
        "rejects",
        "replay",
        "status",
        "audit",
        "Exit codes:",
    ] {
        assert!(help.stdout.contains(word), "{word} is not in {}", help.stdout);
    }
    let version = run_tallyline(&["--version"], &[]).await;
    assert_eq!(
        (code(&version), version.stdout.trim()),
        (0, concat!("tallyline ", env!("CARGO_PKG_VERSION")))
    );
    for wrong in [
        &["frobnicate"][..],
        &["check"],
        &["replay", "plan", "--pipeline", "x"],
        &["status", "--pipeline", "x", "--log-level", "a=b=c"],
    ] {
        assert_refused(&run_tallyline(wrong, &[]).await, 2, "");
    }
}

#[tokio::test]
async fn check_lists_every_mistake_at_once() {
    let wrong = pipeline(
        "[ledger]\nurl = 'hunter2'\n[log]\nkind = 'pigeon'\n[license.public_keys]\na = 'hunter3'\n",
    );
    let ended = wrong.run("check --output json --set collect.poll_seconds=0").await;
    assert_eq!((code(&ended), ended.stderr.as_str()), (2, ""), "{ended:?}");
    let keys: Vec<String> = json(&ended)["mistakes"]
        .as_array()
        .unwrap()
        .iter()
        .map(|mistake| mistake["key"].as_str().unwrap().to_owned())
        .collect();
    assert_eq!(
        keys,
        [
            "source.coderd_url",
            "source.coderd_url",
            "ledger.url",
            "log.kind",
            "license.public_keys.a",
            "collect.poll_seconds"
        ]
    );
    let table = wrong.run("check").await;
    assert!(
        code(&table) == 2
            && table.stdout.contains("pipeline.toml:2")
            && !table.stdout.contains("hunter"),
        "{table:?}"
    );
    // another command reports the same on stderr
    let status = wrong.run("status").await;
    assert_refused(&status, 2, "pipeline.toml:4: log.kind must be one of postgres, kafka");
    assert!(!status.stderr.contains("hunter"));

    let good = pipeline("roles = ['consume']\nledger.url = 'env:SURELY_NOT_SET'\n");
    assert_eq!(code(&good.run("check").await), 0);
    let secrets = good.run("check --secrets").await;
    assert!(
        code(&secrets) == 2 && secrets.stdout.contains("SURELY_NOT_SET is not set"),
        "{secrets:?}"
    );
    let by_variable = run_tallyline(
        &["check", "--pipeline", &good.file],
        &[("TALLYLINE_LEDGER_CONNECTIONS", "1")],
    )
    .await;
    assert!(
        code(&by_variable) == 2 && by_variable.stdout.contains("TALLYLINE_LEDGER_CONNECTIONS"),
        "{by_variable:?}"
    );
}

#[tokio::test]
async fn an_unreachable_server_is_reported_without_the_password() {
    let port = support::ports::free_port();
    let nowhere = pipeline(&format!(
        "roles = ['consume']\nledger.url = 'postgres://teller:hunter2@127.0.0.1:{port}/books'\n"
    ));
    for command in ["status", "migrate", "export usage --from 2025-01-01 --to 2025-02-01 --file -"]
    {
        let ended = nowhere.run(command).await;
        assert_refused(&ended, 3, &format!("127.0.0.1:{port}/books as teller"));
        assert!(
            ended.stderr.contains("is it started") && !ended.stderr.contains("hunter2"),
            "{ended:?}"
        );
    }
    let unset = pipeline("roles = ['consume']\nledger.url = 'env:SURELY_NOT_SET'\n");
    assert_refused(
        &unset.run("status").await,
        2,
        "ledger.url: the variable SURELY_NOT_SET is not set",
    );

    let database = database().await;
    let no_kafka = format!("--set log.kind=kafka --set kafka.brokers=127.0.0.1:{port}");
    assert_refused(
        &Pipeline::on(&database).run(&format!("migrate {no_kafka}")).await,
        3,
        &format!("Kafka at 127.0.0.1:{port}"),
    );
    // the ledger's own numbers are still reported
    let status = Pipeline::on(&database).run(&format!("status --output json {no_kafka}")).await;
    assert_eq!(code(&status), 3, "{status:?}");
    assert!(
        status.stderr.contains("the lag is not known") && json(&status)["log_problem"].is_string(),
        "{status:?}"
    );
}

#[tokio::test]
async fn migrate_may_run_again_and_leaves_a_newer_schema_alone() {
    let database = database().await;
    let pipeline = Pipeline::on(&database);
    assert_refused(&pipeline.run("status").await, 3, "tallyline migrate");
    for _ in 0..2 {
        let migrated = pipeline.run("migrate --output json").await;
        assert_eq!(
            (code(&migrated), json(&migrated)["differences"].as_array().map(Vec::len)),
            (0, Some(0)),
            "{migrated:?}"
        );
    }
    let other = pipeline.run("migrate --set log.partitions=3").await;
    assert!(code(&other) == 0 && other.stdout.contains("not changed"), "{other:?}");
    sqlx::query(
        "insert into _sqlx_migrations (version, description, success, checksum, execution_time)
         values (9999, 'of a later version', true, '', 0)",
    )
    .execute(&database.pool)
    .await
    .unwrap();
    assert_refused(&pipeline.run("migrate").await, 4, "newer than this binary's");
    assert_refused(&pipeline.run("status").await, 4, "newer than this binary's");
}

#[tokio::test]
async fn export_writes_the_same_bytes_each_time_and_totals_beside_them() {
    let database = database().await;
    let pipeline = Pipeline::on(&database);
    assert_eq!(code(&pipeline.run("migrate").await), 0);
    let ledger = Ledger::open(
        &LedgerSettings { url: database.url.clone(), connections: 2 },
        Clock::manual(noon()),
    )
    .unwrap();
    let events: Vec<_> = (0..40).map(|n| usage(DEPLOYMENT, n)).collect();
    register_retired(&ledger, DEPLOYMENT).await;
    let sequence = record(&ledger, &events).await;
    // usage(n) counts n % 3 + 1; every fourth is a seat, and only the maximum of seats is reported
    let agents = (0..40_u64).filter(|n| n % 4 != 3).map(|n| n % 3 + 1).sum::<u64>().to_string();

    let range = "export usage --from 2025-08-01 --to 2025-08-02";
    let mut files = Vec::new();
    for name in ["one.csv", "two.csv"] {
        let path = pipeline.path(name);
        let ended = pipeline.run(&format!("{range} --output json --file {}", path.display())).await;
        assert_eq!((code(&ended), ended.stderr.as_str()), (0, ""), "{ended:?}");
        let answer = json(&ended);
        assert_eq!(
            (&answer["events"], &answer["as_of_sequence"]),
            (&40.into(), &sequence.to_string().into())
        );
        let head: Head = answer["head"].as_str().unwrap().parse().unwrap();
        assert_eq!(
            Some(head),
            ledger.run(async |conn| head::at(conn, sequence.number).await).await.unwrap()
        );
        let types: Vec<(&str, u64, &str)> = answer["types"]
            .as_array()
            .unwrap()
            .iter()
            .map(|one| {
                (
                    one["event_type"].as_str().unwrap(),
                    one["events"].as_u64().unwrap(),
                    one["quantity"].as_str().unwrap(),
                )
            })
            .collect();
        assert_eq!(
            types,
            [("dc_managed_agents_v1", 30, agents.as_str()), ("hb_ai_seats_v1", 10, "3")]
        );
        files.push(std::fs::read(path).unwrap());
    }
    assert_eq!(files[0], files[1]);
    assert_eq!(
        files[0].split(|byte| *byte == b'\n').count(),
        42,
        "a header, 40 rows, and nothing behind the last line end"
    );

    let to_stdout = pipeline.run(&format!("{range} --as-of {sequence} --file -")).await;
    assert_eq!((code(&to_stdout), to_stdout.stdout.as_bytes()), (0, files[0].as_slice()));
    assert!(to_stdout.stderr.contains("40 events"), "{to_stdout:?}");
    let table = pipeline
        .run(&format!(
            "{range} --as user-001 --reason June --file {}",
            pipeline.path("three.csv").display()
        ))
        .await;
    assert!(table.stdout.contains(&format!("as of ledger sequence {sequence}")), "{table:?}");
    assert!(table.stdout.contains("seats at most"), "{table:?}");

    // each file is recorded, and none takes a sequence
    let sha256 = hex::encode(Sha256::digest(&files[0]));
    assert!(table.stdout.contains(&sha256), "{table:?}");
    type Row = (i64, i64, String, bool);
    let rows: Vec<Row> = sqlx::query_as("select sequence, events, encode(export_file.sha256, 'hex'), source_id is null from export_file join batch using (sequence, chain) order by export_file.id")
        .fetch_all(&database.pool)
        .await
        .unwrap();
    assert_eq!(rows, vec![(sequence.number, 40, sha256, true); 4]);
    let by: (String, String) =
        sqlx::query_as("select actor, reason from export_file order by id desc limit 1")
            .fetch_one(&database.pool)
            .await
            .unwrap();
    assert_eq!(by, ("user-001".to_owned(), "June".to_owned()));
    assert_eq!(ledger.run(snapshots::head).await.unwrap(), sequence);

    assert_refused(
        &pipeline.run(&format!("{range} --source {OTHER_DEPLOYMENT} --file -")).await,
        4,
        "no such deployment",
    );
    let later = Sequence { number: 9999, ..sequence };
    let refused = format!("--as-of {later}: the ledger's last sequence is {sequence}");
    assert_refused(&pipeline.run(&format!("{range} --as-of {later} --file -")).await, 4, &refused);
    let other = Sequence { incarnation: DEPLOYMENT, ..sequence };
    let refused = format!(
        "--as-of {other} is of another incarnation: this ledger is {}; each restore begins another",
        sequence.incarnation
    );
    assert_refused(&pipeline.run(&format!("{range} --as-of {other} --file -")).await, 4, &refused);
    assert_refused(
        &pipeline.run(&format!("{range} --as-of 9999 --file -")).await,
        2,
        "INCARNATION:SEQUENCE",
    );
    assert_refused(
        &pipeline.run("export usage --from 2025-08-02 --to 2025-08-02 --file -").await,
        2,
        "--from must be before --to",
    );
    assert_refused(
        &pipeline
            .run(&format!("{range} --file {}", pipeline.path("no/folder.csv").display()))
            .await,
        4,
        "cannot be written",
    );
    let parts = std::fs::read_dir(pipeline.folder.path()).unwrap().filter(|entry| {
        entry.as_ref().unwrap().path().extension().is_some_and(|end| end == "part")
    });
    assert_eq!(parts.count(), 0);
}

/// Plans and executes a replay on a log that has more than the ledger. `words` select this log.
async fn replay_adds_missing_events_once(database: &Database, log: &Log, words: &str) {
    let pipeline = Pipeline::on(database);
    let run = async |command: &str| pipeline.run(&format!("{command} {words}")).await;
    assert_eq!(code(&run("migrate").await), 0);
    let ledger = Ledger::open(
        &LedgerSettings { url: database.url.clone(), connections: 2 },
        Clock::manual(noon()),
    )
    .unwrap();
    register(&ledger, &[DEPLOYMENT]).await;
    let events: Vec<_> = (0..30).map(|n| usage(DEPLOYMENT, n).to_message()).collect();
    log.append(Topic::AgentUsage, events).await.unwrap();

    let plan = async |range: &str| {
        let planned = run(&format!("replay plan --output json {range}")).await;
        assert_eq!(code(&planned), 0, "{planned:?}");
        json(&planned)
    };
    let count = |plan: &Value, field: &str| {
        plan["partitions"]
            .as_array()
            .unwrap()
            .iter()
            .map(|one| one[field].as_i64().unwrap())
            .sum::<i64>()
    };
    let first = plan("--all-topics --from earliest").await;
    assert_eq!(
        (
            count(&first, "records"),
            count(&first, "new_events"),
            first["partitions"].as_array().unwrap().len()
        ),
        (30, 30, 6)
    );
    let same = plan("--topic tallyline.agent-usage.v1:0,1 --from PT1H").await;
    assert_eq!((count(&same, "new_events"), same["partitions"].as_array().unwrap().len()), (30, 2));
    assert_eq!(
        count(
            &plan("--topic tallyline.agent-usage.v1 --from 2025-01-01T00:00:00.000 --until 3")
                .await,
            "records"
        ),
        6
    );
    assert_eq!(count(&plan("--all-topics --from latest").await, "records"), 0);

    let queued: Vec<_> = first["effect"]["publications"]
        .as_array()
        .unwrap()
        .iter()
        .map(|one| (one["event_type"].clone(), one["events"].clone()))
        .collect();
    // every fourth of the 30 is a seat
    assert_eq!(
        queued,
        [("dc_managed_agents_v1".into(), 23.into()), ("hb_ai_seats_v1".into(), 7.into())],
        "{first}"
    );
    let hash = |plan: &Value| plan["hash"].as_str().unwrap().to_owned();
    // the command as printed, without the program's name
    let command: Vec<&str> =
        first["execute"].as_str().unwrap().split(' ').skip(1).chain(["--output", "json"]).collect();
    let executed = run_tallyline(&command, &[]).await;
    assert_eq!(
        (code(&executed), json(&executed)["accepted"].as_i64()),
        (0, Some(30)),
        "{executed:?}"
    );
    assert!(executed.stderr.contains("replaying: 30 of 30 records"), "{executed:?}");
    assert_refused(&run(&format!("replay execute --plan {}", hash(&first))).await, 4, "plan again");
    assert_refused(
        &run(&format!("replay execute --plan {}", hash(&same))).await,
        4,
        "the effect has changed since the plan",
    );
    assert_refused(&run("replay execute --plan 00ff").await, 4, "no replay was planned");
    let again = plan("--all-topics --from earliest").await;
    assert_eq!((count(&again, "new_events"), count(&again, "duplicates")), (0, 30));

    assert_refused(
        &run("replay plan --topic tallyline.agent-usage.v1:7 --from earliest").await,
        2,
        "partition 7 does not exist",
    );
    assert_refused(
        &run("replay plan --topic usage --from earliest").await,
        2,
        "tallyline.workspace-builds.v1",
    );
    assert_refused(
        &run("replay plan --all-topics --from yesterday").await,
        2,
        "neither earliest, latest, an offset",
    );
    // one line for all partitions; the JSON has both ends of each of the six
    let clamped = run("replay plan --all-topics --from 99998 --until 99999 --output json").await;
    let warnings: Vec<&str> = clamped.stderr.lines().filter(|line| line.contains("WARN")).collect();
    assert_eq!(
        (code(&clamped), warnings.len(), json(&clamped)["moved_ends"].as_array().map(Vec::len)),
        (0, 1, Some(12)),
        "{clamped:?}"
    );
    assert!(
        warnings[0].contains("--from 99998 and --until 99999: not held by every partition"),
        "{clamped:?}"
    );
    for partition in 0..2 {
        let (_, end) =
            log.watermarks(TopicPartition { topic: Topic::AgentUsage, partition }).await.unwrap();
        let range = format!("tallyline.agent-usage.v1/{partition} 0 to {end}");
        assert_eq!(warnings[0].matches(&range).count(), 1, "{range:?} is not once in {clamped:?}");
    }
    assert_refused(
        &run("replay plan --topic tallyline.agent-usage.v1:0 --from 2 --until 1").await,
        2,
        "would begin at 2 and end at 1",
    );

    let status = run("status --output json").await;
    let answer = json(&status);
    let lags: i64 = answer["partitions"]
        .as_array()
        .unwrap()
        .iter()
        .map(|one| one["lag"].as_i64().unwrap())
        .sum();
    // a replay moves no live position
    assert_eq!((code(&status), lags), (0, 30), "{status:?}");
    assert_eq!(
        answer["events"][1]["events"].as_i64().unwrap()
            + answer["events"][0]["events"].as_i64().unwrap(),
        30
    );
    assert_eq!(answer["publications"][0]["state"], "pending");
    let table = run("status").await;
    assert!(
        table.stdout.contains("replay") && table.stdout.contains(&DEPLOYMENT.to_string()),
        "{table:?}"
    );
}

#[tokio::test]
async fn replay_on_postgres_adds_missing_events_once() {
    let database = database().await;
    let log = Log::postgres(database.pool.clone(), PostgresLogSettings::default());
    replay_adds_missing_events_once(&database, &log, "").await;
}

#[tokio::test]
async fn replay_on_kafka_adds_missing_events_once() {
    let (database, kafka) = (database().await, support::kafka());
    let log = Log::kafka(KafkaSettings {
        topic_prefix: kafka.prefix.clone(),
        ..KafkaSettings::new(&kafka.brokers)
    })
    .unwrap();
    let words = format!(
        "--set log.kind=kafka --set kafka.brokers={} --set kafka.topic_prefix={}",
        kafka.brokers, kafka.prefix
    );
    replay_adds_missing_events_once(&database, &log, &words).await;
}

#[tokio::test]
async fn a_closed_output_pipe_is_not_a_panic() {
    let good = pipeline("roles = ['consume']\nledger.url = 'postgres://h/d'\n");
    for (words, exit) in [(vec!["check", "--pipeline", &good.file], 0), (vec!["--help"], 0)] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_tallyline"));
        let mut child =
            command.args(words).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        drop(child.stdout.take());
        let ended = child.wait_with_output().unwrap();
        assert_eq!(
            (ended.status.code(), String::from_utf8_lossy(&ended.stderr).as_ref()),
            (Some(exit), "")
        );
    }
}

#[tokio::test]
async fn the_clock_can_be_shifted() {
    let database = database().await;
    let pipeline = Pipeline::on(&database);
    assert_eq!(code(&pipeline.run("migrate").await), 0);
    let at = async |offset: &str| {
        let status =
            json(&pipeline.run(&format!("status --output json --clock-offset {offset}")).await);
        status["at"].as_str().unwrap().parse::<chrono::DateTime<chrono::Utc>>().unwrap()
    };
    let (now, back) = (at("0").await, at("-86400").await);
    // the two runs are seconds apart, not hours
    assert!((now - back - TimeDelta::days(1)).abs() < TimeDelta::minutes(10), "{now} {back}");
}

#[tokio::test]
async fn a_slow_statement_is_not_printed_to_the_caller() {
    let database = database().await;
    let pipeline = Pipeline::on(&database);
    assert_eq!(code(&pipeline.run("migrate").await), 0);
    let ledger = Ledger::open(
        &LedgerSettings { url: database.url.clone(), connections: 2 },
        Clock::manual(noon()),
    )
    .unwrap();
    for (filter, is_logged) in [("info", false), ("info,sqlx::query=warn", true)] {
        let lock = sqlx::raw_sql(
            "begin; lock table operator_act in access exclusive mode; select pg_sleep(3); commit",
        );
        let (pool, arguments) = (&ledger.pool, ["audit-log", "--pipeline", &pipeline.file]);
        let locked = "select exists (select from pg_locks where relation = 'operator_act'::regclass and mode = 'AccessExclusiveLock' and granted)";
        let command = async {
            eventually(Duration::from_secs(30), "the table is locked", || async {
                sqlx::query_scalar::<_, bool>(locked).fetch_one(pool).await.unwrap()
            })
            .await;
            run_tallyline(&arguments, &[("RUST_LOG", filter)]).await
        };
        let (lock, ended) = tokio::join!(lock.execute(pool), command);
        lock.unwrap();
        assert_eq!((code(&ended), ended.stderr.contains("slow")), (0, is_logged), "{ended:?}");
        assert_eq!(
            ended.stderr.contains("operation=\"select operator_act\""),
            is_logged,
            "{ended:?}"
        );
        for sql in ["order by", "where", "select id"] {
            assert!(!ended.stderr.contains(sql), "{sql} is in {ended:?}");
        }
        assert!(is_logged || ended.stderr.is_empty(), "{ended:?}");
    }
}
