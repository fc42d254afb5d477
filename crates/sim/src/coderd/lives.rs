//! Plans the lives of workspaces: their builds and times.

use chrono::{DateTime, TimeDelta, Utc};
use rand::Rng;
use uuid::Uuid;

use super::acts::{Act, Change, Class, Transition};
use super::builds::{BuildRequest, Ending, Workspace};
use super::chance::{Subject, dice, log_uniform, one_in, pick, uniform};
use super::config::{Config, PREBUILDS_USER};
use super::deployment::{Deployment, Template};
use super::planning::{Existing, Planning, Window};

/// The kind of a workspace's life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Story {
    Regular,
    /// The first build fails, the second (with another preset) succeeds.
    Retry,
    FailedForGood,
    CanceledPendingThenStarted,
    CanceledRunning,
    CanceledButFailed,
    Pool,
    PoolFailed,
    /// One statement cancels pending pool builds of an inactive version; both times are equal.
    PoolBulkCanceled,
    Claimed,
    /// Spring 2025: the claim's initiator is the prebuilds user.
    EarlyClaimed,
    /// Older: without a stage in any input.
    StagelessClaimed,
    /// The claim fails, and its new owner starts the workspace again.
    ClaimFailed,
    Skewed,
    ClaimSkewed,
    EmptyError,
    Reaped,
    ReapedPending,
    ReapedUnstarted,
}

impl Story {
    fn is_of_pool(self) -> bool {
        use Story::{
            ClaimFailed, ClaimSkewed, Claimed, EarlyClaimed, Pool, PoolBulkCanceled, PoolFailed,
            StagelessClaimed,
        };
        matches!(
            self,
            Pool | PoolFailed
                | PoolBulkCanceled
                | Claimed
                | EarlyClaimed
                | StagelessClaimed
                | ClaimFailed
                | ClaimSkewed
        )
    }
}

/// Every kind with its weight.
const STORIES: [(Story, u32); 19] = [
    (Story::Regular, 300),
    (Story::Retry, 40),
    (Story::FailedForGood, 25),
    (Story::CanceledPendingThenStarted, 20),
    (Story::CanceledRunning, 20),
    (Story::CanceledButFailed, 12),
    (Story::Pool, 60),
    (Story::PoolFailed, 20),
    (Story::PoolBulkCanceled, 12),
    (Story::Claimed, 180),
    (Story::EarlyClaimed, 60),
    (Story::StagelessClaimed, 15),
    (Story::ClaimFailed, 15),
    (Story::Skewed, 10),
    (Story::ClaimSkewed, 6),
    (Story::EmptyError, 10),
    (Story::Reaped, 8),
    (Story::ReapedPending, 6),
    (Story::ReapedUnstarted, 6),
];

/// Plans lives, window after window.
pub(super) struct LifePlanner {
    planning: Planning,
    /// When each template's second version becomes active.
    promotions: Vec<(Uuid, Uuid, DateTime<Utc>)>,
}

impl LifePlanner {
    pub fn new(config: &Config, deployment: &Deployment) -> Self {
        let mut dice = dice(config.seed, Subject::LifePlanner);
        let span = (config.end - config.start).num_microseconds().unwrap_or(i64::MAX);
        let promotions = deployment
            .templates
            .iter()
            .map(|template| {
                (
                    template.id,
                    template.versions[1].id,
                    config.start + uniform(&mut dice, (span * 3 / 10, span * 7 / 10)),
                )
            })
            .collect();
        LifePlanner { planning: Planning::new(config, dice), promotions }
    }

    /// The acts that make second versions active.
    pub fn promotions(&self) -> Vec<Act> {
        let act = |&(template, version, at): &(Uuid, Uuid, DateTime<Utc>)| Act {
            at,
            held_for: None,
            change: Change::Promote { template, version },
        };
        self.promotions.iter().map(act).collect()
    }

    /// Plans lives with at least `builds` builds that complete in the window. Outside of a history,
    /// planned builds are enough.
    pub fn plan(&mut self, deployment: &Deployment, window: Window, builds: usize) -> Vec<Act> {
        let mut acts = Vec::new();
        let mut done = 0;
        let mut first_round = STORIES.iter().map(|(story, _)| *story);
        if window.history {
            acts.extend(self.left_open(deployment, window));
        }
        while done < builds {
            let story = if window.history { first_round.next() } else { None }
                .unwrap_or_else(|| self.any_story());
            if matches!(story, Story::EarlyClaimed | Story::StagelessClaimed) && !window.history {
                continue;
            }
            let life = self.life(deployment, window, story);
            let counts = |act: &&Act| {
                matches!(act.change, Change::Complete(_) | Change::CancelPending { .. })
                    && (!window.history || act.at <= window.to)
            };
            done += life.iter().filter(counts).count();
            acts.extend(life);
        }
        acts
    }

