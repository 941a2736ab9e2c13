"""The labelling page in a real browser: keys, text as text, what labels teach, a server that dies.

Skipped where there is no browser: it needs playwright (``pip install playwright``) and a Chromium,
its own or the system's.
"""

from jax_klrlhf import label, labelling
from jax_klrlhf.labelling import pair_of

EVIL = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"


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
    page.problems.clear()  # the console says that nobody answered
    # Started again at the same place, the same pair is answered.
    with label.serve(session, port=served.port):
        page.keyboard.press("ArrowLeft")
        page.locator("#asking").wait_for(state="hidden")
    assert len(labelling.read_labels(tmp_path)) == 1
    session.close()


def begin(page, served, name):
    page.goto(served.url)
    page.fill("#name", name)
    page.keyboard.press("Enter")
    page.wait_for_selector("#asking:not([hidden])")


def test_two_people_label_at_once_and_no_label_is_lost_or_there_twice(pages, tmp_path):
    asked = [pair_of(f"p {n}", f"first {n}", f"second {n}")[0] for n in range(12)]
    labelling.write_pairs(tmp_path, asked)
    session = label.Session(tmp_path, repeats=0.0)
    people = {"Ana": pages(), "Ben": pages()}
    with label.serve(session) as served:
        for name, page in people.items():
            begin(page, served, name)
        while any(page.is_visible("#asking") for page in people.values()):
            shown = [p.inner_text("#asked") for p in people.values() if p.is_visible("#asking")]
            assert len(set(shown)) == len(shown)  # nobody looks at the pair of another
            for page in people.values():
                # In a hurry: the second key may come while the first is on its way.
                page.keyboard.press("ArrowLeft")
                page.keyboard.press("ArrowLeft")
            for page in people.values():
                page.wait_for_function("!document.querySelector('#buttons button').disabled")
    labels = labelling.read_labels(tmp_path)
    assert sorted(x.pair.name for x in labels) == sorted(pair.name for pair in asked)
    assert {x.annotator for x in labels} == set(people)
    session.close()


def test_one_name_in_two_browsers_gives_each_pair_one_label_and_the_later_is_told(pages, tmp_path):
    asked = [pair_of(f"p {n}", f"first {n}", f"second {n}")[0] for n in range(3)]
    labelling.write_pairs(tmp_path, asked)
    session = label.Session(tmp_path, repeats=0.0)
    one, two = pages(), pages()
    with label.serve(session) as served:
        begin(one, served, "Ana")
        begin(two, served, "Ana")
        assert one.inner_text("#asked") == two.inner_text("#asked")
        one.keyboard.press("ArrowLeft")
        one.get_by_text("1 answers of Ana").wait_for()
        two.keyboard.press("ArrowRight")
        # What was said first stays, and the other page goes on to a pair that waits.
        two.get_by_text("a label is not changed").wait_for()
        two.get_by_text("1 answers of Ana").wait_for()
        assert two.inner_text("#asked") == one.inner_text("#asked")
        two.problems.clear()  # the console has the status 409
    (kept,) = labelling.read_labels(tmp_path)
    assert kept.answer == kept.left
    session.close()
