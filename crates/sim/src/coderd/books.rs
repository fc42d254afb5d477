//! The simulator's bookkeeping: it notes the effect of each act when the act is done.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use chrono::{DateTime, Utc};
use uuid::Uuid;

use super::acts::{Act, Change, Class, Completed, Queued, Transition, UsageKind, UsageRow};
use super::config::{Config, PREBUILDS_USER};
use super::deployment::Deployment;
use super::signing::LicenseKey;
use super::truth::{
    BuildTruth, ClaimSeries, CreationSeries, CreationTotal, CreationType, Labels, LicenseTruth,
    Observation, Rename, Status, Truth, UsageTruth,
};

/// Everything noted until now.
pub(super) struct Books {
    pub names: HashMap<Uuid, String>,
    /// Presets whose row is removed.
    pub removed_presets: BTreeSet<Uuid>,
    pub renames: Vec<Rename>,
    open: HashMap<Uuid, OpenBuild>,
    workspaces: HashMap<Uuid, WorkspaceBook>,
    builds: Vec<BuildTruth>,
    usage: BTreeMap<String, UsageTruth>,
    licenses: Vec<LicenseTruth>,
    seats: BTreeSet<Uuid>,
    suspended: Uuid,
}

/// An incomplete build.
struct OpenBuild {
    queued: Queued,
    created_at: DateTime<Utc>,
    started_at: Option<DateTime<Utc>>,
    canceled: bool,
}

#[derive(Default)]
struct WorkspaceBook {
    template: Uuid,
    started_once: bool,
    deleted: bool,
}

impl Books {
    pub fn new(deployment: &Deployment) -> Self {
        let mut books = Books {
            names: deployment
                .organizations
                .iter()
                .map(|organization| (organization.id, organization.name.clone()))
                .collect(),
            removed_presets: BTreeSet::new(),
            renames: Vec::new(),
            open: HashMap::new(),
            workspaces: HashMap::new(),
            builds: Vec::new(),
            usage: BTreeMap::new(),
            licenses: Vec::new(),
            seats: BTreeSet::new(),
            suspended: deployment.suspended.id,
        };
        for template in &deployment.templates {
            books.add_template(template);
        }
        books
    }

    pub fn add_template(&mut self, template: &super::deployment::Template) {
        self.names.insert(template.id, template.name.clone());
        let presets = template.versions.iter().flat_map(|version| &version.presets);
        self.names.extend(presets.map(|preset| (preset.id, preset.name.clone())));
    }

    /// Whether the template has a workspace that is not deleted.
    pub fn has_workspaces(&self, template: Uuid) -> bool {
        self.workspaces
            .values()
            .any(|workspace| workspace.template == template && !workspace.deleted)
    }

    /// A workspace that is not deleted; the same acts give the same one.
    pub fn any_workspace(&self) -> Option<Uuid> {
        self.workspaces.iter().filter(|(_, workspace)| !workspace.deleted).map(|(id, _)| *id).min()
    }

    pub fn completed(&self) -> usize {
        self.builds.len()
    }

    pub fn usage_rows(&self) -> usize {
        self.usage.len()
    }

    /// Notes the effect of the act.
    pub fn note(&mut self, act: &Act) {
        match &act.change {
            Change::Queue(queued) => self.queued(queued, act.at),
            Change::Acquire { build, started_at, .. } => {
                if let Some(open) = self.open.get_mut(&build.build) {
                    open.started_at = Some(*started_at);
                }
            }
            Change::CancelRunning { build, .. } => {
                if let Some(open) = self.open.get_mut(&build.build) {
                    open.canceled = true;
                }
            }
            Change::CancelPending { build, completed_at, .. } => {
                if let Some(open) = self.open.remove(&build.build) {
                    self.closed(open, Status::Canceled, *completed_at, false);
                }
            }
            Change::Complete(done) => self.completed_job(done, act.at),
            Change::Usage(row) => self.used(row, act.at, None),
            Change::Publish { id, published_at, failure } => {
                if let Some(row) = self.usage.get_mut(id) {
                    row.published_at = *published_at;
                    row.failure_message.clone_from(failure);
                }
            }
            Change::License(row) => self.licenses.push(LicenseTruth {
                uuid: row.uuid,
                jwt: row.jwt.clone(),
                kid: row.kid.clone(),
                verifiable: row.known_key,
                claims: row.claims.clone(),
                uploaded_at: act.at,
                managed_agents: 0,
            }),
            Change::Seat { user } => {
                self.seats.insert(*user);
            }
            Change::Claim { .. } | Change::Chat { .. } | Change::Promote { .. } => {}
        }
    }

