//! Pieces of states, and snapshots of all pieces.

use std::collections::BTreeMap;

use serde_json::{Value, json};
use tallyline::ledger::{Ledger, Sequence, StageRules, snapshots};
use tallyline::stages::Stage;

/// Contents of pieces by name.
pub type Pieces = BTreeMap<String, Vec<u8>>;

pub fn rules<S: Stage>() -> StageRules {
    StageRules { stage: S::NAME, version: S::RULES_VERSION }
}

/// All pieces of a state: equal for equal states, bit for bit.
pub fn pieces<S: Stage>(state: &S) -> Pieces {
    let all = state.pieces().into_iter();
    all.map(|piece| (piece.to_string(), state.encode(piece).expect("a piece"))).collect()
}

/// Whether a piece contains this text.
pub fn contain(pieces: &Pieces, text: &str) -> bool {
    pieces.values().any(|content| String::from_utf8_lossy(content).contains(text))
}

/// The newest snapshot.
pub async fn load<S: Stage>(ledger: &Ledger) -> Option<(Sequence, Pieces)> {
    let mut pieces = Pieces::new();
    let found = ledger
        .run(async |conn| {
            snapshots::load(conn, rules::<S>(), i64::MAX, |name, content| {
                pieces.insert(name.to_owned(), content.to_vec());
            })
            .await
        })
        .await
        .expect("the ledger answers")?;
    assert_eq!((found.pieces, found.read), (found.read, i64::try_from(pieces.len()).unwrap()));
    Some((found.sequence, pieces))
}

/// Saves all pieces of a state. False: its ledger is another incarnation.
pub async fn save<S: Stage>(ledger: &Ledger, sequence: Sequence, pieces: &Pieces) -> bool {
    let now = ledger.clock.now();
    ledger
        .run(async |conn| {
            let begun = snapshots::begin(conn, rules::<S>(), sequence.incarnation).await?;
            let Some(mut saver) = begun else { return Ok(false) };
            let versions =
                pieces.iter().map(|(name, content)| (name.clone(), Some(content.clone())));
            saver.write(sequence.number, versions.collect()).await?;
            saver.remove_others(sequence.number).await?;
            let number = i64::try_from(pieces.len()).unwrap();
            saver.finish(sequence.number, number, now).await
        })
        .await
        .expect("the ledger answers")
}

/// Changes the number of creations in the first series of a state of the metrics. Returns the
/// piece's name, and the number before and after.
pub fn change_creations(pieces: &mut Pieces, change: impl Fn(u64) -> u64) -> (String, u64, u64) {
    let (name, content) =
        pieces.iter_mut().find(|(name, _)| name.contains("/creations/")).expect("creations");
    let mut series: Value = serde_json::from_slice(&content[1..]).expect("JSON after the form");
    let value = &mut series[0][1]["value"];
    let before = value.as_u64().expect("a number");
    *value = json!(change(before));
    content.truncate(1);
    serde_json::to_writer(&mut *content, &series).expect("JSON");
    (name.clone(), before, change(before))
}
