//! Accepted usage with its publications, and each final state with the vendor's recorded answer.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use sqlx::PgConnection;

use super::checked::CheckedPage;
use super::page::BatchPage;
use super::query::{LISTED, check, differences, known_of};
use crate::ledger::{AuditItem, Difference};

/// Publications in one page by key.
const KEYS: i64 = 20_000;

const QUEUED: &str = "queued, but not accepted";
const NOT_QUEUED: &str = "select u.id, 'accepted, but not queued' from usage_event u
     where u.batch_id = any($1) and not exists (select from publication p where p.source_id = u.source_id and p.event_id = u.id) limit $2";

/// The state of publication `p`, if the recorded answers do not support it. A correction can return a
/// refused event to the queue.
macro_rules! unanswered {
    ($touched:literal) => {
        concat!(
            "with touched as materialized (", $touched, ")
             select p.event_id, 'state is ' || p.state || ', but no recorded answer has this verdict'
             from touched join publication p on p.source_id = touched.source_id and p.event_id = touched.event_id
             where case when p.state in ('published', 'refused') then not exists (select from publication_attempt a where a.source_id = p.source_id
                     and a.event_id = p.event_id and a.verdict = case p.state when 'published' then 'accepted' else 'refused' end)
                     and not exists (select from removed_answer a where (a.source_id, a.event_id, a.state) = (p.source_id, p.event_id, p.state))
                 else exists (select from publication_attempt a where a.source_id = p.source_id and a.event_id = p.event_id
                     and (a.verdict = 'accepted' or a.verdict = 'refused' and not exists (select from settlement back
                         join publication_request r on r.id = a.request_id where back.source_id = p.source_id and back.event_id = p.event_id
                             and back.state = 'pending' and back.batch_id > r.batch_id))) end limit $2"
        )
    };
}

/// Of the usage that these batches accepted, and of the publications that they settled.
const UNANSWERED: &str = unanswered!(
    "select source_id, id as event_id from usage_event where batch_id = any($1)
     union select source_id, event_id from settlement where batch_id = any($1)"
);
const KNOWN_UNANSWERED: &str = unanswered!(
    "select s.id as source_id, known.id as event_id from unnest($1::text[]) as known (id) cross join source s"
);

const KNOWN_UNQUEUED: &str = "select known.id, case when p.event_id is null then 'accepted, but not queued' else 'queued, but not accepted' end
     from unnest($1::text[]) as known (id) cross join source s
     left join usage_event u on u.source_id = s.id and u.id = known.id left join publication p on p.source_id = s.id and p.event_id = known.id
     where (u.id is null) <> (p.event_id is null) limit $2";

/// The key of a publication: the end of a page.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PublicationKey {
    pub source_id: i16,
    pub event_id: String,
}

/// A page of publications in the order of their keys.
#[derive(Clone, Debug)]
pub struct KeyPage {
    /// None: no publication follows.
    pub until: Option<PublicationKey>,
    /// Publications of the page by state.
    pub states: BTreeMap<String, i64>,
    pub differences: Vec<Difference>,
}

pub(super) async fn page(
    tx: &mut PgConnection,
    page: &BatchPage,
) -> Result<CheckedPage, sqlx::Error> {
    let usage = sqlx::query_scalar("select count(*) from usage_event where batch_id = any($1)")
        .bind(&page.ids)
        .fetch_one(&mut *tx)
        .await?;
    let mut differences = check(tx, "usage_without_publication", NOT_QUEUED, &page.ids).await?;
    differences.extend(check(tx, "publication_without_its_answer", UNANSWERED, &page.ids).await?);
    Ok(CheckedPage {
        until: page.until,
        is_last: page.is_last,
        chains: BTreeMap::new(),
        usage,
        differences,
    })
}

/// The publications that follow the key: each has its accepted usage.
pub(super) async fn key_page(
    tx: &mut PgConnection,
    after: &PublicationKey,
) -> Result<KeyPage, sqlx::Error> {
    let rows: Vec<(String, i64, Vec<String>, i16, String)> = sqlx::query_as(
        "with page as materialized (
             select source_id, event_id, state from publication where (source_id, event_id) > ($1, $2) order by source_id, event_id limit $3
         ), last as (select source_id, event_id from page order by source_id desc, event_id desc limit 1)
         select state, count(*), coalesce(array_agg(page.event_id) filter (where u.id is null), '{}'), last.source_id, last.event_id
         from page cross join last left join usage_event u on u.source_id = page.source_id and u.id = page.event_id
         group by state, last.source_id, last.event_id",
    )
    .bind(after.source_id)
    .bind(&after.event_id)
    .bind(KEYS)
    .fetch_all(tx)
    .await?;
    let mut page = KeyPage { until: None, states: BTreeMap::new(), differences: Vec::new() };
    for (state, count, without_usage, source_id, event_id) in rows {
        page.until = Some(PublicationKey { source_id, event_id });
        page.states.insert(state, count);
        page.differences.extend(without_usage.into_iter().map(|id| Difference {
            kind: "usage_without_publication".into(),
            id,
            detail: QUEUED.to_owned(),
        }));
    }
    let read: i64 = page.states.values().sum();
    page.until = page.until.filter(|_| read == KEYS);
    Ok(page)
}

/// What still differs of the known items.
pub(super) async fn known(
    tx: &mut PgConnection,
    known: &[AuditItem],
) -> Result<Vec<Difference>, sqlx::Error> {
    let mut found = Vec::new();
    for (kind, query) in [
        ("usage_without_publication", KNOWN_UNQUEUED),
        ("publication_without_its_answer", KNOWN_UNANSWERED),
    ] {
        let ids = known_of(known, kind, |item| Some(item.id.as_str()));
        if !ids.is_empty() {
            let rows = sqlx::query_as(query).bind(ids).bind(LISTED).fetch_all(&mut *tx).await?;
            found.extend(differences(kind, rows));
        }
    }
    Ok(found)
}
