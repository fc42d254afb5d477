//! The three joints at which the books must balance.
