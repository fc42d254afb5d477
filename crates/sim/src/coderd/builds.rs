//! Plans one workspace, and each of its builds from queue to end.

use chrono::{DateTime, TimeDelta, Utc};
use rand::Rng;
use uuid::Uuid;

use super::acts::{
    Act, BuildIds, Change, Class, Completed, NewTask, NewWorkspace, Queued, Success, Transition,
    UsageKind, UsageRow,
};
use super::chance::{log_uniform, one_in, pick, uniform, uuid_from};
use super::config::PREBUILDS_USER;
use super::deployment::{Deployment, Template, Version};
use super::planning::{Existing, Planning, Window};

/// Durations at the exact upper bound of a classic bucket, in seconds.
const BUCKET_BOUNDS: [i64; 5] = [1, 10, 30, 60, 300];

/// A workspace during the planning of its life.
pub(super) struct Workspace<'a> {
    pub planning: &'a mut Planning,
    pub window: Window,
    pub template: &'a Template,
    pub owner: Uuid,
    pub now: DateTime<Utc>,
    /// Whether a task refers to it.
    pub task: bool,
    pub deleted: bool,
    pub acts: Vec<Act>,
    deployment: &'a Deployment,
    version: &'a Version,
    preset: Option<Uuid>,
    id: Uuid,
    number: i32,
    /// The rows that the first build or the claim build creates.
    new_workspace: Option<NewWorkspace>,
    new_task: Option<NewTask>,
}

/// A requested build.
#[derive(Clone, Copy)]
pub(super) struct BuildRequest {
    pub class: Class,
    pub transition: Transition,
    pub initiator: Uuid,
    pub reason: &'static str,
    pub stage: Option<u8>,
    pub ending: Ending,
}

/// The end of a build, with odd forms of its row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ending {
    Success,
    /// The daemon's replica has a fast clock: the start is after the end.
    SuccessSkewed,
    /// Completed with an empty string as its error, which is not an error.
    SuccessWithEmptyError,
    /// Its usage row is dated at this instant.
    SuccessWithUsageAt(DateTime<Utc>),
    Failure,
    CanceledPending,
    BulkCanceled,
    CanceledRunning,
    CanceledButFailed,
    /// A hung running job.
    Reaped,
    /// A hung pending job: the reaper also writes its end as its start.
    ReapedPending,
    /// The same by an older reaper: without a start.
    ReapedUnstarted,
    /// Not over when the history ends.
    LeftPending,
    LeftRunning,
    LeftCanceling,
}

impl<'a> Workspace<'a> {
    pub fn new(
        planning: &'a mut Planning,
        deployment: &'a Deployment,
        window: Window,
        template: &'a Template,
        version: &'a Version,
        now: DateTime<Utc>,
    ) -> Self {
        let id = uuid_from(&mut planning.dice);
        let owner = deployment.users[planning.dice.random_range(0..deployment.users.len())].id;
        Workspace {
            planning,
            window,
            template,
            owner,
            now,
            task: false,
            deleted: false,
            acts: Vec::new(),
            deployment,
            version,
            preset: None,
            id,
            number: 0,
            new_workspace: None,
            new_task: None,
        }
    }

    /// Continues with an existing workspace.
    pub fn resume(&mut self, existing: &Existing) {
        (self.id, self.owner, self.number) = (existing.workspace, existing.owner, existing.builds);
    }

    /// A user's creation. More than half of those on an AI template are tasks; `may_lack_preset`
    /// sometimes leaves the preset out.
    pub fn create(&mut self, ending: Ending, may_lack_preset: bool) {
        if !(may_lack_preset && one_in(&mut self.planning.dice, 7)) {
            self.choose_another_preset();
        }
        let name = self.next_name("workspace");
        self.new_workspace = Some(NewWorkspace { owner: self.owner, name });
        let chance = matches!(ending, Ending::SuccessWithUsageAt(_))
            || self.planning.dice.random_ratio(6, 10);
        self.perhaps_task(chance);
        self.build(BuildRequest {
            class: Class::RegularCreation,
            transition: Transition::Start,
            initiator: self.owner,
            reason: "initiator",
            stage: None,
            ending,
        });
    }

    /// The reconciler's creation of a pool workspace.
    pub fn fill_pool(&mut self, stage: Option<u8>, ending: Ending) {
        let pools: Vec<Uuid> = self
            .version
            .presets
            .iter()
            .filter(|preset| preset.pool)
            .map(|preset| preset.id)
            .collect();
        self.preset = (!pools.is_empty()).then(|| pick(&mut self.planning.dice, &pools));
        let name = self.next_name("prebuild");
        self.new_workspace = Some(NewWorkspace { owner: PREBUILDS_USER, name });
        let user = std::mem::replace(&mut self.owner, PREBUILDS_USER);
        self.build(BuildRequest {
            class: Class::PrebuildCreation,
            transition: Transition::Start,
            initiator: PREBUILDS_USER,
            reason: "initiator",
            stage,
            ending,
        });
        self.owner = user;
    }

