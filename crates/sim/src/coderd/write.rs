//! Writes acts into coderd's tables: any number of acts in one transaction, with one statement per
//! kind of row.
//!
//! Kinds are written in the order of their rows' dependencies. So a batch gives the same rows as
//! its acts one by one.

use anyhow::Context;
use chrono::{DateTime, Utc};
use sqlx::PgConnection;
use uuid::Uuid;

use super::acts::{Act, Change, Completed, Queued, UsageRow};
use super::schema::SchemaVersion;

type Time = DateTime<Utc>;

/// Writes the acts. The caller begins and commits.
pub(super) async fn write(
    tx: &mut PgConnection,
    schema: SchemaVersion,
    acts: &[Act],
) -> anyhow::Result<()> {
    let mut batch = Batch::default();
    for act in acts {
        batch.add(act);
    }
    batch.workspaces(tx).await.context("workspaces")?;
    batch.jobs(tx).await.context("provisioner_jobs")?;
    batch.builds(tx).await.context("workspace_builds")?;
    if schema.has_tasks() {
        batch.tasks(tx).await.context("tasks")?;
    }
    batch.acquisitions(tx).await.context("acquired jobs")?;
    batch.claims(tx).await.context("claims")?;
    batch.cancels(tx).await.context("canceled jobs")?;
    batch.completions(tx).await.context("completed jobs")?;
    batch.successes(tx, schema).await.context("succeeded builds")?;
    batch.usage(tx).await.context("usage_events")?;
    batch.verdicts(tx).await.context("published usage")?;
    batch.rest(tx).await
}

