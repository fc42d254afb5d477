-- The differences of about 21 September 2026: Tasks are gone, runtime hours are unique.

alter table workspace_builds add column notified_autostop_deadline timestamptz not null default '0001-01-01 00:00:00+00';
alter table workspace_builds add constraint workspace_builds_id_workspace_id_key unique (id, workspace_id);
alter table template_version_presets
    add constraint template_version_presets_id_template_version_id_key unique (id, template_version_id);

alter table templates add column time_til_autostop_notify bigint not null default 0;
alter table templates add column agents_allowed boolean not null default true;
alter table templates add column allow_workspace_renames boolean not null default false;

alter table users add column chat_spend_limit_micros bigint;

alter table replicas add column cluster_host text not null default '';
alter table replicas add column nats_port integer not null default 0;

create unique index idx_usage_events_agent_runtime on usage_events (event_type, created_at) where event_type = 'hb_agent_runtime_v1';
alter table usage_events add constraint usage_events_agent_runtime_hour_aligned check (
    event_type <> 'hb_agent_runtime_v1' or date_trunc('hour', created_at at time zone 'UTC') = created_at at time zone 'UTC'
);

create table workspace_build_orchestrations (
    id uuid not null default gen_random_uuid(),
    created_at timestamptz not null,
    updated_at timestamptz not null,
    parent_build_id uuid not null,
    child_build_id uuid,
    child_transition workspace_transition not null,
    child_reason build_reason not null,
    attempt_count integer not null default 0,
    next_retry_after timestamptz,
    status text not null default 'pending',
    constraint workspace_build_orchestrations_pkey primary key (id),
    constraint workspace_build_orchestrations_parent_build_id_key unique (parent_build_id),
    constraint workspace_build_orchestrations_child_build_id_key unique (child_build_id),
    constraint workspace_build_orchestrations_status_check check (status in ('pending', 'completed', 'failed', 'canceled'))
);
