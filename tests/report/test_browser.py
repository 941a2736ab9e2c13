"""Pages of answers and of runs in a real browser: every filter, the live page, text as text.

Skipped where there is no browser, as ``tests/label/test_browser.py`` says.
"""

import json
import re

import pytest

from jax_klrlhf import report
from jax_klrlhf.report import run as runs
from jax_klrlhf.report import serving
from tests.report.test_run import dpo, iterated
from tests.report.test_side_by_side import EVIL

WORDS = ["alpha", "beta", "gamma", "delta"]


def records(count):
    """Answers of two policies; in ``gold`` the second is better by the prompt's number."""
    for n in range(count):
        prompt = f"prompt {n} {WORDS[n % 4]}"
        yield {"prompt": prompt, "policy": "pi0", "text": f"plain {n}", "gold": 0.0, "proxy": 0.0}
        yield {
            "prompt": prompt, "policy": "online", "text": f"Bright {n}", "gold": float(n % 7),
            "proxy": float((5 * n) % 11), "tokens": ["Bright", f" {n}"], "token_kl": [0.0, 1.0 * n],
        }  # fmt: skip


@pytest.fixture
def answers(page, tmp_path):
    page.goto(report.side_by_side(records(45), tmp_path / "page.html").as_uri())
    return page


def control(page, name):
    return page.locator(".bar label", has_text=re.compile(f"^{name} ")).locator("select")


def policy(page, name):
    return page.locator(".bar label", has_text=name).locator("input[type=checkbox]")


def shown(page):
    return [int(text.split()[1]) for text in page.locator("#list .prompt").all_inner_texts()]


def test_words_are_looked_for_in_prompts_and_answers_of_the_policies_that_are_shown(answers):
    place = answers.locator("#place")
    assert place.inner_text() == "prompts 1 to 20 of 45"
    answers.fill("#search", "GAMMA bright")  # in a prompt, and in an answer
    assert place.inner_text() == "prompts 1 to 11 of 11"
    assert shown(answers) == [n for n in range(45) if n % 4 == 2]
    policy(answers, "online").uncheck()
    assert place.inner_text() == "no prompt"
    policy(answers, "online").check()
    answers.fill("#search", "")
    assert answers.locator("#list section").first.locator("h3").all_inner_texts() == [
        "pi0",
        "online",
    ]
    policy(answers, "pi0").uncheck()
    assert answers.locator("#list section").first.locator("h3").all_inner_texts() == ["online"]


def test_pages_are_turned_to_the_end_and_back(answers):
    seen = shown(answers)
    back, onward = answers.get_by_text("\u2190 back"), answers.get_by_text("next \u2192")
    assert back.is_disabled()
    for _ in range(2):
        onward.click()
        seen += shown(answers)
    assert onward.is_disabled()
    assert seen == list(range(45))
    back.click()
    assert shown(answers) == list(range(20, 40))


def test_orders_are_what_they_say(answers):
    def order(label):
        answers.select_option("#order", label=label)
        found = shown(answers)
        while answers.get_by_text("next \u2192").is_enabled():
            answers.get_by_text("next \u2192").click()
            found += shown(answers)
        return found

    by_gold = order("largest difference in gold")
    assert [n % 7 for n in by_gold] == sorted((n % 7 for n in range(45)), reverse=True)
    # The other way round, the differences change their sign.
    control(answers, "of").select_option("pi0")
    control(answers, "less").select_option("online")
    assert [n % 7 for n in shown(answers)] == sorted(n % 7 for n in range(45))[:20]
    over = order("proxy furthest above gold")
    gaps = [(5 * n) % 11 - n % 7 for n in over]
    # pi0's is 0 everywhere, and the furthest of the policies counts.
    assert [max(gap, 0) for gap in gaps] == sorted((max(gap, 0) for gap in gaps), reverse=True)
    random = order("at random (always the same)")
    assert sorted(random) == list(range(45)) != random
    assert order("at random (always the same)") == random
    assert not control(answers, "of").is_visible()


