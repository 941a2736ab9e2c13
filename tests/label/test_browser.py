"""The labelling page in a real browser: keys, text as text, what labels teach, a server that dies.

Skipped where there is no browser: it needs playwright (``pip install playwright``) and a Chromium,
its own or the system's.
"""

import shutil

import pytest

from jax_klrlhf import label, labelling
from jax_klrlhf.labelling import pair_of

EVIL = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture
def page():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as run:
        try:
            browser = run.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"no browser: {str(error).splitlines()[0]}")
        page = browser.new_page()
        page.problems = []
        page.on("pageerror", lambda error: page.problems.append(str(error)))
        page.on(
            "console",
            lambda said: page.problems.append(said.text) if said.type == "error" else None,
        )
        yield page
        browser.close()


def test_a_person_labels_with_keys_and_nothing_of_a_model_runs(page, tmp_path):
    asked = [pair_of(EVIL, f"{EVIL} first {n}", f"second {n}")[0] for n in range(4)]
    labelling.write_pairs(tmp_path, asked)
    session = label.Session(tmp_path, repeats=0.0)
    with label.serve(session, token=True) as served:
        page.goto(served.url)
        page.fill("#name", "Ana s 1")
        page.keyboard.press("Enter")
        page.wait_for_selector("#asking:not([hidden])")
        assert page.inner_text("#asked") == EVIL
        assert {page.inner_text("#left"), page.inner_text("#right")} >= {
            session.next("Ana s 1").pair.first
        }
        shown = []
        for number, key in enumerate(["ArrowLeft", "2", "ArrowDown", "s"], 1):
            shown.append({side: page.inner_text(f"#{side}") for side in ("left", "right")})
            page.keyboard.press(key)
            page.get_by_text(f"{number} answers of Ana").wait_for()
        page.locator("#asking").wait_for(state="hidden")
        assert "No pair waits" in page.inner_text("#message")
        page.keyboard.press("ArrowLeft")  # nothing is shown: nothing is said
        page.click("#tab-taught")
        page.wait_for_selector("#taught svg")
        assert "Ana s 1" in page.inner_text("#taught")
        assert page.locator("#taught svg").count() == 2
        page.set_viewport_size({"width": 390, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.title() == "Which answer is better?"
    assert page.problems == []
    kept = labelling.read_labels(tmp_path)
    texts = [getattr(x.pair, x.answer, x.answer) for x in kept]
    assert texts == [shown[0]["left"], shown[1]["right"], "tie", "skip"]
    session.close()


def test_the_page_says_when_nothing_was_kept(page, tmp_path):
    labelling.write_pairs(tmp_path, [pair_of("p", "a", "b")[0]])
    session = label.Session(tmp_path)
    served = label.serve(session)
    page.goto(served.url)
    page.fill("#name", "Ana")
    page.keyboard.press("Enter")
    page.wait_for_selector("#asking:not([hidden])")
    served.close()
    page.keyboard.press("ArrowLeft")
    page.get_by_text("the server does not answer").wait_for()
    # Started again at the same place, the same pair is answered.
    with label.serve(session, port=served.port):
        page.keyboard.press("ArrowLeft")
        page.locator("#asking").wait_for(state="hidden")
    assert len(labelling.read_labels(tmp_path)) == 1
    session.close()
