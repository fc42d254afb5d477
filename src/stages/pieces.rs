//! Pieces of a state: their names, their form, and the set of changed ones.

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

use serde::Serialize;
use serde::de::DeserializeOwned;
use uuid::Uuid;

/// First byte of each piece. Another number is another form.
pub(super) const FORM: u8 = 1;

/// The subject of a piece within its deployment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Part {
    /// Managed agents of one hour.
    Agents,
    ClaimSeconds,
    CreationSeconds,
    Creations,
    /// All licenses. Each deployment of the stage `licenses` has this piece.
    Licenses,
    NegativeDurations,
    /// The introduction. Each deployment of the stage `metrics` has this piece.
    Source,
}

impl Part {
    /// In the order of the words. The parts that each deployment has are after the others of their
    /// stage: a state is read in descending order of the names.
    pub(super) const WORDS: [(Part, &'static str); 7] = [
        (Part::Agents, "agents"),
        (Part::ClaimSeconds, "claim_seconds"),
        (Part::CreationSeconds, "creation_seconds"),
        (Part::Creations, "creations"),
        (Part::Licenses, "licenses"),
        (Part::NegativeDurations, "negative_durations"),
        (Part::Source, "source"),
    ];
}

/// A piece of a state, written `DEPLOYMENT/PART/NUMBER`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Piece {
    pub deployment: Uuid,
    pub part: Part,
    /// The key range within the part.
    pub number: i64,
}

impl fmt::Display for Piece {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let word =
            Part::WORDS.iter().find(|(part, _)| *part == self.part).map_or("", |(_, word)| word);
        write!(f, "{}/{word}/{}", self.deployment, self.number)
    }
}

impl FromStr for Piece {
    type Err = PieceError;

    fn from_str(name: &str) -> Result<Self, PieceError> {
        let parsed = || {
            let (deployment, rest) = name.split_once('/')?;
            let (word, number) = rest.split_once('/')?;
            Some(Piece {
                deployment: deployment.parse().ok()?,
                part: Part::WORDS.iter().find(|(_, known)| *known == word)?.0,
                number: number.parse().ok()?,
            })
        };
        // one piece has one name
        parsed()
            .filter(|piece| piece.to_string() == name)
            .ok_or_else(|| PieceError(format!("{name:?} is not a piece of this version")))
    }
}

/// A piece that this version cannot read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct PieceError(pub(super) String);

impl Piece {
    pub(super) fn unreadable(self, problem: impl fmt::Display) -> PieceError {
        PieceError(format!("piece {self}: {problem}"))
    }
}

/// A piece in JSON, after its form.
pub(super) fn to_json(value: &impl Serialize) -> Vec<u8> {
    let mut content = vec![FORM];
    serde_json::to_writer(&mut content, value).expect("a state has JSON");
    content
}

pub(super) fn from_json<T: DeserializeOwned>(
    piece: Piece,
    content: &[u8],
) -> Result<T, PieceError> {
    serde_json::from_slice(body(piece, content)?).map_err(|error| piece.unreadable(error))
}

/// The content without its form.
pub(super) fn body(piece: Piece, content: &[u8]) -> Result<&[u8], PieceError> {
    match content.split_first() {
        Some((&FORM, body)) => Ok(body),
        Some((other, _)) => {
            Err(piece.unreadable(format!("its form is {other}, and this version reads {FORM}")))
        }
        None => Err(piece.unreadable("it is empty")),
    }
}

/// Pieces changed since the set was last taken. Not part of a state's value.
#[derive(Clone, Debug, Default)]
pub(super) struct Changed(BTreeSet<Piece>);

impl Changed {
    pub(super) fn insert(&mut self, piece: Piece) {
        self.0.insert(piece);
    }

    pub(super) fn take(&mut self) -> BTreeSet<Piece> {
        std::mem::take(&mut self.0)
    }
}

impl PartialEq for Changed {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Eq for Changed {}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_deployments_own_piece_is_read_before_its_others() {
        let words = Part::WORDS.map(|(_, word)| word);
        assert!(words.is_sorted() && Part::WORDS.map(|(part, _)| part).is_sorted());
        assert!("licenses" > "agents");
        for other in ["claim_seconds", "creation_seconds", "creations", "negative_durations"] {
            assert!("source" > other);
        }
    }

    proptest! {
        #[test]
        fn a_written_name_reads_back(deployment: u128, part in 0..7_usize, number: i64) {
            let (part, _) = Part::WORDS[part];
            let piece = Piece { deployment: Uuid::from_u128(deployment), part, number };
            prop_assert_eq!(piece.to_string().parse(), Ok(piece));
        }

        #[test]
        fn any_text_is_one_pieces_name_or_an_error(text in ".{0,60}|[0-9a-f-]{36}/(agents|source|x)/[-+0-9]{1,20}") {
            if let Ok(piece) = text.parse::<Piece>() {
                prop_assert_eq!(piece.to_string(), text);
            }
        }
    }
}
