//! The rules for `kafka.properties`, checked without a broker, by librdkafka itself where it can.
//! Texts of this file never contain a property's value, because any value may be a secret.

use std::collections::BTreeMap;

use rdkafka::ClientConfig;
use rdkafka::config::RDKafkaLogLevel;
use rdkafka::consumer::BaseConsumer;
use rdkafka::error::KafkaError;
use rdkafka::types::RDKafkaConfRes;

/// The default session of a group member: the shortest that brokers allow by default.
pub(super) const SESSION_MS: &str = "6000";

/// Properties that correctness depends on, and the reasons why they cannot be set.
const RESERVED: &[(&str, &str)] = &[
    ("bootstrap.servers", "set kafka.brokers instead"),
    ("group.id", "set log.group instead"),
    ("enable.auto.commit", "the ledger's position decides where reading continues"),
    ("auto.commit.enable", "the ledger's position decides where reading continues"),
    ("enable.auto.offset.store", "the ledger's position decides where reading continues"),
    ("auto.offset.reset", "the ledger's position decides where reading continues"),
    ("enable.partition.eof", "readers depend on it"),
    ("isolation.level", "records of aborted transactions must not be counted"),
    ("enable.idempotence", "the order of a key's records depends on it"),
    ("acks", "an event is appended when every replica has it"),
    ("delivery.timeout.ms", "the deadline of an append sets it"),
    ("partitioner", "all producers of a topic must put a key into the same partition"),
    ("transactional.id", "Tallyline's producers are not transactional"),
    (
        "group.instance.id",
        "two processes with one id would fence each other, and the partitions of a static member that ends wait for its session; remove it",
    ),
];

/// Other spellings of a property, and the spelling that Tallyline uses. librdkafka accepts both.
const ALIASES: &[(&str, &str)] = &[
    ("metadata.broker.list", "bootstrap.servers"),
    ("max.in.flight", "max.in.flight.requests.per.connection"),
    ("sasl.mechanism", "sasl.mechanisms"),
    ("fetch.message.max.bytes", "max.partition.fetch.bytes"),
    ("queue.buffering.max.ms", "linger.ms"),
    ("message.send.max.retries", "retries"),
    ("compression.codec", "compression.type"),
    ("request.required.acks", "acks"),
    ("message.timeout.ms", "delivery.timeout.ms"),
];

/// Names that only Kafka's Java client knows, with their replacements.
const JAVA: &[(&str, &str)] = &[
    ("sasl.jaas.config", "set sasl.username and sasl.password"),
    ("sasl.login.callback.handler.class", "use SCRAM or TLS certificates"),
    ("sasl.client.callback.handler.class", "use SCRAM or TLS certificates"),
    ("ssl.truststore.location", "set ssl.ca.location to a PEM file"),
    ("ssl.truststore.certificates", "set ssl.ca.pem"),
    ("ssl.truststore.password", "set ssl.ca.location to a PEM file, which needs no password"),
    ("ssl.truststore.type", "set ssl.ca.location to a PEM file"),
    (
        "ssl.keystore.type",
        "set ssl.keystore.location to a PKCS#12 file, or ssl.certificate.location and ssl.key.location to PEM files",
    ),
    ("ssl.keystore.key", "set ssl.key.pem"),
    ("ssl.keystore.certificate.chain", "set ssl.certificate.pem"),
    ("buffer.memory", "set queue.buffering.max.kbytes"),
    ("max.request.size", "set message.max.bytes"),
    ("fetch.max.wait.ms", "set fetch.wait.max.ms"),
    ("send.buffer.bytes", "set socket.send.buffer.bytes"),
    ("receive.buffer.bytes", "set socket.receive.buffer.bytes"),
    ("default.api.timeout.ms", "set socket.timeout.ms"),
    ("socket.connection.setup.timeout.max.ms", "set socket.connection.setup.timeout.ms"),
];

/// The allowed values of properties with a choice. librdkafka compares them without case.
const CHOICES: &[(&str, &[&str])] = &[
    ("security.protocol", &["plaintext", "ssl", "sasl_plaintext", "sasl_ssl"]),
    ("ssl.endpoint.identification.algorithm", &["none", "https"]),
    ("group.protocol", &["classic", "consumer"]),
    ("compression.type", &["none", "gzip", "snappy", "lz4", "zstd"]),
    ("broker.address.family", &["any", "v4", "v6"]),
    ("client.dns.lookup", &["use_all_dns_ips", "resolve_canonical_bootstrap_servers_only"]),
    ("metadata.recovery.strategy", &["none", "rebootstrap"]),
    ("queuing.strategy", &["fifo", "lifo"]),
];

