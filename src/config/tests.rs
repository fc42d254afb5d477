//! Tests of loading as a whole: precedence, mistakes, and the shipped files against the table of
//! keys.

use std::path::{Path, PathBuf};
use std::time::Duration;

use proptest::prelude::*;

use super::*;

/// Creates a file with this text. Its folder exists as long as the returned handle.
fn file(text: &str) -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("p.toml");
    std::fs::write(&path, text).expect("written");
    (folder, path)
}

fn load_all(text: &str, variables: &[(&str, &str)], sets: &[&str]) -> Result<Pipeline, Mistakes> {
    let (_folder, path) = file(text);
    let variables =
        variables.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    load(&Input {
        file: path,
        sets: sets.iter().map(|set| (*set).to_owned()).collect(),
        variables,
        public_key_fault: Some(key_fault),
        kafka_property_faults: Some(property_faults),
    })
}

fn property_faults(properties: &[(&str, Option<&str>)]) -> Vec<(usize, String)> {
    let reserved = properties.iter().position(|(name, _)| *name == "acks");
    reserved.map(|index| (index, "is set by Tallyline".to_owned())).into_iter().collect()
}

fn key_fault(_name: &str, key: &str) -> Option<String> {
    (!key.starts_with("key")).then(|| "refused: not a key".to_owned())
}

/// The printed mistakes, with the file's name instead of its path.
fn mistakes(text: &str, variables: &[(&str, &str)], sets: &[&str]) -> Vec<String> {
    let mistakes = load_all(text, variables, sets).expect_err("mistakes");
    mistakes
        .iter()
        .map(|mistake| {
            let line = mistake.to_string();
            let from = line.find("p.toml").unwrap_or(0);
            line[from..].to_owned()
        })
        .collect()
}

const MINIMAL: &str = "roles = ['consume']\nledger.url = 'postgres://h/d'\n";

#[test]
fn a_flag_overrides_a_variable_the_file_and_the_default() {
    let poll = |text: &str, variables: &[(&str, &str)], sets: &[&str]| {
        let pipeline = load_all(&format!("{MINIMAL}{text}"), variables, sets).expect("no mistake");
        (pipeline.collect.poll.as_secs_f64() * 10.0).round()
    };
    let (line, variable) =
        ("collect.poll_seconds = 1", [("TALLYLINE_COLLECT_POLL_SECONDS", "2.5")]);
    assert_eq!(poll("", &[], &[]), 50.0);
    assert_eq!(poll(line, &[], &[]), 10.0);
    assert_eq!(poll(line, &variable, &[]), 25.0);
    assert_eq!(poll(line, &variable, &["collect.poll_seconds=3", "collect.poll_seconds=4"]), 40.0);
}

