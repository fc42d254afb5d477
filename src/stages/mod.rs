//! Pure folds: state and event to state.
