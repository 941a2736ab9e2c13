# %% [markdown]
# # Human feedback in ten minutes
#
# You compare answers on a page; a reward is fitted to what you say, with its confidence; and a
# policy learns from you, in rounds. Set `PERSON = True` to be the one who labels. Otherwise a
# script stands in, and asks the page in the way a browser does.

# %%
import json
import os
import tempfile
import threading
import time
import urllib.request

import jax
import matplotlib.pyplot as plt
import numpy as np
import optax

from jax_klrlhf import figures, label, toy
from jax_klrlhf.core import pairs
from jax_klrlhf.label import session as sessions
from jax_klrlhf.training import rounds
from jax_klrlhf.training.rounds import oracle

plt.rcParams.update(figures.STYLE)
PERSON = False
SMALL = os.environ.get("KLRLHF_SMALL") == "1"  # continuous integration
LABELS = 12 if SMALL else 40  # of the first page
folder = tempfile.mkdtemp()

# %% [markdown]
# ## Answers to compare
#
# A toy that comes with the library: a prompt is a name and what it did first, an answer goes on.
# pi0 has learned from sentences in which sad things happen more often than happy ones. Which of two
# answers is better is for you to say; the script likes happy words, and is sure of it as
# Bradley-Terry is.

# %%
world = toy.world(steps=20 if SMALL else 200)
prompts = world.prompts(24, seed=3)
drawn = world.draw(6)(jax.random.key(0), world.pi0, prompts)
asked = [toy.decode(ids) for ids in prompts.ids]
answers = [
    [toy.decode(ids[:n]) for ids, n in zip(rows, counts, strict=True)]
    for rows, counts in zip(np.asarray(drawn.ids), np.asarray(drawn.lengths), strict=True)
]
for prompt, texts in list(zip(asked, answers, strict=True))[:3]:
    print(f"{prompt} ...", *texts[:3], sep="\n    ")

# %% [markdown]
# ## The page
#
# It asks for the pair whose label says most of a linear reward, given what was labelled. Every
# label is on the disk before the page says so.

# %%
pool = label.Pool.of(asked, answers)
session = label.Session(f"{folder}/first", pool=pool, rule=pairs.most_uncertain, repeats=0.15)
page = label.serve(session, token=True)
if PERSON and importlib.util.find_spec("google.colab"):
    from google.colab import output

    output.serve_kernel_port_as_iframe(page.port, path=f"/#token={page.token}", height=600)
elif PERSON:
    print("label here:", page.url)


