//! The head of the hash-chained ledger. A copy that is kept elsewhere shows later whether the
//! ledger was rewritten.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use sqlx::postgres::{PgTypeInfo, PgValueRef};
use sqlx::{Decode, PgConnection, Postgres, Type};
use utoipa::openapi::{RefOr, Schema};
use utoipa::{PartialSchema, ToSchema};

use super::Sequence;

/// The chain of the ledger after a batch, written `INCARNATION:SEQUENCE:CHAIN`. It covers the
/// content of that batch and of all batches before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct Head {
    pub sequence: Sequence,
    /// SHA-256; 32 zero bytes for the empty ledger.
    pub chain: [u8; 32],
}

/// A text that is not a [`Head`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is not a head; expected INCARNATION:SEQUENCE:CHAIN with 64 hexadecimal digits, as printed by `tallyline audit`"
)]
pub struct InvalidHead(String);

impl fmt::Display for Head {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.sequence, hex::encode(self.chain))
    }
}

impl FromStr for Head {
    type Err = InvalidHead;

    fn from_str(text: &str) -> Result<Self, InvalidHead> {
        let parsed = text.rsplit_once(':').and_then(|(sequence, digits)| {
            let mut chain = [0; 32];
            hex::decode_to_slice(digits, &mut chain).ok()?;
            Some(Head { sequence: sequence.parse().ok()?, chain })
        });
        parsed.ok_or_else(|| InvalidHead(text.chars().take(150).collect()))
    }
}

impl From<Head> for String {
    fn from(head: Head) -> String {
        head.to_string()
    }
}

impl TryFrom<String> for Head {
    type Error = InvalidHead;

    fn try_from(text: String) -> Result<Self, InvalidHead> {
        text.parse()
    }
}

impl PartialSchema for Head {
    fn schema() -> RefOr<Schema> {
        String::schema()
    }
}

impl ToSchema for Head {}

impl Type<Postgres> for Head {
    fn type_info() -> PgTypeInfo {
        <str as Type<Postgres>>::type_info()
    }

    fn compatible(type_info: &PgTypeInfo) -> bool {
        <str as Type<Postgres>>::compatible(type_info)
    }
}

/// Reads the written form.
impl<'r> Decode<'r, Postgres> for Head {
    fn decode(value: PgValueRef<'r>) -> Result<Self, sqlx::error::BoxDynError> {
        Ok(<&str as Decode<Postgres>>::decode(value)?.parse()?)
    }
}

/// The ledger's head, from one row.
pub async fn read(conn: &mut PgConnection) -> Result<Head, sqlx::Error> {
    let query =
        "select named_sequence(next_sequence - 1) || ':' || encode(chain, 'hex') from ledger";
    sqlx::query_scalar(query).fetch_one(conn).await
}

/// The head after the batch of this sequence, from two rows; none if the ledger lacks the batch.
pub async fn at(conn: &mut PgConnection, number: i64) -> Result<Option<Head>, sqlx::Error> {
    sqlx::query_scalar(
        "select named_sequence($1) || ':' || repeat('00', 32) where $1 = 0
         union all
         select named_sequence(sequence) || ':' || encode(chain, 'hex') from batch where sequence = $1 and chain is not null",
    )
    .bind(number)
    .fetch_optional(conn)
    .await
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use uuid::Uuid;

    use super::*;

    proptest! {
        #[test]
        fn a_written_head_reads_back(incarnation: u128, number in 0..=i64::MAX, chain: [u8; 32]) {
            let sequence = Sequence { incarnation: Uuid::from_u128(incarnation), number };
            let head = Head { sequence, chain };
            prop_assert_eq!(head.to_string().parse(), Ok(head));
        }

        #[test]
        fn no_text_makes_the_reader_panic(text in ".{0,130}") {
            let _: Result<Head, _> = text.parse();
        }
    }

    #[test]
    fn an_incomplete_head_is_refused() {
        let incarnation = "6a3f1c2e-0d5b-4c1f-9a53-6f1f0a7f2b10";
        for text in [
            format!("{incarnation}:77"),
            format!("{incarnation}:77:"),
            format!("{incarnation}:77:{}", "0".repeat(63)),
            format!("{incarnation}:77:{}", "0".repeat(66)),
            format!("{incarnation}:77:{}", "x".repeat(64)),
            format!(":77:{}", "0".repeat(64)),
        ] {
            let error = text.parse::<Head>().unwrap_err().to_string();
            assert!(error.contains("INCARNATION:SEQUENCE:CHAIN"), "{text}");
        }
    }
}
