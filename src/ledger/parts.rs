//! The digests of a batch's rows, by part. The schema's views `batch_content` and `chained_row`
//! define those of the batch itself and of all rows except events.

use sha2::{Digest as _, Sha256};
use sqlx::FromRow;

use crate::event::{
    Digest, Event, Form, InputStage, Payload, PrebuildClaimed, PublishMarks,
    WorkspaceBuildCompleted,
};

/// The part of a batch's content that contains its events.
pub const EVENTS: &str = "events";

/// The length of one mark: 4 bytes that locate a row, and 4 bytes of its digest.
const MARK: usize = 8;

/// A row as a batch's part contains it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PartRow {
    /// The low bytes of an offset, or a digest of the row's name.
    pub place: [u8; 4],
    pub digest: Digest,
}

/// The digest of an event's row: its place in the ledger and the log, the event's own digest, and
/// each column that never changes and that the event's digest does not cover. A test pins the
/// form; a change needs another tag.
#[must_use]
pub fn event_digest(source_id: i16, log_offset: i64, digest: &Digest, event: &Event) -> Digest {
    let mut form = Form::new("tallyline.event.v1");
    form.text(event.topic().name()).number(source_id.into()).number(log_offset).bytes(digest);
    match &event.payload {
        Payload::Build(build) => build_columns(&mut form, build),
        Payload::Claim(claim) => claim_columns(&mut form, claim),
        Payload::Usage(usage) => {
            let PublishMarks { publish_started_at, published_at, failure_message } = &usage.marks;
            form.text(&usage.id)
                .optional(*publish_started_at, Form::time)
                .optional(*published_at, Form::time)
                .optional(failure_message.as_deref(), Form::text);
        }
    }
    form.finish()
}

/// Names every field, so that a further field must be decided on.
fn build_columns(form: &mut Form, build: &WorkspaceBuildCompleted) {
    let WorkspaceBuildCompleted {
        build_id,
        template_id,
        preset_id,
        owner_id,
        reason,
        first_build_by_prebuilds_user,
        first_build_stage,
        first_successful_start,
        has_ai_task,
        has_external_agent,
        daily_cost,
        organization_name,
        template_name,
        template_version_name,
        preset_name,
        workspace_name,
        owner_name,
        // the event's digest covers these
        workspace_id: _,
        organization_id: _,
        template_version_id: _,
        initiator_id: _,
        transition: _,
        status: _,
        build_number: _,
        stage: _,
        created_at: _,
        started_at: _,
        completed_at: _,
    } = build;
    form.id(*build_id).id(*template_id).optional(*preset_id, Form::id).id(*owner_id).text(reason);
    form.flag(*first_build_by_prebuilds_user)
        .optional(first_build_stage.map(InputStage::as_str), Form::text)
        .flag(*first_successful_start)
        .optional(*has_ai_task, Form::flag)
        .optional(*has_external_agent, Form::flag)
        .number((*daily_cost).into());
    form.text(organization_name)
        .text(template_name)
        .text(template_version_name)
        .text(preset_name)
        .text(workspace_name)
        .text(owner_name);
}

fn claim_columns(form: &mut Form, claim: &PrebuildClaimed) {
    let PrebuildClaimed {
        build_id,
        template_id,
        preset_id,
        claimed_by,
        organization_name,
        template_name,
        preset_name,
        // the event's digest covers these
        workspace_id: _,
        organization_id: _,
        template_version_id: _,
        initiator_id: _,
        build_number: _,
        stage: _,
        status: _,
        created_at: _,
        started_at: _,
        completed_at: _,
    } = claim;
    form.id(*build_id).id(*template_id).optional(*preset_id, Form::id).id(*claimed_by);
    form.text(organization_name).text(template_name).text(preset_name);
}

/// The place of an event or a reject in its part.
#[must_use]
pub fn place_of(log_offset: i64) -> [u8; 4] {
    let [_, _, _, _, place @ ..] = log_offset.to_be_bytes();
    place
}

/// The stored form of a part: the number of its rows, their digest, and their marks.
#[derive(Clone, Debug, Default, PartialEq, Eq, FromRow)]
pub struct BatchPart {
    pub rows: i32,
    pub sha256: Vec<u8>,
    /// Read only for a part that does not fit.
    #[sqlx(default)]
    pub marks: Vec<u8>,
}

