//! Closed sets of words: the form of enums in columns, JSON, the command line and labels.

/// A word that is not in a set.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{word:?}: unknown; expected one of {}", .known.join(", "))]
pub struct UnknownWord {
    /// The unknown word.
    pub word: String,
    /// All words of the set, in order.
    pub known: &'static [&'static str],
}

/// The description of a set in the API's document: its documentation and each word's meaning.
pub(crate) fn description(set: &str, words: &[(&str, &str)]) -> String {
    let documented = words.iter().filter(|(_, meaning)| !meaning.is_empty());
    let lines = documented.map(|(word, meaning)| format!("\n- `{word}`: {meaning}"));
    let lines: String = lines.collect();
    let gap = if lines.is_empty() { "" } else { "\n" };
    format!("{}{gap}{lines}", set.trim())
}

/// Declares an enum together with the word of each variant. A second word is one of an earlier
/// version: the command line and JSON still accept it.
macro_rules! words {
    ($(#[doc = $doc:literal])* $name:ident {
        $($(#[doc = $meaning:literal])* $variant:ident = $word:literal $(| $old:literal)?),+ $(,)?
    }) => {
        $(#[doc = $doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[derive(serde::Serialize, serde::Deserialize, sqlx::Type)]
        #[sqlx(type_name = "text")]
        pub enum $name {
            $(
                $(#[doc = $meaning])*
                #[serde(rename = $word $(, alias = $old)?)]
                #[sqlx(rename = $word)]
                $variant
            ),+
        }

        impl $name {
            /// All values, in the order in which they are shown.
            pub const ALL: [$name; [$($word),+].len()] = [$($name::$variant),+];

            #[must_use]
            pub const fn as_str(self) -> &'static str {
                match self { $($name::$variant => $word),+ }
            }

            /// The documentation of the value, in one line.
            #[must_use]
            pub const fn meaning(self) -> &'static str {
                match self { $($name::$variant => concat!($($meaning),*).trim_ascii()),+ }
            }
        }

        impl utoipa::PartialSchema for $name {
            fn schema() -> utoipa::openapi::RefOr<utoipa::openapi::Schema> {
                let words = utoipa::openapi::ObjectBuilder::new().schema_type(utoipa::openapi::Type::String);
                let meanings = $name::ALL.map(|one| (one.as_str(), one.meaning()));
                let description = $crate::words::description(concat!($($doc),*), &meanings);
                let words = words.enum_values(Some([$($word),+]));
                words.description(Some(description)).into()
            }
        }

        impl utoipa::ToSchema for $name {}

        impl clap::ValueEnum for $name {
            fn value_variants<'a>() -> &'a [Self] {
                &Self::ALL
            }

            fn to_possible_value(&self) -> Option<clap::builder::PossibleValue> {
                use clap::builder::PossibleValue;
                Some(match self {
                    $($name::$variant => PossibleValue::new($word)$(.alias($old))?),+
                })
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.pad(self.as_str())
            }
        }

        impl std::str::FromStr for $name {
            type Err = $crate::words::UnknownWord;

            fn from_str(word: &str) -> Result<Self, Self::Err> {
                let known = $name::ALL.into_iter().find(|known| known.as_str() == word);
                known.ok_or_else(|| $crate::words::UnknownWord { word: word.to_owned(), known: &[$($word),+] })
            }
        }
    };
}
pub(crate) use words;
