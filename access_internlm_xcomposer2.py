"""Which files and addresses may be read, and how one URL is fetched within its limits.

What a caller of the package names is read. What a client of a server names is read only where its operator
allows it. No error repeats what a remote server sent.
"""

import http.client
import ipaddress
import os
import queue
import socket
import ssl
import string
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

LOCAL_PATH_VARIABLE = "IXC2_ALLOWED_LOCAL_MEDIA_PATH"
DOMAINS_VARIABLE = "IXC2_ALLOWED_MEDIA_DOMAINS"

# A process that has loaded one of these modules is a server: what it is asked to read, clients name.
SERVER_MODULES = ("transformers.cli.serving.server", "internlm_xcomposer2.llamacpp.server")

ANY_PUBLIC_HOST = "*"
LOCALHOST = "localhost"
REDIRECTS = (301, 302, 303, 307, 308)
MAX_REDIRECTS = 5
NAT64 = ipaddress.ip_network("64:ff9b::/96")

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class Refused(Exception):
    """Why a URL was not read, without its name and without anything that its server sent."""


def is_served() -> bool:
    """Whether this process is `transformers serve` or `ixc2 serve`."""
    return any(name in sys.modules for name in SERVER_MODULES)


@contextmanager
def bad_requests() -> Iterator[None]:
    """In a server, what is wrong with a request is an answer of status 400 with the error's text, not of 500.

    FastAPI makes such answers of its `HTTPException`. Outside of a server, errors pass through.
    """
    try:
        yield
    except Exception as error:
        if not is_served() or not _is_of_the_request(error):
            raise
        from fastapi import HTTPException

        class BadRequest(HTTPException, ValueError):
            """What is wrong with a request."""

        raise BadRequest(400, str(error)) from error


def _is_of_the_request(error: Exception) -> bool:
    """Whether an error says what is wrong with a request, in words that its sender may read."""
    from jinja2 import TemplateError

    return isinstance(error, FileNotFoundError | PermissionError | TypeError | ValueError | TemplateError)


# ---- what may be read ----


@dataclass(frozen=True)
class MediaAccess:
    """Which files and URLs may be read.

    Attributes:
        local_path: a folder, whose files may be read; "" for no file at all; None for any.
        domains: hosts whose URLs may be read, by name or address, and networks such as "10.0.0.0/8"; `"*"`
            stands for every host with a public address; empty for no URL at all; None for any.
    """

    local_path: str | None = None
    domains: tuple[str, ...] | None = None

    @classmethod
    def of(
        cls,
        local_path: str | os.PathLike | None = None,
        domains: Iterable[str] | None = None,
    ) -> "MediaAccess":
        """What is set here, or else by the environment; else nothing in a server and anything elsewhere.

        Raises:
            TypeError: one of the settings has another type.
        """
        unset = "" if is_served() else None
        if local_path is None:
            local_path = os.environ.get(LOCAL_PATH_VARIABLE, unset)
        if domains is None:
            domains = os.environ.get(DOMAINS_VARIABLE, unset)
        if isinstance(domains, str):
            domains = domains.split(",")
        if local_path is not None and not isinstance(local_path, str | os.PathLike):
            raise TypeError(f"allowed_local_media_path must be a folder, got {local_path!r:.80}")
        if domains is None:
            return cls(local_path and os.fspath(local_path))
        domains = tuple(domains)
        if not all(isinstance(domain, str) for domain in domains):
            raise TypeError(f"allowed_media_domains must be names of hosts, got {domains!r:.80}")
        names = (domain.strip().lower().removesuffix(".") for domain in domains)
        return cls(None if local_path is None else os.fspath(local_path), tuple(filter(None, names)))

    def may_read(self, path: str | os.PathLike) -> bool:
        """Whether a path leads into the folder, links followed, whether or not there is a file."""
        if not self.local_path:
            return self.local_path is None
        try:
            folder, target = os.path.realpath(self.local_path), os.path.realpath(path)
            return os.path.commonpath([folder, target]) == folder
        except (OSError, ValueError):  # a zero byte, or another drive
            return False

    def check_path(self, path: str | os.PathLike) -> None:
        """Raise `ValueError` for a file that may not be read, whether it exists or not."""
        if not self.may_read(path):
            raise ValueError(
                f"'{os.fsdecode(path)[:200]}' may not be read here; send the content itself, or have the "
                f"operator allow a folder by {LOCAL_PATH_VARIABLE} (allowed_local_media_path)"
            )

    def refusal_of_host(self, host: str) -> str | None:
        """Why the URLs of a host may not be read; None if they may."""
        if self.domains is None:
            return None
        host = host.lower().removesuffix(".")
        if {host, ANY_PUBLIC_HOST} & set(self.domains) or self._is_listed(_address(host)):
            return None
        return (
            "is on a host that is not allowed here; send the content itself, or have the operator allow the "
            f"host by {DOMAINS_VARIABLE} (allowed_media_domains)"
        )

    def refusal_of_address(self, host: str, address: str) -> str | None:
        """Why a host may not be reached at this address, to which its name leads; None if it may.

        Public addresses may be reached, others only if they are listed themselves, so that no name leads into
        the network around the server. `localhost` stands for the addresses of loopback.
        """
        if self.domains is None:
            return None
        found = _address(address)
        is_named = host.lower() == LOCALHOST and LOCALHOST in self.domains
        if found and (is_public(found) or self._is_listed(found) or (is_named and found.is_loopback)):
            return None
        return (
            "leads to an address inside the server's own network, which is not allowed here; have the "
            f"operator list the address itself in {DOMAINS_VARIABLE}"
        )

    def _is_listed(self, address: Address | None) -> bool:
        networks = filter(None, map(_network, self.domains or ()))
        return address is not None and any(address in network for network in networks)


