//! The hash that identifies a plan when it is executed.

use serde::Serialize;
use sha2::{Digest as _, Sha256};

use super::OperationError;

/// SHA-256 of the changes of a plan as JSON, in hexadecimal.
pub(super) fn plan_hash(essence: &impl Serialize) -> Result<String, OperationError> {
    let json = serde_json::to_vec(essence)?;
    Ok(hex::encode(Sha256::digest(json)))
}
