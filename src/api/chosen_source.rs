//! Chooses the source of a request.

use uuid::Uuid;

use super::answer::Problem;

/// Why a request has no source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NoSource {
    /// The requested or configured source does not exist.
    Unknown(Uuid),
    /// The ledger has no source yet.
    NoneYet,
    /// There are several sources, and none was named.
    Several,
}

/// The source of a request: the requested one, else the default (configured, or the only one in
/// use), else the only one.
pub(super) fn choose(
    there: &[Uuid],
    meant: Option<Uuid>,
    asked: Option<Uuid>,
) -> Result<Uuid, NoSource> {
    match (asked.or(meant), there) {
        (Some(named), _) if there.contains(&named) => Ok(named),
        (Some(named), _) => Err(NoSource::Unknown(named)),
        (None, [only]) => Ok(*only),
        (None, []) => Err(NoSource::NoneYet),
        (None, _) => Err(NoSource::Several),
    }
}

impl From<NoSource> for Problem {
    fn from(none: NoSource) -> Self {
        match none {
            NoSource::Unknown(id) => {
                Problem::not_found(format!("no deployment {id} was introduced"))
            }
            NoSource::NoneYet => Problem::not_found("no deployment was introduced yet"),
            NoSource::Several => Problem::field(
                "source",
                "is needed: there are several deployments, and source.deployment_id does not say which is meant",
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_named_source_is_shown_else_the_configured_one_else_the_only_one() {
        let [one, other, third] = [1, 2, 3].map(Uuid::from_u128);
        let both = [one, other];
        assert_eq!(choose(&both, None, Some(other)), Ok(other));
        assert_eq!(choose(&both, Some(one), Some(other)), Ok(other));
        assert_eq!(choose(&both, Some(one), None), Ok(one));
        assert_eq!(choose(&[one], None, None), Ok(one));
        assert_eq!(choose(&both, None, None), Err(NoSource::Several));
        assert_eq!(choose(&[], None, None), Err(NoSource::NoneYet));
        assert_eq!(choose(&both, None, Some(third)), Err(NoSource::Unknown(third)));
        // A configured source is the default even before it exists: another one must not replace
        // it.
        assert_eq!(choose(&[one], Some(third), None), Err(NoSource::Unknown(third)));
    }
}
