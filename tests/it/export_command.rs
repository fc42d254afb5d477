//! `tallyline export`: its output files, and the ranges that it refuses.

use std::os::unix::fs::MetadataExt as _;
use std::process::{Command, Stdio};
use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use tallyline::clock::Clock;
use tallyline::event::{Event, Topic};
use tallyline::ledger::{
    ActKind, Ledger, LedgerSettings, NewAct, NewPass, RestoreEvidence, Sequence, Source, Subject,
    leases, passes, positions, recoveries, restored, retirements, snapshots, sources,
};
use uuid::Uuid;

use crate::cli::{Pipeline, assert_refused, code, json};
use crate::export::record;
use crate::support::ledger::{
    DEPLOYMENT, OTHER_DEPLOYMENT, migrated, newest_landmark, noon, partition, register_retired,
    take_lease, usage,
};
use crate::support::process::{Process, tallyline};
use crate::support::{Database, eventually};

/// A ledger with some usage, and its pipeline file.
struct Site {
    database: Database,
    pipeline: Pipeline,
    ledger: Ledger,
}

/// The day of all usage.
const DAY: &str = "export usage --from 2025-08-01 --to 2025-08-02";

impl Site {
    async fn new(deployment: Uuid) -> Site {
        let database = migrated().await;
        let pipeline = Pipeline::on(&database);
        let ledger = Ledger::open(
            &LedgerSettings { url: database.url.clone(), connections: 2 },
            Clock::manual(noon()),
        )
        .unwrap();
        let events: Vec<Event> = (0..20).map(|n| usage(deployment, n)).collect();
        register_retired(&ledger, deployment).await;
        record(&ledger, &events).await;
        Site { database, pipeline, ledger }
    }

    /// Reactivates the source, so that its completeness matters.
    async fn in_use(&self) -> Source {
        let act = NewAct {
            actor: "sre-1",
            act: ActKind::Reinstate,
            subject: Subject::Named("a test"),
            reason: "a test",
            detail: serde_json::json!({}),
        };
        assert!(
            self.ledger
                .run(async |conn| retirements::reinstate(
                    conn,
                    DEPLOYMENT,
                    &act,
                    self.ledger.clock.now()
                )
                .await)
                .await
                .unwrap()
        );
        self.ledger
            .run(async |conn| sources::get(conn, DEPLOYMENT).await)
            .await
            .unwrap()
            .expect("registered")
    }

    /// Records a collector pass that is complete until then (None: not reported), with this number
    /// of unread records. Returns the ledger's last sequence.
    async fn pass(
        &self,
        source: &Source,
        complete_until: Option<DateTime<Utc>>,
        unread: i64,
    ) -> Sequence {
        self.runtime_pass(source, complete_until, None, unread).await
    }

    /// Adds events of the next day to the ledger's first batch.
    async fn add_next_day(&self, events: i32) {
        sqlx::query(
            "insert into usage_event (source_id, id, batch_id, log_offset, digest, event_type, quantity, created_at)
             select source_id, 'many-' || n, batch_id, log_offset, digest, event_type, quantity, created_at + interval '1 day'
             from (select * from usage_event limit 1) event, generate_series(1, $1) n",
        )
        .bind(events)
        .execute(&self.database.pool)
        .await
        .unwrap();
    }

    /// Starts an export of this day of August 2025.
    fn start(&self, day: u32, file: &str) -> Process {
        let (from, to) = (format!("2025-08-0{day}"), format!("2025-08-0{}", day + 1));
        tallyline(
            &[
                "export",
                "usage",
                "--from",
                &from,
                "--to",
                &to,
                "--file",
                file,
                "--pipeline",
                &self.pipeline.file,
            ],
            &[],
        )
    }

    /// The same for a coderd with agent runtime.
    async fn runtime_pass(
        &self,
        source: &Source,
        complete_until: Option<DateTime<Utc>>,
        runtime_complete_until: Option<DateTime<Utc>>,
        unread: i64,
    ) -> Sequence {
        let name = format!("collector:{}", source.deployment_id);
        let lease = take_lease(&self.ledger, &name, "test", Duration::from_secs(60))
            .await
            .unwrap()
            .expect("free");
        let mut offsets = self.ledger.run(positions::list).await.unwrap();
        offsets.iter_mut().for_each(|(_, next_offset)| *next_offset += unread);
        let pass = NewPass {
            source_id: source.id,
            started_at: noon(),
            complete_until,
            runtime_complete_until,
            full_sweep: true,
            offsets,
            ..NewPass::default()
        };
        self.ledger.run(async |conn| passes::record(conn, &lease, &pass).await).await.unwrap();
        self.ledger.run(async |conn| leases::release(conn, lease).await).await.unwrap();
        self.ledger.run(snapshots::head).await.unwrap()
    }
}

