//! Requests to the vendor whose answer is not recorded, because their publisher ended.

use chrono::{DateTime, TimeDelta, Utc};
use sqlx::PgConnection;

/// An older request without an answer has lost its publisher.
pub(super) const ANSWERED_WITHIN: TimeDelta = TimeDelta::minutes(10);

/// Adds the source's requests that were sent up to `until` and have no answer to the content of this
/// batch, if no earlier batch covers them. They show that the vendor may have accepted their events.
/// Reads only such requests, by index: none, unless a publisher ended between request and answer.
pub(super) async fn cover(
    tx: &mut PgConnection,
    source_id: i16,
    batch_id: i64,
    until: DateTime<Utc>,
) -> Result<(), sqlx::Error> {
    sqlx::query(
        r#"update publication_request request set open_batch_id = $2, event_ids_sha256 = sha256(convert_to(array(
               select event_id from publication_attempt where request_id = request.id order by event_id collate "C")::text, 'UTF8'))
           where id = any(array(select id from publication_request
               where source_id = $1 and batch_id is null and open_batch_id is null and sent_at <= $3
               order by sent_at limit 1000 for update skip locked))"#,
    )
    .bind(source_id)
    .bind(batch_id)
    .bind(until)
    .execute(tx)
    .await?;
    Ok(())
}
