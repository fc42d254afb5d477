//! The servers that `scripts/bench` starts, and databases on them.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use sqlx::{AssertSqlSafe, Connection as _, PgConnection};
use tallyline::clock::Clock;
use tallyline::ledger::{Ledger, LedgerSettings};
use uuid::Uuid;

/// The addresses of the servers.
pub struct Servers {
    /// PostgreSQL, as a superuser.
    pub postgres: String,
    /// Kafka's `bootstrap.servers`.
    pub brokers: String,
}

/// A database of one row.
pub struct Database {
    pub name: String,
    pub url: String,
}

impl Servers {
    pub fn from_environment() -> Result<Servers> {
        let setting = |name: &str| {
            std::env::var(name).with_context(|| format!("{name} is not set: run scripts/bench"))
        };
        Ok(Servers {
            postgres: setting("TALLYLINE_TEST_POSTGRES")?,
            brokers: setting("TALLYLINE_TEST_KAFKA")?,
        })
    }

    pub async fn admin(&self) -> Result<PgConnection> {
        Ok(PgConnection::connect(&self.postgres).await?)
    }

    /// An empty database.
    pub async fn database(&self) -> Result<Database> {
        let name = format!("bench_{}", Uuid::new_v4().simple());
        let (address, _) =
            self.postgres.rsplit_once('/').context("the server's address ends in a database")?;
        let create = AssertSqlSafe(format!("create database {name}"));
        sqlx::query(create).execute(&mut self.admin().await?).await?;
        Ok(Database { url: format!("{address}/{name}"), name })
    }

    /// A database with this version's ledger.
    pub async fn ledger(&self) -> Result<Database> {
        let database = self.database().await?;
        database.open(2)?.migrate().await?;
        Ok(database)
    }

    /// Removes a database, so that a later row has its disk and cache.
    pub async fn remove(&self, database: &Database) -> Result<()> {
        let drop = AssertSqlSafe(format!("drop database {} with (force)", database.name));
        sqlx::query(drop).execute(&mut self.admin().await?).await?;
        Ok(())
    }

    /// Keeps the writes of one side out of the other's time.
    pub async fn checkpoint(&self) -> Result<()> {
        sqlx::query("checkpoint").execute(&mut self.admin().await?).await?;
        Ok(())
    }

    /// Makes a superuser of this name, by which `pg_stat_statements` separates its statements.
    pub async fn role(&self, name: &str) -> Result<()> {
        let mut admin = self.admin().await?;
        let known = "select exists (select from pg_roles where rolname = $1)";
        if !sqlx::query_scalar::<_, bool>(known).bind(name).fetch_one(&mut admin).await? {
            let create = AssertSqlSafe(format!("create role {name} superuser login"));
            sqlx::query(create).execute(&mut admin).await?;
        }
        sqlx::query("create extension if not exists pg_stat_statements")
            .execute(&mut admin)
            .await
            .context("pg_stat_statements is not loaded: run scripts/bench")?;
        Ok(())
    }

    /// Milliseconds that PostgreSQL has spent on statements of this role, in all databases or in
    /// one.
    pub async fn statement_ms(&self, role: &str, database: Option<&Database>) -> Result<f64> {
        let query = "select coalesce(sum(total_exec_time + total_plan_time), 0)::float8
             from pg_stat_statements statement join pg_roles role on role.oid = statement.userid
             join pg_database database on database.oid = statement.dbid
             where rolname = $1 and ($2::text is null or datname = $2)";
        let mut admin = self.admin().await?;
        let query = sqlx::query_scalar(query).bind(role);
        Ok(query.bind(database.map(|database| &database.name)).fetch_one(&mut admin).await?)
    }
}

impl Database {
    /// The ledger in this database.
    pub fn open(&self, connections: u32) -> Result<Ledger> {
        let settings = LedgerSettings { url: self.url.clone(), connections };
        Ok(Ledger::open(&settings, Clock::system())?)
    }

    pub async fn connect(&self) -> Result<PgConnection> {
        Ok(PgConnection::connect(&self.url).await?)
    }

    /// The address for another role.
    pub fn url_of(&self, role: &str) -> Result<String> {
        let (_, place) = self.url.split_once('@').context("the server's address names a role")?;
        Ok(format!("postgres://{role}@{place}"))
    }

    /// Waits until this query returns true.
    pub async fn wait(&self, what: &str, deadline: Duration, query: &'static str) -> Result<()> {
        let (begun, mut connection) = (Instant::now(), self.connect().await?);
        while !sqlx::query_scalar::<_, bool>(query).fetch_one(&mut connection).await? {
            if begun.elapsed() > deadline {
                bail!("{what}: not within {} s", deadline.as_secs());
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    }
}