#[tokio::test]
async fn a_fifo_and_standard_output_receive_the_stream() {
    let site = Site::new(DEPLOYMENT).await;
    let whole = site.pipeline.run(&format!("{DAY} --file -")).await;
    assert!(
        code(&whole) == 0
            && whole.stdout.lines().count() == 21
            && whole.stderr.contains("20 events"),
        "{whole:?}"
    );
    // a pipe is a FIFO, a redirection is a regular file; both have the same name
    let to_name = site.pipeline.run(&format!("{DAY} --file /dev/stdout")).await;
    assert_eq!((code(&to_name), &to_name.stdout), (0, &whole.stdout));
    assert!(to_name.stderr.contains("20 events"), "{to_name:?}");
    let words: Vec<&str> = DAY
        .split(' ')
        .chain(["--file", "/dev/stdout", "--pipeline", &site.pipeline.file])
        .collect();
    let piped = Command::new(env!("CARGO_BIN_EXE_tallyline"))
        .args(words)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert_eq!(
        (piped.status.code(), String::from_utf8_lossy(&piped.stdout).as_ref()),
        (Some(0), whole.stdout.as_str())
    );

    let fifo = site.pipeline.path("fifo");
    assert!(Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    let reader = std::thread::spawn({
        let fifo = fifo.clone();
        move || std::fs::read_to_string(fifo).unwrap()
    });
    let streamed = site.pipeline.run(&format!("{DAY} --file {}", fifo.display())).await;
    assert!(code(&streamed) == 0 && streamed.stdout.contains("20 events"), "{streamed:?}");
    assert_eq!(reader.join().unwrap(), whole.stdout);

    let file = site.pipeline.path("usage.csv");
    assert_eq!(code(&site.pipeline.run(&format!("{DAY} --file {}", file.display())).await), 0);
    assert_eq!(
        (
            std::fs::metadata(&file).unwrap().mode() & 0o7777,
            std::fs::read_to_string(&file).unwrap()
        ),
        (0o640, whole.stdout)
    );
    drop(site.database);
}

#[tokio::test]
async fn a_range_beyond_what_is_complete_is_refused_unless_that_is_allowed() {
    let site = Site::new(DEPLOYMENT).await;
    let end = noon() + TimeDelta::hours(12);
    let source = site.in_use().await;
    let export = async |more: &str| site.pipeline.run(&format!("{DAY} --file - {more}")).await;
    let id = DEPLOYMENT.to_string();

    let never_read = export("").await;
    assert_refused(&never_read, 4, "not read by a collector");
    assert!(
        never_read.stderr.contains(&id) && never_read.stderr.contains("--allow-incomplete"),
        "{never_read:?}"
    );

    site.pass(&source, Some(end - TimeDelta::seconds(1)), 0).await;
    assert_refused(
        &export("").await,
        4,
        "is complete only until 2025-08-01T23:59:59Z, but the range ends at 2025-08-02T00:00:00Z",
    );
    let allowed = site
        .pipeline
        .run(&format!(
            "{DAY} --file {} --allow-incomplete --output json",
            site.pipeline.path("a.csv").display()
        ))
        .await;
    assert!(
        code(&allowed) == 0 && json(&allowed)["incomplete"].as_str().unwrap().contains(&id),
        "{allowed:?}"
    );

    let before = site.pass(&source, Some(end), 0).await;
    let complete = site
        .pipeline
        .run(&format!("{DAY} --file {} --output json", site.pipeline.path("b.csv").display()))
        .await;
    assert!(code(&complete) == 0 && json(&complete)["incomplete"].is_null(), "{complete:?}");
    // no row of the range came after the earlier sequence: it was complete then
    assert_eq!(export(&format!("--as-of {before}")).await.stdout.lines().count(), 1 + 20);

    // another deployment does not matter unless it is exported
    let other = site
        .ledger
        .run(async |conn| {
            sources::register(conn, OTHER_DEPLOYMENT, noon(), None, site.ledger.clock.now()).await
        })
        .await
        .unwrap();
    assert_eq!(code(&export(&format!("--source {DEPLOYMENT}")).await), 0);
    assert_refused(&export("").await, 4, &OTHER_DEPLOYMENT.to_string());

    // a hot standby reports no completeness
    site.pass(&other, None, 0).await;
    assert_refused(
        &export("").await,
        4,
        &format!(
            "deployment {OTHER_DEPLOYMENT} does not report completeness: its database is a hot standby"
        ),
    );
}

#[tokio::test]
async fn unread_records_of_the_log_make_the_range_incomplete() {
    let site = Site::new(DEPLOYMENT).await;
    let source = site.in_use().await;
    site.pass(&source, Some(noon() + TimeDelta::days(1)), 3).await;
    assert_refused(
        &site.pipeline.run(&format!("{DAY} --file -")).await,
        4,
        "is complete only until an unknown instant",
    );
}

#[tokio::test]
async fn usage_of_the_range_that_was_recorded_later_makes_an_earlier_sequence_incomplete() {
    let site = Site::new(DEPLOYMENT).await;
    let source = site.in_use().await;
    let export = async |more: &str| site.pipeline.run(&format!("{DAY} --file - {more}")).await;
    let pass = site.pass(&source, Some(noon() + TimeDelta::days(1)), 3).await;
    assert_refused(
        &export(&format!("--as-of {pass}")).await,
        4,
        "is complete only until an unknown instant",
    );

    let events: Vec<Event> = (20..23).map(|n| usage(DEPLOYMENT, n)).collect();
    let read = record(&site.ledger, &events).await;
    let reason = format!(
        "deployment {DEPLOYMENT} has usage in the range that was recorded after sequence {pass}, up to sequence {read}"
    );
    assert_refused(&export(&format!("--as-of {pass}")).await, 4, &reason);
    assert_eq!(
        export(&format!("--as-of {pass} --allow-incomplete")).await.stdout.lines().count(),
        1 + 20
    );
    assert_eq!(export(&format!("--as-of {read}")).await.stdout.lines().count(), 1 + 23);

    // usage of another day or deployment changes nothing
    register_retired(&site.ledger, OTHER_DEPLOYMENT).await;
    record(&site.ledger, &[usage(DEPLOYMENT, 10_000)]).await;
    assert_eq!(code(&export(&format!("--as-of {read}")).await), 0);
    record(&site.ledger, &[usage(OTHER_DEPLOYMENT, 0)]).await;
    assert_eq!(code(&export(&format!("--as-of {read} --source {DEPLOYMENT}")).await), 0);
    assert_refused(&export(&format!("--as-of {read}")).await, 4, &OTHER_DEPLOYMENT.to_string());
}

#[tokio::test]
async fn usage_recorded_during_the_completeness_check_is_in_the_file() {
    let site = Site::new(DEPLOYMENT).await;
    let source = site.in_use().await;
    site.pass(&source, Some(noon() + TimeDelta::days(1)), 3).await;
    let mut checks = site.database.pool.begin().await.unwrap();
    sqlx::query("lock table collector_pass_offset").execute(&mut *checks).await.unwrap();
    let read_meanwhile = async {
        let waiting = "select exists (select from pg_locks where relation = 'collector_pass_offset'::regclass and not granted)";
        eventually(Duration::from_secs(60), "the export asks for completeness", || async {
            sqlx::query_scalar(waiting).fetch_one(&site.database.pool).await.unwrap()
        })
        .await;
        let events: Vec<Event> = (20..23).map(|n| usage(DEPLOYMENT, n)).collect();
        record(&site.ledger, &events).await;
        checks.commit().await.unwrap();
    };
    let command = format!("{DAY} --file -");
    let (export, ()) = tokio::join!(site.pipeline.run(&command), read_meanwhile);
    assert_eq!((code(&export), export.stdout.lines().count()), (0, 1 + 23), "{export:?}");
}

#[tokio::test]
async fn an_hour_whose_agent_runtime_coderd_has_not_written_is_not_complete() {
    let site = Site::new(DEPLOYMENT).await;
    let source = site.in_use().await;
    let end = noon() + TimeDelta::hours(12);
    let command = format!("{DAY} --file -");
    let export = || site.pipeline.run(&command);

    // two minutes after midnight: coderd writes the row of the last hour later
    site.runtime_pass(
        &source,
        Some(end + TimeDelta::minutes(2)),
        Some(end - TimeDelta::hours(1)),
        0,
    )
    .await;
    let reason = format!(
        "deployment {DEPLOYMENT} has agent runtime complete only until 2025-08-01T23:00:00Z, but the range ends at 2025-08-02T00:00:00Z"
    );
    assert_refused(&export().await, 4, &reason);
    site.runtime_pass(&source, Some(end + TimeDelta::minutes(9)), Some(end), 0).await;
    assert_eq!(code(&export().await), 0);
}

#[tokio::test]
async fn an_export_while_a_recovery_is_open_is_refused_with_its_reason() {
    let site = Site::new(DEPLOYMENT).await;
    let landmark = newest_landmark(&site.ledger).await;
    let gone = tallyline::ledger::Landmark {
        recorded_at: landmark.recorded_at + TimeDelta::seconds(1),
        ..landmark
    };
    assert!(
        site.ledger
            .run(async |conn| restored::record_detected(
                conn,
                &RestoreEvidence::Batch(gone),
                site.ledger.clock.now()
            )
            .await)
            .await
            .unwrap()
    );
    let id = site.ledger.run(recoveries::open).await.unwrap().unwrap().id;
    site.ledger
        .run(async |conn| {
            recoveries::set_targets(
                conn,
                id,
                &[(partition(Topic::AgentUsage, 1), 3)],
                site.ledger.clock.now(),
            )
            .await
        })
        .await
        .unwrap();
    let path = site.pipeline.path("usage.csv");
    let refused = site.pipeline.run(&format!("{DAY} --file {}", path.display())).await;
    assert_refused(&refused, 4, "the ledger was restored and has not caught up");
    assert!(!path.exists());
    assert_eq!(
        code(
            &site
                .pipeline
                .run(&format!("{DAY} --file {} --allow-incomplete", path.display()))
                .await
        ),
        0
    );
}

#[tokio::test]
async fn an_export_that_is_stopped_in_the_middle_replaces_no_file_and_can_be_repeated() {
    const EVENTS: usize = 150_000;
    let site = Site::new(DEPLOYMENT).await;
    site.add_next_day(i32::try_from(EVENTS).unwrap()).await;
    let file = site.pipeline.path("usage.csv");
    std::fs::write(&file, "old").unwrap();
    let name = file.to_str().unwrap();
    let unfinished = || {
        let entries = std::fs::read_dir(site.pipeline.folder.path()).unwrap();
        let mut parts = entries.map(|entry| entry.unwrap().path());
        parts.find(|path| path.extension().is_some_and(|extension| extension == "part"))
    };
    for kill in [false, true] {
        let mut export = site.start(2, name);
        eventually(Duration::from_secs(60), "rows in the unfinished file", || async {
            unfinished()
                .is_some_and(|path| std::fs::metadata(path).is_ok_and(|file| file.len() > 0))
        })
        .await;
        if kill {
            export.kill();
            let written = std::fs::read_to_string(unfinished().expect("remains")).unwrap();
            assert!(written.lines().count() < EVENTS, "it was killed in the middle");
        } else {
            let ended = export.terminate(Duration::from_secs(20)).await;
            assert!(!ended.success() && unfinished().is_none(), "{ended}");
        }
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "old");
    }
    let recorded = "select count(*) from export_file";
    let count: i64 = sqlx::query_scalar(recorded).fetch_one(&site.database.pool).await.unwrap();
    assert_eq!(count, 0, "an export without its file is not recorded");

    let mut texts = Vec::new();
    for _ in 0..2 {
        assert!(site.start(2, name).ends_within(Duration::from_secs(60)).await.success());
        texts.push(std::fs::read_to_string(&file).unwrap());
    }
    assert_eq!(texts[0].lines().count(), 1 + EVENTS);
    assert!(texts[0] == texts[1], "a repeated export has the same bytes");
}