    fn queued(&mut self, queued: &Queued, at: DateTime<Utc>) {
        self.workspaces.entry(queued.ids.workspace).or_default().template = queued.template;
        let open =
            OpenBuild { queued: queued.clone(), created_at: at, started_at: None, canceled: false };
        self.open.insert(queued.ids.build, open);
    }

    fn completed_job(&mut self, done: &Completed, at: DateTime<Utc>) {
        let Some(mut open) = self.open.remove(&done.ids.build) else { return };
        if done.start_at_end && open.started_at.is_none() {
            open.started_at = Some(done.completed_at);
        }
        let status = match &done.error {
            Some(error) if !error.is_empty() => Status::Failed,
            _ if open.canceled => Status::Canceled,
            _ => Status::Succeeded,
        };
        if let Some(usage) = done.success.as_ref().and_then(|success| success.usage.as_ref()) {
            self.used(usage, at, Some(done.ids.build));
        }
        self.closed(open, status, done.completed_at, done.start_at_end);
    }

    fn closed(
        &mut self,
        open: OpenBuild,
        status: Status,
        completed_at: DateTime<Utc>,
        reaper_wrote_start: bool,
    ) {
        let queued = open.queued;
        let workspace = self.workspaces.entry(queued.ids.workspace).or_default();
        let succeeded = status == Status::Succeeded;
        let first_successful_start =
            succeeded && queued.transition == Transition::Start && !workspace.started_once;
        workspace.started_once |= first_successful_start;
        workspace.deleted |= succeeded && queued.transition == Transition::Delete;
        let by_prebuilds_user = queued.initiator == PREBUILDS_USER;
        let duration = open
            .started_at
            .filter(|_| !reaper_wrote_start)
            .map(|started_at| completed_at - started_at);
        self.builds.push(BuildTruth {
            id: queued.ids.build,
            job_id: queued.ids.job,
            workspace_id: queued.ids.workspace,
            build_number: queued.number,
            transition: queued.transition,
            class: queued.class,
            status,
            by_prebuilds_user,
            first_successful_start,
            counted_as_creation: first_successful_start && !by_prebuilds_user,
            labels: self.labels(&queued),
            created_at: open.created_at,
            started_at: open.started_at,
            completed_at,
            duration_micros: duration.and_then(|duration| duration.num_microseconds()),
        });
    }

    fn labels(&self, queued: &Queued) -> Labels {
        let name = |id: Uuid| self.names.get(&id).cloned().unwrap_or_default();
        let preset = queued.preset.filter(|preset| !self.removed_presets.contains(preset));
        Labels {
            organization_name: name(queued.organization),
            template_name: name(queued.template),
            preset_name: preset.map(name).unwrap_or_default(),
        }
    }

    fn used(&mut self, row: &UsageRow, inserted_at: DateTime<Utc>, build_id: Option<Uuid>) {
        let truth = UsageTruth {
            id: row.id.clone(),
            event_type: row.kind,
            quantity: row.quantity,
            created_at: row.created_at,
            inserted_at,
            build_id,
            published_at: None,
            failure_message: None,
        };
        self.usage.entry(row.id.clone()).or_insert(truth);
    }

