"""What a URL may make a node dial, in every disguise that an address has."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.upstream.urls import PinnedResolver, UrlRefused, check_address, parse_base, resolve


@pytest.mark.parametrize(
    ("url", "base"),
    [
        ("http://localhost:8000/v1/", "http://localhost:8000/v1"),
        ("https://OpenRouter.ai/api/v1", "https://openrouter.ai:443/api/v1"),
        ("http://[::1]:81", "http://[::1]:81"),
        ("http://host./v1", "http://host:80/v1"),
    ],
)
def test_a_base_url_is_read(url: str, base: str) -> None:
    assert parse_base(url)[0] == base


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "ftp://host/",
        "gopher://host/",
        "localhost:8000",
        "http://",
        "http://user:secret@host/",
        "http://user@host/",
        "http://host/v1?key=1",
        "http://host/v1#x",
        "http://host:0/",
        "http://host:70000/",
        "http://ho st/",
        "http://host\\@169.254.169.254/",
        "http://hôst/",
        "http://host/\r\nX: y",
        "http://" + "a" * 3000,
        "http://[::1",
    ],
)
def test_what_is_no_plain_base_url_is_refused(url: str) -> None:
    with pytest.raises(UrlRefused):
        parse_base(url)


NEVER = [
    "169.254.169.254",
    "169.254.0.1",
    "fe80::1",
    "0.0.0.0",
    "0.1.2.3",
    "::",
    "224.0.0.1",
    "ff02::1",
    "255.255.255.255",
    "240.0.0.1",
    "100.100.100.200",
    "fd00:ec2::254",
    "::ffff:169.254.169.254",
    "64:ff9b::a9fe:a9fe",
    "2002:a9fe:a9fe::",
    "::a9fe:a9fe",
]
PRIVATE = ["10.1.2.3", "172.16.0.1", "192.168.1.1", "100.64.0.1", "fd12::1", "::ffff:10.0.0.1", "64:ff9b::a00:1"]


@pytest.mark.parametrize("address", NEVER)
@pytest.mark.parametrize("allow_private", [True, False])
def test_some_addresses_are_never_dialled(address: str, allow_private: bool) -> None:
    with pytest.raises(UrlRefused):
        check_address(ipaddress.ip_address(address), allow_private=allow_private)


@pytest.mark.parametrize("address", PRIVATE)
def test_private_networks_only_when_allowed(address: str) -> None:
    check_address(ipaddress.ip_address(address), allow_private=True)
    with pytest.raises(UrlRefused, match="allow-private"):
        check_address(ipaddress.ip_address(address), allow_private=False)


@pytest.mark.parametrize("address", ["127.0.0.1", "127.8.8.8", "::1", "::ffff:127.0.0.1", "1.1.1.1", "2606:4700::1"])
def test_this_machine_and_the_internet_are_fine(address: str) -> None:
    check_address(ipaddress.ip_address(address), allow_private=False)


@given(st.ip_addresses(v=4, network="169.254.0.0/16"))
def test_no_scheme_of_embedding_hides_a_link_local_address(inner: ipaddress.IPv4Address) -> None:
    number = int(inner)
    for outer in (0xFFFF << 32 | number, 0x0064FF9B << 96 | number, 0x2002 << 112 | number << 80, number):
        with pytest.raises(UrlRefused):
            check_address(ipaddress.IPv6Address(outer), allow_private=True)


@pytest.mark.parametrize("url", ["http://metadata.google.internal/", "http://METADATA/", "http://metadata.goog./"])
async def test_metadata_services_are_refused_by_name(url: str) -> None:
    with pytest.raises(UrlRefused, match="metadata"):
        await resolve(url, allow_private=True)


@pytest.mark.parametrize("host", ["2852039166", "0xa9fea9fe", "0251.0376.0251.0376", "169.254.43518"])
async def test_numbers_that_the_system_reads_as_an_address_are_seen_as_that_address(host: str) -> None:
    with pytest.raises(UrlRefused):
        await resolve(f"http://{host}/", allow_private=True)


async def test_one_bad_address_behind_a_name_refuses_the_name() -> None:
    async def lookup(_host: str, _port: int) -> list[str]:
        return ["93.184.216.34", "169.254.169.254"]

    with pytest.raises(UrlRefused, match="never dialled"):
        await resolve("https://example.org/v1", allow_private=False, lookup=lookup)


async def test_a_name_is_dialled_at_the_addresses_that_were_checked_and_no_others() -> None:
    answers = [["93.184.216.34"], ["127.0.0.1"]]

    async def lookup(_host: str, _port: int) -> list[str]:
        return answers.pop(0)

    target = await resolve("https://example.org/v1", allow_private=False, lookup=lookup)
    pinned = PinnedResolver(target)
    assert [row["host"] for row in await pinned.resolve("example.org", 443)] == ["93.184.216.34"]
    assert len(answers) == 1, "the name was not looked up again"
    with pytest.raises(OSError, match="not the server that was checked"):
        await pinned.resolve("localhost", 443)
    with pytest.raises(OSError, match="not the server that was checked"):
        await pinned.resolve("example.org", 80)


async def test_a_name_without_an_address_is_refused() -> None:
    async def nothing(_host: str, _port: int) -> list[str]:
        raise OSError("no such host")

    with pytest.raises(UrlRefused, match="does not resolve"):
        await resolve("http://nowhere.invalid/", allow_private=False, lookup=nothing)
