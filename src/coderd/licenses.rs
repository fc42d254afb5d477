//! Licenses in coderd's table.

use std::fmt;

use sqlx::FromRow;

use super::connect::within;
use super::{CoderdError, Reader, Time};

/// A row of `licenses`. Its `Debug` form omits the token.
#[derive(Clone, PartialEq, Eq, FromRow)]
pub struct LicenseRow {
    pub id: i32,
    pub uploaded_at: Time,
    /// `jwt`: a secret, because it signs requests to Tallyman
    pub jwt: String,
}

impl fmt::Debug for LicenseRow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LicenseRow")
            .field("id", &self.id)
            .field("jwt", &"***")
            .finish_non_exhaustive()
    }
}

impl Reader {
    /// All licenses in order of `id`, including expired ones.
    pub async fn licenses(&mut self) -> Result<Vec<LicenseRow>, CoderdError> {
        let query = sqlx::query_as("select id, uploaded_at, jwt from licenses order by id");
        within(self.deadline, query.fetch_all(&mut self.connection)).await
    }
}
