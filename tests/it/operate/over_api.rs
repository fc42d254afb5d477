//! The command line can ask a serving process instead of the databases.

use serde_json::Value;

use super::{Kind, Running, Site, append_builds};
use crate::support::eventually;
use crate::support::ports::free_port;
use crate::support::process::{Ended, run_tallyline};

const SECRETS: [(&str, &str); 3] =
    [("READ", "the read token"), ("ENFORCE", "the enforce token"), ("ADMIN", "the admin token")];

/// A running process with a token of each scope.
async fn serving() -> (Site, Running) {
    let mut site = Site::registered(Kind::Postgres).await;
    for (name, text) in SECRETS {
        let scope = name.to_lowercase();
        site.set(&format!("serve.tokens.the-{scope}"), &format!("'{scope} {text}'"));
    }
    let running = site.start("");
    eventually(super::SOON, "the process is ready", || async {
        running.get("/readyz").await.0.is_success()
    })
    .await;
    (site, running)
}

/// Runs a command against the API at this address.
async fn over(api: &str, words: &str, token: &str) -> Ended {
    let words: Vec<&str> =
        words.split_whitespace().chain(["--api", api]).chain(token.split_whitespace()).collect();
    run_tallyline(&words, &SECRETS).await
}

fn json(ended: &Ended) -> Value {
    assert!(ended.status.success(), "{ended:?}");
    serde_json::from_str(&ended.stdout).unwrap()
}

#[tokio::test]
async fn a_command_shows_the_same_with_and_without_the_api() {
    let (site, mut running) = serving().await;
    append_builds(&site.log(), 0..5).await;
    site.builds(5).await;
    let api = running.api().await;
    let (mut over_http, mut direct) =
        (json(&over(&api, "status --output json", "--token env:READ").await), site.status().await);
    assert!(over_http.as_object_mut().unwrap().remove("folded_sequences").is_some());
    // parts that change by themselves are there, with the time of the answer
    for moving in ["at", "audit", "leases", "processes", "rates"] {
        let [one, other] = [&mut over_http, &mut direct]
            .map(|answer| answer.as_object_mut().unwrap().remove(moving).unwrap());
        assert_eq!(one.as_array().map(Vec::len), other.as_array().map(Vec::len), "{moving}");
    }
    assert_eq!(over_http, direct);
    let paused = over(&api, "pause publish --reason maintenance", "--token env:ADMIN").await;
    assert!(
        paused.status.success() && paused.stdout.contains("publish is paused by the-admin"),
        "{paused:?}"
    );
    let again = over(&api, "pause publish --reason maintenance", "--token env:ADMIN").await;
    assert!(
        again.status.code() == Some(4)
            && again.stderr.contains("409 Conflict: publish is paused by the-admin"),
        "{again:?}"
    );
    let resumed = over(&api, "resume publish", "--token env:ADMIN").await;
    assert!(
        resumed.status.success() && resumed.stdout.contains("publish is resumed"),
        "{resumed:?}"
    );
    let none = over(&api, "rejects list", "--token env:READ").await;
    assert_eq!((none.status.code(), none.stdout.as_str()), (Some(0), "none\n"), "{none:?}");
    let unknown = over(&api, "rejects show 7", "--token env:READ").await;
    assert!(
        unknown.status.code() == Some(4)
            && unknown.stderr.contains("404 Not Found: reject 7 does not exist"),
        "{unknown:?}"
    );
    let explain = format!(
        "explain {} --output json",
        crate::support::ledger::build(crate::support::ledger::DEPLOYMENT, 0).id()
    );
    assert_eq!(
        json(&over(&api, &explain, "--token env:READ").await),
        json(&site.command(&explain).await)
    );
    let audited = over(&api, "audit --patience 1", "--token env:ADMIN").await;
    assert!(
        audited.status.success() && audited.stdout.contains("the books balance"),
        "{audited:?}"
    );
    a_head_is_printed_and_compared(&api).await;
    let planned = json(
        &over(&api, "replay plan --all-topics --from earliest --output json", "--token env:ADMIN")
            .await,
    );
    let execute = planned["execute"].as_str().unwrap().strip_prefix("tallyline ").unwrap();
    assert!(execute.contains(&format!("--api {api}/ --token env:ADMIN")), "{execute}");
    let executed = run_tallyline(&execute.split(' ').collect::<Vec<_>>(), &SECRETS).await;
    assert!(executed.stdout.contains("5 records read again: 0 new, 5 duplicates"), "{executed:?}");
    let again = run_tallyline(&execute.split(' ').collect::<Vec<_>>(), &SECRETS).await;
    assert!(again.status.code() == Some(4) && again.stderr.contains("plan again"), "{again:?}");
    let rebuilt = over(&api, "rebuild plan metrics", "--token env:ADMIN").await;
    assert!(
        rebuilt.status.success() && rebuilt.stdout.contains("the shown state equals the ledger"),
        "{rebuilt:?}"
    );
    let [over_http, direct] =
        [over(&api, "audit-log", "--token env:READ").await, site.command("audit-log").await]
            .map(|ended| ended.stdout);
    assert_eq!(over_http, direct);
    assert_eq!(direct.lines().filter(|line| line.contains("the-admin")).count(), 3, "{direct}");
    running.ends_in_order().await;
}

