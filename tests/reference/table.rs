//! Markdown of the pages.

/// Maximum width of prose.
const WIDTH: usize = 100;

/// A table. Bars in its cells are escaped, and line breaks are spaces.
pub fn table<const N: usize>(
    heads: [&str; N],
    rows: impl IntoIterator<Item = [String; N]>,
) -> String {
    let line = |cells: &[String; N]| format!("| {} |\n", cells.join(" | "));
    let cell = |text: &String| text.trim().replace('|', "\\|").replace('\n', " ");
    let mut table = line(&heads.map(str::to_owned)) + &line(&heads.map(|_| "---".to_owned()));
    for row in rows {
        table += &line(&row.each_ref().map(cell));
    }
    table
}

/// A text in the form of code.
pub fn code(text: &str) -> String {
    format!("`{text}`")
}

/// A list of words in the form of code, separated by commas.
pub fn codes<'a>(words: impl IntoIterator<Item = &'a str>) -> String {
    words.into_iter().map(code).collect::<Vec<_>>().join(", ")
}

/// A link to a heading of the same page.
pub fn link(text: &str, heading: &str) -> String {
    let kept = |character: &char| character.is_ascii_alphanumeric() || "- _".contains(*character);
    let anchor: String = heading.to_lowercase().chars().filter(kept).collect();
    format!("[{text}](#{})", anchor.replace(' ', "-"))
}

/// Prose with wrapped lines. Blank lines separate paragraphs. A line that begins with `- ` is an
/// item of a list.
pub fn wrapped(text: &str) -> String {
    let mut lines: Vec<String> = Vec::new();
    for line in text.trim().lines() {
        if line.is_empty() {
            // the paragraph's end, and the beginning of the next one
            lines.extend([String::new(), String::new()]);
        } else if line.starts_with("- ") && lines.last().is_some_and(|last| !last.is_empty()) {
            lines.push(String::new());
        }
        for word in line.split_whitespace() {
            let indent = if lines.last().is_some_and(|line| is_item(line)) { "  " } else { "" };
            match lines.last_mut() {
                Some(last) if last.is_empty() => *last = word.to_owned(),
                Some(last) if last.chars().count() + 1 + word.chars().count() <= WIDTH => {
                    *last = format!("{last} {word}");
                }
                _ => lines.push(format!("{indent}{word}")),
            }
        }
    }
    lines.join("\n")
}

/// Whether the line belongs to an item of a list.
fn is_item(line: &str) -> bool {
    line.starts_with("- ") || line.starts_with("  ")
}
