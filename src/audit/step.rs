//! One step of the continuous audit at one joint.

pub(super) use crate::ledger::{AuditItem as Item, AuditStep as Step};
