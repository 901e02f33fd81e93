"""The pages: as HTTP, and in a browser."""

from __future__ import annotations

import importlib.util
import re
import shutil
import time
from collections.abc import Callable, Iterator

import httpx2 as httpx
import pytest
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page, Route, expect, sync_playwright

from services import pages, templating
from services.access import COOKIE
from services.store import AuditEntry
from sweeps.events import Delivered, SweepEnded, TrialTold
from tests.services.page_support import Still, begin, certificate, standing_still, trial

HTML = {"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
OTHER_SITES = ("http://localhost:9", "http://127.0.0.1:9")
"""Another site, and the same site at another port, where cookies go along: never ours."""


@pytest.fixture(scope="module")
def still(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Still]:
    """A service that many tests share: each has users of its own."""
    with standing_still(tmp_path_factory.mktemp("pages") / "home") as one:
        yield one


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A Chromium."""
    if CHROMIUM is None:
        pytest.skip("needs a Chromium: none of chromium, chromium-browser, google-chrome is installed")
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        expect.set_options(timeout=20_000)
        yield launched
        launched.close()


@pytest.fixture
def visit(browser: Browser, still: Still) -> Iterator[Callable[..., Page]]:
    """Opens a browser of its own, logged in with a token; what its console complained of fails the test."""
    contexts: list[BrowserContext] = []
    complaints: list[str] = []

    def open_tab(token: str | None, **options: object) -> Page:
        context = browser.new_context(base_url=still.url, **options)
        contexts.append(context)
        if token is not None:
            context.add_cookies([{"name": COOKIE, "value": token, "url": still.url, "sameSite": "Strict"}])
        tab = context.new_page()
        tab.set_default_timeout(20_000)
        tab.on("console", lambda said: complaints.append(said.text) if is_complaint(said) else None)
        tab.on("pageerror", lambda error: complaints.append(str(error)))
        return tab

    yield open_tab
    for context in contexts:
        context.close()
    assert not complaints


def is_complaint(said: ConsoleMessage) -> bool:
    """Whether a line of the console speaks of a fault; what status answers had is a test's own matter."""
    return said.type in ("error", "warning") and "responded with a status of" not in said.text


def client(still: Still, token: str | None = None, **headers: str) -> httpx.Client:
    cookies = {} if token is None else {COOKIE: token}
    return httpx.Client(base_url=still.url, cookies=cookies, headers=HTML | headers, timeout=60)


def finished(still: Still, owner: str, trials: int = 3) -> str:
    """A sweep that has finished."""
    sweep = still.submit("done", owner=owner, trials=trials)
    still.add(sweep, begin())
    for number in range(trials):
        still.end_trial(sweep, number, 0.5 - number / 10)
    still.add(sweep, certificate(0))
    still.finish(sweep)
    return sweep


def running(still: Still, owner: str) -> str:
    """A sweep that has just begun."""
    sweep = still.submit("runs", owner=owner)
    still.add(sweep, begin())
    still.move(sweep, "running")
    return sweep


# -- who may see them --------------------------------------------------------------------------------------------------

ROUTES = [
    (method, re.sub(r"\{name\}", "page.css", re.sub(r"\{sweep\}", "x", route.path)))
    for route in pages.router.routes
    for method in sorted(route.methods)
]


@pytest.mark.parametrize(("method", "path"), ROUTES)
@pytest.mark.parametrize("token", [None, "lsw_0123456789ab_" + "x" * 43, "nonsense"])
def test_without_a_valid_token_no_page_opens(still: Still, method: str, path: str, token: str | None):
    with client(still, token, **{"Sec-Fetch-Site": "same-origin"}) as browser:
        answer = browser.request(method, path)
        assert answer.status_code == 401
        assert 'name="token"' in answer.text, "who reads HTML is asked for a token"
        assert answer.headers["www-authenticate"].startswith("Bearer")
        assert "set-cookie" not in answer.headers
        plain = browser.request(method, path, headers={"Accept": "application/json"})
        assert plain.status_code == 401
        assert plain.headers["content-type"] == "application/problem+json"


def test_a_login_sets_a_cookie_that_no_script_and_no_other_site_gets(still: Still):
    token = still.token("hal")
    with client(still) as browser:
        answer = browser.post("/login", data={"token": f"  {token} ", "next": "/"})
        assert (answer.status_code, answer.headers["location"]) == (303, "/")
        cookie = answer.headers["set-cookie"]
        assert cookie.startswith(f"{COOKIE}={token}; ")
        for part in ("HttpOnly", "SameSite=strict", "Path=/", "Max-Age=604800"):
            assert part in cookie
        assert "Secure" not in cookie
        assert browser.get("/").status_code == 200
        secure = browser.post("/login", data={"token": token}, headers={"X-Forwarded-Proto": "https"})
        assert "; Secure" in secure.headers["set-cookie"]
    assert [one.action for one in still.service.store.audit(limit=50) if one.user == "hal"] == ["login", "login"]


@pytest.mark.parametrize(
    ("wanted", "there"),
    [
        ("/sweeps/tiny-000000", "/sweeps/tiny-000000"),
        ("/sweeps/tiny-000000/log", "/sweeps/tiny-000000/log"),
        ("//evil.example", "/"),
        ("https://evil.example/", "/"),
        ("/\\evil.example", "/"),
        ("/v1/sweeps", "/"),
        ("", "/"),
    ],
)
def test_a_login_leads_to_a_page_of_ours_only(still: Still, wanted: str, there: str):
    with client(still) as browser:
        answer = browser.post("/login", data={"token": still.token(), "next": wanted})
        assert (answer.status_code, answer.headers["location"]) == (303, there)
        assert f'name="next" value="{there}"' in browser.post("/login", data={"token": "no", "next": wanted}).text


@pytest.mark.parametrize(
    ("form", "fault"),
    [
        ({"token": "nonsense"}, "opens nothing here"),
        ({"token": " "}, "none was typed in"),
        ({}, "none was typed in"),
        ({f"field{i}": "x" for i in range(50)}, "none was typed in"),
    ],
)
def test_a_login_that_fails_says_why(still: Still, form: dict[str, str], fault: str):
    with client(still) as browser:
        answer = browser.post("/login", data=form)
        assert answer.status_code == 401
        assert fault in answer.text
        assert "set-cookie" not in answer.headers


def test_an_expired_token_is_told_from_none(still: Still):
    with client(still, still.token("old", expires_at_s=time.time() - 1)) as browser:
        assert "has expired, or was revoked" in browser.get("/").text


@pytest.mark.parametrize("site", ["cross-site", "same-site", "none"])
def test_no_page_but_ours_changes_anything(still: Still, site: str):
    sweep = running(still, "ivy")
    with client(still, still.token("ivy"), **{"Sec-Fetch-Site": site}) as browser:
        for path in (f"/sweeps/{sweep}/cancel", f"/sweeps/{sweep}/resume", "/logout"):
            answer = browser.post(path)
            assert answer.status_code == 401
            assert "Nothing was done" in answer.text
    assert still.service.store.get(sweep).wanted == ""


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_no_page_but_ours_logs_anybody_in(still: Still, site: str):
    with client(still, **{"Sec-Fetch-Site": site}) as browser:
        answer = browser.post("/login", data={"token": still.token("mallory")})
        assert answer.status_code == 401
        assert "set-cookie" not in answer.headers


def test_others_sweeps_are_not_there(still: Still):
    sweep = finished(still, "judy")
    with client(still, still.token("kim")) as browser:
        assert sweep not in browser.get("/").text
        for path in ("", "/log", "/export", "/export.zip"):
            answer = browser.get(f"/sweeps/{sweep}{path}")
            assert (answer.status_code, answer.headers["content-type"]) == (404, "text/html; charset=utf-8")
        posted = browser.post(f"/sweeps/{sweep}/cancel", headers={"Sec-Fetch-Site": "same-origin"})
        assert posted.status_code == 404
    with client(still, still.token("root", "admin")) as browser:
        assert sweep in browser.get("/").text


def test_who_may_only_read_gets_no_buttons(still: Still):
    sweep = running(still, "lea")
    with client(still, still.token("lea", "read"), **{"Sec-Fetch-Site": "same-origin"}) as browser:
        text = browser.get(f"/sweeps/{sweep}").text
        assert 'id="cancel"' not in text
        assert browser.post(f"/sweeps/{sweep}/cancel").status_code == 403
    with client(still, still.token("lea", "submit")) as browser:
        assert 'id="cancel"' in browser.get(f"/sweeps/{sweep}").text
    assert still.service.store.get(sweep).wanted == ""


# -- what they say -----------------------------------------------------------------------------------------------------


def test_the_queue_has_what_runs_first_then_what_waits_then_what_has_ended(still: Still):
    ended, waits, second = finished(still, "mia"), still.submit("waits", owner="mia"), still.submit("next", owner="mia")
    runs = running(still, "mia")
    with client(still, still.token("mia")) as browser:
        text = browser.get("/").text
        places = [text.index(f"/sweeps/{sweep}") for sweep in (runs, waits, second, ended)]
        assert places == sorted(places)
        assert "3 of 3" in text
        assert "0.3 nats" in text
        assert re.search(r"in the queue|devices, of which", text), "why the queued ones wait"
        only = browser.get("/", params={"state": "running"}).text
        assert runs in only
        assert waits not in only
        assert ended not in only


def test_a_long_queue_comes_in_pages(still: Still):
    sweeps = [still.submit("many", owner="ned") for _ in range(51)]
    for sweep in sweeps:
        still.move(sweep, "cancelled")
    with client(still, still.token("ned")) as browser:
        first = browser.get("/").text
        shown = re.findall(r'<a href="/sweeps/([^"]+)">', first)
        assert shown == sweeps[:0:-1]
        following = re.search(r'href="(/\?after=[^"]+)" rel="next"', first)
        assert following is not None
        last = browser.get(following[1]).text
        assert re.findall(r'<a href="/sweeps/([^"]+)">', last) == sweeps[:1]
        assert 'rel="next"' not in last


def test_an_empty_queue_says_how_to_fill_it(still: Still):
    with client(still, still.token("new")) as browser:
        assert f"lora-sweeps submit SPEC --server {still.url}" in browser.get("/").text


def test_a_finished_sweep_has_its_best_point_and_links(still: Still):
    sweep = finished(still, "oda")
    with client(still, still.token("oda")) as browser:
        text = browser.get(f"/sweeps/{sweep}").text
        assert "eval/loss 0.3 nats" in text
        assert "with default init" in text
        best = browser.get(f"/v1/sweeps/{sweep}/best").json()
        assert f">{best['default_init']['lr']:.4g}<" in text
        assert f">{best['default_init']['alpha']:.4g}<" in text
        for path in ("report?format=html", "report?format=md", "report?format=json", "adapter", "best", "events"):
            assert f'href="/v1/sweeps/{sweep}/{path}"' in text
        for form in ("peft", "trl", "axolotl", "llamafactory", "unsloth", "hf_trainer", "loralib"):
            assert f'href="/sweeps/{sweep}/export?format={form}"' in text
            page = browser.get(f"/sweeps/{sweep}/export", params={"format": form})
            assert page.status_code == 200
            archive = browser.get(f"/sweeps/{sweep}/export.zip", params={"format": form})
            assert archive.content[:2] == b"PK"
        assert "alpha held at" in text, "the plan"
        assert "search: {method: random" in text, "the spec"
        assert "1 bit-identical" in text


def test_trials_come_best_first_and_the_rest_is_left_to_the_report(still: Still):
    sweep = still.submit("wide", owner="pia", trials=203)
    still.add(sweep, begin())
    still.add(sweep, *[event for number in range(202) for event in trial(number, 1 + number / 1000)])
    still.add(
        sweep, *trial(202, 9)[:3], TrialTold(trial=202, state="pruned", value=0.1, reason="not in the best third")
    )
    with client(still, still.token("pia")) as browser:
        text = browser.get(f"/sweeps/{sweep}").text
    table = text[text.index('id="trials"') :]
    rows = [int(number) for number in re.findall(r'<th scope="row" class="n">(\d+)</th>', table)]
    assert rows == list(range(200))
    assert "3 more are in the report" in table


def test_links_lead_to_mlflow_and_ray(still: Still, monkeypatch: pytest.MonkeyPatch):
    served, by_hand = still.submit(owner="quy"), still.submit(owner="quy", tracking_uri="sqlite:////srv/mlflow.db")
    settings = still.service.settings.model_copy(update={"ray_address": "http://head.example:8265"})
    with client(still, still.token("quy")) as browser:
        text = browser.get(f"/sweeps/{served}").text
        assert "nothing there yet" in text
        assert "Ray dashboard" not in text
        for sweep in (served, by_hand):
            still.add(sweep, Delivered(up_to=1, experiment_id="7", parent_run_id="r8"))
        monkeypatch.setattr(still.service, "settings", settings)
        text = browser.get(f"/sweeps/{served}").text
        assert 'href="http://127.0.0.1:5000/#/experiments/7/runs/r8"' in text
        assert 'href="http://head.example:8265"' in text
        assert "mlflow ui" not in text
        assert "mlflow ui --backend-store-uri sqlite:////srv/mlflow.db" in browser.get(f"/sweeps/{by_hand}").text


def test_a_sweep_that_failed_says_why_and_may_be_resumed(still: Still):
    sweep = still.submit("fails", owner="ray")
    still.add(sweep, begin(), SweepEnded(state="failed", reason="x"))
    still.move(sweep, "failed", "its driver died")
    with client(still, still.token("ray"), **{"Sec-Fetch-Site": "same-origin"}) as browser:
        text = browser.get(f"/sweeps/{sweep}").text
        assert "its driver died" in text
        assert 'id="cancel"' not in text
        answer = browser.post(f"/sweeps/{sweep}/resume")
        assert (answer.status_code, answer.headers["location"]) == (303, f"/sweeps/{sweep}")
        assert 'id="resume"' not in browser.get(f"/sweeps/{sweep}").text
        refused = browser.post(f"/sweeps/{sweep}/resume")
        assert refused.status_code == 409
        assert "what is resumed must be paused" in refused.text
    assert still.service.store.get(sweep).state == "queued"


def test_a_wrong_address_is_answered_in_words(still: Still):
    with client(still, still.token("sam")) as browser:
        for path, status in (("/?state=lost", 422), ("/?after=x", 422), ("/sweeps/none", 404), ("/static/x", 404)):
            answer = browser.get(path)
            assert answer.status_code == status
            assert "<h1>" in answer.text
        assert browser.get("/static/%2e%2e%2fpages.py").status_code == 404


def test_files_of_pages_are_kept_by_browsers_and_by_nobody_else(still: Still):
    with client(still, still.token("tom")) as browser:
        page = browser.get("/")
        assert page.headers["cache-control"] == "no-store"
        for url in re.findall(r'(?:href|src)="(/static/[^"]+)"', page.text):
            answer = browser.get(url)
            assert answer.headers["cache-control"].startswith("private, ")
            assert answer.headers["content-type"] in ("text/css; charset=utf-8", "text/javascript; charset=utf-8")
            assert answer.headers["x-content-type-options"] == "nosniff"


# -- in a browser ------------------------------------------------------------------------------------------------------


def test_the_keyboard_alone_logs_in_and_gets_around(still: Still, visit: Callable[..., Page]):
    token, sweep = still.token("uma"), finished(still, "uma")
    tab = visit(None)
    tab.goto("/")
    expect(tab).to_have_title("Log in · lora-sweeps")
    tab.keyboard.type("nonsense")
    tab.keyboard.press("Enter")
    expect(tab.get_by_role("alert")).to_contain_text("opens nothing here")
    tab.keyboard.type(token)
    tab.keyboard.press("Enter")
    expect(tab.get_by_role("heading", level=1)).to_have_text("Sweeps")
    tab.keyboard.press("Tab")
    expect(tab.get_by_role("link", name="Skip to the content")).to_be_focused()
    tab.keyboard.press("Enter")
    for _ in range(20):
        tab.keyboard.press("Tab")
        if tab.evaluate("document.activeElement.getAttribute('href')") == f"/sweeps/{sweep}":
            break
    tab.keyboard.press("Enter")
    expect(tab.get_by_role("heading", level=1)).to_have_text(sweep)
    tab.get_by_role("button", name="Log out").press("Enter")
    expect(tab).to_have_title("Log in · lora-sweeps")
    assert tab.context.cookies() == []


def test_progress_is_live(still: Still, visit: Callable[..., Page]):
    sweep = running(still, "vic")
    tab = visit(still.token("vic"))
    tab.goto(f"/sweeps/{sweep}")
    tab.evaluate("window.same = true")
    expect(tab.get_by_role("status")).to_have_text("Live: kept up to date. running: 0 of 4 trials ended")
    expect(tab.locator("#live")).to_contain_text("No trial has finished yet.")
    for number in range(4):
        still.end_trial(sweep, number, 0.5 - number / 10)
        expect(tab.locator(".progress")).to_contain_text(f"{number + 1} of 4")
        expect(tab.locator(".progress progress")).to_have_attribute("value", str(number + 1))
    expect(tab.locator(".best")).to_have_text("eval/loss 0.2 nats")
    expect(tab.locator("svg path")).to_have_count(1)
    tab.locator("#cancel").focus()
    still.add(sweep, certificate(0))
    expect(tab.locator("#certificates")).to_contain_text("holds")
    expect(tab.locator("#cancel")).to_be_focused()
    still.finish(sweep)
    expect(tab.locator(".lead")).to_contain_text("finished")
    expect(tab.get_by_role("status")).to_have_text("Nothing more comes by itself. finished: 4 of 4 trials ended")
    expect(tab.locator("#cancel")).to_have_count(0)
    expect(tab.get_by_role("link", name="Adapter")).to_be_visible()
    assert tab.evaluate("window.same") is True, "the page was never loaded again"


def test_the_queue_is_looked_at_again(still: Still, visit: Callable[..., Page]):
    tab = visit(still.token("wes"))
    tab.clock.install()
    tab.goto("/")
    expect(tab.locator("#live")).to_contain_text("No sweeps yet")
    expect(tab.get_by_role("status")).to_have_text("Up to date; looks again every 5 s.")
    sweep = still.submit(owner="wes")
    tab.clock.fast_forward(5_000)
    expect(tab.get_by_role("link", name=sweep)).to_be_visible()


def test_a_connection_that_is_lost_is_said_and_found_again(still: Still, visit: Callable[..., Page]):
    sweep = running(still, "xia")
    tab = visit(still.token("xia"))

    def refuse(route: Route) -> None:
        route.fulfill(status=503)

    tab.clock.install()
    tab.route("**/events*", refuse)
    tab.goto(f"/sweeps/{sweep}")
    expect(tab.get_by_role("status")).to_have_text("The connection is lost; trying again.")
    tab.unroute("**/events*", refuse)
    tab.clock.fast_forward(5_000)
    expect(tab.get_by_role("status")).to_have_text("Live: kept up to date. running: 0 of 4 trials ended")
    still.end_trial(sweep, 0, 0.5)
    expect(tab.locator(".progress")).to_contain_text("1 of 4")


def test_who_is_logged_out_meanwhile_is_told(still: Still, visit: Callable[..., Page]):
    token, sweep = still.token("yan"), running(still, "yan")
    tab = visit(token)
    tab.goto(f"/sweeps/{sweep}")
    expect(tab.get_by_role("status")).to_contain_text("Live:")
    assert still.service.store.revoke_token(token.split("_")[1], AuditEntry("test", "token revoke"))
    still.end_trial(sweep, 0, 0.5)
    expect(tab.get_by_role("status")).to_have_text("You are logged out. Reload the page to log in.")


def test_everything_works_without_script(still: Still, visit: Callable[..., Page]):
    token, sweep = still.token("zoe"), running(still, "zoe")
    tab = visit(None, java_script_enabled=False)
    tab.goto(f"/sweeps/{sweep}")
    tab.get_by_label("Token").fill(token)
    tab.get_by_role("button", name="Log in").click()
    expect(tab.get_by_role("heading", level=1)).to_have_text(sweep)
    still.end_trial(sweep, 0, 0.5)
    tab.get_by_role("link", name="refresh").click()
    expect(tab.locator(".progress")).to_contain_text("1 of 4")
    tab.get_by_role("button", name="Cancel").click()
    expect(tab.locator(".lead")).to_contain_text("asked to cancel by zoe")
    expect(tab.get_by_role("button", name="Cancel")).to_have_count(0)
    tab.get_by_role("link", name="All sweeps").click()
    expect(tab.get_by_role("link", name=sweep)).to_be_visible()
    assert still.service.store.get(sweep).wanted == "cancel"


def test_a_sweep_that_waits_is_cancelled_and_resumed_at_a_button(still: Still, visit: Callable[..., Page]):
    sweep = still.submit(owner="abe")
    tab = visit(still.token("abe"))
    tab.goto(f"/sweeps/{sweep}")
    tab.get_by_role("button", name="Cancel").click()
    expect(tab.locator(".lead")).to_contain_text("cancelled")
    tab.get_by_role("button", name="Resume").click()
    expect(tab.locator(".lead")).to_contain_text("queued")
    assert still.service.store.get(sweep).state == "queued"


def test_nothing_that_users_write_becomes_part_of_the_page(still: Still, visit: Callable[..., Page]):
    bad = "</pre><script>document.title = 'taken'</script><img src=x onerror=\"document.title = 'taken'\">"
    sweep = still.submit(owner="bob", comment=f"# {bad}\n", source=f"{bad}.yaml")
    still.add(sweep, begin(), *trial(0, 0.5), *trial(1, 0.4)[:3])
    still.add(sweep, TrialTold(trial=1, state="failed", reason=bad))
    still.move(sweep, "failed", bad)
    log = still.service.home.logs(sweep)
    log.parent.mkdir(exist_ok=True)
    log.write_text(f"\x1b[36m(driver)\x1b[0m {bad}\n")
    tab = visit(still.token("bob"))
    for path in (f"/sweeps/{sweep}", "/", f"/sweeps/{sweep}/log"):
        tab.goto(path)
        expect(tab.locator("main")).to_contain_text("document.title = 'taken'")
        assert "taken" not in tab.title()
        assert tab.locator("img").count() == 0
        assert [each.get_attribute("src") for each in tab.locator("script").all()] == [templating.static_url("page.js")]
    expect(tab.locator("pre")).to_have_text(f"(driver) {bad}\n")


def stands_at(tab: Page, url: str, body: str) -> None:
    """Has a tab find a page at an address."""

    def answer(route: Route) -> None:
        route.fulfill(content_type="text/html", body=body)

    tab.route(url, answer)


@pytest.mark.parametrize("other", OTHER_SITES)
def test_a_form_on_anothers_page_does_nothing(still: Still, visit: Callable[..., Page], other: str):
    sweep, mallory = running(still, "cat"), still.token("mallory")
    tab = visit(still.token("cat"))
    cookies = tab.context.cookies()
    field = f'<input name="token" value="{mallory}">'
    for path in (f"/sweeps/{sweep}/cancel", "/login"):
        form = f'<form method="post" action="{still.url}{path}">{field}<button>go</button></form>'
        stands_at(tab, f"{other}{path}", form)
        tab.goto(f"{other}{path}")
        with tab.expect_response(lambda answer: answer.request.method == "POST") as answer:
            tab.get_by_role("button", name="go").click()
        assert (answer.value.url, answer.value.status) == (f"{still.url}{path}", 401)
    assert still.service.store.get(sweep).wanted == ""
    assert tab.context.cookies() == cookies


def test_a_link_on_anothers_page_leads_here_all_the_same(still: Still, visit: Callable[..., Page]):
    sweep = running(still, "dan")
    tab = visit(still.token("dan"))
    stands_at(tab, "http://localhost:9/", f'<a href="{still.url}/sweeps/{sweep}">a sweep</a>')
    tab.goto("http://localhost:9/")
    tab.get_by_role("link", name="a sweep").click()
    tab.get_by_role("link", name="open the page").click()
    expect(tab.get_by_role("heading", level=1)).to_have_text(sweep)


@pytest.mark.parametrize("width", [320, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_are_accessible(still: Still, visit: Callable[..., Page], scheme: str, width: int):
    if importlib.util.find_spec("axe_playwright_python") is None:
        pytest.skip("needs axe-playwright-python, of the extra dev")
    from axe_playwright_python.sync_playwright import Axe

    done, runs, token = finished(still, "eve"), running(still, "eve"), still.token("eve")
    # axe is put into the page, which its policy would not have.
    look = {"color_scheme": scheme, "viewport": {"width": width, "height": 800}, "bypass_csp": True}
    tab, stranger = visit(token, **look), visit(None, **look)
    for each, path in [
        (stranger, "/"),
        (tab, "/"),
        (tab, f"/sweeps/{done}"),
        (tab, f"/sweeps/{runs}"),
        (tab, f"/sweeps/{done}/log"),
        (tab, f"/sweeps/{done}/export"),
        (tab, "/sweeps/none"),
    ]:
        each.goto(path)
        found = Axe().run(each)
        assert found.violations_count == 0, f"{path}\n{found.generate_report()}"
        assert each.evaluate("document.documentElement.scrollWidth") <= width, path
