//! The simulators of coderd and Tallyman, and the demo that runs Tallyline between them.

pub mod coderd;
pub mod demo;
pub mod tallyman;
