-- The log, where there is no Kafka. Offsets of a partition are given under its row's lock in the appending transaction, so that commit
-- order is offset order, without holes.

create table log_topic (
    name text primary key,
    -- what retention may remove is older than this
    retention_days integer not null constraint log_topic_retention_is_positive check (retention_days > 0)
);

create table log_partition (
    id integer generated always as identity primary key,
    topic text not null references log_topic,
    partition integer not null constraint log_partition_is_not_negative check (partition >= 0),
    -- the first offset that is still held, and the one that the next record gets
    start_offset bigint not null default 0,
    next_offset bigint not null default 0,
    -- record times never fall within a partition, so that a time is found by halving
    last_appended_at timestamptz not null default '-infinity',
    constraint log_partition_is_unique unique (topic, partition),
    constraint log_partition_offsets_are_ordered check (0 <= start_offset and start_offset <= next_offset)
);

-- Key and payload are any bytes, as they came. No foreign key: an append has the partition's row locked, and a check for each record
-- would cost more than the record.
create table log_record (
    partition_id integer not null,
    record_offset bigint not null,
    appended_at timestamptz not null,
    key bytea,
    -- as in the table reject
    headers bytea not null,
    payload bytea,
    primary key (partition_id, record_offset)
);
