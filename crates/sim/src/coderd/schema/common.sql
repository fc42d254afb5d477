-- coderd's tables as an outside reader sees them: names, types, nullability, defaults, checks, keys and indexes of both schema versions.
-- tasks_era.sql and sep_2026.sql have the differences, applied after this file.

create type provisioner_job_status as enum ('pending', 'running', 'succeeded', 'canceling', 'canceled', 'failed', 'unknown');
create type provisioner_job_type as enum ('template_version_import', 'workspace_build', 'template_version_dry_run');
create type workspace_transition as enum ('start', 'stop', 'delete');
create type build_reason as enum ('initiator', 'autostart', 'autostop', 'dormancy', 'failedstop', 'autodelete', 'dashboard', 'cli',
    'ssh_connection', 'vscode_connection', 'jetbrains_connection');
create type provisioner_type as enum ('echo', 'terraform');
create type provisioner_storage_method as enum ('file');
create type prebuild_status as enum ('healthy', 'hard_limited', 'validation_failed');
create type user_status as enum ('active', 'suspended', 'dormant');
create type login_type as enum ('password', 'github', 'oidc', 'token', 'none', 'oauth2_provider_app');
create type automatic_updates as enum ('always', 'never');
create type ai_seat_usage_reason as enum ('aibridge', 'task');
create type chat_message_role as enum ('system', 'user', 'assistant', 'tool');
create type app_sharing_level as enum ('owner', 'authenticated', 'organization', 'public');
create type cors_behavior as enum ('simple', 'passthru');
create type shareable_workspace_owners as enum ('none', 'everyone', 'service_accounts');

create table site_configs (
    key varchar(256) not null,
    value text not null,
    constraint site_configs_key_key unique (key)
);

create table replicas (
    id uuid not null,
    created_at timestamptz not null,
    started_at timestamptz not null,
    stopped_at timestamptz,
    updated_at timestamptz not null,
    hostname text not null,
    region_id integer not null,
    relay_address text not null,
    database_latency integer not null,
    version text not null,
    error text not null default '',
    "primary" boolean not null default true
);

create table organizations (
    id uuid not null,
    name text not null,
    description text not null,
    created_at timestamptz not null,
    updated_at timestamptz not null,
    is_default boolean not null default false,
    display_name text not null,
    icon text not null default '',
    deleted boolean not null default false,
    shareable_workspace_owners shareable_workspace_owners not null default 'everyone',
    default_org_member_roles text[] not null,
    constraint organizations_pkey primary key (id)
);
create unique index idx_organization_name_lower on organizations (lower(name)) where deleted = false;
create unique index organizations_single_default_org on organizations (is_default) where is_default = true;

create table users (
    id uuid not null,
    email text not null,
    username text not null default '',
    hashed_password bytea not null,
    created_at timestamptz not null,
    updated_at timestamptz not null,
    status user_status not null default 'dormant',
    rbac_roles text[] not null default '{}',
    login_type login_type not null default 'password',
    avatar_url text not null default '',
    deleted boolean not null default false,
    last_seen_at timestamp without time zone not null default '0001-01-01 00:00:00',
    quiet_hours_schedule text not null default '',
    name text not null default '',
    github_com_user_id bigint,
    is_system boolean not null default false,
    is_service_account boolean not null default false,
    constraint users_pkey primary key (id),
    constraint users_email_not_empty check (is_service_account = (email = '')),
    constraint users_service_account_login_type check (not is_service_account or login_type = 'none'),
    constraint users_username_min_length check (length(username) >= 1)
);

