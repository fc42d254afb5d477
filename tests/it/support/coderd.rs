//! A deployment with one template in coderd's own tables, written row by row: for tests that need
//! one certain row.

use chrono::{DateTime, Utc};
use sqlx::{PgConnection, PgExecutor, PgPool};
use tallyline_sim::coderd::{PREBUILDS_USER, SchemaVersion, create_schema};
use tokio::sync::OnceCell;
use uuid::Uuid;

use super::{Database, database};

/// The deployment's database and the ids in it.
pub struct Coderd {
    pub database: Database,
    pub deployment: Uuid,
    pub organization: Uuid,
    pub owner: Uuid,
    pub template: Uuid,
    pub version: Uuid,
    pub preset: Uuid,
    pub worker: Uuid,
}

/// A build to write. The default is an ordinary first start that took a second.
#[derive(Clone, Debug)]
pub struct Build {
    pub workspace: Uuid,
    pub number: i32,
    pub transition: &'static str,
    pub initiator: Uuid,
    /// The job input's stage; 0 is left out, as in coderd.
    pub stage: i32,
    pub preset: Option<Uuid>,
    /// Absent for a job without a daemon: then it has no start either.
    pub worker: Option<Uuid>,
    pub canceled: bool,
    pub error: Option<&'static str>,
    pub completed_at: DateTime<Utc>,
}

/// A database with coderd's tables of that version: a copy takes far less time than the statements.
pub async fn tables(version: SchemaVersion) -> Database {
    static TASKS_ERA: OnceCell<String> = OnceCell::const_new();
    static SEP_2026: OnceCell<String> = OnceCell::const_new();
    let template = match version {
        SchemaVersion::TasksEra => &TASKS_ERA,
        SchemaVersion::Sep2026 => &SEP_2026,
    };
    let template = template.get_or_init(|| template_of(version)).await;
    super::database_like(&super::setting("TALLYLINE_TEST_POSTGRES"), template).await
}

/// Creates the database that every one of that version is a copy of, and returns its name.
async fn template_of(version: SchemaVersion) -> String {
    let database = database().await;
    let mut connection = database.pool.acquire().await.unwrap();
    create_schema(&mut connection, version).await.unwrap();
    drop(connection);
    database.into_template().await
}

/// Writes the facts that identify this coderd: its deployment id and its default organization.
pub async fn identify(pool: &PgPool, deployment: Uuid, organization: Uuid) {
    sqlx::query("insert into site_configs (key, value) values ('deployment_id', $1)")
        .bind(deployment.to_string())
        .execute(pool)
        .await
        .unwrap();
    sqlx::query(
        "insert into organizations (id, name, description, created_at, updated_at, is_default, display_name, default_org_member_roles)
         values ($1, 'acme', '', now(), now(), true, '', '{}')",
    )
    .bind(organization)
    .execute(pool)
    .await
    .unwrap();
}

impl Coderd {
    /// Tables of that version, with one organization, user, template, version and preset.
    pub async fn new(version: SchemaVersion) -> Coderd {
        let database = tables(version).await;
        let id = Uuid::new_v4;
        let coderd = Coderd {
            database,
            deployment: id(),
            organization: id(),
            owner: id(),
            template: id(),
            version: id(),
            preset: id(),
            worker: id(),
        };
        coderd.add_people().await;
        coderd
    }

    async fn add_people(&self) {
        let pool = &self.database.pool;
        identify(pool, self.deployment, self.organization).await;
        for (id, name) in [(self.owner, "user-001"), (PREBUILDS_USER, "prebuilds")] {
            sqlx::query(
                "insert into users (id, email, username, hashed_password, created_at, updated_at) values ($1, $2 || '@x', $2, '', now(), now())",
            )
            .bind(id)
            .bind(name)
            .execute(pool)
            .await
            .unwrap();
        }
        sqlx::query(
            "insert into templates (id, created_at, updated_at, organization_id, name, provisioner, active_version_id, created_by)
             values ($1, now(), now(), $2, 'docker', 'terraform', $3, $4)",
        )
        .bind(self.template)
        .bind(self.organization)
        .bind(self.version)
        .bind(self.owner)
        .execute(pool)
        .await
        .unwrap();
        sqlx::query(
            "insert into template_versions (id, template_id, organization_id, created_at, updated_at, name, readme, job_id, created_by)
             values ($1, $2, $3, now(), now(), 'v1', '', gen_random_uuid(), $4)",
        )
        .bind(self.version)
        .bind(self.template)
        .bind(self.organization)
        .bind(self.owner)
        .execute(pool)
        .await
        .unwrap();
        sqlx::query("insert into template_version_presets (id, template_version_id, name) values ($1, $2, 'large')")
            .bind(self.preset)
            .bind(self.version)
            .execute(pool)
            .await
            .unwrap();
    }

