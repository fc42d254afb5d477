//! The PostgreSQL ledger: totally ordered batches of accepted events.