    /// Creations of AI workspaces with usage one microsecond before, on and after each instant.
    pub fn on_edges(
        &mut self,
        deployment: &Deployment,
        window: Window,
        edges: &[DateTime<Utc>],
    ) -> Vec<Act> {
        let mut acts = Vec::new();
        let Some(template) =
            deployment.templates.iter().find(|template| template.ai && !template.sunset)
        else {
            return acts;
        };
        for edge in edges {
            for offset in [-1, 0, 1] {
                let usage_at = *edge + TimeDelta::microseconds(offset);
                let begun = usage_at - TimeDelta::seconds(30);
                if begun < window.from || usage_at > window.to {
                    continue;
                }
                let mut workspace = self.workspace(deployment, window, template, begun);
                workspace.create(Ending::SuccessWithUsageAt(usage_at), true);
                acts.extend(workspace.acts);
            }
        }
        acts
    }

    /// Another start of a workspace by its owner, queued when the window begins. No acts if its
    /// template is gone.
    pub fn start_again(
        &mut self,
        deployment: &Deployment,
        window: Window,
        existing: &Existing,
    ) -> Vec<Act> {
        let Some(template) =
            deployment.templates.iter().find(|template| template.id == existing.template)
        else {
            return Vec::new();
        };
        let mut workspace = self.workspace(deployment, window, template, window.from);
        workspace.resume(existing);
        workspace.start("dashboard");
        workspace.acts
    }

    fn any_story(&mut self) -> Story {
        let mut at = self
            .planning
            .dice
            .random_range(0..STORIES.iter().map(|(_, weight)| weight).sum::<u32>());
        for (story, weight) in STORIES {
            if at < weight {
                return story;
            }
            at -= weight;
        }
        Story::Regular
    }

    /// One build pending, one running and one canceling at the end of the history.
    fn left_open(&mut self, deployment: &Deployment, window: Window) -> Vec<Act> {
        let mut acts = Vec::new();
        let span = window.to - window.from;
        for ending in [Ending::LeftPending, Ending::LeftRunning, Ending::LeftCanceling] {
            let lasting: Vec<&Template> =
                deployment.templates.iter().filter(|template| !template.sunset).collect();
            let template = pick(&mut self.planning.dice, &lasting);
            let mut workspace =
                self.workspace(deployment, window, template, window.to - span / 500);
            workspace.create(ending, false);
            acts.extend(workspace.acts);
        }
        acts
    }

    fn life(&mut self, deployment: &Deployment, window: Window, story: Story) -> Vec<Act> {
        let fits = |template: &&Template| {
            (window.history || !template.sunset) && (!story.is_of_pool() || template.has_pool())
        };
        let fitting: Vec<&Template> = deployment.templates.iter().filter(fits).collect();
        let template = if fitting.is_empty() {
            &deployment.templates[0]
        } else {
            pick(&mut self.planning.dice, &fitting)
        };
        let early = match story {
            Story::EarlyClaimed => 0.4,
            Story::StagelessClaimed => 0.2,
            _ if template.sunset => 0.4,
            _ => 1.0,
        };
        let begun = self.moment(window, early);
        let mut workspace = self.workspace(deployment, window, template, begun);
        workspace.live(story);
        if template.sunset && !workspace.deleted {
            workspace.now += TimeDelta::microseconds(window.pace.gap.0);
            workspace.end_of_life(workspace.owner, "initiator");
        }
        workspace.acts
    }

    /// A moment in the first part of the window.
    #[allow(clippy::cast_possible_truncation, clippy::cast_precision_loss)] // a window in microseconds is far below 2^52
    fn moment(&mut self, window: Window, part: f64) -> DateTime<Utc> {
        let span = (window.to - window.from).num_microseconds().unwrap_or(i64::MAX) as f64 * part;
        window.from + TimeDelta::microseconds((span * self.planning.dice.random::<f64>()) as i64)
    }

    fn workspace<'a>(
        &'a mut self,
        deployment: &'a Deployment,
        window: Window,
        template: &'a Template,
        begun: DateTime<Utc>,
    ) -> Workspace<'a> {
        let promoted = self
            .promotions
            .iter()
            .find(|(id, _, _)| *id == template.id)
            .is_none_or(|(_, _, at)| *at <= begun);
        let version = if promoted { template.versions.last() } else { template.versions.first() };
        Workspace::new(
            &mut self.planning,
            deployment,
            window,
            template,
            version.unwrap_or(&template.versions[0]),
            begun,
        )
    }
}

