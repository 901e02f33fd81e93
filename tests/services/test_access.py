"""Who gets in, and how far: tokens, scopes, owners, browsers' cookies, the names and the size of requests."""

from __future__ import annotations

import hmac
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from services import access, auth
from services.auth import Scope
from tests.services.api_support import Site, open_site, posted, problem_of, soon, trained
from tests.services.service_support import TINY_SPEC, YAML

_MIB = 2**20


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with open_site(tmp_path) as one:
        yield one


# -- every route -------------------------------------------------------------------------------------------------------


def routes_of(site: Site) -> set[tuple[str, str]]:
    """Every method and path that the application answers to, from its routes and from its document."""

    def walk(routes: Any) -> Iterator[tuple[str, str]]:
        for route in routes:
            inner = getattr(route, "original_router", None) or getattr(route, "app", None)
            if getattr(route, "methods", None) and getattr(route, "path", None):
                yield from ((method, route.path) for method in route.methods)
            elif hasattr(inner, "routes"):
                yield from walk(inner.routes)

    documented = {(method.upper(), path) for path, item in site.app.openapi()["paths"].items() for method in item}
    walked = set(walk(site.app.routes))
    assert documented <= walked, "the walk misses routes"
    return documented | walked


def asked(site: Site, method: str, path: str, token: str | None, **how: Any) -> Any:
    """Asks for a route with what would have an effect if its asker were let in."""
    place = path.replace("{sweep}", "anns").replace("{name}", "page.css")
    assert "{" not in place, f"say here what goes in {path}"
    body, media = TINY_SPEC, YAML
    if path.endswith("/extend"):
        body, media = '{"trials": 9}', {"Content-Type": "application/json"}
    headers = how.pop("headers", {}) | (media if method == "POST" else {})
    content = body if method == "POST" else None
    return site.client(token).request(method, place, content=content, headers=headers, **how)


def strangers(site: Site) -> dict[str, tuple[str | None, dict[str, str], dict[str, str]]]:
    """Ways to come without a valid token: bearer, headers, query."""
    right = site.token("ann", "admin")
    identity, secret = auth.split(right) or ("", "")
    revoked, expired = site.token("ann", "admin"), site.token("ann", "admin", expires_at_s=1.0)
    from services.store import AuditEntry

    assert site.store.revoke_token((auth.split(revoked) or ("",))[0], AuditEntry("ann", "token revoke"))
    other = (auth.split(site.token("bob", "admin")) or ("", ""))[1]
    return {
        "none": (None, {}, {}),
        "malformed": ("lsw_", {}, {}),
        "empty": (None, {"Authorization": "Bearer "}, {}),
        "no scheme": (None, {"Authorization": right}, {}),
        "wrong secret": (f"lsw_{identity}_{'A' * 43}", {}, {}),
        "another's secret": (f"lsw_{identity}_{other}", {}, {}),
        "unknown id": (f"lsw_{'0' * 12}_{secret}", {}, {}),
        "cut": (right[:-1], {}, {}),
        "longer": (right + "A", {}, {}),
        "revoked": (revoked, {}, {}),
        "expired": (expired, {}, {}),
        "basic": (None, {"Authorization": f"Basic {right}"}, {}),
        "query": (None, {}, {"token": right, "access_token": right}),
        "hash": (None, {"Authorization": f"Bearer lsw_{identity}_{auth.digest(secret)}"}, {}),
        "cookie": (None, {"Cookie": f"{access.COOKIE}={right[:-1]}"}, {}),
    }


