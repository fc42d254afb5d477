//! License tokens, their claims and the rules that turn them into entitlements.
