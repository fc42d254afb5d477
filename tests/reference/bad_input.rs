//! docs/reference/bad-input.md: the causes of rejects, the limits, and the result of each bad input.

use tallyline::event::{
    KEPT_PAYLOAD_BYTES, MAX_ID_BYTES, MAX_PAYLOAD_BYTES, MAX_TEXT_BYTES, MIN_KEY_BYTES,
    RejectCause, YEARS,
};
use tallyline::ledger::Disposition;
use tallyline::license::MAX_TOKEN_BYTES;

use crate::bad_input_rows::{Outcome, ROWS};
use crate::table::{code, table};

const INTRODUCTION: &str = "\
# Bad input

Input from outside is accepted unchanged or refused unchanged: it is not repaired and not dropped,
and the records around it are not affected. A refused record is a row with its bytes, its place in
the log, its disposition, a cause, and the field and the reason. `tallyline rejects list` shows the
rows.
";

pub fn page() -> String {
    let dispositions = Disposition::ALL.map(|one| [code(one.as_str()), one.meaning().to_owned()]);
    let causes = RejectCause::ALL.map(|cause| {
        [code(cause.as_str()), Disposition::of(cause).to_string(), cause.meaning().to_owned()]
    });
    let rows = ROWS.iter().map(|row| [row.input.to_owned(), row.result.text(), code(row.test)]);
    format!(
        "{INTRODUCTION}\n## Dispositions\n\n{}\n## Causes\n\n{}\n## Limits\n\n{}\n## Inputs\n\n{}",
        table(["disposition", "meaning"], dispositions),
        table(["cause", "disposition", "meaning"], causes),
        table(["limit", "value"], limits()),
        table(["input", "result", "test"], rows),
    )
}

fn limits() -> [[String; 2]; 7] {
    [
        ("body of a record", size(MAX_PAYLOAD_BYTES)),
        ("kept beginning of a larger body", size(KEPT_PAYLOAD_BYTES)),
        ("text", size(MAX_TEXT_BYTES)),
        ("event id", size(MAX_ID_BYTES)),
        ("years of an event", format!("{} to {}", YEARS.start(), YEARS.end())),
        ("license token", size(MAX_TOKEN_BYTES)),
        ("signature key, at least", size(MIN_KEY_BYTES)),
    ]
    .map(|(limit, value)| [limit.to_owned(), value])
}

fn size(bytes: usize) -> String {
    if bytes.is_multiple_of(1024) && bytes > 4096 {
        format!("{} KiB", bytes / 1024)
    } else {
        format!("{bytes} bytes")
    }
}

#[test]
fn every_cause_has_an_input() {
    let with_input = |cause: &RejectCause| {
        ROWS.iter()
            .any(|row| matches!(row.result, Outcome::Refused(causes, _) if causes.contains(cause)))
    };
    let without: Vec<_> = RejectCause::ALL.into_iter().filter(|cause| !with_input(cause)).collect();
    assert_eq!(without, []);
}
