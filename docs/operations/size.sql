-- Fills an empty, migrated ledger with 200,000 rows of each kind and shows their bytes. Only for a database of its own:
--
--   tallyline migrate --pipeline FILE && psql --file docs/operations/size.sql URL
\set rows 200000
\set ON_ERROR_STOP on
set session_replication_role = replica;
set jit = off;

insert into batch (id, sequence, kind, recorded_at, topic, partition, generation, epoch, first_offset, next_offset, records, accepted, chain)
    overriding system value
    select n, n, 'log', now() + n * interval '1 second', 'tallyline.workspace-builds.v1', n % 6, 1, 7, n * 5, n * 5 + 5, 5, 5, sha256(n::text::bytea)
    from generate_series(1, :rows) n;
-- a batch of five events
insert into batch_part (batch_id, part, rows, sha256, marks)
    select n, 'events', 5, sha256(n::text::bytea), decode(repeat(md5(n::text), 3), 'hex')::bytea from generate_series(1, :rows) n;
insert into workspace_build
    select 1, gen_random_uuid(), n / 5, n, sha256(n::text::bytea), gen_random_uuid(), gen_random_uuid(), gen_random_uuid(), gen_random_uuid(),
        case when n % 3 = 0 then gen_random_uuid() end, gen_random_uuid(), gen_random_uuid(), 'start', 'initiator', 'succeeded', 1, null, false, null,
        n % 3 = 0, null, null, 0, now() + n * interval '1 second', now(), now() + n * interval '1 second', 'engineering', 'kubernetes-' || n % 50,
        'happy_turing' || n % 90, 'large-preset', 'workspace-' || n, 'firstname.lastname' || n % 900, now()
    from generate_series(1, :rows) n;
insert into workspace_first_start select 1, gen_random_uuid(), gen_random_uuid() from generate_series(1, :rows) n;
insert into prebuild_claim
    select 1, gen_random_uuid(), n / 5, n, sha256(n::text::bytea), gen_random_uuid(), gen_random_uuid(), gen_random_uuid(), gen_random_uuid(),
        gen_random_uuid(), gen_random_uuid(), gen_random_uuid(), 2, 'claim', 'succeeded', now(), now(), now() + n * interval '1 second',
        'engineering', 'kubernetes-' || n % 50, 'large-preset', now()
    from generate_series(1, :rows) n;
insert into usage_event
    select 1, gen_random_uuid()::text, n / 5, n, sha256(n::text::bytea), 'dc_managed_agents_v1', 1, now() + n * interval '1 second', null, null, null, now()
    from generate_series(1, :rows) n;
insert into publication (source_id, event_id, event_created_at, queued_batch_id, state, attempts, next_attempt_at)
    select source_id, id, created_at, batch_id, 'pending', 0, created_at from usage_event;
-- the life of a publication: leased, sent, settled. Vacuum runs beside it in a deployment.
update publication set leased_by = gen_random_uuid()::text, leased_until = now();
vacuum publication;
update publication set attempts = 1, unanswered = true;
vacuum publication;
update publication set state = 'published', unanswered = false, leased_by = null, leased_until = null;
vacuum publication;
insert into settlement select source_id, event_id, queued_batch_id, 'published' from publication;
-- requests of 10 events
insert into publication_request (id, source_id, license_sha256, events, sent_at, answered_at, status, batch_id)
    select md5((n / 10)::text)::uuid, 1, sha256('x'), 10, now() + n * interval '1 second', now(), 200, n
    from generate_series(0, :rows - 1, 10) n;
insert into publication_attempt
    select md5((n / 10)::text)::uuid, 1, event_id, null, null
    from (select event_id, row_number() over (order by event_created_at) - 1 as n from publication) p;
update publication_attempt set verdict = 'accepted';
vacuum publication_attempt;
insert into operator_act (batch_id, acted_at, actor, act, reject_id, reason)
    select n, now(), 'firstname.lastname', 'discard', n, 'a test of the producer, ticket 4711' from generate_series(1, :rows) n;
-- a usage event with eight headers and a body of 300 bytes
insert into reject (batch_id, topic, partition, generation, log_offset, disposition, cause, detail, deployment_id, event_id, event_type, units, state,
        act_id, record_timestamp, record_key, headers, payload, recorded_at)
    select n / 5, 'tallyline.agent-usage.v1', 0, 1, n, 'rejected', 'field', 'data.count: not a number from 1 to 2147483647', gen_random_uuid(),
        gen_random_uuid()::text, 'dc_managed_agents_v1', 1, 'discarded', n, now(), gen_random_uuid()::text::bytea,
        convert_to((select jsonb_agg(jsonb_build_array('ce_header' || h, encode(convert_to(md5(n || 'x' || h), 'UTF8'), 'base64')))::text
                    from generate_series(1, 8) h), 'UTF8'),
        convert_to((select string_agg(md5(n || 'y' || p), '') from generate_series(1, 10) p), 'UTF8'), now()
    from generate_series(1, :rows) n;
insert into log_partition (topic, partition) values ('t', 0) on conflict do nothing;
insert into log_record select 1, n, now(), gen_random_uuid()::text::bytea, headers, payload
    from (select row_number() over () as n, headers, payload from reject) r;
analyze;

create temp table measured as
    select relname::text as "table", round(pg_relation_size(oid) / n::numeric) as heap, round(pg_indexes_size(oid) / n::numeric) as indexes,
        round(pg_total_relation_size(oid) / n::numeric) as total
    from pg_class join lateral (select reltuples as n) rows on n > 0
    where relnamespace = 'public'::regnamespace and relkind = 'r' and reltuples >= :rows / 20 order by 1;
table measured;

-- the same rejects and requests after retention
update reject set payload_removed_at = now(), headers_sha256 = sha256(headers), payload_sha256 = sha256(payload),
    unsigned_headers_sha256 = sha256(headers), headers = null, payload = null;
vacuum full reject;
select 'reject, pruned' as "table", round(pg_total_relation_size('reject') / :rows::numeric) as total;
