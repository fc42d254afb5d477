-- The ledger holds every accepted event once, in batches of one total order.

-- The ledger's identity. A ledger restored from a backup gets a new incarnation.
create table ledger (
    singleton boolean primary key default true constraint ledger_is_one_row check (singleton),
    incarnation uuid not null default gen_random_uuid(),
    next_sequence bigint not null default 1,
    -- the newest batch's chain; of the empty ledger, 32 zero bytes
    chain bytea not null default decode(repeat('00', 32), 'hex')
);
insert into ledger default values;

-- Incarnations that have ended. One that is neither here nor in `ledger` began after the backup that this ledger was restored from.
create table past_incarnation (
    incarnation uuid primary key
);

-- Each row that a fold, an export or a close reads belongs to a batch.
create table batch (
    id bigint generated always as identity primary key,
    -- set at commit, so that sequence order is commit order without gaps; only the transaction itself sees null
    sequence bigint constraint batch_sequence_is_unique unique,
    -- SHA-256 of the chain of the batch before it and of this batch's content (view batch_content); set with the sequence
    chain bytea,
    kind text not null constraint batch_kind_is_known
        check (kind in ('log', 'replay', 'source', 'licenses', 'verdicts', 'operator')),
    recorded_at timestamptz not null,
    topic text,
    partition integer,
    -- a topic that is lost or recreated begins another generation of the partition
    generation integer,
    epoch bigint,
    replay_id uuid,
    first_offset bigint,
    next_offset bigint,
    records integer not null default 0,
    accepted integer not null default 0,
    duplicates integer not null default 0,
    conflicts integer not null default 0,
    rejects integer not null default 0,
    held integer not null default 0,
    -- publications that the batch settles without a verdict of the vendor
    settled integer not null default 0,
    -- sequences begin at 1: the audit walks them from there
    constraint batch_sequence_is_positive check (sequence > 0),
    constraint batch_counts_balance check (records = accepted + duplicates + conflicts + rejects + held),
    constraint batch_of_the_log_names_its_range check (
        (kind in ('log', 'replay')) = (topic is not null and partition is not null and generation is not null and first_offset is not null and next_offset is not null)),
    constraint batch_of_a_replay_names_it check ((kind = 'replay') = (replay_id is not null)),
    constraint batch_of_verdicts_settles check (settled = 0 or kind in ('verdicts', 'operator'))
);
create index batch_by_partition on batch (topic, partition, first_offset) where kind in ('log', 'replay');
-- Replays can start at any offset, and there are few of them.
create index batch_of_replays on batch (topic, partition, first_offset) where kind = 'replay';
create index batch_by_time on batch (recorded_at);
-- The order of a partition's chain; its newest batch is found without the others.
create index batch_chain on batch (topic, partition, generation, sequence) where kind = 'log';

-- Digests of a batch's rows, by part. They remain valid if rows of a part are removed later.
create table batch_part (
    batch_id bigint not null,
    part text not null constraint batch_part_is_known check (part in ('events', 'rejects', 'requests', 'attempts', 'settlements', 'facts')),
    rows integer not null,
    -- SHA-256 of the digests of the part's rows, in order
    sha256 bytea not null,
    -- of each row in order, 4 bytes that locate it and 4 bytes of its digest: to name a row that does not fit
    marks bytea not null,
    primary key (batch_id, part)
);

-- The form in which a sequence is shown: INCARNATION:SEQUENCE.
create function named_sequence(number bigint) returns text language sql stable strict as $$
    select incarnation || ':' || number from ledger
$$;

-- The act of an operator, or of this program on an operator's behalf. Each act is a batch of its own, so that it has a place in the
-- ledger's order. Its results are in the tables of the changed rows.
create table operator_act (
    id bigint generated always as identity primary key,
    batch_id bigint not null references batch,
    acted_at timestamptz not null,
    -- a person's login, the name of a token, or `tallyline VERSION`
    actor text not null constraint operator_act_names_its_actor check (actor <> ''),
    act text not null constraint operator_act_is_known
        check (act in ('resubmit', 'admit', 'discard', 'pause', 'resume', 'replay', 'rebuild', 'recover', 'accept', 'retire', 'reinstate',
            'correct', 'prune', 'sign')),
    -- the target: a plan's hash, an operation, a stage, a deployment, `retention`; or a reject
    subject text,
    reject_id bigint,
    reason text not null,
    detail jsonb not null default '{}',
    constraint operator_act_is_done_to_one_thing check (num_nonnulls(subject, reject_id) = 1)
);
create index operator_act_by_batch on operator_act (batch_id);
-- Acts other than those of single rejects are few.
create index operator_act_by_kind on operator_act (act, id) where reject_id is null;
create index operator_act_by_reject on operator_act (reject_id) where reject_id is not null;

-- A Coder deployment. Its introduction is in the ledger before its first event.
create table source (
    id smallint generated always as identity primary key,
    deployment_id uuid not null constraint source_deployment_is_unique unique,
    batch_id bigint not null references batch,
    -- histograms observe builds that completed at or after this instant
    introduced_at timestamptz not null,
    -- builds completed earlier are counted once in creation_baseline and are not collected; null: all history is collected
    baseline_until timestamptz,
    -- the coderd that the source is bound to, by deployment id and default organization; null: neither has been read yet
    bound_deployment_id uuid constraint source_coderd_is_bound_once unique,
    bound_organization_id uuid constraint source_organization_is_bound_once unique,
    constraint source_is_bound_to_both check (num_nulls(bound_deployment_id, bound_organization_id) in (0, 2)),
    -- accepted events that coderd no longer has: rows with gone_at
    gone_events bigint not null default 0,
    -- the operator's act that retired the source; null: it is in use
    retired_act_id bigint references operator_act
);

