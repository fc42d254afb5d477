//! Connections to the ledger's database, and migrations of its schema.

use std::str::FromStr;
use std::time::Duration;

use sqlx::migrate::{AppliedMigration, Migrate, MigrateError};
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use sqlx::{ConnectOptions as _, Connection as _, PgConnection, Row as _};

use super::Ledger;
use super::migrations::MIGRATIONS;
use super::rights;
use super::run::DEADLINE;
use crate::cause;
use crate::clock::Clock;

/// Connection settings of the ledger.
#[derive(Clone, Debug)]
pub struct LedgerSettings {
    /// `postgres://user:password@host:port/database`
    pub url: String,
    /// Maximum number of connections of this process.
    pub connections: u32,
}

/// Reasons why the ledger cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum LedgerError {
    /// The URL is not valid.
    #[error("ledger.url is not a PostgreSQL URL ({}); expected postgres://USER:PASSWORD@HOST:PORT/DATABASE", cause::text(.0))]
    Url(#[source] sqlx::Error),
    /// PostgreSQL does not answer, or refuses.
    #[error("the ledger's PostgreSQL is not usable: {}", cause::text(.0))]
    Unavailable(#[from] sqlx::Error),
    /// The schema is older than this binary.
    #[error(
        "the ledger's schema has version {found}, this binary needs {needed}: run `tallyline migrate`"
    )]
    SchemaTooOld {
        /// The newest migration that the database has.
        found: i64,
        /// The newest migration of this binary.
        needed: i64,
    },
    /// The schema is newer than this binary.
    #[error(
        "the ledger's schema has version {found}, newer than this binary's {needed}: use the binary that migrated it, or a later one"
    )]
    SchemaTooNew {
        /// The newest migration that the database has.
        found: i64,
        /// The newest migration of this binary.
        needed: i64,
    },
    #[error(
        "ledger.url names coderd's own database, which has the tables site_configs and workspace_builds: create a database for the ledger \
         alone, as docs/install.md does, and set ledger.url to it"
    )]
    CoderdDatabase,
    /// The role may not read the list of applied migrations.
    #[error("the role lacks rights in the ledger's database; let an administrator run:\n{}", .0.join("\n"))]
    MissingRights(Vec<String>),
    #[error("the ledger's migration failed: {}", cause::text(.0))]
    Migrate(#[from] sqlx::migrate::MigrateError),
}

impl Ledger {
    /// A handle that connects on first use: PostgreSQL may be unavailable when it is created.
    ///
    /// # Errors
    /// [`LedgerError::Url`].
    pub fn open(settings: &LedgerSettings, clock: Clock) -> Result<Self, LedgerError> {
        let options = PgConnectOptions::from_str(&settings.url).map_err(LedgerError::Url)?;
        let options = options.application_name("tallyline").options(SESSION);
        let pool = PgPoolOptions::new()
            .max_connections(settings.connections)
            .acquire_timeout(Duration::from_secs(10))
            .test_before_acquire(false)
            .before_acquire(|connection, _| Box::pin(is_writable(connection)))
            .connect_lazy_with(options);
        Ok(Ledger { pool, clock, deadline: DEADLINE })
    }

    /// Opens and closes one connection beside the pool. The pool would hide why a connection fails.
    pub async fn reach(&self) -> Result<(), sqlx::Error> {
        self.pool.connect_options().connect().await?.close().await
    }

    /// Migrates the schema to this binary's version.
    ///
    /// # Errors
    /// [`LedgerError::SchemaTooNew`], and the database is not changed;
    /// [`LedgerError::CoderdDatabase`].
    pub async fn migrate(&self) -> Result<(), LedgerError> {
        let applied = self.applied_migrations().await?;
        match versions(&applied) {
            (found, needed) if found > needed => Err(LedgerError::SchemaTooNew { found, needed }),
            // The migrator requires the right to create tables even if it has nothing to create.
            (found, needed) if found == needed => Ok(unchanged(&applied)?),
            _ => {
                // A migration may rewrite a large table.
                let options = PgConnectOptions::clone(&self.pool.connect_options())
                    .options([("statement_timeout", "0")]);
                let mut connection = options.connect().await?;
                MIGRATIONS.run(&mut connection).await?;
                Ok(connection.close().await?)
            }
        }
    }