create table provisioner_jobs (
    id uuid not null,
    created_at timestamptz not null,
    updated_at timestamptz not null,
    started_at timestamptz,
    canceled_at timestamptz,
    completed_at timestamptz,
    error text,
    organization_id uuid not null,
    initiator_id uuid not null,
    provisioner provisioner_type not null,
    storage_method provisioner_storage_method not null,
    type provisioner_job_type not null,
    input jsonb not null,
    worker_id uuid,
    file_id uuid not null,
    tags jsonb not null default '{"scope": "organization"}',
    error_code text,
    trace_metadata jsonb,
    -- First match wins. An empty error is not an error; a real one takes precedence over a cancellation, completed or not.
    job_status provisioner_job_status not null generated always as (
        case
            when error <> '' then 'failed'::provisioner_job_status
            when completed_at is not null and canceled_at is not null then 'canceled'::provisioner_job_status
            when completed_at is not null then 'succeeded'::provisioner_job_status
            when canceled_at is not null then 'canceling'::provisioner_job_status
            when started_at is null then 'pending'::provisioner_job_status
            else 'running'::provisioner_job_status
        end
    ) stored,
    logs_length integer not null default 0,
    logs_overflowed boolean not null default false,
    constraint provisioner_jobs_pkey primary key (id),
    constraint max_provisioner_logs_length check (logs_length <= 1048576),
    constraint provisioner_jobs_organization_id_fkey foreign key (organization_id) references organizations (id) on delete cascade
);
-- All indexes: none is led by completed_at, updated_at or created_at.
create index idx_provisioner_jobs_status on provisioner_jobs (job_status);
create index provisioner_jobs_started_at_idx on provisioner_jobs (started_at) where started_at is null;
create index provisioner_jobs_worker_id_organization_id_completed_at_idx
    on provisioner_jobs (worker_id, organization_id, completed_at desc);

create table provisioner_daemons (
    id uuid not null default gen_random_uuid(),
    created_at timestamptz not null,
    name varchar(64) not null,
    provisioners provisioner_type[] not null,
    replica_id uuid,
    tags jsonb not null default '{}',
    last_seen_at timestamptz,
    version text not null default '',
    api_version text not null default '1.0',
    organization_id uuid not null,
    constraint provisioner_daemons_pkey primary key (id),
    constraint provisioner_daemons_organization_id_fkey foreign key (organization_id) references organizations (id) on delete cascade
);

create table templates (
    id uuid not null,
    created_at timestamptz not null,
    updated_at timestamptz not null,
    organization_id uuid not null,
    deleted boolean not null default false,
    name varchar(64) not null,
    provisioner provisioner_type not null,
    active_version_id uuid not null,
    description varchar(128) not null default '',
    default_ttl bigint not null default 604800000000000,
    created_by uuid not null,
    icon varchar(256) not null default '',
    user_acl jsonb not null default '{}',
    group_acl jsonb not null default '{}',
    display_name varchar(64) not null default '',
    allow_user_cancel_workspace_jobs boolean not null default true,
    allow_user_autostart boolean not null default true,
    allow_user_autostop boolean not null default true,
    failure_ttl bigint not null default 0,
    time_til_dormant bigint not null default 0,
    time_til_dormant_autodelete bigint not null default 0,
    autostop_requirement_days_of_week smallint not null default 0,
    autostop_requirement_weeks bigint not null default 0,
    autostart_block_days_of_week smallint not null default 0,
    require_active_version boolean not null default false,
    deprecated text not null default '',
    activity_bump bigint not null default 3600000000000,
    max_port_sharing_level app_sharing_level not null default 'owner',
    use_classic_parameter_flow boolean not null default false,
    cors_behavior cors_behavior not null default 'simple',
    disable_module_cache boolean not null default false,
    constraint templates_pkey primary key (id),
    constraint templates_organization_id_fkey foreign key (organization_id) references organizations (id) on delete cascade,
    constraint templates_created_by_fkey foreign key (created_by) references users (id) on delete restrict
);
create unique index templates_organization_id_name_idx on templates (organization_id, lower(name)) where deleted = false;