-- Initial values of the all-time counters where history is not collected.
create table creation_baseline (
    source_id smallint not null references source,
    batch_id bigint not null references batch,
    organization_name text not null,
    template_name text not null,
    preset_name text not null,
    creations bigint not null constraint creation_baseline_is_not_negative check (creations >= 0),
    primary key (source_id, organization_name, template_name, preset_name)
);
create index creation_baseline_by_batch on creation_baseline (batch_id);

-- Events. batch_id has no foreign key: the same transaction writes the batch row last. The audit compares the counts.
create table workspace_build (
    source_id smallint not null,
    build_id uuid not null,
    batch_id bigint not null,
    log_offset bigint not null,
    digest bytea not null,
    workspace_id uuid not null,
    organization_id uuid not null,
    template_id uuid not null,
    template_version_id uuid not null,
    preset_id uuid,
    owner_id uuid not null,
    initiator_id uuid not null,
    transition text not null constraint workspace_build_transition_is_known check (transition in ('start', 'stop', 'delete')),
    reason text not null,
    status text not null constraint workspace_build_status_is_known check (status in ('succeeded', 'failed', 'canceled')),
    build_number integer not null,
    stage text constraint workspace_build_stage_is_known check (stage in ('create', 'claim')),
    first_build_by_prebuilds_user boolean not null,
    -- the stage of the workspace's build 1
    first_build_stage text constraint workspace_build_first_build_stage_is_known check (first_build_stage in ('create', 'claim')),
    first_successful_start boolean not null,
    has_ai_task boolean,
    has_external_agent boolean,
    daily_cost integer not null,
    created_at timestamptz not null,
    started_at timestamptz,
    completed_at timestamptz not null,
    organization_name text not null,
    template_name text not null,
    template_version_name text not null,
    preset_name text not null,
    workspace_name text not null,
    owner_name text not null,
    -- when a valid signature or an equal row in coderd confirmed it; null: not confirmed
    confirmed_at timestamptz,
    -- since when coderd no longer has the row; it remains counted, and the audit leaves it out of its slices
    gone_at timestamptz,
    constraint workspace_build_is_unique primary key (source_id, build_id)
);
create index workspace_build_by_batch on workspace_build (batch_id);
create index workspace_build_by_completion on workspace_build (source_id, completed_at);
create index workspace_build_first_start on workspace_build (source_id, workspace_id) where first_successful_start;
create index workspace_build_gone on workspace_build (source_id, build_id) where gone_at is not null;

-- Each workspace has one first successful start. Only this build is counted as a creation, even if the source later names another.
create table workspace_first_start (
    source_id smallint not null,
    workspace_id uuid not null,
    -- null: the start was before the source's baseline
    build_id uuid,
    constraint workspace_first_start_is_unique primary key (source_id, workspace_id)
);
create index workspace_first_start_before_baseline on workspace_first_start (source_id) where build_id is null;

create table prebuild_claim (
    source_id smallint not null,
    build_id uuid not null,
    batch_id bigint not null,
    log_offset bigint not null,
    digest bytea not null,
    workspace_id uuid not null,
    organization_id uuid not null,
    template_id uuid not null,
    template_version_id uuid not null,
    preset_id uuid,
    claimed_by uuid not null,
    initiator_id uuid not null,
    build_number integer not null,
    stage text constraint prebuild_claim_stage_is_known check (stage in ('create', 'claim')),
    status text not null constraint prebuild_claim_status_is_known check (status in ('succeeded', 'failed', 'canceled')),
    created_at timestamptz not null,
    started_at timestamptz,
    completed_at timestamptz not null,
    organization_name text not null,
    template_name text not null,
    preset_name text not null,
    -- see workspace_build
    confirmed_at timestamptz,
    gone_at timestamptz,
    constraint prebuild_claim_is_unique primary key (source_id, build_id)
);
create index prebuild_claim_by_batch on prebuild_claim (batch_id);
create index prebuild_claim_by_completion on prebuild_claim (source_id, completed_at);
create index prebuild_claim_gone on prebuild_claim (source_id, build_id) where gone_at is not null;

create table usage_event (
    source_id smallint not null,
    id text not null,
    batch_id bigint not null,
    log_offset bigint not null,
    digest bytea not null,
    event_type text not null constraint usage_event_type_is_known
        check (event_type in ('dc_managed_agents_v1', 'hb_ai_seats_v1', 'hb_agent_runtime_v1')),
    -- an unsigned 64-bit number in the type's unit
    quantity numeric(20, 0) not null constraint usage_event_quantity_is_unsigned check (quantity >= 0),
    created_at timestamptz not null,
    -- coderd's publish marks when the event was accepted
    publish_started_at timestamptz,
    published_at timestamptz,
    failure_message text,
    -- see workspace_build
    confirmed_at timestamptz,
    gone_at timestamptz,
    constraint usage_event_is_unique primary key (source_id, id)
);
create index usage_event_by_batch on usage_event (batch_id);
create index usage_event_by_time on usage_event (source_id, created_at, id);
create index usage_event_gone on usage_event (source_id, id) where gone_at is not null;

-- Accepted events with their deployment and batch, null where missing. The quantity is text, as decoders of the event expect it.
create view kept_build as
    select e.build_id::text as key, e.*, s.deployment_id, to_jsonb(b) as batch
    from workspace_build e left join source s on s.id = e.source_id left join batch b on b.id = e.batch_id;
create view kept_claim as
    select e.build_id::text as key, e.*, s.deployment_id, to_jsonb(b) as batch
    from prebuild_claim e left join source s on s.id = e.source_id left join batch b on b.id = e.batch_id;
create view kept_usage as
    select e.id as key, e.id, e.source_id, e.batch_id, e.log_offset, e.digest, e.event_type, e.quantity::text as quantity, e.created_at,
        e.publish_started_at, e.published_at, e.failure_message, s.deployment_id, to_jsonb(b) as batch
    from usage_event e left join source s on s.id = e.source_id left join batch b on b.id = e.batch_id;

