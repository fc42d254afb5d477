//! Licenses as coderd keeps them.

use std::fmt;

use sqlx::FromRow;
use uuid::Uuid;

use super::connect::within;
use super::{CoderdError, Reader, Time};

/// A row of `licenses`. Its `Debug` form leaves the token out.
#[derive(Clone, PartialEq, Eq, FromRow)]
pub struct LicenseRow {
    /// `id`
    pub id: i32,
    /// `uploaded_at`
    pub uploaded_at: Time,
    /// `jwt`: a secret, for it signs requests to Tallyman
    pub jwt: String,
    /// `exp`: a copy of the token's claim
    pub exp: Time,
    /// `uuid`, not unique
    pub uuid: Uuid,
}

impl fmt::Debug for LicenseRow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LicenseRow").field("id", &self.id).field("exp", &self.exp).field("jwt", &"***").finish_non_exhaustive()
    }
}

impl Reader {
    /// All licenses, expired ones too, in `id` order.
    ///
    /// # Errors
    /// [`CoderdError`]
    pub async fn licenses(&mut self) -> Result<Vec<LicenseRow>, CoderdError> {
        within(
            self.deadline,
            sqlx::query_as("select id, uploaded_at, jwt, exp, uuid from licenses order by id").fetch_all(&mut self.connection),
        )
        .await
    }
}
