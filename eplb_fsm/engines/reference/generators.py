"""Seeded generators of the two machine-written domains of the corpus: server logs and JSON records."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator

_PATHS = (
    "/",
    "/login",
    "/logout",
    "/api/v1/orders",
    "/api/v1/orders/{n}",
    "/api/v2/users/{n}/avatar",
    "/health",
    "/static/app.{h}.js",
    "/static/site.{h}.css",
    "/search?q={w}&page={s}",
    "/cart",
    "/checkout",
    "/metrics",
)
_WORDS = (
    "lamp",
    "river",
    "copper",
    "window",
    "garden",
    "signal",
    "marble",
    "harbor",
    "winter",
    "ladder",
    "orchid",
    "pencil",
    "saddle",
    "thunder",
    "velvet",
    "anchor",
    "basket",
    "candle",
    "domino",
    "ember",
    "falcon",
)
_AGENTS = (
    "Mozilla/5.0 (X11; Linux x86_64; rv:128.0) Gecko/20100101 Firefox/128.0",
    "curl/8.5.0",
    "okhttp/4.12.0",
    "Mozilla/5.0 (Macintosh; Intel Mac OS X 10_15_7) AppleWebKit/605.1.15",
    "kube-probe/1.29",
)
_UNITS = ("sshd", "systemd", "kernel", "cron", "dhclient", "postfix/smtpd", "dockerd", "rsyslogd")
_EVENTS = (
    "Accepted publickey for {w} from {ip} port {n} ssh2",
    "Started Session {n} of User {w}.",
    "Failed password for invalid user {w} from {ip} port {n} ssh2",
    "Out of memory: Killed process {n} ({w})",
    "eth0: link up, 1000 Mbps, full duplex",
    "connection from unknown[{ip}] timed out after {s} s",
    "DHCPACK from {ip} (xid=0x{h})",
    "run-parts(/etc/cron.hourly) finished in {s} ms",
)
_MESSAGES = (
    "request served",
    "cache miss",
    "retrying upstream",
    "pool exhausted",
    "lease renewed",
    "job finished",
    "slow query",
    "checkpoint written",
    "circuit opened",
    "consumer rebalanced",
)
_LEVELS = ("INFO", "INFO", "INFO", "INFO", "DEBUG", "DEBUG", "WARN", "ERROR")


class _Fields:
    """Random values that the templates of one generator refer to, and a clock that only goes forward."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.seconds = self.random.randrange(28 * 86400)

    def tick(self) -> str:
        self.seconds += self.random.choice((0, 0, 1, 1, 2, 5, 30))
        day, second = divmod(self.seconds % (28 * 86400), 86400)
        return f"{day + 1:02d} {second // 3600:02d}:{second // 60 % 60:02d}:{second % 60:02d}"

    def address(self) -> str:
        return f"10.{self.random.randrange(4)}.{self.random.randrange(16)}.{self.random.randrange(256)}"

    def fill(self, template: str) -> str:
        pick = self.random
        return template.format(
            n=pick.randrange(100, 60000),
            s=pick.randrange(1, 90),
            h=f"{pick.getrandbits(32):08x}",
            w=pick.choice(_WORDS),
            ip=self.address(),
        )


def _access_line(fields: _Fields) -> str:
    pick = fields.random
    day, clock = fields.tick().split()
    status = pick.choices((200, 301, 304, 404, 403, 500, 502), (80, 3, 6, 6, 2, 2, 1))[0]
    method = pick.choices(("GET", "POST", "PUT", "DELETE"), (80, 14, 4, 2))[0]
    path = fields.fill(pick.choice(_PATHS))
    return (
        f'{fields.address()} - - [{day}/Mar/2025:{clock} +0000] "{method} {path} HTTP/1.1" {status} '
        f'{pick.randrange(90, 42000)} "-" "{pick.choice(_AGENTS)}"'
    )


def _system_line(fields: _Fields) -> str:
    pick = fields.random
    event = fields.fill(pick.choice(_EVENTS))
    clock = fields.tick()
    source = f"node-{pick.randrange(8):02d} {pick.choice(_UNITS)}[{pick.randrange(300, 32000)}]"
    return f"Mar {clock} {source}: {event}"


def _service_line(fields: _Fields) -> str:
    pick = fields.random
    day, clock = fields.tick().split()
    at = f"2025-03-{day}T{clock}.{pick.randrange(1000):03d}Z"
    source = f"{pick.choice(_LEVELS):<5} svc={pick.choice(_WORDS)} trace={pick.getrandbits(64):016x}"
    return f'{at} {source} dur_ms={pick.expovariate(0.02):.2f} msg="{pick.choice(_MESSAGES)}"'


def _log_pieces(seed: int) -> Iterator[str]:
    fields = _Fields(seed)
    while True:
        line = fields.random.choice((_access_line, _system_line, _service_line))
        yield "".join(line(fields) + "\n" for _ in range(fields.random.randrange(8, 40)))


def _order(fields: _Fields) -> dict[str, object]:
    pick = fields.random
    lines = [
        {
            "sku": f"{pick.choice(_WORDS)[:3].upper()}-{pick.randrange(1000, 9999)}",
            "qty": pick.randrange(1, 9),
            "price": round(pick.uniform(0.5, 400), 2),
        }
        for _ in range(pick.randrange(1, 5))
    ]
    return {
        "id": pick.randrange(10**6, 10**7),
        "customer": {"name": pick.choice(_WORDS), "vip": pick.random() < 0.1},
        "lines": lines,
        "paid": pick.random() < 0.8,
        "note": None,
    }


def _reading(fields: _Fields) -> dict[str, object]:
    pick = fields.random
    return {
        "sensor": f"t{pick.randrange(64)}",
        "at": 1_740_000_000 + fields.seconds + pick.randrange(1000),
        "values": [round(pick.gauss(20, 4), 3) for _ in range(pick.randrange(3, 12))],
        "ok": True,
    }


def _feature(fields: _Fields) -> dict[str, object]:
    pick = fields.random
    ring = [[round(pick.uniform(-180, 180), 5), round(pick.uniform(-90, 90), 5)] for _ in range(pick.randrange(3, 8))]
    return {
        "type": "Feature",
        "geometry": {"type": "Polygon", "coordinates": [ring]},
        "properties": {"name": pick.choice(_WORDS), "rank": pick.randrange(100)},
    }


def _json_pieces(seed: int) -> Iterator[str]:
    fields = _Fields(seed)
    while True:
        record = fields.random.choice((_order, _reading, _feature))
        indent = fields.random.choice((None, None, 2))
        yield json.dumps([record(fields) for _ in range(fields.random.randrange(2, 8))], indent=indent) + "\n"


def _collect(pieces: Iterator[str], size: int) -> bytes:
    text = bytearray()
    while len(text) < size:
        text += next(pieces).encode()
    return bytes(text[:size])


def log_text(seed: int, size: int) -> bytes:
    """Returns `size` bytes of web-server, system and service logs; the same seed gives the same bytes."""
    return _collect(_log_pieces(seed), size)


def json_text(seed: int, size: int) -> bytes:
    """Returns `size` bytes of JSON orders, readings and map features; the same seed gives the same bytes."""
    return _collect(_json_pieces(seed), size)


GENERATORS: dict[str, Callable[[int, int], bytes]] = {"logs": log_text, "json": json_text}
