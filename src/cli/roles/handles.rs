//! The handles that a pipeline configures.

use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;
use tracing::{info, warn};
use uuid::Uuid;

use crate::cause::LastingFault;
use crate::cli::connect::{self, LedgerAt, LogAt};
use crate::cli::{Exit, Failure, license_rules};
use crate::clock::Clock;
use crate::coderd::{CoderdError, Database};
use crate::config::{Pipeline, Role};
use crate::ledger::Retention;
use crate::license::PublicKeys;
use crate::operations::Operations;
use crate::retry::Backoff;

/// Timeout of our statements in coderd's database.
const CODERD_STATEMENT: Duration = Duration::from_secs(30);

/// The handles of one deployment. None of them has connected yet.
#[derive(Clone)]
pub struct Handles {
    pub pipeline: Arc<Pipeline>,
    pub ledger: LedgerAt,
    pub log: LogAt,
    /// coderd's database, if configured.
    pub coderd: Option<Database>,
    /// The keys that may sign licenses.
    pub keys: PublicKeys,
    pub clock: Clock,
}

impl Handles {
    /// Resolves the secrets and creates the handles.
    pub async fn open(pipeline: Pipeline, clock: Clock) -> Result<Self, Failure> {
        let ledger = connect::open_ledger(&pipeline, clock.clone()).await?;
        let log = connect::open_log(&pipeline, &ledger).await?;
        let coderd = match &pipeline.source.coderd_url {
            None => None,
            Some(url) => {
                let url = connect::secret("source.coderd_url", url).await?;
                let database = Database::new(&url, CODERD_STATEMENT);
                Some(database.map_err(|error| {
                    Failure::of(Exit::Configuration, format!("source.coderd_url: {error}"))
                })?)
            }
        };
        let mut keys = PublicKeys::new();
        for (name, key) in &pipeline.license.public_keys {
            keys.add(name, key).map_err(|error| {
                Failure::of(Exit::Configuration, format!("license.public_keys: {error}"))
            })?;
        }
        Ok(Handles { pipeline: Arc::new(pipeline), ledger, log, coderd, keys, clock })
    }

    /// The handles for operations. Their deployment is the configured one, without a query to
    /// coderd.
    pub fn operations(&self) -> Result<Operations, Failure> {
        Ok(Operations {
            ledger: self.ledger.ledger.clone(),
            log: self.log.log.clone(),
            group: self.pipeline.log.group.clone(),
            partitions: i32::try_from(self.pipeline.log.partitions)
                .map_err(|error| Failure::new(Exit::Configuration, error))?,
            coderd: self.coderd.clone(),
            deployment: self.pipeline.source.deployment_id,
            keys: self.keys.clone(),
            rules: license_rules(&self.pipeline)?,
            retention: self.retention(),
        })
    }

    /// The settings of retention.
    #[must_use]
    pub fn retention(&self) -> Retention {
        let settings = &self.pipeline.retention;
        Retention {
            reject_payload_days: settings.reject_payload_days,
            attempt_days: settings.attempt_days,
        }
    }

    #[must_use]
    pub fn has(&self, role: Role) -> bool {
        self.pipeline.roles.contains(&role)
    }

    /// Waits for the ledger, its schema, the log and its topics.
    ///
    /// # Errors
    /// A failure that waiting cannot end, or [`Exit::Interrupted`].
    pub async fn wait(&self, stop: &CancellationToken) -> Result<(), Failure> {
        self.ledger.wait(stop).await?;
        self.log.wait(stop).await
    }

    /// The deployment's id: configured, or reported by coderd when it answers. `None` if stopped
    /// before, or without a configured coderd.
    pub async fn deployment(&self, stop: &CancellationToken) -> Option<Uuid> {
        if let Some(id) = self.pipeline.source.deployment_id {
            return Some(id);
        }
        let database = self.coderd.as_ref()?;
        let mut waits = Backoff::new(Duration::from_millis(500), Duration::from_secs(10));
        let mut logged = LastingFault::default();
        loop {
            match ask(database).await {
                Ok(id) => return Some(id),
                Err(error) if logged.is_new(&error.to_string()) => {
                    warn!("{error}; waiting for coderd's deployment id")
                }
                Err(_) => {}
            }
            if !waits.wait(stop).await {
                return None;
            }
        }
    }
}

async fn ask(database: &Database) -> Result<Uuid, CoderdError> {
    let mut reader = database.connect().await?;
    let id = reader.deployment_id().await;
    reader.close().await;
    if let Ok(id) = &id {
        info!(deployment = %id, "deployment id read from coderd");
    }
    id
}
