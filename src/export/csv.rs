//! CSV (RFC 4180) that a spreadsheet opens as text.

use std::borrow::Cow;

/// A text of foreign origin as a field. Spreadsheets run a field that begins with `=`, `+`, `-`, `@`, a tab or a line end as a formula, so
/// such a text gets an apostrophe before it; one that begins with an apostrophe gets another, so that taking one away always gives the
/// text back. No id or type of coderd's own begins so.
pub(super) fn text(text: &str) -> Cow<'_, str> {
    if text.starts_with(['=', '+', '-', '@', '\t', '\r', '\n', '\'']) { Cow::Owned(format!("'{text}")) } else { Cow::Borrowed(text) }
}

#[cfg(test)]
mod tests {
    use super::text;

    #[test]
    fn a_formula_becomes_text_and_can_be_had_back() {
        for formula in ["=1+1", "+1", "-1", "@a", "\t=1", "\r=1", "\n=1", "'=1"] {
            assert_eq!(text(formula).strip_prefix('\''), Some(formula));
        }
        for plain in ["dc_managed_agents_v1", "5b1f…", "", "a=1", " =1"] {
            assert_eq!(text(plain), plain);
        }
    }
}
