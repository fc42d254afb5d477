//! What a simulation is asked to be.

use chrono::{DateTime, Utc};

use super::schema::SchemaVersion;

/// The prebuilds system user, the same in every deployment.
pub const PREBUILDS_USER: uuid::Uuid = uuid::uuid!("c42fdf75-3097-471c-8c33-fb52454d81c0");

/// Everything that decides what happens. The same configuration gives the same rows and the same truth.
#[derive(Clone, Debug)]
pub struct Config {
    /// Decides every id, name, time and outcome.
    pub seed: u64,
    /// Which of coderd's schemas is lived in.
    pub schema: SchemaVersion,
    /// When the deployment's history begins.
    pub start: DateTime<Utc>,
    /// When it ends; later acts come only from [`super::Simulation::extend`].
    pub end: DateTime<Utc>,
    /// At least so many builds complete between start and end.
    pub builds: usize,
    /// How many organizations.
    pub organizations: usize,
    /// How many templates, spread over the organizations; names recur between organizations.
    pub templates: usize,
    /// How many pairs of template and preset name. The last template has none.
    pub presets: usize,
    /// How many templates run AI agents, and so make `dc_managed_agents_v1` rows.
    pub ai_templates: usize,
    /// Whether seat and runtime heartbeats are written.
    pub heartbeats: bool,
    /// One completion in so many commits after later ones; 0: none does.
    pub late_commit_every: usize,
    /// When coderd changed from counting AI resources to counting tasks (27 January 2026 in life). Meaningless without Tasks.
    pub task_rule_since: DateTime<Utc>,
    /// Usage found in coderd's own publisher cycles before this instant is marked published or refused by coderd itself.
    pub coderd_publishes_until: Option<DateTime<Utc>>,
    /// Acts per transaction. 1 keeps coderd's own transactions; more writes a history fast, and the rows end the same.
    pub acts_per_transaction: usize,
    /// The Ed25519 seed that signs licenses; made from `seed` when absent.
    pub license_key: Option<[u8; 32]>,
}

impl Config {
    /// Three organizations, twelve templates, thirty presets, four of the templates with AI, heartbeats, one late commit in 150
    /// completions, the counting rule changing in the middle, nothing published by coderd, history written in large transactions.
    #[must_use]
    pub fn history(seed: u64, schema: SchemaVersion, start: DateTime<Utc>, end: DateTime<Utc>, builds: usize) -> Self {
        Config {
            seed,
            schema,
            start,
            end,
            builds,
            organizations: 3,
            templates: 12,
            presets: 30,
            ai_templates: 4,
            heartbeats: true,
            late_commit_every: 150,
            task_rule_since: start + (end - start) / 2,
            coderd_publishes_until: None,
            acts_per_transaction: 1000,
            license_key: None,
        }
    }
}
