//! A planned deployment: all acts in order of time, and the books of the done ones. It has no
//! database.

use std::collections::VecDeque;

use anyhow::ensure;
use chrono::{DateTime, TimeDelta, Utc};

use super::acts::{Act, Change};
use super::books::Books;
use super::chance::{Subject, dice};
use super::config::Config;
use super::deployment::Deployment;
use super::heartbeats::Heartbeats;
use super::licenses;
use super::lives::LifePlanner;
use super::planning::{Existing, Pace, Window};
use super::signing::Signer;
use super::truth::Truth;

/// A planned deployment and its done acts, without a database.
pub(super) struct Script {
    pub config: Config,
    pub deployment: Deployment,
    pub signer: Signer,
    pub books: Books,
    lives: LifePlanner,
    heartbeats: Heartbeats,
    /// In order of time.
    acts: VecDeque<Act>,
    /// The end of the plan.
    planned_until: DateTime<Utc>,
    /// The clock of one of coderd's two replicas.
    slow_clock: SlowClock,
}

/// Two replicas of coderd act in turn. The clock of the second may be behind.
#[derive(Default)]
struct SlowClock {
    behind: TimeDelta,
    second_replica: bool,
}

impl Script {
    pub fn new(config: Config) -> anyhow::Result<Self> {
        ensure!(config.start < config.end, "a history starts before it ends");
        let deployment = Deployment::plan(&config);
        let (signer, licenses) =
            licenses::plan(&config, deployment.id, &mut dice(config.seed, Subject::Licenses))?;
        let upload = |(at, row)| Act { at, held_for: None, change: Change::License(Box::new(row)) };
        let mut acts: Vec<Act> = licenses.into_iter().map(upload).collect();
        let window = Window { from: config.start, to: config.end, pace: Pace::LIFE, history: true };
        let mut lives = LifePlanner::new(&config, &deployment);
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
        let slow_clock = SlowClock::default();
        Ok(Script {
            config,
            deployment,
            signer,
            books,
            lives,
            heartbeats,
            acts: acts.into(),
            planned_until,
            slow_clock,
        })
    }

    pub fn extend(&mut self, until: DateTime<Utc>, builds: usize) -> usize {
        let window =
            Window { from: self.planned_until, to: until, pace: Pace::BRISK, history: false };
        if until <= window.from {
            return 0;
        }
        let mut acts = self.lives.plan(&self.deployment, window, builds);
        if self.config.heartbeats {
            acts.extend(self.heartbeats.plan(&self.deployment, window.from, until));
        }
        self.planned_until = until;
        self.add(acts)
    }

    /// Plans lives that begin in a past span. Their acts are due at once and keep their times.
    pub fn extend_late(
        &mut self,
        from: DateTime<Utc>,
        until: DateTime<Utc>,
        builds: usize,
    ) -> usize {
        let window = Window { from, to: until, pace: Pace::BRISK, history: false };
        let acts = self.lives.plan(&self.deployment, window, builds);
        self.add(acts)
    }

    /// Plans another start of each workspace, from `now` on.
    pub fn start_again(&mut self, workspaces: &[Existing], now: DateTime<Utc>) -> usize {
        let window = Window { from: now, to: now, pace: Pace::BRISK, history: false };
        let Script { lives, deployment, .. } = self;
        let acts = workspaces
            .iter()
            .flat_map(|workspace| lives.start_again(deployment, window, workspace))
            .collect();
        self.add(acts)
    }

    /// Adds acts to the plan. Returns the number of builds that they queue.
    fn add(&mut self, mut acts: Vec<Act>) -> usize {
        let builds = acts.iter().filter(|act| matches!(act.change, Change::Queue(_))).count();
        acts.extend(self.heartbeats.publishing(&acts));
        acts.extend(self.acts.drain(..));
        acts.sort_by_key(|act| act.at);
        self.acts = acts.into();
        builds
    }

    /// From now on every second act has times that are this far behind.
    pub fn set_clock_behind(&mut self, behind: TimeDelta) {
        self.slow_clock.behind = behind;
    }

    pub fn planned_until(&self) -> DateTime<Utc> {
        self.planned_until
    }

