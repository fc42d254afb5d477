//! Topics are lost or recreated unnoticed. After the recovery, stopped consumers go on by
//! themselves, and coderd provides lost unread rows again. In between, completeness is not
//! reported.

use rdkafka::ClientConfig;
use rdkafka::admin::{AdminClient, AdminOptions};
use rdkafka::client::DefaultClientContext;
use serde_json::json;
use tallyline::event::Topic;
use tallyline::ledger::positions;

use super::world::{SOON, World, ends, json as answered};
use crate::journey::site::Backend;
use crate::support::eventually;
use crate::support::ledger::{OTHER_DEPLOYMENT, build, completeness_of, register};

async fn delete_topic(world: &World, topic: Topic) {
    let prefix = world.site.prefix.as_ref().expect("Kafka");
    let name = format!("{prefix}{}", topic.name());
    let brokers = crate::support::setting("TALLYLINE_TEST_KAFKA");
    let admin: AdminClient<DefaultClientContext> =
        ClientConfig::new().set("bootstrap.servers", brokers).create().unwrap();
    let deleted = admin.delete_topics(&[&name], &AdminOptions::new()).await.unwrap();
    assert!(deleted.iter().all(Result::is_ok), "{deleted:?}");
    eventually(SOON, "the topic is gone", || async {
        world.site.log.partitions(topic).await.is_err()
    })
    .await;
}

/// A foreign producer appends builds of another deployment.
async fn push(world: &World, numbers: std::ops::Range<u32>) {
    register(&world.site.ledger, &[OTHER_DEPLOYMENT]).await;
    let messages = numbers.map(|n| build(OTHER_DEPLOYMENT, 100_000 + n).to_message()).collect();
    world.site.log.append(Topic::WorkspaceBuilds, messages).await.unwrap();
}

