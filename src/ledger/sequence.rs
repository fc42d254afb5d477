//! The sequence of a batch with its incarnation.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use sqlx::postgres::{PgTypeInfo, PgValueRef};
use sqlx::{Decode, Postgres, Type};
use utoipa::openapi::{RefOr, Schema};
use utoipa::{PartialSchema, ToSchema};
use uuid::Uuid;

/// A ledger sequence, written `INCARNATION:SEQUENCE`: the state after the batch of that number. A
/// restored ledger has another incarnation and continues from its last number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct Sequence {
    /// The ledger's incarnation.
    pub incarnation: Uuid,
    /// The batch's number in the order of commits; 0 is the empty ledger.
    pub number: i64,
}

/// A text that is not a [`Sequence`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is not a sequence; expected INCARNATION:SEQUENCE, such as 6a3f1c2e-0d5b-4c1f-9a53-6f1f0a7f2b10:77"
)]
pub struct InvalidSequence(String);

impl fmt::Display for Sequence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.incarnation, self.number)
    }
}

impl FromStr for Sequence {
    type Err = InvalidSequence;

    fn from_str(text: &str) -> Result<Self, InvalidSequence> {
        let parsed = text.split_once(':').and_then(|(incarnation, number)| {
            let digits = !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit());
            Some(Sequence {
                incarnation: incarnation.parse().ok()?,
                number: number.parse().ok().filter(|_| digits)?,
            })
        });
        parsed.ok_or_else(|| InvalidSequence(text.chars().take(100).collect()))
    }
}

impl From<Sequence> for String {
    fn from(sequence: Sequence) -> String {
        sequence.to_string()
    }
}

impl TryFrom<String> for Sequence {
    type Error = InvalidSequence;

    fn try_from(text: String) -> Result<Self, InvalidSequence> {
        text.parse()
    }
}

impl PartialSchema for Sequence {
    fn schema() -> RefOr<Schema> {
        String::schema()
    }
}

impl ToSchema for Sequence {}

impl Type<Postgres> for Sequence {
    fn type_info() -> PgTypeInfo {
        <str as Type<Postgres>>::type_info()
    }

    fn compatible(type_info: &PgTypeInfo) -> bool {
        <str as Type<Postgres>>::compatible(type_info)
    }
}

/// Reads the format of the schema's function `named_sequence`.
impl<'r> Decode<'r, Postgres> for Sequence {
    fn decode(value: PgValueRef<'r>) -> Result<Self, sqlx::error::BoxDynError> {
        Ok(<&str as Decode<Postgres>>::decode(value)?.parse()?)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_written_sequence_reads_back(incarnation: u128, number in 0..=i64::MAX) {
            let sequence = Sequence { incarnation: Uuid::from_u128(incarnation), number };
            prop_assert_eq!(sequence.to_string().parse(), Ok(sequence));
        }

        #[test]
        fn no_text_makes_the_reader_panic(text in ".{0,60}") {
            if let Ok(sequence) = text.parse::<Sequence>() {
                prop_assert!(sequence.number >= 0);
            }
        }
    }

    #[test]
    fn an_incomplete_sequence_is_refused() {
        for text in [
            "77",
            ":77",
            "6a3f1c2e-0d5b-4c1f-9a53-6f1f0a7f2b10",
            "6a3f1c2e-0d5b-4c1f-9a53-6f1f0a7f2b10:",
            "6a3f1c2e-0d5b-4c1f-9a53-6f1f0a7f2b10:-1",
        ] {
            assert!(
                text.parse::<Sequence>().unwrap_err().to_string().contains("INCARNATION:SEQUENCE"),
                "{text}"
            );
        }
    }
}