#[tokio::test]
async fn the_memory_of_an_export_does_not_grow_with_its_rows() {
    let site = Site::new(DEPLOYMENT).await;
    site.add_next_day(150_000).await;
    let file = site.pipeline.path("usage.csv").display().to_string();
    let mut peaks = Vec::new();
    for day in [1, 2] {
        // a finished export waits here for the lock, and its peak can be read
        let mut lock = site.database.pool.begin().await.unwrap();
        sqlx::query("lock table export_file").execute(&mut *lock).await.unwrap();
        let mut export = site.start(day, &file);
        let waiting = "select exists (select from pg_locks where relation = 'export_file'::regclass and not granted)";
        eventually(Duration::from_secs(60), "all rows are written", || async {
            sqlx::query_scalar(waiting).fetch_one(&site.database.pool).await.unwrap()
        })
        .await;
        let status = std::fs::read_to_string(format!("/proc/{}/status", export.pid())).unwrap();
        let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
        peaks.push(peak.trim().trim_end_matches(" kB").parse::<u64>().unwrap());
        lock.commit().await.unwrap();
        assert!(export.ends_within(Duration::from_secs(60)).await.success());
    }
    let [few, many] = peaks[..] else { unreachable!("two exports") };
    assert!(many < few + 8 * 1024, "{few} KiB with 20 rows, {many} KiB with 150,000");
}