def test_colours_are_of_tokens_or_of_numbers(answers):
    colour = "element => getComputedStyle(element).backgroundColor"
    said = answers.locator("#list section").nth(3).locator(".column").nth(1)
    token = said.locator(".said span")
    alpha = lambda element: float(element.evaluate(colour).rstrip(")").split(",")[-1])  # noqa: E731
    assert alpha(token.nth(0)) == 0.0
    assert alpha(token.nth(1)) > 0.0
    assert token.nth(1).get_attribute("title") == "3.000 nats"
    answers.select_option("#colour", "gold")
    assert said.locator(".said span").count() == 0
    least = answers.locator("#list section").nth(0).locator(".card").nth(1).evaluate(colour)
    most = answers.locator("#list section").nth(6).locator(".card").nth(1).evaluate(colour)
    assert least.startswith("rgba(33, 102, 172")
    assert most.startswith("rgba(230, 97, 1")
    answers.select_option("#colour", "")
    none = answers.locator("#list section").nth(6).locator(".card").nth(1)
    assert none.get_attribute("style") is None


def test_a_narrow_screen_has_no_page_wider_than_itself(answers):
    answers.set_viewport_size({"width": 390, "height": 800})
    assert answers.evaluate("document.documentElement.scrollWidth") <= 390


def test_what_a_model_says_is_text_in_both_pages(page, tmp_path):
    said = [{"prompt": EVIL, "policy": EVIL, "text": EVIL, "gold": 1.0}]
    page.goto(report.side_by_side(said, tmp_path / "page.html", title=EVIL).as_uri())
    assert page.inner_text("#list .card .said") == EVIL
    assert page.title() == EVIL
    page.goto(runs.write(dpo(tmp_path / "run")).as_uri())
    page.get_by_text("Configuration").click()
    assert EVIL in page.inner_text("#page")
    assert page.locator("img").count() == 0


def test_a_finished_and_a_stopped_run_are_shown_with_charts_that_open(page, tmp_path):
    folder = dpo(tmp_path / "run")
    with (folder / "metrics.jsonl").open("a") as file:  # a name of no chart of its own
        file.write('ss": 0}\n{"step": 10, "mine": 1.0}\n{"step": 20, "mine": 2.0}\n')
    page.goto(runs.write(folder).as_uri())
    assert page.inner_text("#state") == "stopped"
    titles = page.locator("figcaption").all_inner_texts()
    assert "The plane of KL and reward" in titles
    # Three points of the plane, with bars in both directions.
    plane = page.locator("figure", has_text="The plane of KL and reward").locator("svg")
    assert plane.locator("circle").count() == 3
    before = page.locator("figure svg:visible").count()
    page.get_by_text("1 more charts").click()
    assert page.locator("figure svg:visible").count() > before
    page.goto(runs.write(iterated(tmp_path / "rounds")).as_uri())
    page.get_by_text("What round 1 compared").click()
    assert page.locator(".pair .card.better").count() == 1
    page.set_viewport_size({"width": 390, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_a_live_page_follows_its_run_and_keeps_open_what_was_opened(page, tmp_path):
    folder = dpo(tmp_path / "run", lines=1)
    read = lambda given: json.loads(json.dumps(runs.read(folder)))  # noqa: E731
    text = runs.text(read(None), live=0.1)
    with serving.start({"/api/report": read}, text, host="127.0.0.1", port=0, token=True) as served:
        page.goto(served.url)
        plane = page.locator("figure", has_text="The plane of KL and reward").locator("circle")
        plane.first.wait_for()
        assert plane.count() == 1
        page.get_by_text("Configuration").click()
        dpo(folder, lines=4)
        plane.nth(3).wait_for()
        assert page.locator("details[open]").count() == 1
        page.goto("about:blank")  # else it asks on, of nobody
