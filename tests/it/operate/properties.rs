//! `kafka.properties` are checked without a broker, and no message contains a value.

use super::{Kind, Site};

#[tokio::test]
async fn wrong_kafka_properties_are_named_with_the_fix_and_without_their_values() {
    let mut site = Site::bare(Kind::Kafka).await;
    let lines = [
        ("sasl.passwrd", "hunter2-a", "is unknown to librdkafka"),
        ("security.protocol", "hunter2-b", "must be one of plaintext, ssl"),
        ("sasl.mechanism", "hunter2-c", "must be one of PLAIN"),
        ("sasl.jaas.config", "hunter2-d", "Java client only: set sasl.username and sasl.password"),
        ("session.timeout.ms", "hunter2-e", "librdkafka rejects"),
        ("group.instance.id", "hunter2-f", "two processes with one id would fence each other"),
        ("compression.type", "gzip", "is another spelling of compression.codec"),
        ("compression.codec", "zstd", ""),
        ("enable.auto.commit", "true", "is set by Tallyline"),
    ];
    for (name, value, _) in lines {
        site.set(&format!("kafka.properties.'{name}'"), &format!("'{value}'"));
    }
    let checked = site.command("check").await;
    assert_eq!(checked.status.code(), Some(2), "{checked:?}");
    let run = site.command("run").await;
    assert_eq!(run.status.code(), Some(2), "{run:?}");
    for (name, _, words) in lines.iter().filter(|(.., words)| !words.is_empty()) {
        for ended in [&checked, &run] {
            let text = format!("{}{}", ended.stdout, ended.stderr);
            assert!(
                text.lines().any(|line| line.contains(&format!("kafka.properties.{name}"))
                    && line.contains(words)),
                "{name}: {text}"
            );
            assert!(!text.contains("hunter2"), "{text}");
        }
    }
}

/// librdkafka refuses some only when it creates a client.
#[tokio::test]
async fn properties_that_librdkafka_refuses_later_are_reported_without_values() {
    for (name, value) in [
        ("ssl.key.pem", "hunter2"),
        ("ssl.ca.location", "/nowhere/hunter2"),
        ("partition.assignment.strategy", "range,hunter2"),
    ] {
        let mut site = Site::bare(Kind::Kafka).await;
        site.set("kafka.properties.'security.protocol'", "'ssl'");
        // through a file, so that the value is known only when it is used
        let file = site.folder.path().join("secret");
        std::fs::write(&file, value).unwrap();
        site.set(&format!("kafka.properties.'{name}'"), &format!("'file:{}'", file.display()));
        for command in ["migrate", "status --log-format json"] {
            let ended = site.command(command).await;
            assert_ne!(ended.status.code(), Some(0), "{ended:?}");
            assert!(!format!("{ended:?}").contains("hunter2"), "{ended:?}");
        }
    }
}