#[test]
fn all_mistakes_are_listed_with_their_place_and_the_allowed_values() {
    let text = "roles = ['collect', 'colect']
colour = 'blue'
[ledger]
url = 'mysql://user:hunter2@h/d'
connections = '16'
[log]
kind = 'kafka'
partitions = 0
groups = 1
[collect]
poll_seconds = -1
[publish]
mode = 'join'
url = 'ftp://x'
[serve]
api_listen = '0.0.0.0:8090'
tls_key = 'k'
tokens.oncall = 'root hunter2'
[license]
rules = '2024-01'
public_keys = 3
[source]
introduced_at = 2025-01-01
";
    let variables = [
        ("TALLYLINE_COLLECT_MARGIN_SECONDS", "soon"),
        ("TALLYLINE_COLECT", "1"),
        ("TALLYLINE_SERVE_PORT", "8090"),
        ("TALLYLINE_SERVE_PORT_8090", "tcp://10.0.0.1:8090"),
        ("TALLYLINE_LICENSE_PUBLIC_KEYS_A", "key"),
        ("OTHER", "1"),
    ];
    let sets = [
        "serve.metrics_listen=2112",
        "ledger.url",
        "ledger.usl=x",
        "kafka.properties.acks=0",
        "serve.tokens.a b=read hunter2",
    ];
    let expected = "p.toml: kafka.brokers is missing: log.kind is kafka
p.toml:1: roles must be a list of collect, consume, publish, serve, each at most once
p.toml:2: colour is unknown; expected one of roles, ledger, log, kafka, source, collect, consume, retention, license, publish, audit, serve, telemetry
p.toml:4: ledger.url must be a postgres:// URL with a host and a database, env:NAME, file:PATH or exec:COMMAND
p.toml:5: ledger.connections must be a whole number from 2 to 500
p.toml:8: log.partitions must be a whole number from 1 to 1000
p.toml:9: log.groups is unknown; [log] has kind, partitions, group, signing_key, verification_keys
p.toml:11: collect.poll_seconds must be a number of seconds from 0.05 to 3600
p.toml:13: publish.mode must be one of shadow, sole
p.toml:14: publish.url must be an http:// or https:// URL with a host and without user and password
p.toml:16: serve.api_listen must be a loopback address, because TLS is not supported yet: listen on 127.0.0.1 behind a proxy
p.toml:17: serve.tls_key is unknown; [serve] has api_listen, metrics_listen, host_names, tokens
p.toml:18: serve.tokens.oncall must be \"SCOPE SECRET\": enforce, read or admin, then a text, env:NAME, file:PATH or exec:COMMAND
p.toml:20: license.rules must be one of 2025-07, 2026-02
p.toml:21: license.public_keys must be a table of names and public keys
p.toml:23: source.introduced_at must be an instant such as 2025-07-01T00:00:00Z
TALLYLINE_COLECT: is not a setting: a variable is named TALLYLINE_SECTION_KEY after a key of the pipeline file
TALLYLINE_COLLECT_MARGIN_SECONDS: collect.margin_seconds must be a number of seconds from 0 to 3600
TALLYLINE_LICENSE_PUBLIC_KEYS_A: license.public_keys cannot be set by a variable for one entry: set the whole table in TALLYLINE_LICENSE_PUBLIC_KEYS, { \"NAME\" = \"…\" }
TALLYLINE_SERVE_PORT: is not a setting: a variable is named TALLYLINE_SECTION_KEY after a key of the pipeline file
TALLYLINE_SERVE_PORT_8090: is not a setting: a variable is named TALLYLINE_SECTION_KEY after a key of the pipeline file
--set: serve.metrics_listen must be an address and port such as 127.0.0.1:8090
--set (number 2): must be KEY=VALUE
--set (number 3): ledger.usl is unknown; [ledger] has url, connections
--set (number 4): kafka.properties.acks is set by Tallyline
--set (number 5): serve.tokens.a b must be named by 1 to 100 letters, digits, '.', '_' or '-': the audit log shows it as the actor";
    let found = mistakes(text, &variables, &sets);
    assert_eq!(found.join("\n"), expected);
    assert!(!found.join("\n").contains("hunter2"));
}

#[test]
fn missing_settings_depend_on_the_roles() {
    assert_eq!(
        mistakes("roles = ['collect', 'publish']", &[], &[]),
        [
            "p.toml: ledger.url is missing: every command needs the ledger",
            "p.toml: source.coderd_url is missing: the role collect reads coderd's database",
            "p.toml: source.coderd_url is missing: the role publish reads coderd's database",
        ]
    );
    load_all(MINIMAL, &[], &[]).expect("a consumer needs no coderd");
}

#[test]
fn wrong_days_of_retention_are_named_with_their_key() {
    let text = "[retention]\nattempt_days = -1\nreject_payload_days = 36501\nevent_days = 9\n";
    let found = mistakes(text, &[("TALLYLINE_RETENTION_ATTEMPT_DAYS", "1.5")], &[]);
    for expected in [
        "p.toml:2: retention.attempt_days must be a whole number from 0 to 36500",
        "p.toml:3: retention.reject_payload_days must be a whole number from 0 to 36500",
        "p.toml:4: retention.event_days is unknown; [retention] has reject_payload_days, attempt_days",
        "TALLYLINE_RETENTION_ATTEMPT_DAYS: retention.attempt_days must be a whole number from 0 to 36500",
    ] {
        assert!(found.iter().any(|line| line == expected), "{expected}: {found:#?}");
    }
}

#[test]
fn invalid_toml_does_not_hide_other_mistakes_or_show_a_secret() {
    let found = mistakes(
        "[ledger]\nurl = 'postgres://u:hunter2@h/d\nconnections = 1\n[log]\nkind = 'carrier pigeon'\n",
        &[],
        &["x=1"],
    );
    let text = found.join("\n");
    assert!(text.starts_with("p.toml:2: is not valid TOML: "), "{text}");
    assert!(
        text.contains("p.toml:3: ledger.connections")
            && text.contains("p.toml:5: log.kind")
            && text.contains("--set: x is unknown"),
        "{text}"
    );
    assert!(!text.contains("hunter2") && !text.contains("missing"), "{text}");
    let absent = load(&Input { file: "surely/not/there.toml".into(), ..Input::default() })
        .expect_err("no file");
    assert!(
        absent.to_string().starts_with("surely/not/there.toml: the pipeline file cannot be read"),
        "{absent}"
    );
}

#[test]
fn tables_accept_entries_from_the_file_variables_and_flags() {
    let text = format!(
        "{MINIMAL}[kafka.properties]\n\"ssl.ca.location\" = '/ca'\nsecurity.protocol = 'PLAINTEXT'\nsocket.keepalive.enable = true\n"
    );
    let variables = [
        ("TALLYLINE_KAFKA_PROPERTIES_SECURITY_PROTOCOL", "SSL"),
        ("TALLYLINE_LICENSE_PUBLIC_KEYS", "{ \"2022-07-27\" = \"key one\" }"),
    ];
    let pipeline = load_all(
        &text,
        &variables,
        &["kafka.properties.sasl.password=env:P", "license.public_keys.b=key two"],
    )
    .expect("no mistake");
    let properties: Vec<(&str, String)> = pipeline
        .kafka
        .properties
        .iter()
        .map(|(name, secret)| (name.as_str(), secret.origin()))
        .collect();
    let literal = || "the literal secret".to_owned();
    assert_eq!(
        properties,
        [
            ("sasl.password", "env:P".to_owned()),
            ("security.protocol", literal()),
            ("socket.keepalive.enable", literal()),
            ("ssl.ca.location", literal())
        ]
    );
    assert_eq!(pipeline.kafka.properties["security.protocol"].literal(), Some("SSL"));
    assert_eq!(
        pipeline.license.public_keys.into_iter().collect::<Vec<_>>(),
        [("2022-07-27".into(), "key one".into()), ("b".into(), "key two".into())]
    );
    assert_eq!(
        mistakes(MINIMAL, &[], &["license.public_keys.b=lock"]),
        ["--set: license.public_keys.b is refused: not a key"]
    );
}

#[test]
fn the_debug_form_of_a_pipeline_contains_no_secret() {
    let text = format!(
        "{MINIMAL}source.coderd_url = 'postgres://u:hunter2@h/d'\nserve.tokens.a = 'read hunter2'\nkafka.properties.'sasl.password' = 'hunter2'\n"
    );
    let pipeline =
        load_all(&text, &[], &["ledger.url=postgres://u:hunter2@h/d"]).expect("no mistake");
    assert!(!format!("{pipeline:?} {pipeline:#?}").contains("hunter2"));
    assert_eq!(pipeline.secrets().len(), 4);
}

#[test]
fn every_default_is_allowed() {
    for key in KEYS {
        if let Some(default) = key.default {
            value::read(key.kind, &value::Raw::Untyped(default.to_owned()))
                .unwrap_or_else(|problem| panic!("{} {problem}", key.name));
        }
    }
    let pipeline = load_all(MINIMAL, &[], &[]).expect("no mistake");
    assert_eq!(pipeline.collect.poll, Duration::from_secs(5));
    assert_eq!(
        (pipeline.publish.mode, pipeline.log.kind),
        (PublishMode::Shadow, LogKind::Postgres)
    );
}

fn shipped(name: &str) -> (PathBuf, String) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("pipelines").join(name);
    let text = std::fs::read_to_string(&path).expect("a shipped file");
    (path, text)
}

