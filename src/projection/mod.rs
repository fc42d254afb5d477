//! Drives a fold along the ledger and keeps its snapshot.