    /// The truth until now.
    pub fn truth(
        &self,
        config: &Config,
        deployment: &Deployment,
        license_key: &LicenseKey,
    ) -> Truth {
        let mut builds = self.builds.clone();
        builds.sort_by_key(|build| (build.completed_at, build.id));
        let mut usage: Vec<UsageTruth> = self.usage.values().cloned().collect();
        usage.sort_by(|a, b| (a.inserted_at, &a.id).cmp(&(b.inserted_at, &b.id)));
        let mut totals: BTreeMap<Labels, u64> = BTreeMap::new();
        for build in builds.iter().filter(|build| build.counted_as_creation) {
            *totals.entry(build.labels.clone()).or_default() += 1;
        }
        let (creations, claims) = observed(&builds);
        let all = creations.values().chain(claims.values()).flatten();
        Truth {
            seed: config.seed,
            schema: config.schema,
            deployment_id: deployment.id,
            license_key: license_key.clone(),
            clock_skews: all.map(|observation| u64::from(observation.skewed)).sum(),
            creation_total: totals
                .into_iter()
                .map(|(labels, count)| CreationTotal { labels, count })
                .collect(),
            creation_seconds: creations
                .into_iter()
                .map(|((labels, kind), observations)| CreationSeries { labels, kind, observations })
                .collect(),
            claim_seconds: claims
                .into_iter()
                .map(|(labels, observations)| ClaimSeries { labels, observations })
                .collect(),
            licenses: self.licenses.iter().map(|license| counted(license, &usage)).collect(),
            active_seats: self.seats.iter().map(|user| u64::from(*user != self.suspended)).sum(),
            renames: self.renames.clone(),
            builds,
            usage,
        }
    }
}

type Creations = BTreeMap<(Labels, CreationType), Vec<Observation>>;
type Claims = BTreeMap<Labels, Vec<Observation>>;

/// The durations of successful creations and claims.
fn observed(builds: &[BuildTruth]) -> (Creations, Claims) {
    let (mut creations, mut claims) = (Creations::new(), Claims::new());
    for build in builds.iter().filter(|build| build.status == Status::Succeeded) {
        let Some(micros) = build.duration_micros else { continue };
        let observation = Observation {
            build_id: build.id,
            completed_at: build.completed_at,
            micros: u64::try_from(micros).unwrap_or(0),
            skewed: micros < 0,
        };
        let labels = build.labels.clone();
        match build.class {
            Class::RegularCreation => {
                creations.entry((labels, CreationType::Regular)).or_default().push(observation)
            }
            Class::PrebuildCreation => {
                creations.entry((labels, CreationType::Prebuild)).or_default().push(observation)
            }
            Class::Claim => claims.entry(labels).or_default().push(observation),
            Class::Other => {}
        }
    }
    (creations, claims)
}

fn counted(license: &LicenseTruth, usage: &[UsageTruth]) -> LicenseTruth {
    let mut license = license.clone();
    for row in usage {
        if row.event_type == UsageKind::ManagedAgents
            && license.claims.nbf <= row.created_at
            && row.created_at < license.claims.exp
        {
            license.managed_agents += u64::try_from(row.quantity).unwrap_or(0);
        }
    }
    license
}

#[cfg(test)]
mod tests {
    use chrono::TimeDelta;

    use super::super::acts::{BuildIds, NewWorkspace, Success};
    use super::super::schema::SchemaVersion;
    use super::*;

    /// A deployment, its books, and a pen that writes acts a second apart.
    struct Desk {
        config: Config,
        deployment: Deployment,
        books: Books,
        now: DateTime<Utc>,
    }

    impl Desk {
        fn new() -> Self {
            let start = DateTime::from_timestamp(1_780_000_000, 0).unwrap();
            let config =
                Config::history(3, SchemaVersion::TasksEra, start, start + TimeDelta::days(1), 1);
            let deployment = Deployment::plan(&config);
            Desk { books: Books::new(&deployment), config, deployment, now: start }
        }

        fn act(&mut self, change: Change) {
            self.now += TimeDelta::seconds(1);
            self.books.note(&Act { at: self.now, held_for: None, change });
        }

