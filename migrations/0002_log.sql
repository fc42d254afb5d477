-- The log of a site without Kafka. The appending transaction locks the partition's row and assigns the offsets,
-- so that commit order is offset order, without gaps.

create table log_topic (
    name text primary key,
    -- retention may remove records older than this
    retention_days integer not null constraint log_topic_retention_is_positive check (retention_days > 0)
);

create table log_partition (
    id integer generated always as identity primary key,
    topic text not null references log_topic,
    partition integer not null constraint log_partition_is_not_negative check (partition >= 0),
    -- the first offset that is kept, and the offset of the next record
    start_offset bigint not null default 0,
    next_offset bigint not null default 0,
    -- record times never decrease within a partition, so that a search by time can halve the range
    last_appended_at timestamptz not null default '-infinity',
    constraint log_partition_is_unique unique (topic, partition),
    constraint log_partition_offsets_are_ordered check (0 <= start_offset and start_offset <= next_offset)
);

-- Key and payload are any bytes, unchanged. The partition has no foreign key. An append holds the lock of its row, and a check per record
-- would cost more than the record.
create table log_record (
    partition_id integer not null,
    record_offset bigint not null,
    appended_at timestamptz not null,
    key bytea,
    -- in the form of reject.headers
    headers bytea not null,
    payload bytea,
    primary key (partition_id, record_offset)
);
