//! Lives in coderd's tables as coderd does and keeps its own truth.
