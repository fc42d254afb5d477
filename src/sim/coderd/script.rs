//! A planned deployment: all acts in order of time, and the books of those that are done. Without a database.

use std::collections::VecDeque;

use anyhow::ensure;
use chrono::{DateTime, Utc};

use super::acts::{Act, Deed};
use super::books::Books;
use super::chance::{Subject, dice};
use super::config::Config;
use super::deployment::Deployment;
use super::heartbeats::Heartbeats;
use super::licenses;
use super::lives::{Lives, Pace, Window};
use super::signing::Signer;
use super::truth::Truth;

/// A planned deployment and what has been done of it, without a database.
pub(super) struct Script {
    pub config: Config,
    pub deployment: Deployment,
    pub signer: Signer,
    pub books: Books,
    lives: Lives,
    heartbeats: Heartbeats,
    /// In order of time.
    acts: VecDeque<Act>,
    /// Up to where it is planned.
    planned_until: DateTime<Utc>,
}

impl Script {
    pub fn new(config: Config) -> anyhow::Result<Self> {
        ensure!(config.start < config.end, "a history starts before it ends");
        let deployment = Deployment::plan(&config);
        let (signer, mut acts) = licenses::plan(&config, deployment.id, &mut dice(config.seed, Subject::Licenses))?;
        let window = Window { from: config.start, to: config.end, pace: Pace::LIFE, history: true };
        let mut lives = Lives::new(&config, &deployment);
        let mut heartbeats = Heartbeats::new(&config);
        let edges = edges(&acts);
        acts.extend(lives.promotions());
        acts.extend(lives.plan(&deployment, window, config.builds));
        acts.extend(lives.on_edges(&deployment, window, &edges));
        if config.heartbeats {
            acts.extend(heartbeats.plan(&deployment, window.from, window.to));
        }
        acts.extend(heartbeats.publishing(&acts));
        acts.sort_by_key(|act| act.at);
        let books = Books::new(&deployment);
        let planned_until = config.end;
        Ok(Script { config, deployment, signer, books, lives, heartbeats, acts: acts.into(), planned_until })
    }

    pub fn extend(&mut self, until: DateTime<Utc>, builds: usize) -> usize {
        let window = Window { from: self.planned_until, to: until, pace: Pace::BRISK, history: false };
        if until <= window.from {
            return 0;
        }
        let mut acts = self.lives.plan(&self.deployment, window, builds);
        let planned = acts.iter().filter(|act| matches!(act.deed, Deed::Queue(_))).count();
        if self.config.heartbeats {
            acts.extend(self.heartbeats.plan(&self.deployment, window.from, until));
        }
        acts.extend(self.heartbeats.publishing(&acts));
        acts.extend(self.acts.drain(..));
        acts.sort_by_key(|act| act.at);
        self.acts = acts.into();
        self.planned_until = until;
        planned
    }

    /// Up to where it is planned.
    pub fn planned_until(&self) -> DateTime<Utc> {
        self.planned_until
    }

    /// The next act that is due at `now`, noted in the books. Presets that are gone are gone from it.
    pub fn next(&mut self, now: DateTime<Utc>) -> Option<Act> {
        let mut act = self.acts.pop_front_if(|act| act.at <= now)?;
        if let Deed::Queue(queued) = &mut act.deed {
            queued.preset = queued.preset.filter(|preset| !self.books.removed_presets.contains(preset));
        }
        self.books.note(&act);
        Some(act)
    }

    pub fn truth(&self) -> Truth {
        self.books.truth(&self.config, &self.deployment, self.signer.public())
    }
}