    /// The next act that is due at `now`, noted in the books. Removed presets are also removed from
    /// it.
    pub fn next(&mut self, now: DateTime<Utc>) -> Option<Act> {
        let mut act = self.acts.pop_front_if(|act| act.at <= now)?;
        if let Change::Queue(queued) = &mut act.change {
            queued.preset =
                queued.preset.filter(|preset| !self.books.removed_presets.contains(preset));
        }
        self.slow_clock.second_replica = !self.slow_clock.second_replica;
        if self.slow_clock.second_replica {
            act.date_back(self.slow_clock.behind);
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
    let windows = acts.iter().filter_map(|act| match &act.change {
        Change::License(license) if license.known_key => {
            Some([license.claims.nbf, license.claims.exp])
        }
        _ => None,
    });
    windows.flatten().collect()
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use super::super::schema::SchemaVersion;
    use super::super::truth::{Class, Status, UsageKind};
    use super::*;

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
        assert_eq!(
            once,
            serde_json::to_string(&played(config(SchemaVersion::TasksEra, 300))).unwrap()
        );
        let other = Config { seed: 12, ..config(SchemaVersion::TasksEra, 300) };
        assert_ne!(once, serde_json::to_string(&played(other)).unwrap());
        assert_eq!(
            serde_json::from_str::<Truth>(&once).unwrap(),
            played(config(SchemaVersion::TasksEra, 300))
        );
    }

    #[test]
    fn a_history_has_the_requested_builds_and_every_oddity() {
        for schema in [SchemaVersion::TasksEra, SchemaVersion::Sep2026] {
            let truth = played(config(schema, 5000));
            assert!(truth.builds.len() >= 5000, "{}", truth.builds.len());
            let agents =
                truth.usage.iter().filter(|row| row.event_type == UsageKind::ManagedAgents).count();
            assert!(agents >= 800, "{schema:?}: {agents} agents");
            for class in
                [Class::RegularCreation, Class::PrebuildCreation, Class::Claim, Class::Other]
            {
                for status in [Status::Succeeded, Status::Failed, Status::Canceled] {
                    let expected = status == Status::Succeeded
                        || class != Class::Claim && class != Class::Other
                        || status == Status::Failed;
                    let there = truth
                        .builds
                        .iter()
                        .any(|build| build.class == class && build.status == status);
                    assert!(there || !expected, "{class:?} {status:?}");
                }
            }
            let retried = |build: &&super::super::truth::BuildTruth| {
                build.counted_as_creation && build.build_number > 1
            };
            assert!(truth.builds.iter().filter(retried).count() > 10);
            assert!(truth.clock_skews > 5);
            assert!(
                truth.builds.iter().any(|build| build.started_at == Some(build.completed_at)),
                "reaped with an end as its start"
            );
            assert!(
                truth
                    .builds
                    .iter()
                    .any(|build| build.started_at.is_none() && build.status == Status::Failed)
            );
            assert!(truth.builds.iter().any(|build| build.labels.preset_name.is_empty()));
            let organizations: BTreeSet<_> =
                truth.builds.iter().map(|build| &build.labels.organization_name).collect();
            let templates: BTreeSet<_> = truth
                .builds
                .iter()
                .map(|build| (&build.labels.organization_name, &build.labels.template_name))
                .collect();
            let presets: BTreeSet<_> = truth
                .builds
                .iter()
                .map(|build| &build.labels)
                .filter(|labels| !labels.preset_name.is_empty())
                .collect();
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
                let around = [-1, 0, 1]
                    .map(|offset| times.contains(&(edge + TimeDelta::microseconds(offset))));
                assert!(around == [true; 3] || around == [false; 3], "{edge}: {around:?}");
                edges += usize::from(around[0]);
            }
            assert!(
                license.claims.exp <= truth.builds[0].completed_at || license.managed_agents > 0,
                "{license:?}"
            );
        }
        assert!(edges >= 5, "{edges} edges");
    }

    #[test]
    fn lives_of_a_span_that_is_over_are_due_at_once_under_their_own_times() {
        let mut script = Script::new(config(SchemaVersion::TasksEra, 100)).unwrap();
        let now = script.config.end;
        while script.next(now).is_some() {}
        let before = script.books.completed();
        let queued =
            script.extend_late(now - TimeDelta::seconds(120), now - TimeDelta::seconds(90), 30);
        while script.next(now).is_some() {}
        let truth = script.truth();
        let late = truth.builds.iter().filter(|build| {
            build.created_at >= now - TimeDelta::seconds(120) && build.completed_at < now
        });
        let late: Vec<_> =
            late.filter(|build| build.completed_at < now - TimeDelta::seconds(20)).collect();
        assert!(
            queued >= 30 && late.len() >= 10 && truth.builds.len() >= before + late.len(),
            "{} of {queued}",
            late.len()
        );
        assert!(
            late.iter().all(|build| build.created_at <= build.completed_at),
            "one clock wrote all of their times"
        );
    }

    #[test]
    fn a_replica_whose_clock_is_behind_dates_its_rows_back_and_heartbeats_keep_their_hours() {
        let behind = TimeDelta::minutes(3);
        let played = |behind| {
            let mut script = Script::new(config(SchemaVersion::TasksEra, 300)).unwrap();
            script.set_clock_behind(behind);
            while script.next(script.config.end).is_some() {}
            script.truth()
        };
        let (right, slow) = (played(TimeDelta::zero()), played(behind));
        let ends = |truth: &Truth| {
            truth
                .builds
                .iter()
                .map(|build| (build.id, build.completed_at))
                .collect::<BTreeMap<_, _>>()
        };
        let (right_ends, slow_ends) = (ends(&right), ends(&slow));
        let shifted = right_ends.iter().filter(|(id, end)| slow_ends[id] == **end - behind).count();
        let same = right_ends.iter().filter(|(id, end)| slow_ends[id] == **end).count();
        assert_eq!((right_ends.len(), slow_ends.len()), (shifted + same, shifted + same));
        assert!(shifted > 50 && same > 50, "{shifted} shifted, {same} not");
        assert!(
            slow.clock_skews > right.clock_skews,
            "a start by the other clock lies after the end"
        );
        let usage = |truth: &Truth| {
            truth
                .usage
                .iter()
                .map(|row| (row.id.clone(), row.created_at))
                .collect::<BTreeMap<_, _>>()
        };
        let (right_usage, slow_usage) = (usage(&right), usage(&slow));
        assert!(
            right
                .usage
                .iter()
                .filter(|row| row.build_id.is_none())
                .all(|row| slow_usage[&row.id] == row.created_at)
        );
        assert!(right_usage.iter().any(|(id, at)| slow_usage[id] == *at - behind));
        assert_eq!(right.creation_totals(), slow.creation_totals());
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