-- Records that are not accepted: rejected, in conflict with an accepted event, or held until their type or deployment is known.
create table reject (
    id bigint generated always as identity primary key,
    batch_id bigint not null,
    -- the replay's batch that wrote the row, if the live chain has taken it over
    replay_batch_id bigint,
    topic text not null,
    partition integer not null,
    generation integer not null,
    log_offset bigint not null,
    disposition text not null constraint reject_disposition_is_known check (disposition in ('rejected', 'conflict', 'held')),
    cause text not null constraint reject_cause_is_known check (cause in ('tombstone', 'oversized', 'json', 'attribute', 'unknown_event_type',
        'foreign_event_type', 'foreign_topic', 'field', 'unknown_field', 'unsigned', 'bad_signature', 'conflict', 'unregistered_source', 'ledger')),
    detail text not null,
    -- null where the record has no readable value
    deployment_id uuid,
    event_id text,
    event_type text,
    -- unbilled usage as an unsigned 64-bit number in the type's unit; null: not usage, or not readable
    units numeric(20, 0),
    -- open until an act of an operator or of an upgrade ends it
    state text not null default 'open' constraint reject_state_is_known check (state in ('open', 'resubmitted', 'admitted', 'discarded')),
    act_id bigint references operator_act,
    -- place in the log of the record that the act appended; null: the act appended none
    passed_topic text,
    passed_partition integer,
    passed_generation integer,
    passed_offset bigint,
    -- the record as received; headers are JSON, [[name, value in base64 or null], ...], kept as bytes because text cannot contain NUL
    record_timestamp timestamptz,
    record_key bytea,
    headers bytea,
    payload bytea,
    -- length and SHA-256 of the whole body, if it is too large and only its first bytes are kept
    whole_bytes bigint,
    whole_sha256 bytea,
    -- when retention removed headers and body, and their SHA-256; null: they are kept. Without a body, payload_sha256 is null.
    payload_removed_at timestamptz,
    headers_sha256 bytea,
    payload_sha256 bytea,
    -- of the headers without the signature
    unsigned_headers_sha256 bytea,
    recorded_at timestamptz not null,
    constraint reject_removal_leaves_digests check (
        case when payload_removed_at is null
            then headers is not null and num_nonnulls(headers_sha256, payload_sha256, unsigned_headers_sha256) = 0
            else num_nonnulls(headers, payload) = 0 and num_nulls(headers_sha256, unsigned_headers_sha256) = 0 end),
    constraint reject_removal_follows_its_end check (payload_removed_at is null or state <> 'open'),
    constraint reject_is_unique unique (topic, partition, generation, log_offset),
    constraint reject_names_the_whole_body check ((whole_bytes is null) = (whole_sha256 is null)),
    constraint reject_is_ended_by_an_act check ((state = 'open') = (act_id is null)),
    constraint reject_passed_to_one_place check (
        num_nulls(passed_topic, passed_partition, passed_generation, passed_offset) = 4
        or num_nulls(passed_topic, passed_partition, passed_generation, passed_offset) = 0 and state in ('resubmitted', 'admitted'))
);
-- SHA-256 of headers without the signature, which depends on the key. Elements of the type json keep their text.
create function unsigned_headers(headers bytea) returns bytea language sql immutable strict as $$
    select sha256(convert_to('[' || coalesce(string_agg(header::text, ',' order by place), '') || ']', 'UTF8'))
    from json_array_elements(convert_from(headers, 'UTF8')::json) with ordinality as one (header, place)
    where lower(substr(header::text, 1, 23) collate "C") <> '["tallyline-signature",'
$$;
-- Registering a deployment releases its held records.
create index reject_unregistered on reject (deployment_id, id) where state = 'open' and cause = 'unregistered_source';
-- Frequent counts read only this index.
create index reject_open on reject (disposition, cause, id) include (event_type, units, recorded_at) where state = 'open';
-- Retention reads ended rejects in the order of the acts that ended them.
create index reject_by_end on reject (act_id, id) where state <> 'open' and payload_removed_at is null;
create index reject_by_batch on reject (batch_id);
create index reject_by_replay on reject (replay_batch_id) where replay_batch_id is not null;
create index reject_by_event on reject (event_id, deployment_id);
create index reject_passed on reject (passed_topic, passed_partition, passed_generation, passed_offset) where passed_offset is not null;

-- The position of each partition. Only the lease holder that knows epoch and position moves it.
create table position (
    topic text not null,
    partition integer not null,
    -- `recover` raises it when it restarts the partition; past_position has the earlier generations
    generation integer not null default 1,
    epoch bigint not null,
    -- where reading began: the log's start for a partition without a position
    start_offset bigint not null,
    next_offset bigint not null,
    -- the last record before the position, to detect a recreated topic
    last_offset bigint,
    last_record bytea,
    records bigint not null default 0,
    moved_at timestamptz not null,
    primary key (topic, partition)
);

-- The offset from which a partition's records need a valid signature. The first consumer with keys writes it for all partitions.
-- A later partition or generation has no row: all its records need one. The recovery of a restored ledger lowers it to the position.
-- The act `sign` has the offsets as first written.
create table signature_cutover (
    topic text not null,
    partition integer not null,
    generation integer not null,
    first_offset bigint not null,
    recorded_at timestamptz not null,
    constraint signature_cutover_is_recorded_once primary key (topic, partition, generation)
);
-- The first offset of the generation whose record needs a signature; null: no consumer has had keys.
create function signed_from(of_topic text, of_partition integer, of_generation integer) returns bigint language sql stable as $$
    select case when exists (select from signature_cutover) then coalesce((select first_offset from signature_cutover
        where topic = of_topic and partition = of_partition and generation = of_generation), 0) end
$$;

-- Positions that `recover` has ended because the topic was lost, was recreated, or no longer had the records to read.
create table past_position (
    topic text not null,
    partition integer not null,
    generation integer not null,
    start_offset bigint not null,
    next_offset bigint not null,
    records bigint not null,
    act_id bigint not null references operator_act,
    primary key (topic, partition, generation)
);

