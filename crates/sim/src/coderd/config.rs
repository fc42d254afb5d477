//! Configuration of a simulation.

use chrono::{DateTime, Utc};

use super::schema::SchemaVersion;

/// The prebuilds system user, the same in every deployment.
pub const PREBUILDS_USER: uuid::Uuid = uuid::uuid!("c42fdf75-3097-471c-8c33-fb52454d81c0");

/// All settings of a simulation. The same configuration gives the same rows and the same truth.
#[derive(Clone, Debug)]
pub struct Config {
    /// Determines every id, name, time and outcome.
    pub seed: u64,
    /// coderd's schema.
    pub schema: SchemaVersion,
    /// When the deployment's history begins.
    pub start: DateTime<Utc>,
    /// When it ends; only [`super::Simulation::extend`] adds later acts.
    pub end: DateTime<Utc>,
    /// The least number of builds that complete between start and end.
    pub builds: usize,
    /// The number of organizations.
    pub organizations: usize,
    /// The number of templates, spread over the organizations. Names are reused between
    /// organizations.
    pub templates: usize,
    /// The number of pairs of template and preset name. The last template has none.
    pub presets: usize,
    /// The number of templates that run AI agents, and so create `dc_managed_agents_v1` rows.
    pub ai_templates: usize,
    /// Whether seat and runtime heartbeats are written.
    pub heartbeats: bool,
    /// One of this number of completions commits after later ones; 0: none does.
    pub late_commit_every: usize,
    /// When coderd changed from counting AI resources to counting tasks (27 January 2026 in
    /// reality). Without Tasks it has no effect.
    pub task_rule_since: DateTime<Utc>,
    /// Usage in coderd's own publisher cycles before this instant is marked published or refused by
    /// coderd itself.
    pub coderd_publishes_until: Option<DateTime<Utc>>,
    /// Acts per transaction. 1 keeps coderd's own transactions; more writes a history fast, with
    /// the same final rows.
    pub acts_per_transaction: usize,
    /// The Ed25519 seed that signs licenses; derived from `seed` when absent.
    pub license_key: Option<[u8; 32]>,
}

impl Config {
    /// Three organizations, twelve templates (four with AI), thirty presets, heartbeats. One late
    /// commit in 150 completions, and a change of the counting rule in the middle. coderd publishes
    /// nothing; large transactions write the history.
    #[must_use]
    pub fn history(
        seed: u64,
        schema: SchemaVersion,
        start: DateTime<Utc>,
        end: DateTime<Utc>,
        builds: usize,
    ) -> Self {
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
