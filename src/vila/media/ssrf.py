"""SSRF check: IP addresses and host names that may be fetched from.

The ranges are listed here instead of taken from `ipaddress`, whose lists depend on the Python version.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence

# IANA IPv4 Special-Purpose Address Registry, including the ranges that are globally reachable: none serves images.
_IPV4 = tuple(
    ipaddress.IPv4Network(network)
    for network in (
        "0.0.0.0/8",  # this network
        "10.0.0.0/8",  # private use
        "100.64.0.0/10",  # shared address space (carrier-grade NAT); Alibaba's metadata at 100.100.100.200
        "127.0.0.0/8",  # loopback
        "168.63.129.16/32",  # not in the registry: the host of a virtual machine at Azure
        "169.254.0.0/16",  # link-local; metadata of most clouds at 169.254.169.254
        "172.16.0.0/12",  # private use
        "192.0.0.0/24",  # IETF protocol assignments; Oracle's metadata at 192.0.0.192
        "192.0.2.0/24",  # documentation
        "192.31.196.0/24",  # AS112
        "192.52.193.0/24",  # AMT
        "192.88.99.0/24",  # 6to4 relays
        "192.168.0.0/16",  # private use
        "192.175.48.0/24",  # AS112
        "198.18.0.0/15",  # benchmarking
        "198.51.100.0/24",  # documentation
        "203.0.113.0/24",  # documentation
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved; limited broadcast
    )
)
# For IPv6 the rule is inverted: IANA has allocated this range for global unicast, everything outside is special.
_IPV6_GLOBAL = ipaddress.IPv6Network("2000::/3")
_IPV6 = tuple(
    ipaddress.IPv6Network(network)
    for network in (
        "2001::/23",  # IETF protocol assignments: Teredo 2001::/32, benchmarking 2001:2::/48, ORCHID, DRIP, ...
        "2001:db8::/32",  # documentation
        "2002::/16",  # 6to4: embeds an arbitrary IPv4 address
        "2620:4f:8000::/48",  # AS112
        "3fff::/20",  # documentation
    )
)
_MAPPED = ipaddress.IPv6Network("::ffff:0:0/96")
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


def is_public(address: str) -> bool:
    """Return whether an IP address is globally routable and has no special purpose.

    An IPv4-mapped (`::ffff:0:0/96`) or NAT64 (`64:ff9b::/96`) address is public if the IPv4 address inside it is. Text
    that is not an IP address, and an address with a zone (`fe80::1%eth0`), is not public.
    """
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv4Address):
        return not any(ip in network for network in _IPV4)
    if ip.scope_id is not None:
        return False
    if ip in _MAPPED or ip in _NAT64:
        return is_public(str(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)))
    return ip in _IPV6_GLOBAL and not any(ip in network for network in _IPV6)


def is_allowed(host: str, domains: Sequence[str]) -> bool:
    """Return whether `host` is in `domains`; `*.example.org` matches all subdomains of example.org, "" all hosts."""
    if not domains:
        return True
    name = normal_host(host)
    for domain in domains:
        below = domain.startswith("*.")
        wanted = normal_host(domain[2:] if below else domain)
        if name.endswith(f".{wanted}") if below else name == wanted:
            return True
    return False


def normal_host(host: str) -> str:
    """Return a host name in normal form: lower-case IDNA ASCII without a trailing dot. Raises ValueError."""
    return host.encode("idna").decode("ascii").lower().rstrip(".")
