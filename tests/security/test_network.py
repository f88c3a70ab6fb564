"""Sockets: none, of no family, although listeners on this machine would answer."""

import socket

import pytest


@pytest.fixture
def tcp():
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_tcp(attack, tcp):
    attack(f"import socket\nsocket.create_connection(('127.0.0.1', {tcp}), 2)\nprint('ESCAPED')")


def test_tcp_server(attack):
    attack("import socket\nsocket.create_server(('127.0.0.1', 0))\nprint('ESCAPED')")


def test_udp(attack):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 0))
        server.settimeout(5)
        port = server.getsockname()[1]
        attack(
            "import socket\ns = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
            f"s.sendto(b'out', ('127.0.0.1', {port}))\nprint('ESCAPED')"
        )
        assert server.recv(10) == b"out"  # the control's datagram
        server.settimeout(0.2)
        with pytest.raises(TimeoutError):
            server.recv(10)


@pytest.mark.parametrize("kind", ["SOCK_STREAM", "SOCK_DGRAM"])
@pytest.mark.parametrize("abstract", [False, True])
def test_unix(attack, tmp_path, kind, abstract):
    address = f"\0appo-{tmp_path.name}-{kind}" if abstract else str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX, getattr(socket, kind)) as server:
        server.bind(address)
        if kind == "SOCK_STREAM":
            server.listen()
        attack(
            f"import socket\ns = socket.socket(socket.AF_UNIX, socket.{kind})\n"
            f"s.connect({address!r})\nprint('ESCAPED')"
        )


def test_unix_by_way_of_a_socket_pair(attack, tmp_path):
    """A datagram pair would be a socket without `socket`: it can send to any named one."""
    address = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
        server.bind(address)
        attack(
            "import socket\na, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)\n"
            f"a.sendto(b'out', {address!r})\nprint('ESCAPED')"
        )


def test_netlink(attack):
    attack("import socket\nsocket.socket(socket.AF_NETLINK, socket.SOCK_RAW)\nprint('ESCAPED')")


def test_asyncio_still_works(boxed):
    code = "import asyncio\nasync def f():\n    await asyncio.sleep(0)\n    return 42\nprint(asyncio.run(f()))"
    assert boxed(code).stdout == "42\n"