def is_public(address: Address) -> bool:
    """Whether an address belongs to the Internet at large, also as an IPv4 address within an IPv6 one."""
    if address.is_multicast or address.is_reserved and address not in NAT64 or not address.is_global:
        return False
    if address.version == 4:
        return True
    inner = [address.sixtofour, *(address.teredo or ())]
    inner += [ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)] if address in NAT64 else []
    return all(is_public(part) for part in inner if part is not None)


def _address(text: str) -> Address | None:
    """An IP address, of IPv4 where IPv6 only wraps it; None for anything else."""
    try:
        address = ipaddress.ip_address(text.strip("[]").partition("%")[0])
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def _network(text: str) -> Network | None:
    try:
        return ipaddress.ip_network(text, strict=False)
    except ValueError:
        return None


# ---- fetching ----


def fetch(url: str, *, timeout: float, max_bytes: int, access: MediaAccess) -> bytes:
    """Read an http or https URL within `timeout` seconds in all, names, redirects and headers included.

    Raises:
        ValueError: it may not be read, or can't be within `timeout` and `max_bytes`.
    """
    try:
        return _follow(url, _Line(access, time.monotonic() + timeout), max_bytes)
    except Exception as error:  # http.client raises anything at all on hostile answers
        reason = _reason(error, timeout)
    raise ValueError(f"{url[:200]!r} {reason}")


def _follow(url: str, line: "_Line", max_bytes: int) -> bytes:
    """The content of a URL, or of what it redirects to; each is checked."""
    opener = line.opener()
    for _ in range(MAX_REDIRECTS + 1):
        line.check(url)
        request = urllib.request.Request(url)
        with opener.open(request, timeout=line.seconds_left()) as response:
            if 200 <= response.status < 300:
                return _read(response, line, max_bytes)
            if response.status not in REDIRECTS:
                raise Refused(f"can't be read: its server answers with the status {response.status}")
            target = response.headers.get("Location", "")
        url = urllib.parse.urljoin(url, urllib.parse.quote(target, safe=string.punctuation))
    raise Refused(f"redirects more than {MAX_REDIRECTS} times")


def _read(response: http.client.HTTPResponse, line: "_Line", max_bytes: int) -> bytes:
    """Read piece by piece, to stop slow and endless answers."""
    promised = response.headers.get("Content-Length", "0").strip()
    promised = int(promised) if promised.isdecimal() else 0
    if promised > max_bytes:
        raise Refused(f"promises {promised} bytes, more than the limit of {max_bytes}")
    content = bytearray()
    while piece := response.read1(1 << 16):
        content += piece
        if len(content) > max_bytes:
            raise Refused(f"sends more than the limit of {max_bytes} bytes")
        line.seconds_left()
    if len(content) < promised:
        raise Refused(f"stopped after {len(content)} of {promised} bytes")
    return bytes(content)