#[test]
fn the_shipped_files_load_unchanged() {
    for (name, kind) in [("single.toml", LogKind::Postgres), ("kafka.toml", LogKind::Kafka)] {
        let pipeline =
            load(&Input { file: shipped(name).0, ..Input::default() }).expect("no mistake");
        assert_eq!(pipeline.log.kind, kind);
        assert_eq!((pipeline.publish.mode, pipeline.roles.len()), (PublishMode::Shadow, 4));
    }
}

#[test]
fn the_default_of_ledger_connections_depends_on_the_roles() {
    for (roles, connections) in [
        ("collect", 6),
        ("consume", 9),
        ("publish", 7),
        ("serve", 8),
        ("collect,publish", 8),
        ("collect,consume,publish,serve", 15),
    ] {
        let pipeline = load(&Input {
            file: shipped("single.toml").0,
            sets: vec![format!("roles={roles}")],
            ..Input::default()
        });
        assert_eq!(pipeline.expect("no mistake").ledger.connections, connections, "{roles}");
    }
}

#[test]
fn the_shipped_files_contain_every_key_with_its_doc_line_and_default() {
    for name in ["single.toml", "kafka.toml"] {
        let (_, text) = shipped(name);
        let uncommented = |line: &str| line.strip_prefix("# ").unwrap_or(line).to_owned();
        let mut section = String::new();
        let mut before = "";
        let mut found = Vec::new();
        for line in text.lines() {
            let code = uncommented(line);
            if let Some(opened) = code.strip_prefix('[').and_then(|code| code.strip_suffix(']')) {
                section = opened.to_owned();
            }
            let full = match code.split_once(" = ") {
                Some((key, _)) if section.is_empty() => key.to_owned(),
                Some((key, _)) => format!("{section}.{key}"),
                None => section.clone(),
            };
            if let Some(key) = KEYS
                .iter()
                .find(|key| key.name == full && (code.contains(" = ") || code.starts_with('[')))
            {
                assert_eq!(before.trim_start_matches("# "), key.doc, "{name}: {full}");
                if let (Some(default), true, Some((_, value))) =
                    (key.default, line.starts_with('#'), code.split_once(" = "))
                {
                    assert_eq!(value.trim_matches('"'), default, "{name}: {full}");
                }
                found.push(full);
            }
            before = line;
        }
        let all: Vec<String> = KEYS.iter().map(|key| key.name.to_owned()).collect();
        found.sort();
        let mut sorted = all.clone();
        sorted.sort();
        assert_eq!(found, sorted, "{name}");
    }
}

