//! The simulators of coderd and Tallyman. They name no other part.

pub mod coderd;
pub mod tallyman;