def test_no_route_but_healthz_lets_a_stranger_in_and_nothing_happens(site: Site):
    site.enter("anns", *trained([0.5]), state="failed")
    ways, routes, documented = strangers(site), routes_of(site), site.app.openapi()["paths"]
    before = site.snapshot()
    open_to_all = set()
    for method, path in sorted(routes):
        for way, (token, headers, query) in ways.items():
            answer = asked(site, method, path, token, headers=headers, params=query)
            if answer.status_code != 401:
                open_to_all.add((method, path, answer.status_code))
                continue
            assert answer.headers["www-authenticate"].startswith("Bearer"), (way, path)
            # Pages are not in the document, and answer people.
            assert "problem+json" in answer.headers["content-type"] or path not in documented, (way, path)
            assert "anns" not in answer.text
    assert open_to_all == {("GET", "/healthz", 200)}
    assert site.snapshot() == before
    assert site.planner.planned == 0


MALFORMED = (b"{", b"[]", b'{"trials": "many"}', b"\xff\xfe", b"")


def test_no_stranger_learns_what_is_wrong_with_a_body(site: Site):
    site.enter("anns", *trained([0.5]), state="failed")
    token = site.token("ann")
    let_in, faults = set(), 0
    for method, path in sorted(routes_of(site)):
        place = path.replace("{sweep}", "anns").replace("{name}", "page.css")
        for body in MALFORMED if method == "POST" else ():
            sent = {"content": body, "headers": {"Content-Type": "application/json"}}
            for wrong in (None, "lsw_wrong"):
                answer = site.client(wrong).request(method, place, **sent)
                if answer.status_code != 401 or "www-authenticate" not in answer.headers:
                    let_in.add((path, body, answer.status_code))
            faults += site.client(token).request(method, place, **sent).status_code in (400, 422)
    assert not let_in
    assert faults >= 2 * len(MALFORMED), "whoever has a token is told"


def test_a_refused_body_is_counted_with_the_refused_tokens(site: Site):
    json = {"Content-Type": "application/json"}
    assert site.client("lsw_wrong").post("/v1/translate", content=b"{", headers=json).status_code == 401
    assert "lora_sweeps_refused_tokens_total 1.0" in site.client().get("/metrics").text


def test_refused_tokens_are_counted(site: Site):
    site.client("lsw_wrong").get("/v1/sweeps")
    assert "lora_sweeps_refused_tokens_total 1.0" in site.client().get("/metrics").text


def test_the_route_is_what_is_asked_for_and_not_what_the_host_header_makes_of_it(site: Site):
    for host in ("localhost/healthz?", "localhost/healthz#", "localhost\\healthz", "x@localhost"):
        assert site.client(None, Host=host).get("/v1/sweeps").status_code in (400, 401)
    assert site.client(None).get("/v1/sweeps?/healthz").status_code == 401
    assert site.client(None).get("/healthz/../v1/sweeps").status_code in (401, 404)


def test_a_hash_is_compared_in_constant_time_for_an_unknown_id_too(site: Site, monkeypatch: pytest.MonkeyPatch):
    compared: list[tuple[str, str]] = []
    real = hmac.compare_digest

    def noted(one: str, other: str) -> bool:
        compared.append((one, other))
        return real(one, other)

    monkeypatch.setattr(hmac, "compare_digest", noted)
    secret = "A" * 43
    assert site.client(f"lsw_{'0' * 12}_{secret}").get("/v1/sweeps").status_code == 401
    assert compared == [(auth.digest(secret), "0" * 64)]
    assert site.client().get("/v1/sweeps").status_code == 200
    assert len(compared) == 2


def test_the_store_has_no_secret_of_a_token(site: Site):
    secret = (auth.split(site.admin) or ("", ""))[1]
    assert secret not in repr(site.snapshot())
    assert secret.encode() not in b"".join(path.read_bytes() for path in site.home.glob("ledger.db*"))


def test_a_token_that_expires_later_opens_until_then(site: Site):
    assert site.client(site.token("ann", expires_at_s=soon(3600))).get("/v1/sweeps").status_code == 200


