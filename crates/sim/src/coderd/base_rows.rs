//! Writes the rows before the first build.

use anyhow::Context;
use chrono::{DateTime, TimeDelta, Utc};
use sqlx::PgConnection;

use super::config::{Config, PREBUILDS_USER};
use super::deployment::{Deployment, Template, Version};
use super::schema::SchemaVersion;

const VERSION: &str = "v2.37.0-devel+simulated";

/// Writes all rows of the deployment before its history begins, in the caller's transaction.
pub(super) async fn write(
    tx: &mut PgConnection,
    config: &Config,
    deployment: &Deployment,
) -> anyhow::Result<()> {
    let at = config.start - TimeDelta::hours(2);
    sqlx::query("insert into site_configs (key, value) values ('deployment_id', $1)")
        .bind(deployment.id.to_string())
        .execute(&mut *tx)
        .await?;
    sqlx::query(
        "insert into replicas (id, created_at, started_at, updated_at, hostname, region_id, relay_address, database_latency, version)
         values ($1, $2, $2, $2, 'coderd-0', 0, '', 1, $3)",
    )
    .bind(deployment.replica)
    .bind(at)
    .bind(VERSION)
    .execute(&mut *tx)
    .await?;
    users(tx, deployment, at).await.context("users")?;
    for (i, organization) in deployment.organizations.iter().enumerate() {
        sqlx::query(
            "insert into organizations (id, name, description, created_at, updated_at, is_default, display_name, default_org_member_roles)
             values ($1, $2, '', $3, $3, $4, $2, '{}')",
        )
        .bind(organization.id)
        .bind(&organization.name)
        .bind(at)
        .bind(i == 0)
        .execute(&mut *tx)
        .await
        .context("organizations")?;
    }
    for template in &deployment.templates {
        self::template(tx, config.schema, deployment, template, at)
            .await
            .with_context(|| format!("template {}", template.name))?;
    }
    daemons(tx, deployment, at).await.context("daemons")?;
    dry_run(tx, deployment, at).await.context("a dry run")
}

async fn users(
    tx: &mut PgConnection,
    deployment: &Deployment,
    at: DateTime<Utc>,
) -> anyhow::Result<()> {
    let people = deployment
        .users
        .iter()
        .map(|user| (user, "active"))
        .chain([(&deployment.suspended, "suspended")]);
    for (user, status) in people {
        sqlx::query(
            "insert into users (id, email, username, hashed_password, created_at, updated_at, status)
             values ($1, $2 || '@example.invalid', $2, '', $3, $3, $4::user_status)",
        )
        .bind(user.id)
        .bind(&user.name)
        .bind(at)
        .bind(status)
        .execute(&mut *tx)
        .await?;
    }
    sqlx::query(
        "insert into users (id, email, username, hashed_password, created_at, updated_at, status, login_type, is_system)
         values ($1, 'prebuilds@system', $2, '', $3, $3, 'active', 'none', true)",
    )
    .bind(PREBUILDS_USER)
    .bind(&deployment.system.name)
    .bind(at)
    .execute(&mut *tx)
    .await?;
    sqlx::query(
        "insert into users (id, email, username, hashed_password, created_at, updated_at, status, login_type, is_service_account)
         values ($1, '', $2, '', $3, $3, 'active', 'none', true)",
    )
    .bind(deployment.service_account.id)
    .bind(&deployment.service_account.name)
    .bind(at)
    .execute(tx)
    .await?;
    Ok(())
}

