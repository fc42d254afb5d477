//! One difference that an audit found.

use std::borrow::Cow;

/// One difference that an audit found.
#[derive(
    Clone,
    Debug,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    serde::Serialize,
    serde::Deserialize,
    utoipa::ToSchema,
)]
pub struct Difference {
    /// The kind of difference.
    pub kind: Cow<'static, str>,
    /// The event, batch or partition that differs.
    pub id: String,
    /// The values on both sides.
    pub detail: String,
}