/// Choices that librdkafka checks only when it creates a client. For SASL this build supports these
/// three.
const CLIENT_CHOICES: &[(&str, &[&str])] = &[
    ("sasl.mechanisms", &["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"]),
    ("partition.assignment.strategy", &["cooperative-sticky", "range", "roundrobin"]),
];

/// Properties that the broker decides with `group.protocol=consumer`.
const CLASSIC_PROTOCOL_ONLY: &[(&str, &str)] = &[
    ("session.timeout.ms", "group.consumer.session.timeout.ms"),
    ("heartbeat.interval.ms", "group.consumer.heartbeat.interval.ms"),
    ("partition.assignment.strategy", "group.consumer.assignors"),
];

/// The faults of the given properties. The value is none if it is not known yet. Each fault has the
/// index of its property and a text that continues the property's name.
#[must_use]
pub fn property_faults(properties: &[(&str, Option<&str>)]) -> Vec<(usize, String)> {
    let mut faults = Vec::new();
    let new_protocol = properties.iter().any(|(name, value)| {
        *name == "group.protocol"
            && value.is_some_and(|value| value.eq_ignore_ascii_case("consumer"))
    });
    for (index, (name, value)) in properties.iter().enumerate() {
        let of_broker =
            CLASSIC_PROTOCOL_ONLY.iter().find(|(classic, _)| new_protocol && classic == name);
        let twin =
            properties[..index].iter().find(|(other, _)| canonical(other) == canonical(name));
        let fault = match (reserved(name), java(name), twin, of_broker) {
            (Some(reason), ..) => Some(format!("is set by Tallyline: {reason}")),
            (_, Some(instead), ..) => {
                Some(format!("is a property of Kafka's Java client only: {instead}"))
            }
            (_, _, Some((twin, _)), _) => Some(format!(
                "is another spelling of {twin}, which is also set: remove one of them"
            )),
            (.., Some((_, setting))) => Some(format!(
                "must not be set with group.protocol=consumer: the broker's {setting} applies"
            )),
            _ => value_fault(name, *value),
        };
        faults.extend(fault.map(|fault| (index, fault)));
    }
    if faults.is_empty() {
        faults.extend(contradiction(properties));
    }
    faults
}

/// Finds valid properties that contradict each other. librdkafka detects this when it creates a
/// client, which without brokers does not connect. Connection properties are left out: TLS files
/// may be on another machine, and the error text must not contain a secret.
fn contradiction(properties: &[(&str, Option<&str>)]) -> Option<(usize, String)> {
    let index_of = |name: &str| properties.iter().position(|(other, _)| canonical(other) == name);
    let sasl = properties.iter().position(|(name, value)| {
        *name == "security.protocol"
            && value.is_some_and(|value| value.to_lowercase().starts_with("sasl_"))
    });
    if let (Some(index), None) = (sasl, index_of("sasl.mechanisms")) {
        return Some((
            index,
            "needs sasl.mechanism: set it to one of PLAIN, SCRAM-SHA-256, SCRAM-SHA-512".to_owned(),
        ));
    }
    let of_connections = |name: &str| {
        ["ssl.", "sasl.", "security.", "enable.ssl."].iter().any(|prefix| name.starts_with(prefix))
    };
    let known = properties.iter().filter_map(|(name, value)| Some((canonical(name), (*value)?)));
    let others: Vec<(&str, &str)> = known.filter(|(name, _)| !of_connections(name)).collect();
    if others.is_empty() {
        return None;
    }
    let mut config = ClientConfig::new();
    config.set_log_level(RDKafkaLogLevel::Emerg);
    if index_of("group.protocol").is_none() {
        config.set("session.timeout.ms", SESSION_MS);
    }
    for (name, value) in others {
        config.set(name, value);
    }
    let Err(KafkaError::ClientCreation(text)) = config.create::<BaseConsumer>() else {
        return None;
    };
    let index = properties.iter().position(|(name, _)| text.contains(canonical(name))).unwrap_or(0);
    Some((index, format!("contradicts the other properties: {text}")))
}

/// The properties under Tallyline's spelling, so that a given one replaces the default.
pub(super) fn by_canonical_name(properties: &BTreeMap<String, String>) -> BTreeMap<String, String> {
    properties.iter().map(|(name, value)| (canonical(name).to_owned(), value.clone())).collect()
}

/// librdkafka's error text about a client, without the values of properties.
pub(super) fn without_values(text: &str, properties: &BTreeMap<String, String>) -> String {
    let mut values: Vec<&String> = properties.values().filter(|value| !value.is_empty()).collect();
    values.sort_unstable_by_key(|value| std::cmp::Reverse(value.len()));
    values.into_iter().fold(text.to_owned(), |text, value| text.replace(value.as_str(), "***"))
}