# -- scopes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scope", "refused"),
    [
        ("read", {"submit", "plan", "cancel", "resume", "extend", "audit"}),
        ("submit", {"audit"}),
        ("admin", set()),
    ],
)
def test_each_scope_reaches_so_far(site: Site, scope: Scope, refused: set[str]):
    site.enter("anns", *trained([0.5]), state="failed")
    token = site.token("ann", scope)
    found = set()
    for path, item in site.app.openapi()["paths"].items():
        for method, what in item.items():
            answer = asked(site, method.upper(), path, token)
            assert answer.status_code != 401
            if answer.status_code == 403:
                assert problem_of(answer, 403)["detail"].endswith(f"this token has scope {scope}")
                found.add(what["operationId"])
    assert found == refused


def test_a_token_that_may_only_read_changes_nothing(site: Site):
    site.enter("anns", *trained([0.5]), state="failed")
    token = site.token("ann", "read")
    before = site.snapshot()
    for action in ("cancel", "resume", "extend"):
        problem_of(asked(site, "POST", f"/v1/sweeps/{{sweep}}/{action}", token), 403)
    problem_of(posted(site.client(token)), 403)
    assert site.snapshot() == before


def test_a_priority_above_everybodys_takes_scope_admin(site: Site):
    detail = problem_of(posted(site.client(site.token("ann")), priority=1), 403)["detail"]
    assert "takes scope admin" in detail
    assert posted(site.client(site.token("ann")), priority=-5).status_code == 201
    assert posted(site.client(), priority=1).status_code == 201


def on_a_sweep(site: Site) -> list[tuple[str, str]]:
    """Method and path of every route that is about one sweep."""
    return sorted((m, p) for m, p in routes_of(site) if p.startswith("/v1/sweeps/{sweep}"))


def test_anothers_sweep_is_not_there_on_any_route(site: Site):
    site.enter("anns", *trained([0.5, 0.4]), state="failed")
    bob = site.token("bob")
    before = site.snapshot()
    assert len(on_a_sweep(site)) >= 10
    for method, path in on_a_sweep(site):
        query = {"format": "peft"} if path.endswith("export") else {}
        found = problem_of(asked(site, method, path, bob, params=query), 404)
        assert "'anns'" in found["detail"]
        assert "ann's" not in found["detail"]
    assert site.client(bob).get("/v1/sweeps").json()["sweeps"] == []
    problem_of(site.client(bob).get("/v1/sweeps/last"), 404)
    problem_of(site.client(bob).get("/v1/sweeps/tiny"), 404)
    assert site.snapshot() == before


def test_a_shared_sweep_is_seen_by_all_and_changed_by_its_owner(site: Site):
    site.enter("anns", *trained([0.5, 0.4]), state="failed", shared=True)
    bob = site.token("bob")
    for method, path in on_a_sweep(site):
        query = {"format": "peft"} if path.endswith("export") else {}
        answer = asked(site, method, path, bob, params=query)
        if method == "POST":
            assert "ann's, who shares the sight of it only" in problem_of(answer, 403)["detail"]
        else:
            assert answer.status_code == 200, (path, answer.text)
    assert site.store.get("anns").state == "failed"
    assert [one["sweep"] for one in site.client(bob).get("/v1/sweeps").json()["sweeps"]] == ["anns"]


def test_an_administrator_sees_and_changes_everybodys(site: Site):
    site.enter("anns", *trained([0.5]), state="failed")
    assert asked(site, "POST", "/v1/sweeps/{sweep}/resume", "").status_code == 202
    assert site.store.get("anns").owner == "ann"


# -- browsers ----------------------------------------------------------------------------------------------------------


def test_a_cookie_opens_reading_and_only_our_own_pages_change_things_with_it(site: Site):
    site.enter("anns", *trained([0.5]), state="failed")
    cookie = {"Cookie": f"{access.COOKIE}={site.token('ann')}"}
    assert site.client(None).get("/v1/sweeps", headers=cookie).status_code == 200
    before = site.snapshot()
    for site_header in ({}, *({"Sec-Fetch-Site": name} for name in ("cross-site", "same-site", "none", "x"))):
        problem_of(site.client(None).post("/v1/sweeps/anns/resume", headers=cookie | site_header), 401)
        problem_of(posted(site.client(None), headers=cookie | site_header), 401)
    assert site.snapshot() == before
    own = cookie | {"Sec-Fetch-Site": "same-origin"}
    assert site.client(None).post("/v1/sweeps/anns/resume", headers=own).status_code == 202