def _reason(error: Exception, timeout: float) -> str:
    """What went wrong on the way, in words of the operating system or our own."""
    if isinstance(error, Refused):
        return str(error)
    reason = getattr(error, "reason", error)  # urllib wraps what happens before there is an answer
    if isinstance(reason, TimeoutError):
        return f"is too slow: it timed out after {timeout:g} seconds in all"
    if isinstance(reason, socket.gaierror):
        return "can't be read: its host is not known"
    if isinstance(reason, ssl.SSLError):
        return f"can't be read: the encrypted connection failed ({reason.reason})"
    if isinstance(reason, OSError) and reason.errno:
        return f"can't be read: {os.strerror(reason.errno)}"
    return "can't be read: it is not a valid URL, or its server sent an invalid response"


class _Line:
    """The way to the servers of one fetch: what it may reach, and until when."""

    def __init__(self, access: MediaAccess, deadline: float):
        self.access, self.deadline = access, deadline

    def seconds_left(self) -> float:
        """Raise `TimeoutError` when none are."""
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left

    def check(self, url: str) -> None:
        """Raise `Refused` unless a URL has a scheme and a host that may be read."""
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise Refused("can't be read: it leads to an address that is neither http nor https")
        _refuse(self.access.refusal_of_host(parts.hostname))

    def opener(self) -> urllib.request.OpenerDirector:
        """urllib without redirects, files and ftp; it uses a proxy only if any address may be reached."""
        opener = urllib.request.OpenerDirector()
        if self.access.domains is None:
            opener.add_handler(urllib.request.ProxyHandler())
        for handler in (_Handler(self), _SecureHandler(self)):
            opener.add_handler(handler)
        return opener

    def connect(self, host: str, port: int) -> "_TimedSocket":
        """A connection to one of the addresses of a host, all of which have to be allowed."""
        _refuse(self.access.refusal_of_host(host))
        found = _resolve(host, port, self.seconds_left())
        for *_, where in found:
            _refuse(self.access.refusal_of_address(host, where[0]))
        failure: OSError = OSError()
        for family, kind, protocol, _, where in found:
            link = _TimedSocket(family, kind, protocol)
            try:
                link.settimeout(self.seconds_left())
                link.connect(where)
                link.settimeout(self.seconds_left())  # for what is sent, and for a handshake
                link.line = self
                return link
            except OSError as error:
                link.close()
                failure = error
        raise failure


def _refuse(reason: str | None) -> None:
    if reason is not None:
        raise Refused(reason)


def _resolve(host: str, port: int, seconds: float) -> list[tuple]:
    """`getaddrinfo`, which has no time-out of its own, within these seconds."""
    answers: queue.SimpleQueue = queue.SimpleQueue()

    def ask() -> None:
        try:
            answers.put(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except (OSError, UnicodeError) as error:
            answers.put(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        answer = answers.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError from None
    if isinstance(answer, Exception):
        raise answer if isinstance(answer, OSError) else socket.gaierror()
    return answer


class _Timed:
    """A socket that reads until the deadline of its line, however its peer spreads the bytes."""

    line: _Line | None = None

    def recv_into(self, *args, **kwargs) -> int:
        if self.line is not None:
            self.settimeout(self.line.seconds_left())
        return super().recv_into(*args, **kwargs)


class _TimedSocket(_Timed, socket.socket):
    pass


class _TimedSecureSocket(_Timed, ssl.SSLSocket):
    pass


class _Connection(http.client.HTTPConnection):
    def __init__(self, *args, line: _Line, **kwargs):
        super().__init__(*args, **kwargs)
        self.line = line

    def connect(self) -> None:
        self.sock = self.line.connect(self.host, self.port)


class _SecureConnection(http.client.HTTPSConnection):
    """https on a line, or through a proxy, which is trusted to keep the time until it has connected."""

    def __init__(self, *args, line: _Line, **kwargs):
        context = ssl.create_default_context()
        context.sslsocket_class = _TimedSecureSocket
        super().__init__(*args, context=context, **kwargs)
        self.line, self.context, self.is_tunnelled = line, context, False

    def set_tunnel(self, *args, **kwargs) -> None:
        super().set_tunnel(*args, **kwargs)
        self.is_tunnelled = True

    def connect(self) -> None:
        if self.is_tunnelled:
            super().connect()
        else:
            link = self.line.connect(self.host, self.port)
            self.sock = self.context.wrap_socket(link, server_hostname=self.host)
        self.sock.line = self.line


class _Handler(urllib.request.HTTPHandler):
    def __init__(self, line: _Line):
        super().__init__()
        self.line = line

    def http_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(partial(_Connection, line=self.line), request)


class _SecureHandler(urllib.request.HTTPSHandler):
    def __init__(self, line: _Line):
        super().__init__()
        self.line = line

    def https_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(partial(_SecureConnection, line=self.line), request)