-- The partition's current generation, or the one that its first record begins.
create function current_generation(of_topic text, of_partition integer) returns integer language sql stable strict as $$
    select coalesce((select generation from position where topic = of_topic and partition = of_partition),
        (select max(generation) + 1 from past_position where topic = of_topic and partition = of_partition), 1)
$$;

-- Plans by the hash of their effect. An execution has exactly this effect.
create table plan (
    hash text primary key,
    kind text not null constraint plan_kind_is_known check (kind in ('replay', 'recover')),
    -- the operator's request, and the effect in the plan's answer
    request jsonb not null,
    effect jsonb not null,
    planned_at timestamptz not null,
    act_id bigint references operator_act,
    finished_at timestamptz
);

-- A planned replay, one row per partition. It has its own positions and never moves the live ones.
create table replay (
    id uuid not null,
    plan_hash text not null references plan,
    topic text not null,
    partition integer not null,
    generation integer not null,
    first_offset bigint not null,
    next_offset bigint not null,
    end_offset bigint not null,
    primary key (id, topic, partition)
);
create index replay_by_plan on replay (plan_hash);

-- One row per accepted usage event. Usage reaches the vendor only through this queue.
create table publication (
    source_id smallint not null,
    event_id text not null,
    event_created_at timestamptz not null,
    queued_batch_id bigint not null,
    state text not null default 'pending' constraint publication_state_is_known
        check (state in ('pending', 'published', 'refused', 'expired', 'unknown', 'not_ours', 'withdrawn')),
    attempts integer not null default 0,
    -- attempts whose rows retention has removed
    removed_attempts integer not null default 0,
    -- whether an attempt was sent whose answer is not recorded
    unanswered boolean not null default false,
    -- attempts that were refused for now or left out of an answer
    refusals integer not null default 0,
    next_attempt_at timestamptz not null,
    -- the request, or the publisher, that may send or settle the row meanwhile
    leased_by text,
    leased_until timestamptz,
    last_message text,
    -- why the row is held although it is due, and since when; null: it is not held by itself
    held_for text constraint publication_held_for_is_known check (held_for in ('coderd_differs', 'vendor_rules', 'vendor_refuses')),
    held_since timestamptz,
    constraint publication_is_held_since_an_instant check ((held_for is null) = (held_since is null)),
    constraint publication_is_unique primary key (source_id, event_id)
)
-- leases and attempts update a row in its page, which needs space there
with (fillfactor = 70);
create index publication_due on publication (source_id, event_created_at, event_id) where state = 'pending';
-- leases read the held rows apart from the others, and only those that are due
create index publication_unheld on publication (source_id, event_created_at, event_id) where state = 'pending' and held_for is null;
create index publication_held on publication (source_id, next_attempt_at) where state = 'pending' and held_for is not null;

-- How each publication left the queue, each later verdict of the vendor, and each return to the queue by a correction. Rows are only
-- added. The newest row up to a sequence is the state at that sequence; without a row the publication was pending. publication.state
-- repeats the newest row.
create table settlement (
    source_id smallint not null,
    event_id text not null,
    batch_id bigint not null references batch,
    state text not null constraint settlement_state_is_known
        check (state in ('pending', 'published', 'refused', 'expired', 'unknown', 'not_ours', 'withdrawn')),
    -- of an acceptance, the batch of the correction whose content the vendor bills; null: the content as accepted
    content_batch_id bigint,
    constraint settlement_is_unique primary key (source_id, event_id, batch_id)
);
create index settlement_by_batch on settlement (batch_id);

-- Corrections of accepted events by operators. Rows are only added, and the accepted row stays as it is. The newest correction of an
-- event up to a sequence is its content at that sequence.
create table correction (
    source_id smallint not null references source,
    event_id text not null,
    -- the operator's act, a batch of its own
    batch_id bigint not null references batch,
    act_id bigint not null references operator_act,
    topic text not null,
    -- the build of a build or claim; null: usage
    build_id uuid,
    -- the batch that accepted the event
    accepted_batch_id bigint not null,
    -- the event before and after the correction, each as a CloudEvent in structured form with its digest; null: coderd does not have it
    before_event jsonb,
    before_digest bytea,
    after_event jsonb,
    digest bytea,
    -- the corrected event's time
    event_time timestamptz,
    -- of corrected usage, as in usage_event
    event_type text,
    quantity numeric(20, 0),
    -- of usage, whether the vendor may have accepted the content before, in an attempt whose answer is not recorded
    unanswered boolean not null default false,
    constraint correction_is_unique primary key (source_id, event_id, batch_id),
    constraint correction_has_events_with_digests check (
        (before_event is null) = (before_digest is null) and num_nulls(after_event, digest, event_time) in (0, 3)),
    constraint correction_changes_the_event check (before_event is distinct from after_event),
    constraint correction_of_usage_has_its_columns check (
        num_nonnulls(event_type, quantity) = case when build_id is null and digest is not null then 2 else 0 end)
);
create index correction_by_batch on correction (batch_id);
create index correction_by_accepted_batch on correction (accepted_batch_id);
create index correction_by_time on correction (source_id, topic, event_time, event_id) where digest is not null;
create index correction_of_first_start on correction (source_id, (after_event -> 'data' ->> 'workspace_id'))
    where after_event -> 'data' ->> 'first_successful_start' = 'true';
-- The newest correction of an event, read by key. Corrections are written one at a time, so a later one has a greater batch id.
-- PostgreSQL expands it in the query.
create function newest_correction(of_source smallint, of_event text) returns setof correction language sql stable as $$
    select * from correction where source_id = of_source and event_id = of_event order by batch_id desc limit 1
$$;
-- Corrected events that coderd has.
create view corrected_event as
    select * from correction c where digest is not null and not exists (select from correction later
        where later.source_id = c.source_id and later.event_id = c.event_id and later.batch_id > c.batch_id);