fn canonical(name: &str) -> &str {
    ALIASES.iter().find(|(alias, _)| *alias == name).map_or(name, |(_, canonical)| *canonical)
}

fn reserved(name: &str) -> Option<&'static str> {
    RESERVED.iter().find(|(own, _)| *own == canonical(name)).map(|(_, reason)| *reason)
}

fn java(name: &str) -> Option<&'static str> {
    JAVA.iter().find(|(java, _)| *java == name).map(|(_, instead)| *instead)
}

/// Checks name and value with librdkafka, and choices with the tables.
fn value_fault(name: &str, value: Option<&str>) -> Option<String> {
    let of = |choices: &[(&str, &'static [&'static str])]| {
        choices.iter().find(|(choice, _)| *choice == canonical(name)).map(|(_, words)| *words)
    };
    let outside = |words: &[&str]| {
        value.is_some_and(|value| !value.split(',').all(|word| words.contains(&word.trim())))
    };
    let must_be = |words: &[&str]| Some(format!("must be one of {}", words.join(", ")));
    let parsed = ClientConfig::new().set(name, value.unwrap_or_default()).create_native_config();
    match parsed.err() {
        Some(KafkaError::ClientConfig(RDKafkaConfRes::RD_KAFKA_CONF_UNKNOWN, ..)) => {
            Some(unknown(name))
        }
        None => of(CLIENT_CHOICES).filter(|words| outside(words)).and_then(must_be),
        Some(_) if value.is_none() => None,
        Some(_) if of(CHOICES).is_some() => of(CHOICES).and_then(must_be),
        Some(KafkaError::ClientConfig(_, text, ..))
            if text.contains("not supported in this build") =>
        {
            Some("is not supported by this build of librdkafka: remove it".to_owned())
        }
        Some(KafkaError::ClientConfig(_, text, ..)) => Some(match allowed_range(&text) {
            Some(range) => format!("must be a number within {range}"),
            None => "has a value that librdkafka rejects: see its CONFIGURATION.md".to_owned(),
        }),
        Some(_) => Some("contains a NUL character: remove it".to_owned()),
    }
}

/// The range at the end of librdkafka's text about a number. The rest of the text is not repeated,
/// because it contains the value.
fn allowed_range(text: &str) -> Option<&str> {
    let (_, range) = text.rsplit_once(" is outside allowed range ")?;
    let range = range.trim_end();
    range
        .chars()
        .all(|character| character.is_ascii_digit() || "-.".contains(character))
        .then_some(range)
}