/// A template, its versions with their import jobs, and their presets.
pub(super) async fn template(
    tx: &mut PgConnection,
    schema: SchemaVersion,
    deployment: &Deployment,
    template: &Template,
    at: DateTime<Utc>,
) -> anyhow::Result<()> {
    let creator = deployment.users[0].id;
    sqlx::query(
        "insert into templates (id, created_at, updated_at, organization_id, name, provisioner, active_version_id, created_by, display_name)
         values ($1, $2, $2, $3, $4, 'terraform', $5, $6, $4)",
    )
    .bind(template.id)
    .bind(at)
    .bind(template.organization)
    .bind(&template.name)
    .bind(template.versions[0].id)
    .bind(creator)
    .execute(&mut *tx)
    .await?;
    for (i, version) in template.versions.iter().enumerate() {
        sqlx::query(
            "insert into provisioner_jobs (id, created_at, updated_at, started_at, completed_at, organization_id, initiator_id, provisioner,
                 storage_method, type, input, worker_id, file_id)
             values ($1, $2, $3, $2, $3, $4, $5, 'terraform', 'file', 'template_version_import',
                 jsonb_build_object('template_version_id', $6::uuid), $7, $6)",
        )
        .bind(version.import_job)
        .bind(at)
        .bind(at + TimeDelta::seconds(41))
        .bind(template.organization)
        .bind(creator)
        .bind(version.id)
        .bind(deployment.workers[i % deployment.workers.len()])
        .execute(&mut *tx)
        .await?;
        sqlx::query(
            "insert into template_versions (id, template_id, organization_id, created_at, updated_at, name, readme, job_id, created_by,
                 has_external_agent)
             values ($1, $2, $3, $4, $4, $5, '', $6, $7, $8)",
        )
        .bind(version.id)
        .bind(template.id)
        .bind(template.organization)
        .bind(at)
        .bind(&version.name)
        .bind(version.import_job)
        .bind(creator)
        .bind(template.external_agent)
        .execute(&mut *tx)
        .await?;
        if schema.has_tasks() {
            let flag = sqlx::query("update template_versions set has_ai_task = $2 where id = $1")
                .bind(version.id)
                .bind(template.ai);
            flag.execute(&mut *tx).await?;
        }
        presets(tx, version, at).await?;
    }
    Ok(())
}

async fn presets(
    tx: &mut PgConnection,
    version: &Version,
    at: DateTime<Utc>,
) -> anyhow::Result<()> {
    for (i, preset) in version.presets.iter().enumerate() {
        sqlx::query(
            "insert into template_version_presets (id, template_version_id, name, created_at, desired_instances, is_default)
             values ($1, $2, $3, $4, $5, $6)",
        )
        .bind(preset.id)
        .bind(version.id)
        .bind(&preset.name)
        .bind(at)
        .bind(preset.pool.then_some(2))
        .bind(i == 0)
        .execute(&mut *tx)
        .await?;
    }
    Ok(())
}

/// Writes the daemons at the end of the history. Workers that left have no row, although jobs name
/// them.
async fn daemons(
    tx: &mut PgConnection,
    deployment: &Deployment,
    at: DateTime<Utc>,
) -> anyhow::Result<()> {
    for (i, worker) in deployment.workers.iter().enumerate().skip(3) {
        sqlx::query(
            "insert into provisioner_daemons (id, created_at, name, provisioners, last_seen_at, version, organization_id)
             values ($1, $2, $3, '{terraform}', $2, $4, $5)",
        )
        .bind(worker)
        .bind(at)
        .bind(format!("provisioner-{i}"))
        .bind(VERSION)
        .bind(deployment.organizations[i % deployment.organizations.len()].id)
        .execute(&mut *tx)
        .await?;
    }
    Ok(())
}

/// A complete job that is not a build.
async fn dry_run(
    tx: &mut PgConnection,
    deployment: &Deployment,
    at: DateTime<Utc>,
) -> anyhow::Result<()> {
    sqlx::query(
        "insert into provisioner_jobs (id, created_at, updated_at, started_at, completed_at, organization_id, initiator_id, provisioner,
             storage_method, type, input, worker_id, file_id)
         values (gen_random_uuid(), $1, $1, $1, $1, $2, $3, 'terraform', 'file', 'template_version_dry_run', '{}', $4, gen_random_uuid())",
    )
    .bind(at)
    .bind(deployment.organizations[0].id)
    .bind(deployment.users[0].id)
    .bind(deployment.workers[0])
    .execute(tx)
    .await?;
    Ok(())
}