-- Corrected usage that coderd has, with its content at a sequence. PostgreSQL expands the function in the query.
create function corrected_usage(up_to bigint) returns table (source_id smallint, id text, batch_id bigint, event_type text,
    quantity numeric, created_at timestamptz, corrected_sequence bigint) language sql stable as $$
    select n.source_id, n.event_id, n.accepted_batch_id, n.event_type, n.quantity, n.event_time, n.sequence
    from (select distinct on (c.source_id, c.event_id) c.*, b.sequence from correction c join batch b on b.id = c.batch_id
          where c.build_id is null and b.sequence <= up_to order by c.source_id, c.event_id, b.sequence desc) n
    where n.digest is not null
$$;

-- Accepted usage with its content at a sequence. Usage that is corrected to nothing is left out. PostgreSQL expands it in the query.
create function usage_as_of(up_to bigint) returns table (source_id smallint, id text, batch_id bigint, event_type text,
    quantity numeric, created_at timestamptz, corrected_sequence bigint) language sql stable as $$
    select e.source_id, e.id, e.batch_id, e.event_type, e.quantity, e.created_at, null::bigint from usage_event e
    where not exists (select from correction c join batch b on b.id = c.batch_id
        where c.source_id = e.source_id and c.event_id = e.id and b.sequence <= up_to)
    union all
    select * from corrected_usage(up_to)
$$;

-- Changes of a workspace's first start by corrections. Rows are only added. Before the change's sequence the workspace had the previous
-- build, null: none. workspace_first_start has the current one.
create table first_start_change (
    source_id smallint not null references source,
    workspace_id uuid not null,
    batch_id bigint not null references batch,
    previous_build_id uuid,
    next_build_id uuid,
    constraint first_start_change_is_unique primary key (source_id, workspace_id, batch_id)
);
create index first_start_change_by_batch on first_start_change (batch_id);

-- coderd's newest publish mark when mode `sole` first read it, kept over restarts. A later mark stops publishing until an operator acts.
create table publish_mark (
    source_id smallint primary key references source,
    -- null: coderd had not published
    first_mark timestamptz,
    later_mark timestamptz,
    seen_at timestamptz,
    constraint publish_mark_is_seen_at_an_instant check ((later_mark is null) = (seen_at is null))
);

-- A request to the vendor, written before it is sent. Its answer is recorded with its verdicts.
create table publication_request (
    id uuid primary key,
    source_id smallint not null,
    license_sha256 bytea not null,
    events integer not null,
    sent_at timestamptz not null,
    answered_at timestamptz,
    status integer,
    error text,
    batch_id bigint,
    -- the first later batch of its source that covers it while it has no answer, and the SHA-256 of its event ids then
    open_batch_id bigint,
    event_ids_sha256 bytea,
    constraint publication_request_is_covered_with_its_events check ((open_batch_id is null) = (event_ids_sha256 is null)),
    -- when retention removed its attempts and its error, the number of these attempts by verdict, and the error's SHA-256; null: kept
    attempts_removed_at timestamptz,
    verdicts jsonb,
    error_sha256 bytea,
    constraint publication_request_removal_leaves_counts check (
        (attempts_removed_at is null) = (verdicts is null)
        and case when attempts_removed_at is null then error_sha256 is null else error is null end)
);
-- Retention reads requests in the order in which they were sent.
create index publication_request_by_age on publication_request (sent_at, id) where attempts_removed_at is null;
create index publication_request_by_batch on publication_request (batch_id) where batch_id is not null;
create index publication_request_open on publication_request (source_id, sent_at) where batch_id is null and open_batch_id is null;
create index publication_request_by_open_batch on publication_request (open_batch_id) where open_batch_id is not null;
create index publication_request_by_source on publication_request (source_id, sent_at);
create table publication_attempt (
    request_id uuid not null references publication_request,
    source_id smallint not null,
    event_id text not null,
    verdict text constraint publication_attempt_verdict_is_known
        check (verdict in ('accepted', 'refused', 'refused_for_now', 'left_out', 'failed')),
    message text,
    -- the batch of the correction whose content was sent; null: the content as accepted
    content_batch_id bigint,
    primary key (request_id, source_id, event_id)
)
-- each row is updated once in its page, with its verdict
with (fillfactor = 50);
create index publication_attempt_by_event on publication_attempt (source_id, event_id);

-- Publications that the vendor settled by a request whose attempts retention has removed.
create view removed_answer as
    select settlement.source_id, event_id, state from settlement join publication_request using (batch_id)
    where attempts_removed_at is not null and (state, true) in (('published', verdicts ? 'accepted'), ('refused', verdicts ? 'refused'));

-- What retention removes, by kind. Each removal adds to the counts in its own transaction. The next act `prune` takes them over.
create table prune_kind (
    kind text primary key constraint prune_kind_is_known check (kind in ('reject_payloads', 'attempts', 'plans', 'snapshots')),
    -- removed since the newest act `prune`, and since when; null: nothing
    rows bigint not null default 0,
    bytes bigint not null default 0,
    counted_since timestamptz,
    -- the end of the program's newest round, and since when a remaining row is due; null: no row is
    ran_at timestamptz,
    due_since timestamptz
);
insert into prune_kind (kind) values ('reject_payloads'), ('attempts'), ('plans'), ('snapshots');

-- Parts of batches that did not match their digest in batch_part when retention compared them. Their rows are kept.
create table prune_evidence (
    batch_id bigint not null,
    part text not null constraint prune_evidence_part_is_known check (part in ('rejects', 'attempts')),
    found_at timestamptz not null,
    primary key (batch_id, part)
);

-- Licenses that appear in and disappear from coderd: claims and a hash, never the token.
create table license (
    batch_id bigint not null references batch,
    source_id smallint not null references source,
    license_id integer not null,
    jwt_sha256 bytea not null,
    present boolean not null,
    uploaded_at timestamptz,
    -- null where the token is not valid; refusal gives the reason
    claims jsonb,
    refusal text,
    primary key (source_id, jwt_sha256, batch_id),
    constraint license_has_claims_or_a_refusal check (not present or (claims is null) <> (refusal is null))
);
create index license_by_batch on license (batch_id);