impl Workspace<'_> {
    fn live(&mut self, story: Story) {
        match story {
            Story::Regular => self.create(Ending::Success, true),
            Story::Skewed => self.create(Ending::SuccessSkewed, true),
            Story::EmptyError => self.create(Ending::SuccessWithEmptyError, true),
            Story::Retry => {
                self.create(Ending::Failure, true);
                self.choose_another_preset();
                self.start_again();
            }
            Story::CanceledPendingThenStarted => {
                self.create(Ending::CanceledPending, true);
                self.start_again();
            }
            Story::FailedForGood => return self.create(Ending::Failure, true),
            Story::CanceledRunning => return self.create(Ending::CanceledRunning, true),
            Story::CanceledButFailed => return self.create(Ending::CanceledButFailed, true),
            Story::Reaped => return self.create(Ending::Reaped, true),
            Story::ReapedPending => return self.create(Ending::ReapedPending, true),
            Story::ReapedUnstarted => return self.create(Ending::ReapedUnstarted, true),
            Story::Pool => return self.pool_workspace_until_deleted(Ending::Success),
            Story::PoolFailed => return self.pool_workspace_until_deleted(Ending::Failure),
            Story::PoolBulkCanceled => return self.fill_pool(Some(1), Ending::BulkCanceled),
            Story::Claimed => self.claimed(Some((1, 2)), false, Ending::Success),
            Story::ClaimSkewed => self.claimed(Some((1, 2)), false, Ending::SuccessSkewed),
            Story::EarlyClaimed => self.claimed(Some((1, 2)), true, Ending::Success),
            Story::StagelessClaimed => {
                let by_system = one_in(&mut self.planning.dice, 2);
                self.claimed(None, by_system, Ending::Success);
            }
            Story::ClaimFailed => {
                self.claimed(Some((1, 2)), false, Ending::Failure);
                self.start_again();
            }
        }
        self.go_on();
    }

    fn pool_workspace_until_deleted(&mut self, ending: Ending) {
        self.fill_pool(Some(1), ending);
        if self.pause() {
            self.end_of_life(PREBUILDS_USER, "initiator");
        }
    }

    /// A pool build, then its claim; the oldest inputs have no stages.
    fn claimed(&mut self, stages: Option<(u8, u8)>, by_system: bool, ending: Ending) {
        self.fill_pool(stages.map(|(create, _)| create), Ending::Success);
        if !self.pause() {
            return;
        }
        self.hand_over();
        let initiator = if by_system { PREBUILDS_USER } else { self.owner };
        let stage = stages.map(|(_, claim)| claim);
        self.build(BuildRequest {
            class: Class::Claim,
            transition: Transition::Start,
            initiator,
            reason: "initiator",
            stage,
            ending,
        });
    }

    fn start_again(&mut self) {
        if self.pause() {
            let reason = pick(&mut self.planning.dice, &["dashboard", "cli", "initiator"]);
            self.start(reason);
        }
    }

    fn start(&mut self, reason: &'static str) {
        let ending = Ending::Success;
        self.build(BuildRequest {
            class: Class::Other,
            transition: Transition::Start,
            initiator: self.owner,
            reason,
            stage: None,
            ending,
        });
    }

    /// Stops, starts and perhaps a delete, until the window ends.
    fn go_on(&mut self) {
        let rounds = self.planning.dice.random_range(0..4);
        for _ in 0..rounds {
            if !self.pause() {
                break;
            }
            let (by, reason) = self.stop_reason();
            self.build(BuildRequest {
                class: Class::Other,
                transition: Transition::Stop,
                initiator: by,
                reason,
                stage: None,
                ending: Ending::Success,
            });
            if !self.pause() {
                break;
            }
            let reason = self.start_reason();
            let ending = match self.planning.dice.random_range(0..20) {
                0 => Ending::Failure,
                1 => Ending::SuccessSkewed,
                _ => Ending::Success,
            };
            self.build(BuildRequest {
                class: Class::Other,
                transition: Transition::Start,
                initiator: self.owner,
                reason,
                stage: None,
                ending,
            });
        }
        if one_in(&mut self.planning.dice, 3) && self.pause() {
            let reason =
                if one_in(&mut self.planning.dice, 3) { "autodelete" } else { "initiator" };
            self.end_of_life(self.owner, reason);
        }
    }

    fn end_of_life(&mut self, initiator: Uuid, reason: &'static str) {
        self.build(BuildRequest {
            class: Class::Other,
            transition: Transition::Delete,
            initiator,
            reason,
            stage: None,
            ending: Ending::Success,
        });
        self.deleted = true;
    }

    fn stop_reason(&mut self) -> (Uuid, &'static str) {
        let reasons: &[&'static str] = if self.task {
            &["task_auto_pause", "task_manual_pause"]
        } else {
            &["autostop", "initiator", "dashboard", "cli", "dormancy"]
        };
        (self.owner, pick(&mut self.planning.dice, reasons))
    }

    fn start_reason(&mut self) -> &'static str {
        let reasons: &[&'static str] = if self.task {
            &["task_resume", "dashboard"]
        } else {
            &[
                "autostart",
                "initiator",
                "dashboard",
                "cli",
                "ssh_connection",
                "vscode_connection",
                "jetbrains_connection",
            ]
        };
        pick(&mut self.planning.dice, reasons)
    }

    /// Lets time pass. False: the window (or a sunset template's time) is over.
    fn pause(&mut self) -> bool {
        let mut gap = log_uniform(&mut self.planning.dice, self.window.pace.gap);
        if !self.template.sunset {
            self.now += gap;
            return !self.window.history || self.now < self.window.to;
        }
        // Its lives are short, so that all end in time: between 0.4 and 0.6 of the window.
        let limit = self.window.from + (self.window.to - self.window.from) * 6 / 10;
        gap = gap.min(TimeDelta::minutes(30)).max(TimeDelta::microseconds(self.window.pace.gap.0));
        self.now += gap;
        self.now < limit
    }
}