def test_a_wrong_bearer_is_not_mended_by_a_cookie(site: Site):
    cookie = {"Cookie": f"{access.COOKIE}={site.admin}"}
    assert site.client("lsw_wrong").get("/v1/sweeps", headers=cookie).status_code == 401


@pytest.mark.parametrize("path", ["/healthz", "/v1/sweeps", "/nowhere", "/v1/sweeps/x%00"])
def test_every_answer_keeps_browsers_from_guessing(site: Site, path: str):
    headers = site.client().get(path).headers
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["x-frame-options"] == "DENY"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["cache-control"] == "no-store"
    assert headers["content-security-policy"].startswith("default-src 'none'")
    assert "access-control-allow-origin" not in headers


# -- names and sizes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "127.0.0.1.nip.io", "", "localhost:x"])
def test_a_foreign_host_is_refused_on_every_route_but_healthz(site: Site, host: str):
    assert site.client("", Host=host).get("/healthz").status_code == 200
    for path in ("/readyz", "/v1/sweeps", "/metrics"):
        answer = site.client("", Host=host).get(path)
        assert "LORA_SWEEPS_ALLOWED_HOSTS" in problem_of(answer, 400)["detail"]
        assert answer.headers["x-content-type-options"] == "nosniff"


def test_hosts_that_the_administrator_names_are_let_in(tmp_path: Path):
    with open_site(tmp_path, allowed_hosts=("sweeps.example", "*.team.example")) as site:
        for host in ("sweeps.example", "sweeps.example:8321", "a.team.example", "localhost:1", "127.0.0.1", "[::1]:2"):
            assert site.client("", Host=host).get("/v1/sweeps").status_code == 200
        assert site.client("", Host="www.sweeps.example").get("/v1/sweeps").status_code == 400


class Chunks:
    """A body without an announced length; it counts what is taken of it."""

    def __init__(self, size: int, pieces: int, first: bytes = b"") -> None:
        self.size, self.pieces, self.first, self.taken = size, pieces, first, 0

    def __iter__(self) -> Iterator[bytes]:
        yield self.first
        for _ in range(self.pieces):
            self.taken += self.size
            yield b"#" * (self.size - 1) + b"\n"


@pytest.mark.parametrize("path", ["/v1/sweeps", "/v1/plan", "/v1/translate", "/v1/sweeps/anns/extend"])
def test_a_body_beyond_a_mebibyte_is_refused(site: Site, path: str):
    site.enter("anns", *trained([0.5]), state="failed")
    media = YAML if path in ("/v1/sweeps", "/v1/plan") else {"Content-Type": "application/json"}
    before = site.snapshot()
    announced = site.client().post(path, content=b"#" * (_MIB + 1), headers=media)
    assert "at most 1,048,576 bytes" in problem_of(announced, 413)["detail"]
    unannounced = site.client().post(path, content=iter(Chunks(_MIB // 2, 3)), headers=media)
    assert "at most 1,048,576 bytes" in problem_of(unannounced, 413)["detail"]
    assert site.snapshot() == before


def test_a_body_of_a_mebibyte_is_taken(site: Site):
    spec = TINY_SPEC + "#" * (_MIB - len(TINY_SPEC))
    assert posted(site.client(), spec).status_code == 201


@pytest.mark.parametrize("length", ["9" * 5000, "-1", "1e3", "x", "²"])
def test_an_announced_length_that_is_none_is_refused(site: Site, length: str):
    headers = YAML | {"Content-Length": length.encode("latin-1")}
    problem_of(site.client().post("/v1/plan", content=TINY_SPEC, headers=headers), 413)
