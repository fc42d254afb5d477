//! Records with a time from their producer, in a topic that keeps such times.

use rdkafka::ClientConfig;
use rdkafka::admin::{AdminClient, AdminOptions, AlterConfig, ResourceSpecifier};
use rdkafka::client::DefaultClientContext;
use rdkafka::producer::{BaseProducer, BaseRecord, Producer as _};
use tallyline::event::Topic;

use super::{Kind, SOON, Site, append_builds};

/// Before PostgreSQL's first time, and before the first `DateTime`: years -4780 and -262143.
const DISTANT: [i64; 2] = [-213_000_000_000_000, -8_334_601_228_800_000];

#[tokio::test]
async fn a_record_with_a_distant_time_is_one_reject_and_stops_nothing() {
    let site = Site::registered(Kind::Kafka).await;
    let kafka = site.kafka.as_ref().unwrap();
    let topic = kafka.name(Topic::WorkspaceBuilds.name());
    let admin: AdminClient<DefaultClientContext> =
        ClientConfig::new().set("bootstrap.servers", &kafka.brokers).create().unwrap();
    let producers_times = AlterConfig::new(ResourceSpecifier::Topic(&topic))
        .set("message.timestamp.type", "CreateTime");
    let altered = admin.alter_configs(&[producers_times], &AdminOptions::new()).await.unwrap();
    assert!(altered.iter().all(Result::is_ok), "{altered:?}");

    let producer: BaseProducer =
        ClientConfig::new().set("bootstrap.servers", &kafka.brokers).create().unwrap();
    for partition in 0..3 {
        for at in DISTANT {
            let record = BaseRecord::<[u8], [u8]>::to(&topic)
                .partition(partition)
                .payload(b"forged")
                .timestamp(at);
            producer.send(record).map_err(|(error, _)| error).unwrap();
        }
    }
    producer.flush(SOON).unwrap();
    append_builds(&site.log(), 0..30).await;

    let mut running = site.start("--role consume");
    site.builds(30).await;
    let query =
        "select count(*) from reject where cause <> 'ledger' and record_timestamp = 'epoch'";
    assert_eq!(site.count(query).await, 6);
    running.ends_in_order().await;
}