        fn queue(
            &mut self,
            workspace: u128,
            number: i32,
            class: Class,
            transition: Transition,
            initiator: Uuid,
            preset: usize,
        ) -> BuildIds {
            let template = &self.deployment.templates[0];
            let ids = BuildIds {
                build: Uuid::from_u128(workspace * 100 + u128::from(number.unsigned_abs())),
                job: Uuid::from_u128(
                    7_000_000 + workspace * 100 + u128::from(number.unsigned_abs()),
                ),
                workspace: Uuid::from_u128(workspace),
            };
            let queued = Queued {
                ids,
                class,
                new_workspace: (number == 1)
                    .then(|| NewWorkspace { owner: initiator, name: format!("w{workspace}") }),
                new_task: None,
                organization: template.organization,
                template: template.id,
                version: template.versions[0].id,
                preset: template.versions[0].presets.get(preset).map(|preset| preset.id),
                number,
                transition,
                initiator,
                reason: "initiator",
                stage: None,
            };
            self.act(Change::Queue(Box::new(queued)));
            ids
        }

        fn acquire(&mut self, build: BuildIds, ahead: TimeDelta) {
            let (worker, started_at) =
                (self.deployment.workers[0], self.now + TimeDelta::seconds(1) + ahead);
            self.act(Change::Acquire { build, worker, started_at });
        }

        fn complete(
            &mut self,
            ids: BuildIds,
            transition: Transition,
            error: Option<&str>,
            usage: Option<UsageRow>,
        ) {
            let success = error.is_none_or(str::is_empty).then_some(Success {
                has_ai_task: false,
                has_external_agent: false,
                deadline: None,
                daily_cost: 0,
                usage,
            });
            let done = Completed {
                ids,
                transition,
                completed_at: self.now + TimeDelta::seconds(1),
                start_at_end: false,
                error: error.map(ToOwned::to_owned),
                error_code: None,
                success,
            };
            self.act(Change::Complete(Box::new(done)));
        }

        fn truth(&self) -> Truth {
            let key = LicenseKey { kid: "k".to_owned(), public_key_pem: String::new() };
            self.books.truth(&self.config, &self.deployment, &key)
        }
    }

    fn user() -> Uuid {
        Uuid::from_u128(1)
    }

    #[test]
    fn a_first_build_that_fails_and_its_retry_are_one_creation_with_the_retrys_preset_and_no_duration()
     {
        let mut desk = Desk::new();
        let first = desk.queue(1, 1, Class::RegularCreation, Transition::Start, user(), 0);
        desk.acquire(first, TimeDelta::zero());
        desk.complete(first, Transition::Start, Some("no"), None);
        let second = desk.queue(1, 2, Class::Other, Transition::Start, user(), 1);
        desk.acquire(second, TimeDelta::zero());
        desk.complete(second, Transition::Start, None, None);
        let truth = desk.truth();
        assert_eq!(truth.creation_total.len(), 1);
        assert_eq!(
            (truth.creation_total[0].count, truth.creation_total[0].labels.preset_name.as_str()),
            (1, "Large")
        );
        assert!(truth.creation_seconds.is_empty());
        assert_eq!(
            truth.builds.iter().map(|build| build.status).collect::<Vec<_>>(),
            [Status::Failed, Status::Succeeded]
        );
    }

    #[test]
    fn a_claimed_prebuild_is_never_a_creation_also_when_its_claim_fails_and_the_user_starts_it() {
        let mut desk = Desk::new();
        let pool = desk.queue(2, 1, Class::PrebuildCreation, Transition::Start, PREBUILDS_USER, 0);
        desk.acquire(pool, TimeDelta::zero());
        desk.complete(pool, Transition::Start, None, None);
        let claim = desk.queue(2, 2, Class::Claim, Transition::Start, user(), 0);
        desk.acquire(claim, TimeDelta::zero());
        desk.complete(claim, Transition::Start, Some("no"), None);
        let again = desk.queue(2, 3, Class::Other, Transition::Start, user(), 0);
        desk.acquire(again, TimeDelta::zero());
        desk.complete(again, Transition::Start, None, None);
        let truth = desk.truth();
        assert!(truth.creation_total.is_empty() && truth.claim_seconds.is_empty());
        assert_eq!(truth.creation_seconds.len(), 1);
        assert_eq!(
            (truth.creation_seconds[0].kind, truth.creation_seconds[0].observations[0].micros),
            (CreationType::Prebuild, 1_000_000)
        );
    }

