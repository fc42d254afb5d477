//! What is read from (and, for publish marks, written to) coderd's own PostgreSQL database.