/// Every commented key must be usable. Only missing files are refused.
#[test]
fn the_shipped_examples_are_allowed() {
    for name in ["single.toml", "kafka.toml"] {
        let (_, text) = shipped(name);
        let code =
            |line: &str| line.contains(" = ") && !line.contains("`") || line.starts_with("# [");
        let whole: Vec<&str> = text
            .lines()
            .map(|line| if code(line) { line.trim_start_matches("# ") } else { line })
            .collect();
        let found = mistakes(&whole.join("\n"), &[], &[]);
        let keys: Vec<&str> =
            found.iter().map(|mistake| mistake.split(' ').nth(1).expect("a key")).collect();
        assert_eq!(keys, ["license.public_keys.2022-07-27"], "{found:#?}");
    }
}

/// The variables that Kubernetes sets for a Service with one port. The names are given in the
/// notation of variables.
fn of_kubernetes(
    service: &str,
    port_name: &str,
    port: u16,
    protocol: &str,
) -> Vec<(String, String)> {
    let (address, scheme) = ("10.0.0.1", protocol.to_lowercase());
    let link = format!("{service}_PORT_{port}_{protocol}");
    vec![
        (format!("{service}_SERVICE_HOST"), address.into()),
        (format!("{service}_SERVICE_PORT"), port.to_string()),
        (format!("{service}_SERVICE_PORT_{port_name}"), port.to_string()),
        (format!("{service}_PORT"), format!("{scheme}://{address}:{port}")),
        (link.clone(), format!("{scheme}://{address}:{port}")),
        (format!("{link}_PROTO"), scheme),
        (format!("{link}_PORT"), port.to_string()),
        (format!("{link}_ADDR"), address.into()),
    ]
}

