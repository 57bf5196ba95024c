"""Which network addresses a job may read from: those of the internet, no private one.

The api-server looks a host up when a request comes in; the trainer checks the address that it has in fact
reached, because a name may lead elsewhere by then (DNS rebinding).
"""

from __future__ import annotations

import ipaddress

_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_GIVEN_OUT = ipaddress.ip_network("2000::/3")
"""All that IANA gives out to hosts of the internet; the standard library calls more of the rest global."""

_DOCUMENTATION = ipaddress.ip_network("3fff::/20")
"""Of RFC 9637, which the standard library does not know."""


def is_public(address: str) -> bool:
    """Whether an IPv4 or IPv6 address is of one host on the internet.

    An address that carries an IPv4 address (mapped, NAT64 of RFC 6052, 6to4 of RFC 3056) is as that one is.

    :raises ValueError: if it is no address.
    """
    return _is_public(ipaddress.ip_address(address))


def _is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    if isinstance(address, ipaddress.IPv6Address):
        if address in _NAT64:
            return _is_public(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
        carried = address.ipv4_mapped or address.sixtofour
        if carried is not None:
            return _is_public(carried)
        if address not in _GIVEN_OUT or address in _DOCUMENTATION:
            return False
    return address.is_global and not address.is_multicast