#[tokio::test]
async fn a_loss_is_recovered_over_the_api() {
    let (site, mut running) = serving().await;
    append_builds(&site.log(), 0..5).await;
    site.builds(5).await;
    let api = running.api().await;
    let execute = |planned: &Value| {
        planned["execute"].as_str().unwrap().strip_prefix("tallyline ").unwrap().to_owned()
    };
    let nothing =
        json(&over(&api, "recover plan --lost log --output json", "--token env:ADMIN").await);
    let direct = json(&site.command("recover plan --lost log --output json").await);
    assert_eq!((&nothing["effect"], &nothing["hash"]), (&direct["effect"], &direct["hash"]));
    assert_eq!(nothing["effect"]["partitions_to_create"], 3, "{nothing}");
    assert_eq!((&nothing["hash"], &nothing["execute"]), (&Value::Null, &Value::Null), "{nothing}");
    let unknown = over(&api, "recover plan --lost coderd", "--token env:ADMIN").await;
    assert!(
        unknown.status.code() == Some(4)
            && unknown.stderr.contains("409 Conflict: coderd's database is not known here"),
        "{unknown:?}"
    );

    let planned =
        json(&over(&api, "recover plan --lost ledger --output json", "--token env:ADMIN").await);
    let words = format!("{} --reason tests", execute(&planned));
    assert!(words.contains(&format!("--api {api}/ --token env:ADMIN")), "{words}");
    let words: Vec<&str> = words.split(' ').collect();
    let executed = run_tallyline(&words, &SECRETS).await;
    assert!(executed.status.success() && executed.stdout.ends_with("done\n"), "{executed:?}");
    let again = run_tallyline(&words, &SECRETS).await;
    assert!(
        again.status.code() == Some(4) && again.stderr.contains("this plan was executed before"),
        "{again:?}"
    );
    let status = over(&api, "status", "--token env:READ").await;
    let mut lines = status.stdout.lines();
    assert!(
        lines.any(|line| line
            .starts_with("the ledger was restored from a backup and has been catching up since ")),
        "{status:?}"
    );
    let forgotten = "acts of operators after the backup are missing from this ledger: pauses, choices of license rules,";
    assert!(lines.next().is_some_and(|line| line.starts_with(forgotten)), "{status:?}");
    let table: Vec<Vec<&str>> =
        lines.skip(1).take(2).map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(table[0], ["RECOVERY", "BY", "SINCE", "REASON"]);
    assert_eq!((table[1][1], table[1][3]), ("the-admin", "tests"));

    // the source no longer exists
    let waiting = site.status().await["recovering"]["sources_to_read"].clone();
    let without: String = waiting
        .as_array()
        .unwrap()
        .iter()
        .map(|id| format!(" --without {}", id.as_str().unwrap()))
        .collect();
    let planned = over(&api, &format!("recover plan --lost ledger{without}"), "--token env:ADMIN")
        .await
        .stdout;
    assert!(
        planned.contains("abandoned by this plan")
            && planned.contains("the\nvendor may have amounts that this ledger does not"),
        "{planned}"
    );
    let planned = json(
        &over(
            &api,
            &format!("recover plan --lost ledger{without} --output json"),
            "--token env:ADMIN",
        )
        .await,
    );
    let unreasoned =
        run_tallyline(&execute(&planned).split(' ').collect::<Vec<_>>(), &SECRETS).await;
    assert!(
        unreasoned.status.code() == Some(2)
            && unreasoned.stderr.contains("reason: abandoning a source needs a reason"),
        "{unreasoned:?}"
    );
    let words = format!("{} --reason retired", execute(&planned));
    let executed = run_tallyline(&words.split(' ').collect::<Vec<_>>(), &SECRETS).await;
    assert!(executed.status.success() && executed.stdout.ends_with("done\n"), "{executed:?}");
    eventually(super::SOON, "the recovery is over", || async {
        site.status().await["recovering"].is_null()
    })
    .await;
    let acts = over(&api, "acts --act recover", "--token env:READ").await.stdout;
    assert!(acts.contains("the-admin") && acts.contains("retired"), "{acts}");
    running.ends_in_order().await;
}