# %%
def ask(page, path, **content):
    """A question to the page, as a browser asks it."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{page.port}/api/{path}",
        json.dumps(content).encode(),
        {"Content-Type": "application/json", "Authorization": f"Bearer {page.token}"},
    )
    with urllib.request.urlopen(request) as reply:
        return json.load(reply)


rng = np.random.default_rng(0)


def worth(text):
    words = text.split()
    return sum(word in toy.HAPPY for word in words) - sum(word in toy.SAD for word in words)


def script(page, count):
    """Somebody who likes happy words: labels up to so many pairs."""
    for _ in range(count):
        shown = ask(page, "next", annotator="script")
        if shown["ask"] is None:
            return
        margin = worth(shown["left"]) - worth(shown["right"])
        left = rng.random() < 1 / (1 + np.exp(-2 * margin))
        said = "tie" if margin == 0 else "left" if left else "right"
        ask(page, "answer", annotator="script", ask=shown["ask"], answer=said)


if not PERSON:
    script(page, LABELS)
while len(session.labels.all) < LABELS:  # a person takes longer
    time.sleep(1)
page.close()
print(len(session.labels.all), "labels; the first:", session.labels.all[0].answer)

# %% [markdown]
# ## What the labels have taught
#
# On the left the set of rewards that the labels allow: its log-volume falls by half of the
# information in them. On the right the fitted reward of every answer, less the mean at its prompt,
# against the gold reward that only the annotator has in mind; bars are two standard errors. A
# smaller ridge believes the labels more, and is less sure where there are none.

# %%
gold = world.gold(prompts, drawn)
gold_of = {
    (prompt, text): worth
    for prompt, texts, row in zip(asked, answers, gold, strict=True)
    for text, worth in zip(texts, row, strict=True)
}
truth = [
    [gold_of[prompt, text] for text in texts]
    for prompt, texts in zip(pool.prompts, pool.answers, strict=True)
]
truth = np.concatenate([np.array(row) - np.mean(row) for row in truth])


def picture(ridge):
    found = label.taught(pool, session.labels.all, ridge=ridge)
    _, (left, right) = plt.subplots(1, 2, figsize=(7, 3), layout="constrained")
    left.plot(found.labelled, found.information)
    left.set(xlabel="labelled pairs", ylabel=r"$\log\det\Sigma - \log\det\lambda I$, nats")
    right.errorbar(truth, found.reward, 2 * found.stderr, fmt="o", ms=3, lw=0.6)
    right.set(xlabel="gold reward, centred", ylabel="fitted reward, centred")
    right.set_title(f"ridge {ridge:g}")
    plt.show()
    print(f"correlation with gold: {np.corrcoef(truth, found.reward)[0, 1]:.2f}")


figures.explore(picture, ridge=(0.1, 0.001, 10.0))
agreement = sessions.agreement(session.labels.all)["itself"]
if agreement:
    print(
        "agreement with oneself, on pairs shown again: "
        f"{agreement['share']:.2f} [{agreement['low']:.2f}, {agreement['high']:.2f}]"
    )
session.close()

# %% [markdown]
# ## A policy that learns from people
#
# `oracle.human` puts the pairs of a round in a folder and waits until they are labelled. The page
# shows pairs as they come; both can be killed and started again. Everything else of the loop is as
# in notebook 3.

# %%
ROUND, COUNT = f"{folder}/rounds", 32 if SMALL else 96
fitting = rounds.Fitting(optimizer=optax.adam(3e-3), steps=4 if SMALL else 80, batch_size=32)
questions = world.prompts(2 * COUNT, seed=2)
session = label.Session(ROUND, repeats=0.0)
page = label.serve(session, token=True)
if PERSON:
    print("label here:", page.url)
done = threading.Event()


def told(labelled, count):
    if labelled == count:
        print(f"{labelled} of {count} pairs are labelled")


def stand_in():
    while not done.is_set():
        script(page, 1000)
        time.sleep(0.05)


if not PERSON:
    threading.Thread(target=stand_in, daemon=True).start()
outcome = rounds.iterate(
    jax.random.key(4),
    world.pi0,
    prompts=lambda number: jax.tree.map(
        lambda x: x[(number - 1) * COUNT : number * COUNT], questions
    ),
    sampler=rounds.main_agent(world.draw(4)),
    reward=rounds.implicit(world.model, kl_coef=0.3, rows=256),
    pair_rule=pairs.otherwise(pairs.best_worst, pairs.sampled),
    oracle=oracle.human(ROUND, toy.decode, poll=0.1, say=told),
    improve=rounds.dpo(world.model, kl_coef=0.3, fitting=fitting, rows=256),
    rounds=1 if SMALL else 2,
)
done.set()
page.close()
session.close()

# %%
names = ["pi0", *(f"round {n + 1}" for n in range(len(outcome.policies) - 1))]
found = [world.evaluate(params) for params in outcome.policies]
for name, metrics in zip(names, found, strict=True):
    print(f"{name:<8} gold reward {metrics['reward']}   KL(pi || pi0) {metrics['kl']} nats")
reward, kl = ([m[key] for m in found] for key in ("reward", "kl"))
figure, axes = plt.subplots(figsize=(4.6, 3), layout="constrained")
axes.errorbar(
    [m.value for m in kl],
    [m.value for m in reward],
    [2 * m.stderr for m in reward],
    [2 * m.stderr for m in kl],
    marker="o",
    capsize=2,
)
for name, x, y in zip(names, kl, reward, strict=True):
    axes.annotate(name, (x.value, y.value), xytext=(5, 5), textcoords="offset points")
_ = axes.set(
    xlabel=r"$\mathrm{KL}(\pi\,\|\,\pi_0)$, nats",
    ylabel="gold reward",
    title="Held-out prompts, two standard errors",
)

# %% [markdown]
# The bars are over prompts, for one person and one training run: read them as such.
#
# From the shell, with a model of your own:
#
#     klrlhf iterate --model MODEL --prompts PROMPTS.txt --reward human --output run
#     klrlhf label --output run/labels
#     klrlhf report run --serve