    /// Checks that the schema has this binary's version.
    pub async fn check_schema(&self) -> Result<(), LedgerError> {
        match versions(&self.applied_migrations().await?) {
            (found, needed) if found > needed => Err(LedgerError::SchemaTooNew { found, needed }),
            (found, needed) if found < needed => Err(LedgerError::SchemaTooOld { found, needed }),
            _ => Ok(()),
        }
    }

    async fn applied_migrations(&self) -> Result<Vec<AppliedMigration>, LedgerError> {
        self.run(async |conn| {
            if is_coderds(conn).await? {
                return Err(LedgerError::CoderdDatabase);
            }
            // This only reads: two processes that create the table at the same time would fail.
            let begun = sqlx::query_scalar("select has_table_privilege(to_regclass($1), 'select')")
                .bind(&*MIGRATIONS.table_name);
            match begun.fetch_one(&mut *conn).await? {
                None => Ok(Vec::new()),
                Some(true) => conn
                    .list_applied_migrations(&MIGRATIONS.table_name)
                    .await
                    .map_err(LedgerError::from),
                Some(false) => Err(LedgerError::MissingRights(rights::missing(conn, false).await?)),
            }
        })
        .await
    }
}

/// Whether the server answers and this session can write. A session that cannot, as on a standby,
/// is closed: a new one may reach another server.
async fn is_writable(connection: &mut PgConnection) -> Result<bool, sqlx::Error> {
    let query = sqlx::raw_sql("select current_setting('transaction_read_only') = 'off'");
    query.fetch_one(connection).await?.try_get(0)
}

/// Whether a schema of the role's `search_path` has coderd's tables, even a schema that the role
/// may not use.
async fn is_coderds(connection: &mut PgConnection) -> Result<bool, sqlx::Error> {
    sqlx::query_scalar(
        r#"select count(distinct relname) = 2
           from unnest(string_to_array(current_setting('search_path'), ',')) as entry
           join pg_namespace schema on nspname = replace(trim(both ' "' from entry), '$user', current_user)
           join pg_class on relnamespace = schema.oid
           where relname in ('site_configs', 'workspace_builds')"#,
    )
    .fetch_one(connection)
    .await
}

/// The newest migration of the database and the newest one of this binary.
fn versions(applied: &[AppliedMigration]) -> (i64, i64) {
    let found = applied.iter().map(|migration| migration.version).max().unwrap_or_default();
    let needed = MIGRATIONS.iter().map(|migration| migration.version).max().unwrap_or_default();
    (found, needed)
}

/// Checks that each applied migration equals this binary's.
fn unchanged(applied: &[AppliedMigration]) -> Result<(), MigrateError> {
    for own in MIGRATIONS.iter() {
        if applied
            .iter()
            .any(|migration| migration.version == own.version && migration.checksum != own.checksum)
        {
            return Err(MigrateError::VersionMismatch(own.version));
        }
    }
    Ok(())
}

/// A transaction whose client is frozen or gone must release its locks soon. An acknowledged commit
/// must survive a crash.
const SESSION: [(&str, &str); 9] = [
    ("idle_in_transaction_session_timeout", "5s"),
    ("lock_timeout", "10s"),
    ("statement_timeout", "60s"),
    ("tcp_keepalives_idle", "10"),
    ("tcp_keepalives_interval", "5"),
    ("tcp_keepalives_count", "3"),
    ("synchronous_commit", "on"),
    ("TimeZone", "UTC"),
    // PostgreSQL starts JIT compilation by estimated cost, which is wrong without statistics.
    ("jit", "off"),
];