/// The number of unread offsets of the topic.
async fn unread(world: &World, topic: Topic) -> i64 {
    let positions = world.site.ledger.run(positions::list).await.unwrap();
    let ends = world.site.ends().await;
    let sum = |of: &[(tallyline::event::TopicPartition, i64)]| {
        of.iter().filter(|(at, _)| at.topic == topic).map(|(_, offset)| offset).sum::<i64>()
    };
    sum(&ends) - sum(&positions)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_topic_lost_unread_is_created_again_and_refilled_from_coderd() {
    let mut world = World::begin(Backend::Kafka).await;
    let mut collect = world.collect();
    let mut consume = world.site.start("consume", &[]);
    world.all_is_in().await;

    // half an hour of builds and some foreign ones are in the log, unread
    ends(&mut consume).await;
    world.goes_on_to(0.6).await;
    push(&world, 0..40).await;
    world.another_pass().await;
    let lost = unread(&world, Topic::WorkspaceBuilds).await;
    assert!(lost > 60, "{lost} unread");
    // from here on no pass is valid: each has unread records
    let before = completeness_of(&world.site.ledger, world.source_id().await).await.unwrap();
    assert!(before.complete_until.is_some());
    delete_topic(&world, Topic::WorkspaceBuilds).await;
    let mut consume = world.site.start("consume", &[]);

    let plan = world.plan("log").await;
    assert_eq!(
        plan["effect"]["topics_to_create"],
        json!([Topic::WorkspaceBuilds.name()]),
        "{plan}"
    );
    let partitions = plan["effect"]["partitions"].as_array().unwrap();
    let sum: i64 = partitions.iter().map(|one| one["unread"].as_i64().unwrap()).sum();
    assert!(
        partitions.len() == 6 && partitions.iter().all(|one| one["problem"] == "gone"),
        "{plan}"
    );
    assert_eq!(sum, lost, "{plan}");
    // the reported completeness stays, and does not advance
    assert_eq!(completeness_of(&world.site.ledger, world.source_id().await).await.unwrap(), before);

    let executed = world.execute(&plan).await;
    assert!(executed.status.success(), "{executed:?}");
    world.all_is_in().await;
    world.everything_is_there().await;
    assert!(
        completeness_of(&world.site.ledger, world.source_id().await).await.unwrap().complete_until
            > before.complete_until
    );
    assert_eq!(world.count("select count(*) from past_position").await, 6);
    assert_eq!(
        world.acts().await,
        [("sre-1".to_owned(), "log".to_owned(), "the disk is gone".to_owned())]
    );
    world.balanced().await;
    let again = world.execute(&plan).await;
    assert_eq!(again.status.code(), Some(4), "{again:?}");
    world.nothing_is_lost("log", "contain the ledger's positions: nothing to recover").await;
    for process in [&mut collect, &mut consume] {
        ends(process).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn claims_lost_unread_are_collected_again_whether_or_not_their_builds_were_read() {
    let mut world = World::begin(Backend::Kafka).await;
    let mut collect = world.collect();
    let mut consume = world.site.start("consume", &[]);
    world.all_is_in().await;

    // the first half of the new rows: the builds are read and the claims are not; of the other half
    // neither
    let claims = Topic::PrebuildClaims;
    let paused = world
        .site
        .command(&["pause", "consume", "--topic", claims.name(), "--reason", "a test"])
        .await;
    assert!(paused.status.success(), "{paused:?}");
    eventually(SOON, "its partitions are held", || {
        let held = consume.stderr().contains("partitions held");
        async move { held }
    })
    .await;
    world.goes_on_to(0.56).await;
    world.another_pass().await;
    eventually(SOON, "the builds are read", || async {
        unread(&world, Topic::WorkspaceBuilds).await == 0
    })
    .await;
    ends(&mut consume).await;
    let claimless = "select count(*) from workspace_build where stage = 'claim'
        and not exists (select from prebuild_claim where prebuild_claim.build_id = workspace_build.build_id)";
    let (read_half, waiting) = (world.count(claimless).await, unread(&world, claims).await);
    assert!(read_half > 0 && read_half <= waiting, "{read_half} {waiting}");
    world.goes_on_to(0.8).await;
    world.another_pass().await;
    let lost = unread(&world, claims).await;
    assert!(lost > waiting && unread(&world, Topic::WorkspaceBuilds).await > 0, "{lost} {waiting}");
    world.another_pass().await;
    assert_eq!(
        unread(&world, claims).await,
        lost,
        "the backlog is not appended again by each pass"
    );

    delete_topic(&world, claims).await;
    let mut consume = world.site.start("consume", &[]);
    let plan = world.plan("log").await;
    assert_eq!(plan["effect"]["topics_to_create"], json!([claims.name()]), "{plan}");
    let executed = world.execute(&plan).await;
    assert!(executed.status.success(), "{executed:?}");
    let resumed = world.site.command(&["resume", "consume", "--topic", claims.name()]).await;
    assert!(resumed.status.success(), "{resumed:?}");
    world.all_is_in().await;
    world.everything_is_there().await;
    world.balanced().await;
    let sent = world.site.appended().await;
    world.another_pass().await;
    assert_eq!(world.site.appended().await, sent);
    for process in [&mut collect, &mut consume] {
        ends(process).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stopped_consumers_read_a_recreated_and_longer_kafka_topic_from_its_start() {
    let world = World::begin(Backend::Kafka).await;
    recreated_and_longer(world, async |world| {
        delete_topic(world, Topic::WorkspaceBuilds).await;
        eventually(SOON, "the topic is made again", || async {
            world.site.log.create_topics(6).await.is_ok()
        })
        .await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stopped_consumers_read_an_emptied_and_longer_postgres_log_from_its_start() {
    let world = World::begin(Backend::Postgres).await;
    recreated_and_longer(world, async |world| {
        let emptied = "begin;
            delete from log_record using log_partition where id = partition_id and topic = 'tallyline.workspace-builds.v1';
            update log_partition set start_offset = 0, next_offset = 0 where topic = 'tallyline.workspace-builds.v1'; commit";
        sqlx::raw_sql(emptied).execute(&world.site.database.pool).await.unwrap();
    })
    .await;
}

async fn recreated_and_longer(mut world: World, recreate: impl AsyncFn(&World)) {
    let mut collect = world.collect();
    let mut consume = world.site.start("consume", &[]);
    world.all_is_in().await;
    let before = completeness_of(&world.site.ledger, world.source_id().await).await.unwrap();
    let records = world
        .count("select sum(records)::bigint from position where topic like '%workspace-builds%'")
        .await;

    for process in [&mut collect, &mut consume] {
        ends(process).await;
    }
    recreate(&world).await;
    push(&world, 0..3000).await;
    let mut collect = world.collect();
    let mut consume = world.site.start("consume", &[]);
    world.goes_on_to(0.6).await;
    eventually(SOON, "its partitions are stopped", || {
        let stopped = consume.stderr().matches("partition stopped").count();
        async move { stopped >= 6 }
    })
    .await;
    world.another_pass().await;
    let now = completeness_of(&world.site.ledger, world.source_id().await).await.unwrap();
    assert_eq!(now, before, "completeness is not reported while the new topic is not read");
    assert_eq!(
        world
            .count(
                "select sum(records)::bigint from position where topic like '%workspace-builds%'"
            )
            .await,
        records
    );

    let plan = world.plan("log").await;
    let problems: Vec<&str> = plan["effect"]["partitions"]
        .as_array()
        .unwrap()
        .iter()
        .map(|one| one["problem"].as_str().unwrap())
        .collect();
    assert!(
        problems.len() == 6 && problems.iter().all(|problem| *problem == "another_record"),
        "{plan}"
    );
    let executed = world.execute(&plan).await;
    assert!(executed.status.success(), "{executed:?}");
    assert_eq!(answered(&executed)["hash"], plan["hash"]);

    // the same processes go on
    world.all_is_in().await;
    world.everything_is_there().await;
    let pushed = "select count(*) from workspace_build join source on source.id = source_id
        where deployment_id = '00000000-0000-0000-0000-0000000000d2'";
    eventually(SOON, "records of other producers are read, too", || async {
        world.count(pushed).await == 3000
    })
    .await;
    assert!(
        completeness_of(&world.site.ledger, world.source_id().await).await.unwrap().complete_until
            > before.complete_until
    );
    world.balanced().await;
    assert!(consume.runs() && collect.runs());
    for process in [&mut collect, &mut consume] {
        ends(process).await;
    }
}
