-- The last schema of the Tasks era (summer 2026, with agent runtime before its unique hour): AI task flags, tasks, their reasons.

alter type build_reason add value 'task_auto_pause';
alter type build_reason add value 'task_manual_pause';
alter type build_reason add value 'task_resume';
create type task_status as enum ('pending', 'initializing', 'active', 'paused', 'unknown', 'error');

alter table workspace_builds add column has_ai_task boolean;
alter table template_versions add column has_ai_task boolean;
create index idx_template_versions_has_ai_task on template_versions (has_ai_task);

create table tasks (
    id uuid not null,
    organization_id uuid not null,
    owner_id uuid not null,
    name text not null,
    workspace_id uuid,
    template_version_id uuid not null,
    template_parameters jsonb not null default '{}',
    prompt text not null,
    created_at timestamptz not null,
    deleted_at timestamptz,
    display_name varchar(127) not null default '',
    constraint tasks_pkey primary key (id),
    constraint tasks_organization_id_fkey foreign key (organization_id) references organizations (id) on delete cascade,
    constraint tasks_owner_id_fkey foreign key (owner_id) references users (id) on delete cascade,
    constraint tasks_workspace_id_fkey foreign key (workspace_id) references workspaces (id) on delete cascade,
    constraint tasks_template_version_id_fkey foreign key (template_version_id) references template_versions (id) on delete cascade
);
create index tasks_workspace_id_idx on tasks (workspace_id);

create index idx_usage_events_agent_runtime on usage_events (event_type, created_at) where event_type = 'hb_agent_runtime_v1';