    #[test]
    fn a_start_after_the_end_is_observed_as_nothing_and_counted_as_skew() {
        let mut desk = Desk::new();
        let build = desk.queue(3, 1, Class::RegularCreation, Transition::Start, user(), 0);
        desk.acquire(build, TimeDelta::milliseconds(1500));
        desk.complete(build, Transition::Start, None, None);
        let truth = desk.truth();
        assert_eq!(truth.builds[0].duration_micros, Some(-500_000));
        assert_eq!((truth.creation_seconds[0].observations[0].micros, truth.clock_skews), (0, 1));
    }

    #[test]
    fn a_job_canceled_before_a_daemon_has_no_duration_and_an_empty_error_is_not_a_failure() {
        let mut desk = Desk::new();
        let build = desk.queue(4, 1, Class::RegularCreation, Transition::Start, user(), 0);
        let at = desk.now + TimeDelta::seconds(1);
        desk.act(Change::CancelPending {
            build,
            canceled_at: at,
            completed_at: at + TimeDelta::microseconds(3),
        });
        let retry = desk.queue(4, 2, Class::Other, Transition::Start, user(), 0);
        desk.acquire(retry, TimeDelta::zero());
        desk.complete(retry, Transition::Start, Some(""), None);
        let truth = desk.truth();
        assert_eq!(
            (truth.builds[0].status, truth.builds[0].duration_micros),
            (Status::Canceled, None)
        );
        assert!(truth.builds[1].status == Status::Succeeded && truth.builds[1].counted_as_creation);
    }

    #[test]
    fn names_are_those_at_completion_and_a_removed_preset_is_none() {
        let mut desk = Desk::new();
        let before = desk.queue(5, 1, Class::RegularCreation, Transition::Start, user(), 0);
        desk.acquire(before, TimeDelta::zero());
        let after = desk.queue(6, 1, Class::RegularCreation, Transition::Start, user(), 0);
        desk.acquire(after, TimeDelta::zero());
        desk.complete(before, Transition::Start, None, None);
        let template = &desk.deployment.templates[0];
        desk.books.names.insert(template.id, "renamed".to_owned());
        desk.books.removed_presets.insert(template.versions[0].presets[0].id);
        desk.complete(after, Transition::Start, None, None);
        let labels: Vec<_> = desk
            .truth()
            .creation_total
            .into_iter()
            .map(|s| (s.labels.template_name, s.labels.preset_name, s.count))
            .collect();
        assert_eq!(
            labels,
            [
                ("go".to_owned(), "lang small".to_owned(), 1),
                ("renamed".to_owned(), String::new(), 1)
            ]
        );
    }

    #[test]
    fn a_license_counts_usage_from_its_start_to_before_its_end() {
        let mut desk = Desk::new();
        let mut claims = super::super::licenses::tests::claims();
        (claims.nbf, claims.exp) = (desk.now + TimeDelta::hours(1), desk.now + TimeDelta::hours(2));
        for (i, at) in [claims.nbf, claims.exp].into_iter().enumerate() {
            for offset in [-1, 0, 1] {
                let created_at = at + TimeDelta::microseconds(offset);
                desk.act(Change::Usage(UsageRow {
                    id: format!("{i} {offset}"),
                    kind: UsageKind::ManagedAgents,
                    quantity: 1,
                    created_at,
                }));
            }
        }
        let row = super::super::licenses::LicenseRow {
            uuid: Uuid::nil(),
            jwt: String::new(),
            exp: claims.exp,
            kid: "k".to_owned(),
            known_key: true,
            claims: claims.clone(),
        };
        desk.act(Change::License(Box::new(row)));
        let truth = desk.truth();
        // The start, one after it, and one before the end.
        assert_eq!(truth.licenses[0].managed_agents, 3);
        assert_eq!(truth.managed_agents(claims.nbf, claims.exp), 3);
    }
}