create table template_versions (
    id uuid not null,
    template_id uuid,
    organization_id uuid not null,
    created_at timestamptz not null,
    updated_at timestamptz not null,
    name varchar(64) not null,
    readme varchar(1048576) not null,
    job_id uuid not null,
    created_by uuid not null,
    external_auth_providers jsonb not null default '[]',
    message varchar(1048576) not null default '',
    archived boolean not null default false,
    source_example_id text,
    has_external_agent boolean,
    constraint template_versions_pkey primary key (id),
    constraint template_versions_template_id_name_key unique (template_id, name),
    constraint template_versions_template_id_fkey foreign key (template_id) references templates (id) on delete cascade,
    constraint template_versions_organization_id_fkey foreign key (organization_id) references organizations (id) on delete cascade,
    constraint template_versions_created_by_fkey foreign key (created_by) references users (id) on delete restrict
);

create table template_version_presets (
    id uuid not null default gen_random_uuid(),
    template_version_id uuid not null,
    name text not null,
    created_at timestamptz not null default current_timestamp,
    desired_instances integer,
    invalidate_after_secs integer default 0,
    prebuild_status prebuild_status not null default 'healthy',
    scheduling_timezone text not null default '',
    is_default boolean not null default false,
    description varchar(128) not null default '',
    icon varchar(256) not null default '',
    last_invalidated_at timestamptz,
    constraint template_version_presets_pkey primary key (id),
    constraint template_version_presets_template_version_id_fkey
        foreign key (template_version_id) references template_versions (id) on delete cascade
);
create unique index idx_unique_preset_name on template_version_presets (name, template_version_id);
create unique index idx_template_version_presets_default on template_version_presets (template_version_id) where is_default = true;

create table workspaces (
    id uuid not null,
    created_at timestamptz not null,
    updated_at timestamptz not null,
    owner_id uuid not null,
    organization_id uuid not null,
    template_id uuid not null,
    deleted boolean not null default false,
    name varchar(64) not null,
    autostart_schedule text,
    ttl bigint,
    last_used_at timestamptz not null default '0001-01-01 00:00:00+00',
    dormant_at timestamptz,
    deleting_at timestamptz,
    automatic_updates automatic_updates not null default 'never',
    favorite boolean not null default false,
    next_start_at timestamptz,
    group_acl jsonb not null default '{}',
    user_acl jsonb not null default '{}',
    constraint workspaces_pkey primary key (id),
    constraint group_acl_is_object check (jsonb_typeof(group_acl) = 'object'),
    constraint user_acl_is_object check (jsonb_typeof(user_acl) = 'object'),
    constraint workspaces_owner_id_fkey foreign key (owner_id) references users (id) on delete restrict,
    constraint workspaces_organization_id_fkey foreign key (organization_id) references organizations (id) on delete restrict,
    constraint workspaces_template_id_fkey foreign key (template_id) references templates (id) on delete restrict
);
create unique index workspaces_owner_id_lower_idx on workspaces (owner_id, lower(name)) where deleted = false;
create index workspace_next_start_at_idx on workspaces (next_start_at) where deleted = false;
create index workspace_template_id_idx on workspaces (template_id) where deleted = false;

create table workspace_builds (
    id uuid not null,
    created_at timestamptz not null,
    updated_at timestamptz not null,
    workspace_id uuid not null,
    template_version_id uuid not null,
    build_number integer not null,
    transition workspace_transition not null,
    initiator_id uuid not null,
    provisioner_state bytea,
    job_id uuid not null,
    deadline timestamptz not null default '0001-01-01 00:00:00+00',
    reason build_reason not null default 'initiator',
    daily_cost integer not null default 0,
    max_deadline timestamptz not null default '0001-01-01 00:00:00+00',
    template_version_preset_id uuid,
    has_external_agent boolean,
    constraint workspace_builds_pkey primary key (id),
    constraint workspace_builds_job_id_key unique (job_id),
    constraint workspace_builds_workspace_id_build_number_key unique (workspace_id, build_number),
    constraint workspace_builds_deadline_below_max_deadline check (
        (deadline <> '0001-01-01 00:00:00+00' and deadline <= max_deadline) or max_deadline = '0001-01-01 00:00:00+00'
    ),
    constraint workspace_builds_workspace_id_fkey foreign key (workspace_id) references workspaces (id) on delete cascade,
    constraint workspace_builds_template_version_id_fkey
        foreign key (template_version_id) references template_versions (id) on delete cascade,
    constraint workspace_builds_job_id_fkey foreign key (job_id) references provisioner_jobs (id) on delete cascade,
    -- A removed preset empties the preset of all its history.
    constraint workspace_builds_template_version_preset_id_fkey
        foreign key (template_version_preset_id) references template_version_presets (id) on delete set null
);
create index idx_workspace_builds_initiator_id on workspace_builds (initiator_id);

