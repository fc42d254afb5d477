//! Settings of one source's publisher.

use std::time::Duration;

use uuid::Uuid;

use crate::coderd::Database;
use crate::license::PublicKeys;
use crate::pauses::Paused;
use crate::tallyman::ClientSettings;

/// Settings of one source's publisher.
#[derive(Clone, Debug)]
pub struct Settings {
    pub deployment: Uuid,
    /// Whether usage is sent. If not, coderd publishes, and the queue follows its marks.
    pub sole: bool,
    /// The database of coderd's rows and licenses; without it nothing is published.
    pub coderd: Option<Database>,
    /// The keys that may have signed licenses.
    pub license_keys: PublicKeys,
    pub tallyman: ClientSettings,
    /// The largest number of requests in flight; at least 1.
    pub concurrency: usize,
    /// The length of leases of events; longer than a request may take.
    pub lease: Duration,
    /// Time between two successful cycles; at most a third of the request's timeout.
    pub poll: Duration,
    /// The wait after the first of several failures.
    pub first_wait: Duration,
    /// The longest wait after a failure, before jitter.
    pub longest_wait: Duration,
    /// The first wait of an event that was refused for now; it doubles each time.
    pub first_refusal_wait: Duration,
    /// The longest wait of an event that is repeatedly refused for now, before jitter.
    pub longest_refusal_wait: Duration,
    pub paused: Paused,
}

impl Settings {
    /// Shadow mode, with leases of one and a half times the request's timeout: 45 seconds with the
    /// default.
    #[must_use]
    pub fn new(
        deployment: Uuid,
        coderd: Option<Database>,
        license_keys: PublicKeys,
        tallyman: ClientSettings,
    ) -> Self {
        Settings {
            deployment,
            sole: false,
            coderd,
            license_keys,
            concurrency: 4,
            lease: tallyman.request_timeout * 3 / 2,
            tallyman,
            poll: Duration::from_secs(10),
            first_wait: Duration::from_secs(2),
            longest_wait: Duration::from_secs(10 * 60),
            first_refusal_wait: Duration::from_secs(60),
            longest_refusal_wait: Duration::from_secs(60 * 60),
            paused: Paused::never(),
        }
    }

    /// Time between two successful cycles. This and a lease together are shorter than two request
    /// timeouts. Within that time another publisher sends the events of a killed one.
    pub(super) fn rest(&self) -> Duration {
        self.poll.min(self.tallyman.request_timeout / 3)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_sends_nothing_and_a_lease_outlasts_a_request() {
        let settings = Settings::new(
            Uuid::nil(),
            None,
            PublicKeys::new(),
            ClientSettings::new("http://127.0.0.1:1/"),
        );
        assert!(!settings.sole);
        assert!(settings.lease > settings.tallyman.request_timeout);
    }
}