/// Acts by kind of row.
#[derive(Default)]
struct Batch<'a> {
    queued: Vec<(Time, &'a Queued)>,
    acquired: Vec<(Uuid, Uuid, Time)>,
    claimed: Vec<(Uuid, Uuid, &'a str, Time)>,
    canceled: Vec<(Uuid, Time, Option<Time>)>,
    completed: Vec<&'a Completed>,
    used: Vec<&'a UsageRow>,
    published: Vec<(&'a str, Option<Time>, Option<&'a str>)>,
    rest: Vec<&'a Act>,
}

impl<'a> Batch<'a> {
    fn add(&mut self, act: &'a Act) {
        match &act.change {
            Change::Queue(queued) => self.queued.push((act.at, queued)),
            Change::Acquire { build, worker, started_at } => {
                self.acquired.push((build.job, *worker, *started_at))
            }
            Change::CancelRunning { build, canceled_at } => {
                self.canceled.push((build.job, *canceled_at, None))
            }
            Change::CancelPending { build, canceled_at, completed_at } => {
                self.canceled.push((build.job, *canceled_at, Some(*completed_at)))
            }
            Change::Complete(done) => {
                self.completed.push(done);
                self.used.extend(done.success.iter().filter_map(|success| success.usage.as_ref()));
            }
            Change::Claim { workspace, owner, name } => {
                self.claimed.push((*workspace, *owner, name, act.at))
            }
            Change::Usage(row) => self.used.push(row),
            Change::Publish { id, published_at, failure } => {
                self.published.push((id, *published_at, failure.as_deref()))
            }
            Change::License(_)
            | Change::Chat { .. }
            | Change::Seat { .. }
            | Change::Promote { .. } => self.rest.push(act),
        }
    }

    async fn workspaces(&self, tx: &mut PgConnection) -> anyhow::Result<()> {
        let new: Vec<_> = self
            .queued
            .iter()
            .filter_map(|(at, queued)| Some((*at, *queued, queued.new_workspace.as_ref()?)))
            .collect();
        if new.is_empty() {
            return Ok(());
        }
        sqlx::query(
            "insert into workspaces (id, created_at, updated_at, owner_id, organization_id, template_id, name, last_used_at)
             select id, at, at, owner, organization, template, name, at
             from unnest($1::uuid[], $2::timestamptz[], $3::uuid[], $4::uuid[], $5::uuid[], $6::text[])
                 as new (id, at, owner, organization, template, name)",
        )
        .bind(column(&new, |(_, queued, _)| queued.ids.workspace))
        .bind(column(&new, |(at, _, _)| *at))
        .bind(column(&new, |(_, _, workspace)| workspace.owner))
        .bind(column(&new, |(_, queued, _)| queued.organization))
        .bind(column(&new, |(_, queued, _)| queued.template))
        .bind(column(&new, |(_, _, workspace)| workspace.name.clone()))
        .execute(tx)
        .await?;
        Ok(())
    }

    async fn jobs(&self, tx: &mut PgConnection) -> anyhow::Result<()> {
        if self.queued.is_empty() {
            return Ok(());
        }
        sqlx::query(
            "insert into provisioner_jobs (id, created_at, updated_at, organization_id, initiator_id, provisioner, storage_method, type,
                 input, file_id, tags)
             select id, at, at, organization, initiator, 'terraform', 'file', 'workspace_build', input::jsonb, version,
                 '{\"scope\": \"organization\", \"owner\": \"\"}'
             from unnest($1::uuid[], $2::timestamptz[], $3::uuid[], $4::uuid[], $5::text[], $6::uuid[])
                 as new (id, at, organization, initiator, input, version)",
        )
        .bind(column(&self.queued, |(_, queued)| queued.ids.job))
        .bind(column(&self.queued, |(at, _)| *at))
        .bind(column(&self.queued, |(_, queued)| queued.organization))
        .bind(column(&self.queued, |(_, queued)| queued.initiator))
        .bind(column(&self.queued, |(_, queued)| input(queued)))
        // The version's file: any id will do, because the table is empty.
        .bind(column(&self.queued, |(_, queued)| queued.version))
        .execute(tx)
        .await?;
        Ok(())
    }

    async fn builds(&self, tx: &mut PgConnection) -> anyhow::Result<()> {
        if self.queued.is_empty() {
            return Ok(());
        }
        sqlx::query(
            "insert into workspace_builds (id, created_at, updated_at, workspace_id, template_version_id, build_number, transition,
                 initiator_id, job_id, reason, template_version_preset_id)
             select id, at, at, workspace, version, number, transition::workspace_transition, initiator, job, reason::build_reason, preset
             from unnest($1::uuid[], $2::timestamptz[], $3::uuid[], $4::uuid[], $5::integer[], $6::text[], $7::uuid[], $8::uuid[],
                 $9::text[], $10::uuid[])
                 as new (id, at, workspace, version, number, transition, initiator, job, reason, preset)",
        )
        .bind(column(&self.queued, |(_, queued)| queued.ids.build))
        .bind(column(&self.queued, |(at, _)| *at))
        .bind(column(&self.queued, |(_, queued)| queued.ids.workspace))
        .bind(column(&self.queued, |(_, queued)| queued.version))
        .bind(column(&self.queued, |(_, queued)| queued.number))
        .bind(column(&self.queued, |(_, queued)| queued.transition.label()))
        .bind(column(&self.queued, |(_, queued)| queued.initiator))
        .bind(column(&self.queued, |(_, queued)| queued.ids.job))
        .bind(column(&self.queued, |(_, queued)| queued.reason))
        .bind(column(&self.queued, |(_, queued)| queued.preset))
        .execute(tx)
        .await?;
        Ok(())
    }

    async fn tasks(&self, tx: &mut PgConnection) -> anyhow::Result<()> {
        let new: Vec<_> = self
            .queued
            .iter()
            .filter_map(|(at, queued)| Some((*at, *queued, queued.new_task.as_ref()?)))
            .collect();
        if new.is_empty() {
            return Ok(());
        }
        sqlx::query(
            "insert into tasks (id, organization_id, owner_id, name, workspace_id, template_version_id, prompt, created_at)
             select id, organization, owner, name, workspace, version, 'a prompt', at
             from unnest($1::uuid[], $2::uuid[], $3::uuid[], $4::text[], $5::uuid[], $6::uuid[], $7::timestamptz[])
                 as new (id, organization, owner, name, workspace, version, at)",
        )
        .bind(column(&new, |(_, _, task)| task.id))
        .bind(column(&new, |(_, queued, _)| queued.organization))
        .bind(column(&new, |(_, _, task)| task.owner))
        .bind(column(&new, |(_, _, task)| task.name.clone()))
        .bind(column(&new, |(_, queued, _)| queued.ids.workspace))
        .bind(column(&new, |(_, queued, _)| queued.version))
        .bind(column(&new, |(at, _, _)| *at))
        .execute(tx)
        .await?;
        Ok(())
    }

    async fn acquisitions(&self, tx: &mut PgConnection) -> anyhow::Result<()> {
        if self.acquired.is_empty() {
            return Ok(());
        }
        sqlx::query(
            "update provisioner_jobs set started_at = at, updated_at = at, worker_id = worker
             from unnest($1::uuid[], $2::uuid[], $3::timestamptz[]) as acquired (job, worker, at) where id = job",
        )
        .bind(column(&self.acquired, |(job, _, _)| *job))
        .bind(column(&self.acquired, |(_, worker, _)| *worker))
        .bind(column(&self.acquired, |(_, _, at)| *at))
        .execute(tx)
        .await?;
        Ok(())
    }

    async fn claims(&self, tx: &mut PgConnection) -> anyhow::Result<()> {
        if self.claimed.is_empty() {
            return Ok(());
        }
        sqlx::query(
            "update workspaces set owner_id = owner, name = new_name, updated_at = at, last_used_at = at, dormant_at = null, deleting_at = null
             from unnest($1::uuid[], $2::uuid[], $3::text[], $4::timestamptz[]) as claimed (workspace, owner, new_name, at)
             where id = workspace",
        )
        .bind(column(&self.claimed, |(workspace, _, _, _)| *workspace))
        .bind(column(&self.claimed, |(_, owner, _, _)| *owner))
        .bind(column(&self.claimed, |(_, _, name, _)| *name))
        .bind(column(&self.claimed, |(_, _, _, at)| *at))
        .execute(tx)
        .await?;
        Ok(())
    }

    /// Writes two columns, and not `updated_at`.
    async fn cancels(&self, tx: &mut PgConnection) -> anyhow::Result<()> {
        if self.canceled.is_empty() {
            return Ok(());
        }
        sqlx::query(
            "update provisioner_jobs set canceled_at = canceled.at, completed_at = ended
             from unnest($1::uuid[], $2::timestamptz[], $3::timestamptz[]) as canceled (job, at, ended) where id = job",
        )
        .bind(column(&self.canceled, |(job, _, _)| *job))
        .bind(column(&self.canceled, |(_, at, _)| *at))
        .bind(column(&self.canceled, |(_, _, ended)| *ended))
        .execute(tx)
        .await?;
        Ok(())
    }

    async fn completions(&self, tx: &mut PgConnection) -> anyhow::Result<()> {
        if self.completed.is_empty() {
            return Ok(());
        }
        sqlx::query(
            "update provisioner_jobs set completed_at = at, updated_at = at, error = ended.error, error_code = ended.code,
                 started_at = case when start_too then coalesce(started_at, at) else started_at end
             from unnest($1::uuid[], $2::timestamptz[], $3::text[], $4::text[], $5::boolean[]) as ended (job, at, error, code, start_too)
             where id = job",
        )
        .bind(column(&self.completed, |done| done.ids.job))
        .bind(column(&self.completed, |done| done.completed_at))
        .bind(column(&self.completed, |done| done.error.clone()))
        .bind(column(&self.completed, |done| done.error_code.clone()))
        .bind(column(&self.completed, |done| done.start_at_end))
        .execute(tx)
        .await?;
        Ok(())
    }

    async fn successes(&self, tx: &mut PgConnection, schema: SchemaVersion) -> anyhow::Result<()> {
        let successes: Vec<_> = self
            .completed
            .iter()
            .filter_map(|done| Some((*done, done.success.as_ref()?)))
            .collect();
        if successes.is_empty() {
            return Ok(());
        }
        let builds = column(&successes, |(done, _)| done.ids.build);
        sqlx::query(
            "update workspace_builds set updated_at = at, has_external_agent = external_agent, daily_cost = cost,
                 deadline = coalesce(until, deadline), provisioner_state = '\\x7b7d'
             from unnest($1::uuid[], $2::timestamptz[], $3::boolean[], $4::integer[], $5::timestamptz[])
                 as succeeded (build, at, external_agent, cost, until)
             where id = build",
        )
        .bind(&builds)
        .bind(column(&successes, |(done, _)| done.completed_at))
        .bind(column(&successes, |(_, success)| success.has_external_agent))
        .bind(column(&successes, |(_, success)| success.daily_cost))
        .bind(column(&successes, |(_, success)| success.deadline))
        .execute(&mut *tx)
        .await?;
        let deleted: Vec<_> = successes
            .iter()
            .filter(|(done, _)| done.transition == super::acts::Transition::Delete)
            .collect();
        let workspaces = column(&deleted, |(done, _)| done.ids.workspace);
        let times = column(&deleted, |(done, _)| done.completed_at);
        sqlx::query("update workspaces set deleted = true from unnest($1::uuid[]) as gone (workspace) where id = workspace")
            .bind(&workspaces)
            .execute(&mut *tx)
            .await?;
        if schema.has_tasks() {
            sqlx::query(
                "update workspace_builds set has_ai_task = ai from unnest($1::uuid[], $2::boolean[]) as flagged (build, ai) where id = build",
            )
            .bind(&builds)
            .bind(column(&successes, |(_, success)| success.has_ai_task))
            .execute(&mut *tx)
            .await?;
            sqlx::query(
                "update tasks set deleted_at = at from unnest($1::uuid[], $2::timestamptz[]) as gone (workspace, at)
                 where workspace_id = workspace",
            )
            .bind(&workspaces)
            .bind(&times)
            .execute(&mut *tx)
            .await?;
        }
        Ok(())
    }

    async fn usage(&self, tx: &mut PgConnection) -> anyhow::Result<()> {
        if self.used.is_empty() {
            return Ok(());
        }
        sqlx::query(
            "insert into usage_events (id, event_type, event_data, created_at)
             select id, type, data::jsonb, at from unnest($1::text[], $2::text[], $3::text[], $4::timestamptz[]) as new (id, type, data, at)
             on conflict (id) do nothing",
        )
        .bind(column(&self.used, |row| row.id.clone()))
        .bind(column(&self.used, |row| row.kind.event_type()))
        .bind(column(&self.used, |row| row.kind.data(row.quantity)))
        .bind(column(&self.used, |row| row.created_at))
        .execute(tx)
        .await?;
        Ok(())
    }

    async fn verdicts(&self, tx: &mut PgConnection) -> anyhow::Result<()> {
        if self.published.is_empty() {
            return Ok(());
        }
        sqlx::query(
            "update usage_events as row set publish_started_at = null, published_at = verdict.at, failure_message = verdict.failure
             from unnest($1::text[], $2::timestamptz[], $3::text[]) as verdict (id, at, failure) where row.id = verdict.id",
        )
        .bind(column(&self.published, |(id, _, _)| *id))
        .bind(column(&self.published, |(_, at, _)| *at))
        .bind(column(&self.published, |(_, _, failure)| *failure))
        .execute(tx)
        .await?;
        Ok(())
    }

    /// Writes rare acts one by one.
    async fn rest(&self, tx: &mut PgConnection) -> anyhow::Result<()> {
        for act in &self.rest {
            let query = match &act.change {
                Change::License(license) => sqlx::query("insert into licenses (uploaded_at, jwt, exp, uuid) values ($1, $2, $3, $4)")
                    .bind(act.at)
                    .bind(&license.jwt)
                    .bind(license.exp)
                    .bind(license.uuid),
                Change::Chat { chat, runtime_ms } => {
                    sqlx::query("insert into chat_messages (chat_id, created_at, role, runtime_ms) values ($1, $2, 'assistant', $3)")
                        .bind(chat)
                        .bind(act.at)
                        .bind(runtime_ms)
                }
                Change::Seat { user } => sqlx::query(
                    "insert into ai_seat_state (user_id, first_used_at, last_used_at, last_event_type, last_event_description, updated_at)
                     values ($1, $2, $2, 'aibridge', 'used the AI bridge', $2)
                     on conflict (user_id) do update set last_used_at = excluded.last_used_at, updated_at = excluded.updated_at",
                )
                .bind(user)
                .bind(act.at),
                Change::Promote { template, version } => {
                    sqlx::query("update templates set active_version_id = $2, updated_at = $3 where id = $1")
                        .bind(template)
                        .bind(version)
                        .bind(act.at)
                }
                _ => continue,
            };
            query.execute(&mut *tx).await.context("license, chat, seat or template")?;
        }
        Ok(())
    }
}

fn column<R, T>(rows: &[R], of: impl Fn(&R) -> T) -> Vec<T> {
    rows.iter().map(of).collect()
}

/// The job's input: NONE is left out.
fn input(queued: &Queued) -> String {
    let build = queued.ids.build;
    match queued.stage {
        Some(stage) => format!(
            "{{\"workspace_build_id\": \"{build}\", \"dry_run\": false, \"prebuilt_workspace_stage\": {stage}}}"
        ),
        None => format!("{{\"workspace_build_id\": \"{build}\", \"dry_run\": false}}"),
    }
}