    /// The claim's first transaction: owner and name. The build follows within milliseconds.
    pub fn hand_over(&mut self) {
        let name = self.next_name("workspace");
        self.act(self.now, Change::Claim { workspace: self.id, owner: self.owner, name });
        self.now += uniform(&mut self.planning.dice, (2_000, 40_000));
        let chance = self.planning.dice.random_ratio(1, 2);
        self.perhaps_task(chance);
    }

    /// Another preset of the version, if it has two.
    pub fn choose_another_preset(&mut self) {
        let others: Vec<Uuid> = self
            .version
            .presets
            .iter()
            .map(|preset| preset.id)
            .filter(|id| Some(*id) != self.preset)
            .collect();
        if !others.is_empty() {
            self.preset = Some(pick(&mut self.planning.dice, &others));
        }
    }

    /// One build from queue to end. Afterwards `now` is the time of its end.
    pub fn build(&mut self, request: BuildRequest) {
        let ids = self.queue(request);
        let queued_at = self.now;
        match request.ending {
            Ending::LeftPending => {}
            Ending::CanceledPending | Ending::BulkCanceled => {
                self.now += uniform(&mut self.planning.dice, self.window.pace.wait);
                let later = if request.ending == Ending::BulkCanceled {
                    0
                } else {
                    self.planning.dice.random_range(2..40)
                };
                let change = Change::CancelPending {
                    build: ids,
                    canceled_at: self.now,
                    completed_at: self.now + TimeDelta::microseconds(later),
                };
                self.now += TimeDelta::microseconds(later);
                self.act(self.now, change);
            }
            Ending::ReapedPending | Ending::ReapedUnstarted => {
                let delay = self.reaping_delay();
                self.now += delay;
                self.fail(ids, request);
            }
            _ => self.run(ids, request, queued_at),
        }
    }

    fn run(&mut self, ids: BuildIds, request: BuildRequest, queued_at: DateTime<Utc>) {
        let lasts = self.duration(request.class);
        if let Ending::SuccessWithUsageAt(usage_at) = request.ending {
            let completed_at = usage_at - TimeDelta::microseconds(120);
            self.acquire(ids, queued_at + (completed_at - queued_at) / 4, TimeDelta::zero());
            self.now = completed_at;
            return self.succeed(ids, request, usage_at);
        }
        let wait = log_uniform(&mut self.planning.dice, self.window.pace.wait);
        let skew = if request.ending == Ending::SuccessSkewed {
            lasts + uniform(&mut self.planning.dice, (1, 2_000_000))
        } else {
            TimeDelta::zero()
        };
        self.acquire(ids, self.now + wait, skew);
        self.now += lasts;
        match request.ending {
            Ending::LeftRunning => {}
            Ending::LeftCanceling => self.act(
                self.now.min(self.window.to),
                Change::CancelRunning { build: ids, canceled_at: self.now.min(self.window.to) },
            ),
            Ending::CanceledRunning | Ending::CanceledButFailed => {
                self.act(self.now, Change::CancelRunning { build: ids, canceled_at: self.now });
                self.now += uniform(&mut self.planning.dice, (100_000, 3_000_000))
                    .min(TimeDelta::microseconds(self.window.pace.gap.0));
                self.fail(ids, request);
            }
            Ending::Reaped => {
                let delay = self.reaping_delay();
                self.now += delay;
                self.fail(ids, request);
            }
            Ending::Failure => self.fail(ids, request),
            _ => {
                let usage_at = self.now + uniform(&mut self.planning.dice, (20, 900));
                self.succeed(ids, request, usage_at);
            }
        }
    }

    fn queue(&mut self, request: BuildRequest) -> BuildIds {
        self.number += 1;
        let dice = &mut self.planning.dice;
        let ids = BuildIds { build: uuid_from(dice), job: uuid_from(dice), workspace: self.id };
        let queued = Queued {
            ids,
            class: request.class,
            new_workspace: self.new_workspace.take(),
            new_task: self.new_task.take(),
            organization: self.template.organization,
            template: self.template.id,
            version: self.version.id,
            preset: self.preset,
            number: self.number,
            transition: request.transition,
            initiator: request.initiator,
            reason: request.reason,
            stage: request.stage,
        };
        self.act(self.now, Change::Queue(Box::new(queued)));
        ids
    }

    /// Acquired at `at` in coderd's order; the row's time is `skew` later.
    fn acquire(&mut self, build: BuildIds, at: DateTime<Utc>, skew: TimeDelta) {
        let middle = self.planning.config.start
            + (self.planning.config.end - self.planning.config.start) / 2;
        let workers = &self.deployment.workers;
        let candidates = if at < middle { &workers[..workers.len() - 3] } else { &workers[3..] };
        let worker = pick(&mut self.planning.dice, candidates);
        self.now = at;
        self.act(at, Change::Acquire { build, worker, started_at: at + skew });
    }

