//! CSV (RFC 4180) that a spreadsheet opens as text.

use std::borrow::Cow;

/// A foreign text as a field. Spreadsheets execute a field that begins with `=`, `+`, `-`, `@`, a
/// tab or a line end as a formula. Such a text gets an apostrophe in front. A text that begins with
/// an apostrophe gets another one, so that removing one always restores the text. coderd's own ids
/// and types never begin with these characters.
pub(super) fn text(text: &str) -> Cow<'_, str> {
    if text.starts_with(['=', '+', '-', '@', '\t', '\r', '\n', '\'']) {
        Cow::Owned(format!("'{text}"))
    } else {
        Cow::Borrowed(text)
    }
}

#[cfg(test)]
mod tests {
    use super::text;

    #[test]
    fn a_formula_becomes_text_and_can_be_restored() {
        for formula in ["=1+1", "+1", "-1", "@a", "\t=1", "\r=1", "\n=1", "'=1"] {
            assert_eq!(text(formula).strip_prefix('\''), Some(formula));
        }
        for plain in ["dc_managed_agents_v1", "5b1f…", "", "a=1", " =1"] {
            assert_eq!(text(plain), plain);
        }
    }
}
