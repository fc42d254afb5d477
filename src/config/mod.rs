//! One TOML file per deployment shape; every key also by flag and by variable.
