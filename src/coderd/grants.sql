-- What Tallyline reads from coderd's database: named columns, and three functions. It reads no job input, build state, password hash or
-- email address. A superuser runs this in coderd's database. Or the owner of coderd's tables does, if that role may create schemas there
-- and is a member of pg_read_all_stats.
--   psql --set reader=ROLE --file grants.sql CODERD_DATABASE_URL
-- Without --set the role is called tallyline. Repeat it after an upgrade of coderd or of Tallyline.
\set ON_ERROR_STOP on
\if :{?reader}
\else
\set reader tallyline
\endif
set tallyline.reader = :'reader';

grant usage on schema public to :"reader";

grant select (id, created_at, started_at, completed_at, organization_id, type, worker_id, job_status) on provisioner_jobs to :"reader";
grant select (id, workspace_id, template_version_id, build_number, transition, initiator_id, job_id, reason, daily_cost, template_version_preset_id, has_external_agent) on workspace_builds to :"reader";
grant select (id, owner_id, organization_id, template_id, name) on workspaces to :"reader";
grant select (id, name, is_default) on organizations to :"reader";
grant select (id, name) on templates to :"reader";
grant select (id, name) on template_versions to :"reader";
grant select (id, name) on template_version_presets to :"reader";
grant select (id, username) on users to :"reader";
grant select (id, uploaded_at, jwt, exp, uuid) on licenses to :"reader";

do $$
declare
    reader text := current_setting('tallyline.reader');
begin
    -- Earlier versions of this file granted these. It does not revoke pg_read_all_stats: monitoring may use the same role.
    if exists (select from pg_attribute where attrelid = to_regclass('provisioner_jobs') and attname = 'input' and not attisdropped) then
        begin
            execute format('revoke select (input) on provisioner_jobs from %I', reader);
        exception when insufficient_privilege then
            raise warning 'not revoked by %: let the owner run: revoke select (input) on provisioner_jobs from %;',
                current_user, quote_ident(reader);
        end;
    end if;
    if exists (select from pg_auth_members join pg_roles on pg_roles.oid = member
               where rolname = reader and roleid = 'pg_read_all_stats'::regrole) then
        raise warning '% is a member of pg_read_all_stats, which Tallyline does not need: unless monitoring uses it, run: revoke pg_read_all_stats from %;',
            reader, quote_ident(reader);
    end if;
    -- Not every version of coderd has these.
    if to_regclass('usage_events') is not null then
        execute format('grant select (id, event_type, event_data, created_at, publish_started_at, published_at, failure_message) on usage_events to %I', reader);
    end if;
    if exists (select from pg_attribute where attrelid = to_regclass('workspace_builds') and attname = 'has_ai_task' and not attisdropped) then
        execute format('grant select (has_ai_task) on workspace_builds to %I', reader);
    end if;
    if not pg_has_role(current_user, 'pg_read_all_stats', 'usage') then
        raise warning '% is not a member of pg_read_all_stats: Tallyline will collect, but will not report completeness', current_user;
    end if;
end
$$;

-- Single values of tables that also contain secrets. A function body is a string, so coderd's migrations may drop or rename its tables.
-- In plpgsql a session plans a body once, not at each call.
create schema if not exists tallyline;
grant usage on schema tallyline to :"reader";

-- The prebuild stages of jobs of workspace builds that have one. The inputs of other jobs contain the values of Terraform variables.
create or replace function tallyline.job_stages(job_ids uuid[]) returns table (job_id uuid, stage text)
    language plpgsql stable security definer set search_path = pg_catalog, pg_temp as $$
begin
    -- The limit keeps a look-up by index: the planner would read the whole table for many ids.
    return query select asked.id, job.stage
    from (select distinct unnest(job_ids) as id) asked
    cross join lateral (
        select input ->> 'prebuilt_workspace_stage' as stage from public.provisioner_jobs
        where id = asked.id and type = 'workspace_build' and input ? 'prebuilt_workspace_stage' limit 1
    ) job;
end
$$;

-- coderd's deployment id. Its table also contains coderd's signing keys.
create or replace function tallyline.deployment_id() returns text
    language plpgsql stable security definer set search_path = pg_catalog, pg_temp as $$
begin
    return (select value from public.site_configs where key = 'deployment_id');
end
$$;

-- When the oldest open transaction of this database began, including prepared ones, and whether this function can see all of them. It
-- cannot without pg_read_all_stats, on a standby (the writers are elsewhere), or while track_activities is off. Autovacuum and replication
-- write no row of coderd.
create or replace function tallyline.oldest_transaction(out started_at timestamptz, out sees_all boolean)
    language plpgsql stable security definer set search_path = pg_catalog, pg_temp as $$
begin
    select min(open.started_at), pg_has_role(current_user, 'pg_read_all_stats', 'usage') and not pg_is_in_recovery()
        and current_setting('track_activities')::boolean
    into started_at, sees_all
    from (
        select xact_start as started_at from pg_stat_activity
        where datname = current_database() and pid <> pg_backend_pid() and backend_type not in ('autovacuum worker', 'walsender')
        union all
        select prepared from pg_prepared_xacts where database = current_database()
    ) open;
end
$$;

revoke all on function tallyline.job_stages(uuid[]), tallyline.deployment_id(), tallyline.oldest_transaction() from public;
grant execute on function tallyline.job_stages(uuid[]), tallyline.deployment_id(), tallyline.oldest_transaction() to :"reader";
