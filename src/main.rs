//! Tallyline's command line.
fn main() {}
