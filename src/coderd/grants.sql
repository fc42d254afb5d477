-- What Tallyline reads from coderd's database, column by column: no build state, no password hash, no email address.
-- Run as an administrator in coderd's database, after: create role tallyline login password '…';

grant usage on schema public to tallyline;

-- To see the oldest open transaction of others. Without it collecting works, but nothing is claimed to be complete.
grant pg_read_all_stats to tallyline;

grant select (id, created_at, started_at, completed_at, organization_id, type, input, worker_id, job_status) on provisioner_jobs to tallyline;
grant select (id, workspace_id, template_version_id, build_number, transition, initiator_id, job_id, reason, daily_cost, template_version_preset_id, has_external_agent) on workspace_builds to tallyline;
grant select (id, owner_id, organization_id, template_id, name) on workspaces to tallyline;
grant select (id, name) on organizations to tallyline;
grant select (id, name) on templates to tallyline;
grant select (id, name) on template_versions to tallyline;
grant select (id, name) on template_version_presets to tallyline;
grant select (id, username) on users to tallyline;
grant select (id, uploaded_at, jwt, exp, uuid) on licenses to tallyline;

-- What not every version of coderd has. Run this again after an upgrade of coderd.
do $$
begin
    if to_regclass('usage_events') is not null then
        grant select (id, event_type, event_data, created_at, publish_started_at, published_at, failure_message) on usage_events to tallyline;
    end if;
    if exists (select from pg_attribute where attrelid = to_regclass('workspace_builds') and attname = 'has_ai_task' and not attisdropped) then
        grant select (has_ai_task) on workspace_builds to tallyline;
    end if;
end
$$;

-- The deployment's id is in site_configs, beside coderd's signing keys: rather set deployment_id in Tallyline's configuration. It is
-- shown in coderd under Deployment > Overview, and this query gives it:
--   select value from site_configs where key = 'deployment_id';