fn unknown(name: &str) -> String {
    let lower = name.to_lowercase();
    if lower != name && value_fault(&lower, None).is_none() {
        return format!("is unknown to librdkafka: write {lower}");
    }
    "is unknown to librdkafka: check its spelling in librdkafka's CONFIGURATION.md".to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fault(name: &str, value: &str) -> String {
        let faults = property_faults(&[(name, Some(value))]);
        faults.into_iter().next().map(|(_, fault)| fault).unwrap_or_default()
    }

    #[test]
    fn each_fault_names_the_property_and_the_next_step() {
        for (name, value, words) in [
            ("sasl.passwrd", "hunter2", "is unknown to librdkafka"),
            ("Security.Protocol", "ssl", "write security.protocol"),
            ("security.protocol", "tls", "must be one of plaintext, ssl, sasl_plaintext, sasl_ssl"),
            (
                "sasl.mechanism",
                "SCRAM-SHA-521",
                "must be one of PLAIN, SCRAM-SHA-256, SCRAM-SHA-512",
            ),
            ("sasl.mechanism", "plain", "must be one of PLAIN"),
            ("compression.codec", "brotli", "must be one of none, gzip"),
            (
                "partition.assignment.strategy",
                "org.apache.kafka.clients.consumer.RangeAssignor",
                "must be one of cooperative-sticky",
            ),
            ("session.timeout.ms", "soon", "librdkafka rejects"),
            ("session.timeout.ms", "99999999", "must be a number within 1..3600000"),
            ("socket.keepalive.enable", "perhaps", "librdkafka rejects"),
            (
                "sasl.jaas.config",
                "hunter2",
                "Java client only: set sasl.username and sasl.password",
            ),
            ("ssl.truststore.location", "/a.jks", "Java client only: set ssl.ca.location"),
            (
                "isolation.level",
                "read_uncommitted",
                "is set by Tallyline: records of aborted transactions",
            ),
            ("metadata.broker.list", "a:1", "is set by Tallyline: set kafka.brokers"),
            ("message.timeout.ms", "1", "is set by Tallyline"),
            ("group.instance.id", "one", "two processes with one id would fence each other"),
        ] {
            let fault = fault(name, value);
            assert!(fault.contains(words), "{name}: {fault}");
            assert!(value.len() < 4 || !fault.contains(value), "{name}: {fault}");
        }
    }

    #[test]
    fn valid_properties_have_no_fault() {
        let properties = [
            ("security.protocol", Some("SASL_SSL")),
            ("sasl.mechanism", Some("SCRAM-SHA-512")),
            ("sasl.username", Some("tallyline")),
            ("sasl.password", None),
            ("compression.codec", Some("gzip")),
            ("partition.assignment.strategy", Some("range,roundrobin")),
            ("session.timeout.ms", None),
            ("ssl.ca.location", Some("/nowhere/ca.pem")),
        ];
        assert_eq!(property_faults(&properties), []);
        assert_eq!(
            property_faults(&[
                ("group.protocol", Some("consumer")),
                ("max.poll.interval.ms", Some("9000"))
            ]),
            []
        );
    }

    #[test]
    fn contradicting_properties_are_found_without_a_broker() {
        let named = |properties: &[(&str, Option<&str>)], words: &str| {
            let faults = property_faults(properties);
            assert!(faults.len() == 1 && faults[0].1.contains(words), "{properties:?}: {faults:?}");
            assert!(!faults[0].1.contains("50000000"), "{faults:?}");
        };
        named(&[("max.poll.interval.ms", Some("1000"))], "session.timeout.ms");
        named(
            &[
                ("client.id", Some("a")),
                ("receive.message.max.bytes", Some("100000")),
                ("fetch.max.bytes", Some("50000000")),
            ],
            "fetch.max.bytes",
        );
        named(
            &[("security.protocol", Some("SASL_SSL")), ("sasl.username", Some("u"))],
            "sasl.mechanism",
        );
        let together = [
            ("max.poll.interval.ms", Some("7000")),
            ("security.protocol", Some("SASL_SSL")),
            ("sasl.mechanism", Some("PLAIN")),
        ];
        assert_eq!(property_faults(&together), []);
    }

    #[test]
    fn two_spellings_and_broker_settings_are_faults() {
        let faults = property_faults(&[
            ("compression.type", Some("zstd")),
            ("compression.codec", Some("gzip")),
        ]);
        assert_eq!(
            faults,
            [(
                1,
                "is another spelling of compression.type, which is also set: remove one of them"
                    .to_owned()
            )]
        );
        let faults = property_faults(&[
            ("group.protocol", Some("consumer")),
            ("session.timeout.ms", Some("6000")),
        ]);
        assert_eq!(faults.len(), 1);
        assert!(faults[0].1.contains("group.consumer.session.timeout.ms"), "{faults:?}");
    }

    /// Checks the table with librdkafka: a value set under one spelling is readable under the
    /// other.
    #[test]
    fn librdkafka_accepts_each_alias() {
        for (alias, canonical) in ALIASES {
            let value = match *canonical {
                "compression.type" => "gzip",
                "bootstrap.servers" | "sasl.mechanisms" => "PLAIN",
                "acks" => "1",
                _ => "4321",
            };
            let config =
                ClientConfig::new().set(*alias, value).create_native_config().expect(alias);
            assert_eq!(config.get(canonical).expect(canonical), value, "{alias}");
        }
        for (name, words) in CHOICES.iter().chain(CLIENT_CHOICES) {
            for word in *words {
                let properties = [(*name, Some(*word)), ("sasl.mechanisms", Some("PLAIN"))];
                assert_eq!(
                    property_faults(
                        &properties[..properties.len() - usize::from(*name == "sasl.mechanisms")]
                    ),
                    [],
                    "{name}"
                );
            }
        }
        for (name, _) in JAVA {
            assert!(
                ClientConfig::new().set(*name, "1").create_native_config().is_err(),
                "librdkafka accepts {name}"
            );
        }
    }

    #[test]
    fn a_text_of_librdkafka_has_its_values_masked() {
        let properties = [("sasl.password", "hunter2"), ("sasl.username", "hunter")]
            .map(|(name, value)| (name.to_owned(), value.to_owned()));
        assert_eq!(without_values("hunter2 and hunter", &properties.into()), "*** and ***");
    }

    proptest::proptest! {
        #[test]
        fn no_fault_contains_a_value(name in "[a-z.]{1,24}|sasl.passwrd|session.timeout.ms|security.protocol|ssl.key.pem", value in "SECRET[ -~]{0,12}") {
            for (_, fault) in property_faults(&[(&name, Some(&value))]) {
                proptest::prop_assert!(!fault.contains("SECRET"), "{}", fault);
            }
        }
    }
}
