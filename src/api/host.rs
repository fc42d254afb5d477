//! Checks the header `Host`. A page of another origin can make its own name resolve to 127.0.0.1
//! (DNS rebinding). Its requests then come from this machine, but the browser puts that name into
//! `Host`.

use std::net::IpAddr;

use axum::http::HeaderMap;
use axum::http::header::HOST;

use super::answer::Problem;

/// Host names that a path accepts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Hosts {
    /// Names of the loopback interface, and configured names.
    Named,
    /// Also any IP address, because a page of another origin cannot have one as its name. Probes
    /// and Prometheus call a proxy beside the process by the pod's address, which is not known in
    /// advance.
    OrAddress,
}

/// Refuses a request with another host name.
pub(super) fn admit(headers: &HeaderMap, names: &[String], hosts: Hosts) -> Result<(), Problem> {
    let advice = "ask for localhost or 127.0.0.1, set serve.host_names, or set serve.tokens";
    let mut given = headers.get_all(HOST).iter();
    let (Some(host), None) = (given.next(), given.next()) else {
        return Err(Problem::forbidden(format!("the header Host must be there once: {advice}")));
    };
    let host = String::from_utf8_lossy(host.as_bytes());
    if is_admitted(&host, names, hosts) {
        return Ok(());
    }
    Err(Problem::forbidden(format!(
        "the header Host {host:?} is not a name of this process: {advice}"
    )))
}

fn is_admitted(host: &str, names: &[String], hosts: Hosts) -> bool {
    let Some(name) = without_port(host) else { return false };
    let address: Option<IpAddr> = name.parse().ok();
    let is_configured = names.iter().any(|known| {
        known.eq_ignore_ascii_case(name) || (address.is_some() && known.parse().ok() == address)
    });
    match address {
        Some(address) => address.is_loopback() || hosts == Hosts::OrAddress || is_configured,
        None => name.eq_ignore_ascii_case("localhost") || is_configured,
    }
}

/// Removes the port and the brackets from `name`, `name:port`, `1.2.3.4:port` or `[::1]:port`.
fn without_port(host: &str) -> Option<&str> {
    let (name, port) = match host.strip_prefix('[') {
        Some(rest) => {
            let (address, port) = rest.split_once(']')?;
            address.parse::<std::net::Ipv6Addr>().ok()?;
            (address, if port.is_empty() { None } else { Some(port.strip_prefix(':')?) })
        }
        None => host.split_once(':').map_or((host, None), |(name, port)| (name, Some(port))),
    };
    let port_is_right = port.is_none_or(|port| {
        port.bytes().all(|byte| byte.is_ascii_digit()) && port.parse::<u16>().is_ok()
    });
    (port_is_right && !name.is_empty()).then_some(name)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn names() -> Vec<String> {
        ["tallyline.example.com", "10.1.2.3", "fd00::1"].map(str::to_owned).into()
    }

    #[test]
    fn loopback_and_the_configured_names_are_admitted_with_or_without_a_port() {
        for name in [
            "localhost",
            "LocalHost",
            "127.0.0.1",
            "127.9.8.7",
            "[::1]",
            "Tallyline.Example.com",
            "10.1.2.3",
            "[fd00::1]",
            "[fd00:0::1]",
        ] {
            for host in [name.to_owned(), format!("{name}:8090")] {
                assert!(is_admitted(&host, &names(), Hosts::Named), "{host}");
            }
        }
    }

    #[test]
    fn any_other_name_is_refused() {
        for host in [
            "",
            ":8090",
            "evil.example",
            "evil.example:8090",
            "localhost.evil.example",
            "127.0.0.1.evil.example",
            "xlocalhost",
            "example.com",
            "localhost:port",
            "localhost:99999",
            "localhost:80:90",
            "localhost@evil.example",
            "::1",
            "[::1",
            "[::1]x",
            "[localhost]",
            "127.1",
            "0x7f000001",
            "localhost.",
            "evil.localhost",
            "tallyline.example.com.",
            "[::ffff:10.1.2.3]",
        ] {
            assert!(!is_admitted(host, &names(), Hosts::Named), "{host}");
            assert!(
                !is_admitted(host, &names(), Hosts::OrAddress) || host == "[::ffff:10.1.2.3]",
                "{host}"
            );
        }
    }

    #[test]
    fn addresses_are_for_probes_and_prometheus_only() {
        for address in ["10.9.8.7", "10.9.8.7:2112", "[fd00::9]:2112", "192.168.0.1"] {
            assert!(is_admitted(address, &names(), Hosts::OrAddress), "{address}");
            assert!(!is_admitted(address, &names(), Hosts::Named), "{address}");
        }
    }

    #[test]
    fn the_header_must_be_there_once() {
        let headers = |values: &[&str]| {
            values.iter().map(|value| (HOST, value.parse().unwrap())).collect::<HeaderMap>()
        };
        assert!(admit(&headers(&["localhost"]), &[], Hosts::Named).is_ok());
        for wrong in [&[][..], &["localhost", "localhost"], &["localhost", "evil.example"]] {
            let problem = admit(&headers(wrong), &[], Hosts::OrAddress).unwrap_err();
            assert!(
                problem.status.as_u16() == 403
                    && problem.message.contains("Host must be there once"),
                "{problem:?}"
            );
        }
        let problem = admit(&headers(&["evil.example:8090"]), &[], Hosts::Named).unwrap_err();
        assert!(
            problem.message.contains("\"evil.example:8090\"")
                && problem.message.contains("serve.host_names"),
            "{problem:?}"
        );
    }

    proptest! {
        /// Only loopback names and configured names are admitted, for any name of a browser's page.
        #[test]
        fn a_name_that_is_not_listed_is_refused(host in "\\PC{0,40}|[a-z0-9.-]{1,30}(:[0-9]{1,5})?") {
            let name = host.rsplit_once(':').map_or(host.as_str(), |(name, _)| name);
            let known = name.eq_ignore_ascii_case("localhost") || name.trim_matches(['[', ']']).parse::<IpAddr>().is_ok();
            prop_assert!(!is_admitted(&host, &[], Hosts::OrAddress) || known, "{host}");
        }
    }
}
