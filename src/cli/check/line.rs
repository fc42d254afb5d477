//! One mistake in the answer.

use serde::Serialize;

#[derive(Serialize)]
pub(super) struct Line {
    pub place: String,
    pub key: Option<String>,
    pub problem: String,
}