    /// The database's own time: coderd's replicas would write it now.
    pub async fn now(&self) -> DateTime<Utc> {
        sqlx::query_scalar("select clock_timestamp()").fetch_one(&self.database.pool).await.unwrap()
    }

    pub async fn workspace(&self) -> Uuid {
        let id = Uuid::new_v4();
        sqlx::query(
            "insert into workspaces (id, created_at, updated_at, owner_id, organization_id, template_id, name)
             values ($1, now(), now(), $2, $3, $4, $5)",
        )
        .bind(id)
        .bind(self.owner)
        .bind(self.organization)
        .bind(self.template)
        .bind(format!("w-{}", id.simple()))
        .execute(&self.database.pool)
        .await
        .unwrap();
        id
    }

    /// The first start of a workspace by its owner, completed just now.
    pub async fn first_start(&self, workspace: Uuid) -> Build {
        Build {
            workspace,
            number: 1,
            transition: "start",
            initiator: self.owner,
            stage: 0,
            preset: None,
            worker: Some(self.worker),
            canceled: false,
            error: None,
            completed_at: self.now().await,
        }
    }

    /// A workspace with its first start, committed.
    pub async fn creation(&self) -> Uuid {
        let build = self.first_start(self.workspace().await).await;
        self.build(&build).await
    }

    /// Writes a completed build in its own transaction.
    pub async fn build(&self, build: &Build) -> Uuid {
        self.build_in(&mut self.database.pool.acquire().await.unwrap(), build).await
    }

    /// Writes a completed build in the connection's transaction.
    pub async fn build_in(&self, connection: &mut PgConnection, build: &Build) -> Uuid {
        let (job, id) = (Uuid::new_v4(), Uuid::new_v4());
        let mut input = serde_json::json!({ "workspace_build_id": id, "dry_run": false });
        if build.stage != 0 {
            input["prebuilt_workspace_stage"] = build.stage.into();
        }
        sqlx::query(
            "insert into provisioner_jobs (id, created_at, updated_at, started_at, canceled_at, completed_at, error, organization_id,
                 initiator_id, provisioner, storage_method, type, input, worker_id, file_id)
             values ($1, $2::timestamptz - interval '2 seconds', $2, case when $3::uuid is not null then $2::timestamptz - interval '1 second' end,
                 case when $4 then $2 end, $2, $5, $6, $7, 'terraform', 'file', 'workspace_build', $8, $3, gen_random_uuid())",
        )
        .bind(job)
        .bind(build.completed_at)
        .bind(build.worker)
        .bind(build.canceled)
        .bind(build.error)
        .bind(self.organization)
        .bind(build.initiator)
        .bind(input)
        .execute(&mut *connection)
        .await
        .unwrap();
        sqlx::query(
            "insert into workspace_builds (id, created_at, updated_at, workspace_id, template_version_id, build_number, transition,
                 initiator_id, job_id, template_version_preset_id)
             values ($1, $2, $2, $3, $4, $5, $6::workspace_transition, $7, $8, $9)",
        )
        .bind(id)
        .bind(build.completed_at)
        .bind(build.workspace)
        .bind(self.version)
        .bind(build.number)
        .bind(build.transition)
        .bind(build.initiator)
        .bind(job)
        .bind(build.preset)
        .execute(&mut *connection)
        .await
        .unwrap();
        id
    }

    /// Writes a usage row dated `created_at`.
    pub async fn usage(
        &self,
        id: &str,
        event_type: &str,
        data: serde_json::Value,
        created_at: DateTime<Utc>,
    ) {
        self.usage_in(&self.database.pool, id, event_type, data, created_at).await;
    }

    /// The same in a given transaction.
    pub async fn usage_in(
        &self,
        executor: impl PgExecutor<'_>,
        id: &str,
        event_type: &str,
        data: serde_json::Value,
        created_at: DateTime<Utc>,
    ) {
        sqlx::query("insert into usage_events (id, event_type, event_data, created_at) values ($1, $2, $3, $4)")
            .bind(id)
            .bind(event_type)
            .bind(data)
            .bind(created_at)
            .execute(executor)
            .await
            .unwrap();
    }
}
