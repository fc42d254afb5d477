//! The rows before the first build: organizations, users, templates with versions and presets,
//! workers.

use rand::Rng;
use uuid::Uuid;

use super::chance::{Dice, Subject, dice, uuid_from};
use super::config::{Config, PREBUILDS_USER};

/// The parts of the deployment, as created. Only [`super::Simulation::rename_things`] changes
/// names.
#[derive(Clone, Debug)]
pub struct Deployment {
    /// The deployment's id, the value of `site_configs.deployment_id`.
    pub id: Uuid,
    pub(super) organizations: Vec<Organization>,
    /// Active people; the writer adds more rows (system, suspended, service account).
    pub(super) users: Vec<User>,
    pub(super) suspended: User,
    pub(super) system: User,
    pub(super) service_account: User,
    pub(super) templates: Vec<Template>,
    /// The first of these left before the history ends: their daemon rows are gone, their jobs
    /// remain.
    pub(super) workers: Vec<Uuid>,
    pub(super) replica: Uuid,
}

#[derive(Clone, Debug)]
pub(super) struct Organization {
    pub id: Uuid,
    pub name: String,
}

#[derive(Clone, Debug)]
pub(super) struct User {
    pub id: Uuid,
    pub name: String,
}

#[derive(Clone, Debug)]
pub(super) struct Template {
    pub id: Uuid,
    pub organization: Uuid,
    pub name: String,
    pub ai: bool,
    pub external_agent: bool,
    /// All its workspaces are deleted well before the history ends, so that it can be deleted, too.
    pub sunset: bool,
    pub versions: Vec<Version>,
}

#[derive(Clone, Debug)]
pub(super) struct Version {
    pub id: Uuid,
    pub name: String,
    pub import_job: Uuid,
    pub presets: Vec<Preset>,
}

#[derive(Clone, Debug)]
pub(super) struct Preset {
    pub id: Uuid,
    pub name: String,
    /// Whether it has a pool.
    pub pool: bool,
}

const ORGANIZATIONS: [&str; 3] = ["platform", "data-science", "platform-eu"];
const TEMPLATES: [&str; 10] = [
    "go",
    "docker",
    "notebook",
    "golang",
    "agents",
    "external",
    "java-service",
    "frontend",
    "gpu",
    "sandbox",
];
const PRESETS: [&str; 4] = ["Small", "Large", "GPU", "Extra large"];
/// The number of workers; the first three leave and the last three come in the middle of the
/// history.
const WORKERS: usize = 8;
const USERS: usize = 40;

impl Template {
    /// Whether every version has a preset with a pool.
    pub fn has_pool(&self) -> bool {
        self.versions.iter().all(|version| version.presets.iter().any(|preset| preset.pool))
    }
}

impl Deployment {
    pub(super) fn plan(config: &Config) -> Self {
        let dice = &mut dice(config.seed, Subject::Deployment);
        let organizations: Vec<_> = (0..config.organizations.max(1))
            .map(|i| Organization {
                id: uuid_from(dice),
                name: ORGANIZATIONS
                    .get(i)
                    .map_or_else(|| format!("organization-{i}"), ToString::to_string),
            })
            .collect();
        let templates = templates(config, &organizations, dice);
        let mut user = |name: String| User { id: uuid_from(dice), name };
        let users = (1..=USERS).map(|i| user(format!("user-{i:03}"))).collect();
        let suspended = user("user-suspended".to_owned());
        let service_account = user("service-001".to_owned());
        let system = User { id: PREBUILDS_USER, name: "prebuilds".to_owned() };
        let workers = (0..WORKERS).map(|_| uuid_from(dice)).collect();
        Deployment {
            id: uuid_from(dice),
            organizations,
            users,
            suspended,
            system,
            service_account,
            templates,
            workers,
            replica: uuid_from(dice),
        }
    }

    /// A new template that takes the name of a deleted one in the same organization.
    pub(super) fn successor(of: &Template, dice: &mut Dice) -> Template {
        let presets =
            of.versions[0].presets.iter().map(|preset| preset.name.clone()).collect::<Vec<_>>();
        Template {
            id: uuid_from(dice),
            organization: of.organization,
            name: of.name.clone(),
            ai: of.ai,
            external_agent: of.external_agent,
            sunset: false,
            versions: vec![version(1, &presets, dice)],
        }
    }
}

fn templates(config: &Config, organizations: &[Organization], dice: &mut Dice) -> Vec<Template> {
    let count = config.templates.max(2);
    let mut templates: Vec<Template> = Vec::with_capacity(count);
    let mut with_ai = 0;
    for i in 0..count {
        let organization = organizations[i % organizations.len()].id;
        let mut name = TEMPLATES[i % TEMPLATES.len()].to_owned();
        if templates
            .iter()
            .any(|template| template.organization == organization && template.name == name)
        {
            name = format!("{name}-{i}");
        }
        // Spread over the organizations.
        let ai = with_ai < config.ai_templates && i % 3 == (i / 3) % 3;
        with_ai += usize::from(ai);
        let presets: Vec<String> = (0..config.presets)
            .filter(|j| j % (count - 1) == i)
            .enumerate()
            .map(|(k, _)| preset_name(i, k))
            .collect();
        templates.push(Template {
            id: uuid_from(dice),
            organization,
            name,
            ai,
            external_agent: i == 5,
            sunset: i == count - 2,
            // The second version has the same preset names under other ids.
            versions: vec![version(1, &presets, dice), version(2, &presets, dice)],
        });
    }
    templates
}

/// Some names run into each other between templates of one organization ("go" + "lang small",
/// "golang" + " small"). One needs escaping, the rest are plain.
fn preset_name(template: usize, k: usize) -> String {
    match (template, k) {
        (0, 0) => "lang small".to_owned(),
        (3, 0) => " small".to_owned(),
        (1, 0) => r#"Größe "L" \ 2"#.to_owned(),
        (_, k) => PRESETS.get(k).map_or_else(|| format!("Preset {k}"), ToString::to_string),
    }
}

fn version(number: usize, presets: &[String], dice: &mut Dice) -> Version {
    Version {
        id: uuid_from(dice),
        name: format!("v{number}_{:04x}", dice.random::<u16>()),
        import_job: uuid_from(dice),
        presets: presets
            .iter()
            .enumerate()
            .map(|(k, name)| Preset { id: uuid_from(dice), name: name.clone(), pool: k % 3 != 2 })
            .collect(),
    }
}