-- Events that coderd lost when its database was restored to an earlier time. The ledger keeps them.
create table source_lost (
    source_id smallint not null references source,
    event_id text not null,
    -- the batch of the operator's act
    batch_id bigint not null references batch,
    act_id bigint not null references operator_act,
    primary key (source_id, event_id)
);
create index source_lost_by_batch on source_lost (batch_id);

-- The content of each batch: SHA-256 of its own columns and of the digests of its parts. Text of an array quotes its elements, so that
-- fields cannot run into each other, and it does not depend on settings of the session.
create view batch_content as
    select id, sequence, chain, topic, partition, first_offset, sha256(convert_to(array['tallyline.batch.v1', id::text, kind,
            encode(timestamptz_send(recorded_at), 'hex'), topic, partition::text, generation::text, epoch::text, replay_id::text,
            first_offset::text, next_offset::text, records::text, accepted::text, duplicates::text, conflicts::text, rejects::text,
            held::text, settled::text]::text
        || coalesce((select string_agg(array[part, rows::text, encode(sha256, 'hex')]::text, '' order by part collate "C")
                     from batch_part where batch_id = batch.id), ''), 'UTF8')) as content
    from batch;

create view covered_reject as
    select id, batch_id, replay_batch_id, log_offset,
        array['reject.v1', id::text, topic, partition::text, generation::text, log_offset::text, disposition, cause, detail,
            deployment_id::text, event_id, event_type, units::text, encode(timestamptz_send(record_timestamp), 'hex'),
            encode(record_key, 'hex'), encode(coalesce(headers_sha256, sha256(headers)), 'hex'),
            encode(coalesce(payload_sha256, sha256(payload)), 'hex'), whole_bytes::text,
            encode(whole_sha256, 'hex'), encode(timestamptz_send(recorded_at), 'hex')] as columns
    from reject;

-- The number of a request's attempts by verdict, also after retention removed them. The text of jsonb orders its keys.
create view covered_request as
    select request.*, coalesce(verdicts, (select coalesce(jsonb_object_agg(verdict, attempts), '{}') from (
            select verdict, count(*) as attempts from publication_attempt where request_id = request.id and verdict is not null group by verdict
        ) counted)) as covered_verdicts, coalesce(error_sha256, sha256(convert_to(error, 'UTF8'))) as covered_error
    from publication_request request;

-- Each row of a batch except events, with the columns that never change. Of an event, src/ledger/chain.rs computes the digest.
-- `place` locates a reject by the low bytes of its offset, and another row by a digest of its name.
create view chained_row as
    select batch_id, part, name, coalesce(place, substr(sha256(convert_to(name, 'UTF8')), 1, 4)) as place,
        sha256(convert_to(columns::text, 'UTF8')) as digest
    from (
        select batch_id, 'rejects' as part, 'reject ' || id as name, substr(int8send(log_offset), 5) as place, columns
        from covered_reject
        union all
        select replay_batch_id, 'rejects', 'reject ' || id, substr(int8send(log_offset), 5), columns
        from covered_reject where replay_batch_id is not null
        union all
        select batch_id, 'requests', 'request ' || id, null,
            array['request.v2', id::text, source_id::text, encode(license_sha256, 'hex'), events::text,
                encode(timestamptz_send(sent_at), 'hex'), encode(timestamptz_send(answered_at), 'hex'), status::text,
                encode(covered_error, 'hex'), covered_verdicts::text]
        from covered_request where batch_id is not null
        union all
        select open_batch_id, 'requests', 'request ' || id || ' without an answer', null,
            array['open_request.v1', id::text, source_id::text, encode(license_sha256, 'hex'), events::text,
                encode(timestamptz_send(sent_at), 'hex'), encode(event_ids_sha256, 'hex')]
        from publication_request where open_batch_id is not null
        union all
        select batch_id, 'attempts', event_id, null,
            array['attempt.v2', request_id::text, attempt.source_id::text, event_id, verdict, message, content_batch_id::text]
        from publication_attempt attempt join publication_request request on request.id = request_id where batch_id is not null
        union all
        select batch_id, 'settlements', event_id, null, array['settlement.v2', source_id::text, event_id, state, content_batch_id::text]
        from settlement
        union all
        select batch_id, 'facts', 'license ' || license_id || ' of source ' || source_id, null,
            array['license.v1', source_id::text, license_id::text, encode(jwt_sha256, 'hex'), present::text,
                encode(timestamptz_send(uploaded_at), 'hex'), claims::text, refusal]
        from license
        union all
        select batch_id, 'facts', 'source ' || deployment_id, null,
            array['source.v1', id::text, deployment_id::text, encode(timestamptz_send(introduced_at), 'hex'),
                encode(timestamptz_send(baseline_until), 'hex')]
        from source
        union all
        select batch_id, 'facts', concat_ws('/', 'baseline of ' || organization_name, template_name, preset_name), null,
            array['baseline.v1', source_id::text, organization_name, template_name, preset_name, creations::text]
        from creation_baseline
        union all
        select batch_id, 'facts', 'workspace ' || workspace_id, null, array['start.v1', source_id::text, workspace_id::text]
        from workspace_first_start start join source on source.id = source_id where build_id is null
        union all
        select batch_id, 'facts', 'correction of ' || event_id || ' of source ' || source_id, null,
            array['correction.v2', source_id::text, event_id, act_id::text, topic, build_id::text, accepted_batch_id::text,
                before_event::text, encode(before_digest, 'hex'), after_event::text, encode(digest, 'hex'), event_type, quantity::text,
                encode(timestamptz_send(event_time), 'hex'), unanswered::text]
        from correction
        union all
        select batch_id, 'facts', 'first start of workspace ' || workspace_id || ' of source ' || source_id, null,
            array['start_change.v1', source_id::text, workspace_id::text, previous_build_id::text, next_build_id::text]
        from first_start_change
        union all
        select batch_id, 'facts', 'lost event ' || event_id || ' of source ' || source_id, null,
            array['lost.v1', source_id::text, event_id, act_id::text]
        from source_lost
        union all
        select batch_id, 'facts', 'act ' || id, null,
            array['act.v1', id::text, encode(timestamptz_send(acted_at), 'hex'), actor, act, subject, reject_id::text, reason, detail::text]
        from operator_act
    ) as covered;

