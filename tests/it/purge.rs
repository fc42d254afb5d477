//! Removals in coderd: a purge of old builds, a deleted template version, a restart after it, and
//! unconfirmed builds.

use std::collections::BTreeSet;

use prometheus::proto::MetricFamily;
use tallyline::event::Topic;
use tallyline::operations::LogRange;
use tallyline::projection::{self, Folded};
use tallyline::stages::{CREATIONS, MetricsState};
use uuid::Uuid;

use crate::audit::{SOURCE, Site, differences, number, remarks};
use crate::support::coderd::Build;
use crate::support::ledger::{ask, operations};

/// All regular creations, folded from zero.
async fn creations(site: &Site) -> u64 {
    let folded: Folded<MetricsState> = projection::fold_to(&site.ledger, i64::MAX).await.unwrap();
    let families = folded.state.deployment(site.coderd.deployment).expect("introduced").families();
    let family: &MetricFamily =
        families.iter().find(|family| family.name() == CREATIONS.name).unwrap();
    family.get_metric().iter().map(|metric| metric.get_counter().value() as u64).sum()
}

/// The creations that a replay of all builds in the log would add.
async fn planned_creations(site: &Site) -> u64 {
    let range = LogRange {
        topics: vec![Topic::WorkspaceBuilds.name().to_owned()],
        from: "earliest".into(),
        until: "latest".into(),
    };
    let plan = ask(&operations(&site.ledger, &site.log), &range).await.unwrap();
    plan.effect
        .metrics
        .iter()
        .filter(|family| family.family == CREATIONS.name)
        .map(|family| family.added)
        .sum()
}

/// Removes a workspace's builds and their jobs, as coderd does with old ones.
async fn purge(site: &Site, workspace: Uuid) {
    let purge = "delete from provisioner_jobs where id in (select job_id from workspace_builds where workspace_id = $1)";
    site.tamper_source(purge, workspace).await;
}

fn build_ids(builds: &[Uuid]) -> BTreeSet<String> {
    builds.iter().map(|build| format!("workspace_build_completed:{build}")).collect()
}

#[tokio::test]
async fn a_restart_after_a_purge_of_old_builds_is_not_a_second_creation() {
    let mut site = Site::new().await;
    let mut first = Vec::new();
    for _ in 1..20 {
        let workspace = site.coderd.workspace().await;
        first.push((workspace, site.coderd.build(&site.coderd.first_start(workspace).await).await));
    }
    site.collect().await;
    assert_eq!((creations(&site).await, differences(&site.audit().await)), (20, vec![]));

    let mut restarts = Vec::new();
    for (workspace, _) in &first[..2] {
        purge(&site, *workspace).await;
        restarts.push(
            site.coderd
                .build(&Build { number: 2, ..site.coderd.first_start(*workspace).await })
                .await,
        );
    }
    site.append().await;
    assert_eq!(planned_creations(&site).await, 0, "a plan counts as the ledger will");
    site.consume().await;
    assert_eq!(creations(&site).await, 20);

    let report = site.audit().await;
    assert_eq!(differences(&report), []);
    assert_eq!(number(&report, SOURCE, "source_gone"), 2);
    let remarked = |kind: &str| -> BTreeSet<String> {
        remarks(&report)
            .into_iter()
            .filter(|(name, _)| *name == kind)
            .map(|(_, id)| id.to_owned())
            .collect()
    };
    assert_eq!(remarked("source_gone"), build_ids(&[first[0].1, first[1].1]));
    assert_eq!(remarked("second_first_start"), build_ids(&restarts), "a second claimant is named");
}

#[tokio::test]
async fn of_two_first_starts_in_one_plan_one_is_a_creation() {
    let mut site = Site::new().await;
    let workspace = site.coderd.workspace().await;
    site.coderd.build(&site.coderd.first_start(workspace).await).await;
    site.append().await;
    purge(&site, workspace).await;
    site.coderd.build(&Build { number: 2, ..site.coderd.first_start(workspace).await }).await;
    site.append().await;
    assert_eq!(planned_creations(&site).await, 1);
    site.consume().await;
    assert_eq!(creations(&site).await, 2, "the site's own, and this one");
}

#[tokio::test]
async fn the_builds_of_a_deleted_template_version_are_removed_and_not_an_imbalance() {
    let site = Site::new().await;
    assert_eq!(differences(&site.audit().await), []);
    let delete = "delete from template_versions where id = (select template_version_id from workspace_builds where id = $1)";
    site.tamper_source(delete, site.creation).await;
    let report = site.audit().await;
    assert_eq!(differences(&report), []);
    assert_eq!(number(&report, SOURCE, "source_gone"), 4, "three builds and a claim");
    assert_eq!(creations(&site).await, 1, "they stay counted");
}

#[tokio::test]
async fn only_removed_builds_that_were_confirmed_are_source_gone() {
    let mut site = Site::new().await;
    assert_eq!(differences(&site.audit().await), [], "this confirms what it sees");
    let unseen = site.coderd.creation().await;
    site.collect().await;
    for build in [site.creation, unseen] {
        site.tamper_source("delete from workspace_builds where id = $1", build).await;
    }
    let report = site.audit().await;
    let [unseen, seen] =
        [unseen, site.creation].map(|build| format!("workspace_build_completed:{build}"));
    assert_eq!(differences(&report), [(SOURCE, "not_in_source", unseen.as_str())]);
    assert_eq!(remarks(&report), [("source_gone", seen.as_str())]);
    assert_eq!(number(&report, SOURCE, "source_gone"), 1);

    // coderd never deletes usage: a missing row is always a difference
    site.tamper_source("delete from usage_events where $1::uuid is not null", site.creation).await;
    let report = site.audit().await;
    assert_eq!(
        differences(&report),
        [(SOURCE, "not_in_source", unseen.as_str()), (SOURCE, "not_in_source", "usage-1")]
    );
}

/// A missing workspace does not explain a build that coderd was never seen to have.
#[tokio::test]
async fn a_forged_build_of_a_deleted_workspace_stays_a_difference() {
    let site = Site::new().await;
    let workspace = "delete from workspaces where id = (select workspace_id from workspace_builds where id = $1)";
    site.tamper_source(workspace, site.creation).await;
    let id = format!("workspace_build_completed:{}", site.creation);
    assert_eq!(differences(&site.audit().await), [(SOURCE, "not_in_source", id.as_str())]);
}
