//! What operators do, once for the command line and for the HTTP side: each file is one subject, with what is asked and what is answered as
//! plain data.
//!
//! An operation that changes anything names its [`Actor`], and its act goes into the ledger's audit trail with what it changed, in one
//! transaction. Nothing here prints, parses arguments or speaks HTTP.

mod desk;
mod error;
pub mod recover;

pub use desk::{Actor, Desk};
pub use error::OperationError;