-- Runs as the last step inside the commit, so that no writer waits for another's statements. The row of `ledger` stays locked until
-- the commit is on disk, and on the synchronous standby if there is one. This lock limits the commits per second, so the content is
-- computed before it is taken. An earlier statement has written the part `events`.
create function take_sequence() returns trigger language plpgsql as $$
declare
    own_content bytea;
    taken bigint;
    head bytea;
begin
    insert into batch_part (batch_id, part, rows, sha256, marks)
        select batch_id, part, count(*), sha256(string_agg(digest, '' order by name collate "C", digest)),
            string_agg(place || substr(digest, 1, 4), '' order by name collate "C", digest)
        from chained_row where batch_id = new.id group by batch_id, part;
    select content into own_content from batch_content where id = new.id;
    update ledger set next_sequence = next_sequence + 1, chain = sha256(chain || own_content)
        returning next_sequence - 1, chain into taken, head;
    update batch set sequence = taken, chain = head where id = new.id;
    return null;
end
$$;
create constraint trigger batch_takes_sequence after insert on batch
    deferrable initially deferred for each row execute function take_sequence();

-- Progress of each source's collector, one row per source. A pass is progress, not a fact, and adds no batch.
create table collector_progress (
    source_id smallint primary key references source,
    -- number of the newest pass, from 1 per source, and its start; a collector continues only from its own last pass
    pass_id bigint not null default 0,
    started_at timestamptz,
    -- whether that pass reports completeness
    reports boolean not null default false,
    -- rows that a pass found after an earlier pass had reported their time complete
    late bigint not null default 0,
    -- start of the newest full sweep; null: none since the last recovery
    swept_at timestamptz,
    -- unsettled passes up to this one are void: their records were lost with a topic or rejected for their signature
    void_pass_id bigint not null default 0,
    -- from settled passes: the newest full sweep, and the source's completeness
    swept_pass_id bigint not null default 0,
    complete_until timestamptz,
    runtime_complete_until timestamptz
);
-- A pass that is not settled, with the later passes that add nothing to it. A pass is settled once the log is read up to all its offsets.
create table collector_pass (
    source_id smallint not null references collector_progress,
    pass_id bigint not null,
    full_sweep boolean not null,
    -- the log has everything that coderd committed before this instant; null: not known
    complete_until timestamptz,
    -- every hour before this one has its runtime row or is over 7 days old
    runtime_complete_until timestamptz,
    primary key (source_id, pass_id)
);
-- The log's end after the pass, where it is ahead of the position and of earlier rows. All records of this and earlier passes are below it.
create table collector_pass_offset (
    source_id smallint not null,
    pass_id bigint not null,
    topic text not null,
    partition integer not null,
    next_offset bigint not null,
    primary key (source_id, pass_id, topic, partition),
    foreign key (source_id, pass_id) references collector_pass on delete cascade
);

-- Offsets of passes that the consumer has not reached.
create view unreached_offset as
    select ahead.* from collector_pass_offset ahead left join position using (topic, partition)
    where position.next_offset is null or position.next_offset < ahead.next_offset;

-- A source's completeness in the ledger and its newest complete full sweep, for the events of one topic; null: all topics.
create function completeness(of_source smallint, of_topic text)
    returns table (swept_pass_id bigint, complete_until timestamptz, runtime_complete_until timestamptz) language sql stable as $$
    select greatest(progress.swept_pass_id, max(pass.pass_id) filter (where full_sweep)),
        greatest(progress.complete_until, max(pass.complete_until)),
        greatest(progress.runtime_complete_until, max(pass.runtime_complete_until))
    from collector_progress progress
    cross join (select min(pass_id) as pass_id from unreached_offset
                where source_id = of_source and (of_topic is null or topic = of_topic)) unreached
    left join collector_pass pass on pass.source_id = of_source and (pass.pass_id < unreached.pass_id or unreached.pass_id is null)
    where progress.source_id = of_source group by progress.source_id
$$;

-- Events that an audit misses. The source's collector fetches their rows in its next pass; recording that pass removes the request.
create table fetch_request (
    source_id smallint not null references source,
    event_id text not null,
    requested_at timestamptz not null,
    constraint fetch_request_is_unique primary key (source_id, event_id)
);
create index fetch_request_by_age on fetch_request (source_id, requested_at, event_id);

-- An operator's latest request for a full sweep of the source, and its progress.
create table sweep_request (
    source_id smallint not null references source constraint sweep_request_is_unique primary key,
    -- when the collector began the sweep, which identifies it; null: not begun
    begun_at timestamptz,
    rows_read bigint not null default 0,
    -- the pass that made the sweep, its appended events and the late ones among them; null: not recorded
    pass_id bigint,
    appended integer,
    late integer,
    constraint sweep_request_has_begun_before_its_pass check (pass_id is null or begun_at is not null)
);

-- A lease has one holder at a time, by the database's clock. The epoch rises with each new holder.
create table lease (
    name text primary key,
    holder text not null,
    epoch bigint not null,
    expires_at timestamptz not null,
    -- no process shows a metrics fold below this sequence
    shown_sequence bigint not null default 0
);

-- A saved state of a fold, after the batch of this sequence. It consists of the newest version of each piece up to this sequence.
create table snapshot (
    stage text not null,
    rules_version integer not null,
    incarnation uuid not null,
    sequence bigint not null,
    taken_at timestamptz not null,
    -- the number of the state's pieces: a snapshot that has another number is not read
    pieces bigint not null,
    primary key (stage, rules_version, incarnation, sequence)
);