impl BatchPart {
    /// The part of these rows, in their order.
    #[must_use]
    pub fn of<'r>(rows: impl ExactSizeIterator<Item = &'r PartRow>) -> Self {
        let (mut hash, mut marks) = (Sha256::new(), Vec::with_capacity(rows.len() * MARK));
        let count = i32::try_from(rows.len()).unwrap_or(i32::MAX);
        for row in rows {
            hash.update(row.digest);
            marks.extend_from_slice(&row.place);
            marks.extend_from_slice(&row.digest[..4]);
        }
        BatchPart { rows: count, sha256: hash.finalize().to_vec(), marks }
    }

    /// The place and the first bytes of the digest of each row.
    pub fn marks(&self) -> impl Iterator<Item = ([u8; 4], [u8; 4])> {
        self.marks.chunks_exact(MARK).map(|mark| {
            let (mut place, mut digest) = ([0; 4], [0; 4]);
            place.copy_from_slice(&mark[..4]);
            digest.copy_from_slice(&mark[4..]);
            (place, digest)
        })
    }
}

#[cfg(test)]
mod tests {
    use chrono::{DateTime, Utc};
    use proptest::prelude::*;
    use uuid::Uuid;

    use super::*;
    use crate::event::{BuildStatus, Transition, Usage, UsageQuantity};

    fn id(number: u128) -> Uuid {
        Uuid::from_u128(number)
    }

    fn at() -> DateTime<Utc> {
        "2025-03-01T10:00:00.000001Z".parse().unwrap()
    }

    fn build() -> WorkspaceBuildCompleted {
        WorkspaceBuildCompleted {
            build_id: id(1),
            workspace_id: id(2),
            organization_id: id(3),
            template_id: id(4),
            template_version_id: id(5),
            preset_id: Some(id(6)),
            owner_id: id(7),
            initiator_id: id(8),
            transition: Transition::Start,
            reason: "initiator".into(),
            status: BuildStatus::Succeeded,
            build_number: 1,
            stage: None,
            first_build_by_prebuilds_user: true,
            first_build_stage: Some(InputStage::Create),
            first_successful_start: false,
            has_ai_task: Some(true),
            has_external_agent: None,
            daily_cost: -3,
            created_at: at(),
            started_at: None,
            completed_at: at(),
            organization_name: "o".into(),
            template_name: "t".into(),
            template_version_name: "v".into(),
            preset_name: String::new(),
            workspace_name: "w".into(),
            owner_name: "é".into(),
        }
    }

    fn digest(source_id: i16, offset: i64, payload: Payload) -> String {
        hex::encode(event_digest(
            source_id,
            offset,
            &[9; 32],
            &Event { deployment: id(0), payload },
        ))
    }

    /// The numbers were computed independently of the code.
    #[test]
    fn the_digest_of_a_row_is_pinned() {
        assert_eq!(
            digest(7, 0x1_0000_0005, Payload::Build(Box::new(build()))),
            "7d9a0afb5793ed3f7d3dda42969613c449d49c626641f9261fe671a6f8a82008"
        );
        let claim = PrebuildClaimed {
            claimed_by: id(9),
            preset_id: None,
            preset_name: "p".into(),
            ..PrebuildClaimed::of(&build())
        };
        assert_eq!(
            digest(7, 5, Payload::Claim(Box::new(claim))),
            "ed51a8319f740c1a76adbc6720f04f387e789e489e2d2c8d316f66c4b02272cd"
        );
        let marks = PublishMarks {
            publish_started_at: Some(at()),
            published_at: None,
            failure_message: Some(String::new()),
        };
        let quantity = UsageQuantity::ManagedAgents(1);
        let usage = Usage { id: "usage-1".into(), quantity, created_at: at(), marks };
        assert_eq!(
            digest(1, 5, Payload::Usage(usage)),
            "2d0b29cefa4b7309a821f58cc12cba52e4b2af757f5f27fa8a4f47f7f0b2940e"
        );
    }

    #[test]
    fn a_place_is_the_low_bytes_of_the_offset() {
        assert_eq!((place_of(5), place_of(0x1_0000_0005)), ([0, 0, 0, 5], [0, 0, 0, 5]));
    }

    proptest! {
        #[test]
        fn fields_cannot_run_into_each_other(
            one in prop::collection::vec(prop::option::of("[\0\u{1}a]{0,2}"), 3),
            other in prop::collection::vec(prop::option::of("[\0\u{1}a]{0,2}"), 3),
        ) {
            let form = |fields: &[Option<String>]| {
                let mut form = Form::new("a test");
                for field in fields {
                    form.optional(field.as_deref(), Form::text);
                }
                form.finish()
            };
            prop_assert_eq!(one == other, form(&one) == form(&other));
        }
    }
}