/// The instants at which the known licenses' windows begin and end.
fn edges(acts: &[Act]) -> Vec<DateTime<Utc>> {
    let windows = acts.iter().filter_map(|act| match &act.deed {
        Deed::License(license) if license.known_key => Some([license.claims.nbf, license.claims.exp]),
        _ => None,
    });
    windows.flatten().collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use chrono::TimeDelta;

    use super::super::truth::{Class, Status, UsageKind};
    use super::*;
    use crate::sim::coderd::SchemaVersion;

    fn config(schema: SchemaVersion, builds: usize) -> Config {
        let start = DateTime::from_timestamp(1_780_000_000, 123_456_000).unwrap();
        Config::history(11, schema, start, start + TimeDelta::days(25), builds)
    }

    fn played(config: Config) -> Truth {
        let mut script = Script::new(config).unwrap();
        while script.next(script.config.end).is_some() {}
        script.truth()
    }

    #[test]
    fn the_same_seed_gives_the_same_truth_and_another_seed_another() {
        let once = serde_json::to_string(&played(config(SchemaVersion::TasksEra, 300))).unwrap();
        assert_eq!(once, serde_json::to_string(&played(config(SchemaVersion::TasksEra, 300))).unwrap());
        let other = Config { seed: 12, ..config(SchemaVersion::TasksEra, 300) };
        assert_ne!(once, serde_json::to_string(&played(other)).unwrap());
        assert_eq!(serde_json::from_str::<Truth>(&once).unwrap(), played(config(SchemaVersion::TasksEra, 300)));
    }

    #[test]
    fn a_history_has_what_it_was_asked_for_and_every_oddity() {
        for schema in [SchemaVersion::TasksEra, SchemaVersion::Sep2026] {
            let truth = played(config(schema, 5000));
            assert!(truth.builds.len() >= 5000, "{}", truth.builds.len());
            let agents = truth.usage.iter().filter(|row| row.event_type == UsageKind::ManagedAgents).count();
            assert!(agents >= 800, "{schema:?}: {agents} agents");
            for class in [Class::RegularCreation, Class::PrebuildCreation, Class::Claim, Class::Other] {
                for status in [Status::Succeeded, Status::Failed, Status::Canceled] {
                    let expected =
                        status == Status::Succeeded || class != Class::Claim && class != Class::Other || status == Status::Failed;
                    let there = truth.builds.iter().any(|build| build.class == class && build.status == status);
                    assert!(there || !expected, "{class:?} {status:?}");
                }
            }
            let retried = |build: &&super::super::truth::BuildTruth| build.counted_as_creation && build.build_number > 1;
            assert!(truth.builds.iter().filter(retried).count() > 10);
            assert!(truth.clock_skews > 5);
            assert!(truth.builds.iter().any(|build| build.started_at == Some(build.completed_at)), "reaped with an end as its start");
            assert!(truth.builds.iter().any(|build| build.started_at.is_none() && build.status == Status::Failed));
            assert!(truth.builds.iter().any(|build| build.labels.preset_name.is_empty()));
            let organizations: BTreeSet<_> = truth.builds.iter().map(|build| &build.labels.organization_name).collect();
            let templates: BTreeSet<_> =
                truth.builds.iter().map(|build| (&build.labels.organization_name, &build.labels.template_name)).collect();
            let presets: BTreeSet<_> =
                truth.builds.iter().map(|build| &build.labels).filter(|labels| !labels.preset_name.is_empty()).collect();
            assert_eq!((organizations.len(), templates.len(), presets.len()), (3, 12, 30));
        }
    }

    #[test]
    fn licenses_have_usage_on_both_sides_of_each_edge_to_the_microsecond() {
        let truth = played(config(SchemaVersion::TasksEra, 200));
        let times: BTreeSet<_> = truth.usage.iter().map(|row| row.created_at).collect();
        let mut edges = 0;
        for license in truth.licenses.iter().filter(|license| license.verifiable) {
            for edge in [license.claims.nbf, license.claims.exp] {
                let around = [-1, 0, 1].map(|offset| times.contains(&(edge + TimeDelta::microseconds(offset))));
                assert!(around == [true; 3] || around == [false; 3], "{edge}: {around:?}");
                edges += usize::from(around[0]);
            }
            assert!(license.claims.exp <= truth.builds[0].completed_at || license.managed_agents > 0, "{license:?}");
        }
        assert!(edges >= 5, "{edges} edges");
    }

    #[test]
    fn builds_of_one_workspace_never_overlap() {
        let truth = played(config(SchemaVersion::TasksEra, 1000));
        let mut builds = truth.builds.clone();
        builds.sort_by_key(|build| (build.workspace_id, build.build_number));
        for pair in builds.windows(2).filter(|pair| pair[0].workspace_id == pair[1].workspace_id) {
            assert!(pair[0].completed_at < pair[1].created_at, "{pair:?}");
        }
    }
}