-- The versions of a state's pieces. A snapshot writes only the pieces that differ from the snapshot before it.
create table snapshot_piece (
    stage text not null,
    rules_version integer not null,
    incarnation uuid not null,
    piece text collate "C" not null,
    -- of the snapshot that wrote this version
    sequence bigint not null,
    -- null: the state has no such piece from this snapshot on
    content bytea,
    primary key (stage, rules_version, incarnation, piece, sequence)
);
create index snapshot_piece_by_snapshot on snapshot_piece (stage, rules_version, incarnation, sequence);

-- An exported file. Its range and its sequence determine its events.
create table export_file (
    id bigint generated always as identity primary key,
    exported_at timestamptz not null,
    actor text not null,
    reason text not null,
    incarnation uuid not null,
    -- usage of [first_instant, end_instant) in the batches up to this sequence
    sequence bigint not null,
    -- the chain of that batch; null: the ledger lacks the batch
    chain bytea,
    first_instant timestamptz not null,
    end_instant timestamptz not null,
    -- null: all sources
    source_id smallint references source,
    format text not null,
    events bigint not null,
    sha256 bytea not null
);

-- Operations that operators have paused, in all processes. Resuming one deletes its row.
create table pause (
    operation text not null constraint pause_operation_is_known check (operation in ('collect', 'consume', 'publish', 'export')),
    -- empty: all topics
    topic text not null default '',
    act_id bigint not null references operator_act,
    primary key (operation, topic)
);

-- Settings that operators have chosen in the ledger. They take precedence over the pipeline file.
create table choice (
    name text primary key constraint choice_is_known check (name in ('license.rules')),
    value text not null,
    act_id bigint not null references operator_act
);

-- Recovery of a ledger restored from a backup. While one is open, domain series are withheld and publishing is held.
create table recovery (
    id bigint generated always as identity primary key,
    act_id bigint not null references operator_act,
    opened_at timestamptz not null,
    -- when the log's end offsets were recorded; the recovery cannot close earlier
    targeted_at timestamptz,
    closed_at timestamptz
);
create unique index recovery_open on recovery ((true)) where closed_at is null;
-- The recovery closes once every one of these positions is reached, …
create table recovery_offset (
    recovery_id bigint not null references recovery,
    topic text not null,
    partition integer not null,
    generation integer not null,
    next_offset bigint not null,
    primary key (recovery_id, topic, partition)
);
-- … the ledger has a later full pass of each of these sources, and coderd's publish marks are compared.
create table recovery_source (
    recovery_id bigint not null references recovery,
    source_id smallint not null references source,
    after_pass_id bigint not null,
    compared_at timestamptz,
    -- the operator's act which states that the source no longer exists; the recovery does not wait for it
    given_up_act_id bigint references operator_act,
    primary key (recovery_id, source_id)
);

-- The latest findings of the continuous audit, one row per joint, or per joint and deployment, by the database's clock.
-- These numbers decide which usage is held. Open items are work for an operator and hold nothing.
create table audit_finding (
    joint text not null,
    -- null: the joint covers the whole ledger
    deployment_id uuid,
    differences bigint not null,
    open bigint not null,
    -- confirmed builds and claims that coderd no longer has
    gone bigint not null,
    -- usage of the last 30 days: events that differ, and all events
    recent_usage_differs bigint not null,
    recent_usage bigint not null,
    -- the first few differences, as JSON
    examples jsonb not null,
    incarnation uuid not null,
    sequence bigint not null,
    audited_at timestamptz not null,
    -- how long the audit took
    seconds double precision not null,
    -- since when the joint differs; null: it balances
    differs_since timestamptz,
    -- publishing is held from then on, unless a later audit reaches the newest batch; null: no audit has reached it
    good_until timestamptz
);
create unique index audit_finding_of_a_joint on audit_finding (joint, coalesce(deployment_id, '00000000-0000-0000-0000-000000000000'));

-- Joints whose late audit does not hold publishing, by an operator's act. The next audit of the joint deletes the row.
create table audit_override (
    joint text not null,
    -- null: the joint covers the whole ledger
    deployment_id uuid,
    act_id bigint not null references operator_act
);
create unique index audit_override_of_a_joint on audit_override (joint, coalesce(deployment_id, '00000000-0000-0000-0000-000000000000'));

-- How far the continuous audit has come at each joint. Each joint has its own form.
create table audit_progress (
    joint text not null,
    -- null: the joint covers the whole ledger
    deployment_id uuid,
    progress jsonb not null,
    -- the last step, by the database's clock: its end, its duration, and whether newer rows remain
    stepped_at timestamptz,
    seconds double precision,
    is_behind boolean
);
create unique index audit_progress_of_a_joint on audit_progress (joint, coalesce(deployment_id, '00000000-0000-0000-0000-000000000000'));

-- Findings of the continuous audit that have not ended. Each round first judges those again that were judged longest ago.
create table audit_item (
    joint text not null,
    deployment_id uuid,
    kind text not null,
    -- the event, batch or partition
    id text not null,
    detail text not null,
    -- work for an operator, not a difference
    is_open boolean not null,
    -- usage of the last 30 days that coderd was seen to have
    is_recent_usage boolean not null,
    found_at timestamptz not null,
    looked_at timestamptz not null
);
create unique index audit_item_is_unique on audit_item (joint, coalesce(deployment_id, '00000000-0000-0000-0000-000000000000'), id, kind);
create index audit_item_by_look on audit_item (joint, coalesce(deployment_id, '00000000-0000-0000-0000-000000000000'), looked_at);

-- Processes at their last heartbeat, by the database's clock.
create table process (
    id uuid primary key,
    host text not null,
    pid integer not null,
    version text not null,
    roles text[] not null,
    started_at timestamptz not null,
    seen_at timestamptz not null,
    -- state of its roles: the publisher's condition, partitions that are not read and why
    standing jsonb not null default '{}'
);
