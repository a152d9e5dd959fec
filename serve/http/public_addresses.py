"""Which addresses lie on the public internet: a picture's URL must not lead into the networks around the server."""

import ipaddress

# Beyond what Python knows as private, link-local, loopback, multicast, reserved or unspecified.
_CLOSED = tuple(
    ipaddress.ip_network(network)
    for network in (
        "0.0.0.0/8",
        "100.64.0.0/10",  # carriers' own; a cloud keeps its metadata there
        "168.63.129.16/32",  # a cloud's host, at a public address
        "192.0.0.0/24",
        "192.88.99.0/24",  # relays to 6to4
        "198.18.0.0/15",
        "::/96",  # IPv4 in IPv6, as it was once written
        "64:ff9b::/96",  # NAT64, which may lead to any IPv4 address
        "64:ff9b:1::/48",
        "100::/64",
        "2001::/23",  # Teredo among them
        "2001:db8::/32",
        "2002::/16",  # 6to4
        "3fff::/20",
        "5f00::/16",
        "fc00::/7",
        "fec0::/10",
    )
)


def is_public(address: str) -> bool:
    """Whether an IPv4 or IPv6 address may be connected to."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:  # with the name of a network card among others
        return False
    if isinstance(found, ipaddress.IPv6Address) and (found.ipv4_mapped or found.sixtofour or found.teredo):
        return False
    special = (
        found.is_private
        or found.is_link_local
        or found.is_loopback
        or found.is_multicast
        or found.is_reserved
        or found.is_unspecified
    )
    closed = any(found in network for network in _CLOSED if network.version == found.version)
    return found.is_global and not special and not closed
