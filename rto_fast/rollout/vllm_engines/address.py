"""How a vLLM server is reached: at http(s)://HOST:PORT, or on a socket, unix:PATH.

No proxy of the environment is asked for either.
"""

from __future__ import annotations

import ipaddress
import logging

import httpx

UNIX = "unix:"

logging.getLogger("httpx").setLevel(logging.WARNING)  # at INFO it prints the URL of each request, password and all


def socket_path(url: str) -> str | None:
    """The path of unix:PATH; None for a server on the network."""
    return url.removeprefix(UNIX) if url.startswith(UNIX) else None


def base(url: str) -> str:
    """What the requests to a server begin with; a socket takes any host."""
    return "http://localhost" if socket_path(url) else url


def is_near(url: str) -> bool:
    """Whether only processes of the server's own machine can reach it by this URL."""
    host = httpx.URL(base(url)).host
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def client(url: str, timeout: httpx.Timeout) -> httpx.Client:
    """A client that is asked for paths behind `url`."""
    path = socket_path(url)
    transport = httpx.HTTPTransport(uds=path) if path else None
    return httpx.Client(base_url=base(url), transport=transport, timeout=timeout, trust_env=False)


def async_client(url: str, timeout: httpx.Timeout, connections: int) -> httpx.AsyncClient:
    """As `client`, with `connections` at most."""
    path, limits = socket_path(url), httpx.Limits(max_connections=connections)
    transport = httpx.AsyncHTTPTransport(uds=path, limits=limits) if path else None
    return httpx.AsyncClient(base_url=base(url), transport=transport, limits=limits, timeout=timeout, trust_env=False)