#[tokio::test]
async fn a_refusal_over_the_api_has_its_reason_and_exit_code() {
    let (_site, mut running) = serving().await;
    let api = running.api().await;
    let nowhere = format!("http://127.0.0.1:{}", free_port());
    for (at, words, token, code, message) in [
        (&api, "status", "", 2, "401 Unauthorized: a valid bearer token is needed"),
        (
            &api,
            "status",
            "--token env:ENFORCE",
            2,
            "this needs a token of scope read; the-enforce has the scope enforce",
        ),
        (&api, "status", "--token env:NOT_SET", 2, "NOT_SET is not set"),
        (&api, "status", "--token hunter2", 2, "--token must be env:NAME"),
        (
            &api,
            "pause consume --reason x",
            "--token env:READ",
            2,
            "this needs a token of scope admin; the-read has the scope read",
        ),
        (
            &api,
            "pause consume --reason x --as user-001",
            "--token env:ADMIN",
            2,
            "--as cannot be used with --api",
        ),
        (
            &api,
            "pause consume",
            "--token env:ADMIN",
            2,
            "reason: is missing: it goes into the audit log",
        ),
        (
            &api,
            "recover plan --lost ledger",
            "--token env:READ",
            2,
            "this needs a token of scope admin; the-read has the scope read",
        ),
        (
            &api,
            "recover execute --plan 0",
            "--token env:ADMIN",
            4,
            "404 Not Found: no recovery was planned under 0",
        ),
        (
            &api,
            "acts --act burn",
            "--token env:ADMIN",
            2,
            "[possible values: resubmit, admit, discard,",
        ),
        (&nowhere, "status", "--token env:READ", 3, "no answer from http://127.0.0.1"),
        (
            &"http://10.0.0.1:8090".to_owned(),
            "status",
            "--token env:READ",
            2,
            "must be https:// beyond this machine",
        ),
    ] {
        let ended = over(at, words, token).await;
        assert!(
            ended.status.code() == Some(code) && ended.stderr.contains(message),
            "{words} {token}: {ended:?}"
        );
        assert!(
            !ended.stderr.contains("hunter2") && !ended.stderr.contains("the read token"),
            "{ended:?}"
        );
    }
    // with the variable only
    let by_variable =
        run_tallyline(&["status", "--api", &api], &[("TALLYLINE_API_TOKEN", "the read token")])
            .await;
    assert!(by_variable.status.success(), "{by_variable:?}");
    running.ends_in_order().await;
}

/// `status` and `audit` print the head, and a deep audit compares the ledger with it.
async fn a_head_is_printed_and_compared(api: &str) {
    let status = json(&over(api, "status --output json", "--token env:READ").await);
    let head = status["ledger_head"].as_str().unwrap();
    let sequence = status["ledger_sequence"].as_str().unwrap();
    assert_eq!(head.strip_prefix(sequence).map(str::len), Some(1 + 64), "{status}");
    let audit = async |flags: &str| over(api, &format!("audit {flags}"), "--token env:ADMIN").await;
    let fits = audit(&format!("--patience 1 --deep --head {head}")).await;
    assert!(fits.status.success() && fits.stdout.contains(&format!("\nhead {head}\n")), "{fits:?}");
    let other = format!("{sequence}:{}", "0".repeat(64));
    let differs = audit(&format!("--patience 1 --deep --head {other}")).await;
    assert!(
        differs.status.code() == Some(1) && differs.stdout.contains("head_differs"),
        "{differs:?}"
    );
    let shallow = audit(&format!("--head {head}")).await;
    assert!(shallow.status.code() == Some(2) && shallow.stderr.contains("--deep"), "{shallow:?}");
    let invalid = audit(&format!("--deep --head {sequence}")).await;
    assert!(
        invalid.status.code() == Some(2) && invalid.stderr.contains("INCARNATION:SEQUENCE:CHAIN"),
        "{invalid:?}"
    );
}
