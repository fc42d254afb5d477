//! Everything in one process, with simulated coderd and Tallyman.