    fn succeed(&mut self, ids: BuildIds, request: BuildRequest, usage_at: DateTime<Utc>) {
        let start = request.transition == Transition::Start;
        let usage = (start && self.counts_as_agent(usage_at)).then(|| UsageRow {
            id: uuid_from(&mut self.planning.dice).to_string(),
            kind: UsageKind::ManagedAgents,
            quantity: 1,
            created_at: usage_at,
        });
        let pool = request.class == Class::PrebuildCreation;
        let success = Success {
            has_ai_task: if self.by_task_rule(self.now) {
                self.task
            } else {
                start && self.template.ai
            },
            has_external_agent: start && self.template.external_agent,
            deadline: (start && !pool).then(|| self.now + TimeDelta::hours(8)),
            daily_cost: if start { self.planning.dice.random_range(0..40) } else { 0 },
            usage,
        };
        let error = (request.ending == Ending::SuccessWithEmptyError).then(String::new);
        let held_for = self.held(success.usage.is_none());
        let done = Completed {
            ids,
            transition: request.transition,
            completed_at: self.now,
            start_at_end: false,
            error,
            error_code: None,
            success: Some(success),
        };
        self.acts.push(Act { at: self.now, held_for, change: Change::Complete(Box::new(done)) });
    }

    fn fail(&mut self, ids: BuildIds, request: BuildRequest) {
        let error = match request.ending {
            Ending::CanceledRunning => one_in(&mut self.planning.dice, 2).then(String::new),
            Ending::CanceledButFailed => Some("terraform apply: interrupted".to_owned()),
            Ending::Reaped | Ending::ReapedPending | Ending::ReapedUnstarted => {
                Some("job was reaped: no sign of life".to_owned())
            }
            _ => Some("terraform apply: exit status 1".to_owned()),
        };
        let coded = request.ending == Ending::Failure && one_in(&mut self.planning.dice, 4);
        let done = Completed {
            ids,
            transition: request.transition,
            completed_at: self.now,
            start_at_end: request.ending == Ending::ReapedPending,
            error,
            error_code: coded.then(|| "REQUIRED_TEMPLATE_VARIABLES".to_owned()),
            success: None,
        };
        self.act(self.now, Change::Complete(Box::new(done)));
    }

    /// Section 2.5: the resource rule counts every successful start of an AI template, the task
    /// rule those of a task's workspace. Without Tasks coderd counts nothing; the simulator keeps
    /// the resource rule, so that there is usage.
    fn counts_as_agent(&self, at: DateTime<Utc>) -> bool {
        if self.by_task_rule(at) { self.task } else { self.template.ai }
    }

    fn by_task_rule(&self, at: DateTime<Utc>) -> bool {
        self.planning.config.schema.has_tasks() && at >= self.planning.config.task_rule_since
    }

    fn perhaps_task(&mut self, chance: bool) {
        if chance && self.template.ai && self.planning.config.schema.has_tasks() {
            self.task = true;
            let id = uuid_from(&mut self.planning.dice);
            self.new_task = Some(NewTask {
                id,
                owner: self.owner,
                name: format!("task-{}", self.planning.workspaces),
            });
        }
    }

    fn duration(&mut self, class: Class) -> TimeDelta {
        let range =
            if class == Class::Claim { self.window.pace.claim } else { self.window.pace.build };
        if one_in(&mut self.planning.dice, 50) {
            let seconds = TimeDelta::seconds(pick(&mut self.planning.dice, &BUCKET_BOUNDS));
            if seconds <= TimeDelta::microseconds(range.1) {
                return seconds;
            }
        }
        log_uniform(&mut self.planning.dice, range)
    }

    fn reaping_delay(&mut self) -> TimeDelta {
        uniform(&mut self.planning.dice, (self.window.pace.gap.0, self.window.pace.gap.0 * 6))
    }

    fn held(&mut self, without_usage: bool) -> Option<TimeDelta> {
        // A usage row in an open transaction would lock its day's total.
        let every = self.planning.config.late_commit_every;
        if !without_usage || every == 0 {
            return None;
        }
        self.planning.completions += 1;
        self.planning
            .completions
            .is_multiple_of(every)
            .then(|| uniform(&mut self.planning.dice, self.window.pace.hold))
    }

    fn next_name(&mut self, kind: &str) -> String {
        self.planning.workspaces += 1;
        format!("{kind}-{:06}", self.planning.workspaces)
    }

    fn act(&mut self, at: DateTime<Utc>, change: Change) {
        self.acts.push(Act { at, held_for: None, change });
    }
}