proptest! {
    /// A Service beside the pods has no effect, for any name that begins with `tallyline`.
    #[test]
    fn variables_of_kubernetes_for_services_are_ignored(
        service in "TALLYLINE(_[A-Z0-9]{1,8}){0,3}", port_name in "[A-Z0-9]{1,8}(_[A-Z0-9]{1,8}){0,2}", port: u16, protocol in "TCP|UDP|SCTP",
    ) {
        for (name, value) in of_kubernetes(&service, &port_name, port, &protocol) {
            let loaded = load_all(MINIMAL, &[(&name, &value)], &[]);
            prop_assert!(loaded.is_ok(), "{}: {:?}", name, loaded);
        }
    }

    /// A setting is never ignored as a variable of Kubernetes, for any value.
    #[test]
    fn a_setting_is_never_treated_as_a_variable_of_kubernetes(index in 0..KEYS.len(), value in "(tcp://)?\\PC{0,30}") {
        let variable = KEYS[index].variable();
        prop_assert!(!overrides::is_of_kubernetes(&variable, &value), "{}", variable);
    }

    /// Any file, flags and variables give a pipeline or mistakes, without a panic.
    #[test]
    fn any_input_gives_a_pipeline_or_mistakes(text in "\\PC*|([a-z_\\[\\].='\" 0-9\n]{0,60})", set in "\\PC*|[a-z._]{1,20}=\\PC{0,20}", variable in "TALLYLINE_[A-Z_]{0,20}", value in "\\PC*") {
        match load_all(&text, &[(&variable, &value)], &[&set]) {
            Ok(_) => {}
            Err(mistakes) => prop_assert!(!mistakes.is_empty()),
        }
    }

    /// Any text for any key is accepted, or reported once for that key. A refused value is never
    /// repeated.
    #[test]
    fn any_value_of_any_key_is_accepted_or_named(index in 0..KEYS.len(), value in "[a-z]{12,20}|[0-9]{1,12}|\\PC{0,30}") {
        let key = KEYS[index];
        let set = format!("{}={value}", key.name);
        if let Err(mistakes) = load_all(MINIMAL, &[], &[&set]) {
            prop_assert!(mistakes.iter().any(|mistake| mistake.key.as_deref().is_some_and(|name| name.starts_with(key.name)) || mistake.key.as_deref() == Some("source.coderd_url") || mistake.key.as_deref() == Some("kafka.brokers")), "{mistakes}");
            if value.len() >= 12 && value.bytes().all(|byte| byte.is_ascii_lowercase()) {
                prop_assert!(!mistakes.to_string().contains(&value), "{mistakes}");
            }
        }
    }

    /// An allowed value arrives in the pipeline from each place.
    #[test]
    fn a_number_has_the_same_value_from_each_place(connections in 2_u32..=500) {
        let by_file = load_all(&format!("{MINIMAL}ledger.connections = {connections}"), &[], &[]);
        let by_variable = load_all(MINIMAL, &[("TALLYLINE_LEDGER_CONNECTIONS", &connections.to_string())], &[]);
        let by_flag = load_all(MINIMAL, &[], &[&format!("ledger.connections={connections}")]);
        for loaded in [by_file, by_variable, by_flag] {
            prop_assert_eq!(loaded.expect("no mistake").ledger.connections, connections);
        }
    }
}

#[test]
fn signature_keys_need_32_bytes_a_name_and_a_known_signing_key() {
    let found = mistakes(
        &format!(
            "{MINIMAL}log.signing_key = '2027'\nlog.verification_keys.'2026' = 'hunter2'\nlog.verification_keys.'a:b' = 'env:KEY'\n"
        ),
        &[],
        &[],
    );
    let reports = |key: &str, words: &str| {
        found.iter().any(|mistake| mistake.contains(key) && mistake.contains(words))
    };
    assert!(
        reports("log.verification_keys.2026", "must be a secret of at least 32 bytes"),
        "{found:#?}"
    );
    assert!(reports("log.verification_keys.a:b", "must be named by"), "{found:#?}");
    assert!(
        reports("log.signing_key", "must be the name of one of log.verification_keys"),
        "{found:#?}"
    );
    assert!(!found.iter().any(|mistake| mistake.contains("hunter2")), "{found:#?}");
    let pipeline = load_all(
        &format!("{MINIMAL}log.signing_key = '2026'\nlog.verification_keys.'2026' = 'env:KEY'\n"),
        &[],
        &[],
    );
    let log = pipeline.expect("no mistake").log;
    assert_eq!((log.signing_key.as_deref(), log.verification_keys.len()), (Some("2026"), 1));
}