create view workspace_prebuild_builds as
    select id, workspace_id, template_version_id, transition, job_id, template_version_preset_id, build_number
    from workspace_builds
    where initiator_id = 'c42fdf75-3097-471c-8c33-fb52454d81c0'::uuid;

create table licenses (
    id serial not null,
    uploaded_at timestamptz not null,
    jwt text not null,
    exp timestamptz not null,
    uuid uuid not null,
    constraint licenses_pkey primary key (id),
    constraint licenses_jwt_key unique (jwt)
);

create table ai_seat_state (
    user_id uuid not null,
    first_used_at timestamptz not null,
    last_used_at timestamptz not null,
    last_event_type ai_seat_usage_reason not null,
    last_event_description text not null,
    updated_at timestamptz not null,
    constraint ai_seat_state_pkey primary key (user_id),
    constraint ai_seat_state_user_id_fkey foreign key (user_id) references users (id) on delete cascade
);

create table chat_messages (
    id bigserial not null,
    chat_id uuid not null,
    created_at timestamptz not null default now(),
    role chat_message_role not null,
    content jsonb,
    runtime_ms bigint,
    deleted boolean not null default false,
    constraint chat_messages_pkey primary key (id)
);
create index idx_chat_messages_created_at on chat_messages (created_at);

create table usage_events (
    id text not null,
    event_type text not null,
    event_data jsonb not null,
    created_at timestamptz not null,
    publish_started_at timestamptz,
    published_at timestamptz,
    failure_message text,
    constraint usage_events_pkey primary key (id),
    constraint usage_event_type_check
        check (event_type in ('dc_managed_agents_v1', 'hb_ai_seats_v1', 'hb_agent_runtime_v1'))
);
create index idx_usage_events_select_for_publishing on usage_events (published_at, publish_started_at, created_at);
create index idx_usage_events_ai_seats on usage_events (event_type, created_at) where event_type = 'hb_ai_seats_v1';

create table usage_events_daily (
    day date not null,
    event_type text not null,
    usage_data jsonb not null,
    constraint usage_events_daily_pkey primary key (day, event_type)
);

-- Insert only: a later correction or removal does not change the day's total. The day's first row is kept unchanged; every later one
-- replaces it by the single number.
create function aggregate_usage_event() returns trigger language plpgsql as $$
begin
    if new.event_type not in ('dc_managed_agents_v1', 'hb_ai_seats_v1', 'hb_agent_runtime_v1') then
        raise exception 'usage event type % has no daily rule', new.event_type;
    end if;
    insert into usage_events_daily as daily (day, event_type, usage_data)
    values ((new.created_at at time zone 'UTC')::date, new.event_type, new.event_data)
    on conflict (day, event_type) do update set usage_data = case new.event_type
        when 'dc_managed_agents_v1' then jsonb_build_object('count',
            coalesce((daily.usage_data ->> 'count')::bigint, 0) + coalesce((excluded.usage_data ->> 'count')::bigint, 0))
        when 'hb_ai_seats_v1' then jsonb_build_object('count',
            greatest(coalesce((daily.usage_data ->> 'count')::bigint, 0), coalesce((excluded.usage_data ->> 'count')::bigint, 0)))
        when 'hb_agent_runtime_v1' then jsonb_build_object('runtime_ms',
            coalesce((daily.usage_data ->> 'runtime_ms')::bigint, 0) + coalesce((excluded.usage_data ->> 'runtime_ms')::bigint, 0))
    end;
    return new;
end
$$;
create trigger trigger_aggregate_usage_event after insert on usage_events for each row execute function aggregate_usage_event();
