//! The outcome of a request without verdicts.

/// Why a request brought no verdicts. No message contains the license.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SendError {
    /// The license cannot be written into a header. Nothing was sent.
    #[error("the license is not a valid header value")]
    LicenseNotAHeader,
    /// No connection. Nothing was sent.
    #[error("cannot connect: {0}")]
    Unreachable(String),
    /// The request may have arrived, but the whole answer did not come in time.
    #[error("no answer: {0}")]
    Unanswered(String),
    /// A status other than 200, with the vendor's message.
    #[error("unexpected status code {status}, error: {message}")]
    Status {
        /// The HTTP status.
        status: u16,
        /// From the body, or why the body has none.
        message: String,
    },
    /// A 200 whose body cannot be read as an answer.
    #[error("decode response body: {0}")]
    Undecodable(String),
}

impl SendError {
    /// Whether the vendor may still have accepted the events. It has not if the request was not
    /// sent, or if it answered with a 4xx status.
    #[must_use]
    pub fn may_have_been_accepted(&self) -> bool {
        match self {
            SendError::LicenseNotAHeader | SendError::Unreachable(_) => false,
            SendError::Unanswered(_) | SendError::Undecodable(_) => true,
            SendError::Status { status, .. } => !(400..500).contains(status),
        }
    }

    /// Whether the vendor, or a proxy before it, refuses the request for its content: 400, 413 or
    /// 422. A request with other events, or with fewer, may be accepted.
    #[must_use]
    pub fn is_refused_for_its_content(&self) -> bool {
        matches!(self, SendError::Status { status: 400 | 413 | 422, .. })
    }
}
