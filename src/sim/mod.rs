//! The two simulators, coderd and Tallyman. They name nothing of the rest.

pub mod coderd;
pub mod tallyman;
