"""Plans of the real programs: on CPU devices, and with the TPU compiler where it is installed."""

import dataclasses
import importlib.util
import json

import jax
import jax.numpy as jnp
import pytest

from jax_klrlhf.core.sequence import Ragged
from jax_klrlhf.errors import InputError
from jax_klrlhf.models.config import ModelConfig
from jax_klrlhf.models.lora import Lora
from jax_klrlhf.models.transformer import language_model
from jax_klrlhf.plan import PRESETS, Shapes, candidates, main, program, report
from jax_klrlhf.plan.chips import GIB, devices, read_topology
from jax_klrlhf.plan.command import read_mesh
from jax_klrlhf.plan.cost import Collective, Cost
from jax_klrlhf.programs.plan_config import PlanConfig
from jax_klrlhf.training import optimizers

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="no TPU compiler: pip install 'jax-klrlhf[tpu]'",
)
# Many layers and a large vocabulary, so that a stack of layers or the whole projection is larger
# than anything that has to travel.
TINY = {
    "model_type": "llama",
    "vocab_size": 4096,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "rope_theta": 1e4,
    "tie_word_embeddings": False,
}
SHAPES = Shapes(prompts=8, responses=2, prompt=16, response=8)
SIZES = {"pairs": 8, "prompt": 16, "response": 8, "samples": 2, "chunk": 64}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    (path / "config.json").write_text(json.dumps(TINY))
    return path


@pytest.fixture(scope="module")
def planned(folder):
    """Step and sampler on eight CPU devices, compiled once, and the folder of the results."""
    config = PlanConfig(
        model=str(folder),
        topology="cpu:8",
        mesh="fsdp=4,tensor=2",
        sampling_tensor=0,
        dtype="float32",
        remat=None,
        output=folder / "plan",
        **SIZES,
    )
    return main(config)


def expected_flops(*, backward: bool) -> float:
    """Every product of the XLA programs, written out.

    Layers: two FLOPs per kernel entry and token. Attention in blocks of 64 queries is here one
    block, masked and not skipped: P^2 pairs of a prompt, C (P + C) of a response. A gradient takes
    two products for one, and the chunked vocabulary is projected again in the backward pass. The
    sampler feeds C - 1 tokens of each response, every one against the whole cache, and projects
    one token of the prompt besides.
    """
    width, inner, layers, vocab = 32, 64, 24, 4096
    kernels = width * (4 + 2 + 2) * 8 + 4 * 8 * width + 3 * width * inner
    rows, samples, prompt, response = 8, 2, 16, 8
    fed = response if backward else response - 1
    tokens = rows * (prompt + samples * fed)
    pairs = rows * (prompt**2 + samples * fed * (prompt + response))
    projected = rows * samples * fed + (0 if backward else rows)
    linear = 2 * kernels * layers * tokens
    attention = 4 * 4 * 8 * pairs * layers
    vocabulary = 2 * vocab * width * projected
    return (
        3 * (linear + attention) + 4 * vocabulary if backward else linear + attention + vocabulary
    )


def test_flops_of_the_real_programs_equal_the_formula(planned):
    step, sampler = planned
    assert step.flops * 8 == expected_flops(backward=True)
    assert sampler.flops * 8 == expected_flops(backward=False)
    assert step.unread == sampler.unread == []


def test_useful_flops_count_what_the_mathematics_needs():
    """By brute force: every pair of a query and a key that it may see, one by one."""
    config = ModelConfig(
        vocab_size=11,
        hidden_size=8,
        intermediate_size=12,
        layers=2,
        heads=2,
        kv_heads=1,
        head_dim=4,
        max_length=32,
        windows=(3, None),
    )
    params = program.parameters(language_model(config))
    found = program.forward_flops(config, params, SHAPES)
    pairs = 0
    for window in (3, 10**9):
        rows = [range(16)] + [[*range(16), *range(16, 24)]] * 2
        for row, first in zip(rows, (0, 16, 16), strict=True):
            pairs += sum(q - window < k <= q for q in row if q >= first for k in row)
    assert found.attention == 4 * 2 * 4 * 8 * pairs
    kernels = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 12
    assert found.linear == 2 * 2 * kernels * 8 * (16 + 2 * 8) + 2 * 11 * 8 * 8 * 2 * 8


def test_memory_is_that_of_the_shards(planned, folder):
    step, sampler = planned
    parameters = 24 * (32 * 64 + 32 * 32 + 3 * 32 * 64) + 2 * 4096 * 32
    norms = 24 * 2 * 32 + 32  # Replicated.
    trained = 4 * (parameters // 8 + norms)
    assert step.memory["trained parameters"] == trained
    assert step.memory["optimizer"] == 2 * trained + 4  # Two moments and a counter.
    assert sampler.memory["parameters"] == trained
    # What the compiler says of the same arguments; step number, key and fingerprint besides.
    assert 0 <= step.memory["padding"] <= 64
    # Buffers are shared: the peak is less than the sum, and no less than what must be there.
    assert trained < step.peak == step.total <= sum(step.memory.values())
    written = json.loads((folder / "plan" / "results.json").read_text())["metrics"]
    assert written["fit/train_step/gib"]["value"] == step.total / GIB
    assert (folder / "plan" / "sampler.hlo.txt").read_text() == sampler.text


def test_no_collective_carries_the_whole_projection_or_all_layers(planned):
    step, sampler = planned
    for plan in (step, sampler):
        assert plan.largest is not None
        assert plan.program.vocabulary == 4096 * 32
        assert plan.program.stack == 24 * 32 * 2 * 8
        assert not plan.gathers_too_much, plan.largest
        assert "WARNING" not in report.table(plan)
    # Nor the hidden states of all responses, though fsdp and tensor cut the embedding both.
    gathered = [one.elements for one in step.work.collectives if one.kind == "all-gather"]
    assert max(gathered) < 8 * 2 * 8 * 32


def known(lower=lambda: None, **arguments) -> program.Program:
    """A program of which everything is made up."""
    return program.Program(
        name="train step",
        lower=lower,
        arguments=arguments,
        useful_flops=64 * 100e12,
        attention_flops=64 * 8.0,
        layers=2,
        vocabulary=1000,
        stack=800,
    )


def plan_with(elements: int, **facts) -> report.Plan:
    """A plan whose one collective has so many entries."""
    one = Collective("all-gather", 2 * elements, elements, 64, 3, "jit(step)/dot")
    return report.Plan(
        program=known(),
        topology=read_topology("v5e:8x8"),
        seconds=1.0,
        arguments={"batch": 1},
        memory={"batch": 1, "temporaries": int(2 * GIB)},
        work=Cost(flops=int(197e12), bytes=int(819e9 / 2), collectives=[one], **facts),
    )


def test_a_collective_as_large_as_a_landmark_is_reported():
    assert not plan_with(799).gathers_too_much
    assert plan_with(800).gathers_too_much
    assert "WARNING" in report.table(plan_with(1000))
    shards = plan_with(1000)
    shards.work.collectives[0] = shards.work.collectives[0]._replace(kind="all-to-all")
    assert not shards.gathers_too_much


def test_roofs_are_work_over_peak():
    plan = plan_with(64 * 10**9)
    # v5e: 8x8 is no torus, so that a chip in its corner has two links of 50 GB/s.
    received = 3 * 2 * 64e9 * 63 / 64
    assert plan.roofs == pytest.approx(
        {"arithmetic": 1.0, "memory": 0.5, "interconnect": received / 100e9}
    )
    assert plan.mfu == pytest.approx(100 / 197 / (received / 100e9))
    assert plan_with(1).mfu == pytest.approx(100 / 197)


def test_attention_kernels_count_in_units_of_a_forward_pass():
    """Forward, its recomputation and both gradients, on prompts and on responses of 2 layers."""
    names = ("fwd", "fwd", "dq", "dkv") * 2
    kernels = [(f"splash_mha_{name}_segmented.{i}", 2) for i, name in enumerate(names)]
    plan = plan_with(1, kernels=kernels)
    assert plan.flops == int(197e12) + (1 + 1 + 1.5 + 2) * 8.0
    assert plan.unread == []
    # A prompt in three pieces is three kernels a layer, and as much attention.
    pieces = plan_with(1, kernels=[("splash_mha_fwd.1", 2 * (3 + 1))])
    pieces = dataclasses.replace(pieces, program=dataclasses.replace(known(), pieces=3))
    assert pieces.flops == int(197e12) + 8.0
    assert "my_kernel" in plan_with(1, kernels=[("my_kernel", 1)]).unread[0]


@pytest.mark.parametrize(
    ("name", "group", "links"),
    [
        ("v5e:8x8", 64, 2),  # Open along both axes.
        ("v5e:16x16", 256, 4),  # Closed along both.
        ("v5e:4x16", 64, 3),
        ("v5e:16x16", 16, 2),  # A part of the chips: one axis.
        ("v5p:4x4x4", 64, 6),
        ("v5p:2x2x2", 8, 3),
        ("v6e:8x8", 8, 1),
    ],
)
def test_links_into_a_chip(name, group, links):
    topology = read_topology(name)
    assert topology.ingress(group) == links * topology.chip.link_bandwidth


@pytest.mark.parametrize(
    "message",
    [
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (19.50G) exceeds available HBM (15.75G).",
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space "
        "hbm. Used 19.50G of 15.75G hbm. Exceeded hbm capacity by 3.75G.",
    ],
)
def test_a_refusal_for_memory_is_an_answer(message):
    refusal = report.read_refusal(message)
    assert (refusal.needs, refusal.has) == (19.5 * GIB, 15.75 * GIB)
    plan = report.Plan(
        program=known(),
        topology=read_topology("v5e:2x4"),
        seconds=1.0,
        arguments={"batch": 1},
        refusal=refusal,
    )
    assert report.verdict(plan) == "does not fit: needs 19.50 of 15.75 GiB"
    assert report.verdict(plan) in report.table(plan)
    assert report.metrics(plan)["fit/train_step/fits"].value == 0.0
    assert report.read_refusal("INTERNAL: something else") is None


def test_what_does_not_fit_is_an_error_with_advice(folder, monkeypatch, capsys):
    monkeypatch.setattr(
        report,
        "compile_program",
        lambda made, topology: report.Plan(
            program=made,
            topology=topology,
            seconds=1.0,
            arguments={},
            refusal=report.Refusal(needs=19.5 * GIB, has=15.75 * GIB),
        ),
    )
    config = PlanConfig(
        model=str(folder), topology="cpu:8", mesh="fsdp=4,data=2", program="train",
        **(SIZES | {"pairs": 16}),
    )  # fmt: skip
    with pytest.raises(InputError) as raised:
        main(config)
    said = str(raised.value)
    assert said.startswith("train step on cpu:8: does not fit. Try ")
    for option in ("--micro-batches up to 2", "--lora 16", "adafactor", "fsdp"):
        assert option in said
    assert "--samples" not in said
    assert "needs 19.50 of 15.75 GiB" in capsys.readouterr().out


def test_what_is_waited_for_is_told_apart():
    """Only synchronous collectives count besides the arithmetic."""
    plan = plan_with(10**9)
    received = 3 * 2e9 * 63 / 64
    assert report.collectives(plan)["all-gather"].waited == pytest.approx(received)
    assert plan.exposed == pytest.approx(1.0 + received / 100e9)
    (one,) = plan.work.collectives
    plan.work.collectives.append(one._replace(asynchronous=True))
    found = report.collectives(plan)["all-gather"]
    assert (found.received, found.waited) == pytest.approx((2 * received, received))
    assert plan.exposed == pytest.approx(1.0 + received / 100e9)


def test_candidates_are_ranked_by_what_fits_and_then_by_time():
    fast, slow, free = plan_with(1), plan_with(10**9), plan_with(10**9)
    free.work.collectives[0] = free.work.collectives[0]._replace(asynchronous=True)
    refused = dataclasses.replace(fast, refusal=report.Refusal(needs=19.5 * GIB, has=15.75 * GIB))
    named = {"refused": refused, "slow": slow, "fast": fast, "free": free}
    found = [candidates.Candidate(name, plan) for name, plan in named.items()]
    order = [one.options for one in candidates.ranked(found)]
    assert set(order[:2]) == {"fast", "free"}
    assert order[2:] == ["slow", "refused"]
    lines = candidates.table(found).splitlines()
    assert "does not fit 15.75 GiB" in lines[4]
    # 100 useful TFLOP of 197 in a second, and in that second and the wait.
    assert lines[1].endswith("50.8%")
    assert lines[3].endswith(f"{100 / 197 / slow.exposed:.1%}")


def test_default_candidates_divide_the_devices_and_the_batch():
    topology = read_topology("v5e:8x8")
    found = candidates.meshes(topology, rows=64)
    assert found[0] == "data=4,fsdp=16,tensor=1"  # what a run does by itself
    assert {"data=8,fsdp=8,tensor=1", "data=1,fsdp=64,tensor=1", "data=1,fsdp=16,tensor=4"} <= {
        *found
    }
    for text in found:
        mesh = dict(part.split("=") for part in text.split(","))
        data, fsdp, tensor = (int(mesh[axis]) for axis in ("data", "fsdp", "tensor"))
        assert data * fsdp * tensor == 64
    assert all("tensor=1" not in text for text in candidates.meshes(topology, rows=32))
    assert candidates.tensors(topology, rows=64) == [1, 2, 4, 8]
    assert candidates.tensors(topology, rows=16) == [4, 8]


@pytest.mark.slow
def test_a_search_compiles_its_candidates_and_prints_them_best_first(folder, capsys):
    config = PlanConfig(
        model=str(folder), topology="cpu:8", search=True, program="train",
        search_meshes=("data=1,fsdp=8", "data=8,fsdp=1"), search_remat=("full",),
        output=folder / "search", **SIZES,
    )  # fmt: skip
    plans = main(config)
    received = [sum(one.received for one in report.collectives(p).values()) for p in plans]
    assert len(plans) == 2
    assert received == sorted(received)
    # Whole copies on every device hold eight times the parameters.
    held = {p.arguments["trained parameters"] for p in plans}
    assert max(held) > 7 * min(held)
    lines = capsys.readouterr().out.splitlines()
    (head,) = (n for n, line in enumerate(lines) if line.startswith("program "))
    rows = lines[head + 1 : head + 3]
    assert [f"{value / 1e9:.2f}" in row for value, row in zip(received, rows, strict=True)] == [
        True
    ] * 2
    written = json.loads((folder / "search" / "results.json").read_text())["metrics"]
    assert len({key.rsplit("/", 1)[1] for key in written}) == 2


def test_a_piece_of_the_batch_has_its_part_of_the_attention():
    config = ModelConfig.from_hf(TINY, dtype=jnp.float32)
    mesh = read_mesh("fsdp=4", read_topology("cpu:4"))
    whole, halves = (
        program.train_step(
            config, mesh, SHAPES, optimizers.adamw(1e-3), compute_dtype=jnp.float32, chunk=64,
            micro_batches=pieces,
        )
        for pieces in (1, 2)
    )  # fmt: skip
    assert whole.attention_flops == 2 * halves.attention_flops
    assert whole.useful_flops == halves.useful_flops


def test_a_plan_for_tpus_samples_as_a_tpu_does():
    """Layers scanned over one stacked cache; on a CPU each has its own, and they are unrolled."""
    for platform, stacked in (("tpu", True), ("cpu", False), (None, False)):
        model = language_model(ModelConfig.from_hf(TINY, platform=platform))
        params = program.parameters(model)
        prompts = Ragged(jnp.zeros((1, 8), jnp.int32), jnp.ones(1, jnp.int32))
        prefix = jax.eval_shape(model.prefill, params, prompts)
        cache = jax.eval_shape(lambda p, x, m=model: m.start(p, x, 2, 24), params, prefix)
        assert isinstance(cache.own, list) != stacked


def test_an_adapter_trains_itself_alone():
    config = ModelConfig.from_hf(TINY, dtype=jnp.bfloat16)
    mesh = read_mesh("fsdp=8", read_topology("cpu:8"))
    made = program.train_step(
        config,
        mesh,
        SHAPES,
        optimizers.adamw(1e-3),
        compute_dtype=jnp.bfloat16,
        chunk=64,
        live_reference=True,
        adapter=Lora(rank=4),
        frozen_dtype=jnp.bfloat16,
    )
    sizes = {kind: program.shard_bytes(tree) for kind, tree in made.arguments.items()}
    kernels = 24 * (32 * 64 + 32 * 32 + 3 * 32 * 64)
    assert sizes["frozen parameters"] == 2 * ((kernels + 2 * 4096 * 32) // 8 + 24 * 2 * 32 + 32)
    # Two moments of every trained entry and a counter: the base has none.
    assert sizes["optimizer"] == 2 * sizes["trained parameters"] + 4
    full = program.forward_flops(config, program.parameters(language_model(config)), SHAPES)
    assert made.useful_flops == 2 * full.linear + 3 * full.attention + sum(full)


# Parameters in billions, as the model cards give them (Gemma 3: of its text decoder, with the
# embedding; 3.88 = 4.3 less the 0.42 of its vision tower).
PUBLISHED = {
    "llama-3-8b": 8.03,
    "llama-3-70b": 70.6,
    "llama-3.2-1b": 1.24,
    "llama-3.2-3b": 3.21,
    "mistral-7b-v0.3": 7.25,
    "qwen2.5-7b": 7.62,
    "qwen3-0.6b": 0.60,
    "qwen3-8b": 8.19,
    "gemma-2-9b": 9.24,
    "gemma-3-4b": 3.88,
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_published_number_of_parameters(name):
    config = ModelConfig.from_hf(PRESETS[name], where=name)
    shapes = program.parameters(language_model(config))
    billions = sum(leaf.size for leaf in jax.tree.leaves(shapes)) / 1e9
    assert billions == pytest.approx(PUBLISHED[name], rel=0.01)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model": "llama-9"}, "neither a preset"),
        ({"topology": "v9:8x8"}, "such as v5e:8x8"),
        ({"topology": "cpu:64"}, "xla_force_host_platform_device_count=64"),
        ({"mesh": "fsdp=3"}, "must multiply to the 8 devices"),
        ({"mesh": "model=8"}, "axis=size"),
        ({"pairs": 12}, "multiple of 8"),
        ({"pairs": 0}, "--pairs is 0; it must be positive"),
        ({"program": "train", "sampling_kv": "int8"}, "--sampling-kv is read by no run with"),
        ({"optimizer": "adafactor", "moments": "bfloat16"}, "--moments is read by no run with"),
        ({"response": 64}, "its context of 64 tokens"),
    ],
)
def test_bad_input_is_named(folder, options, words):
    given = {"model": str(folder), "topology": "cpu:8", "mesh": "fsdp=8", **SIZES}
    with pytest.raises(InputError, match=words):
        main(PlanConfig(**(given | options)))


def test_broken_config_files_are_named(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": \n oops}')
    with pytest.raises(InputError, match="line 2 is not JSON"):
        main(PlanConfig(model=str(tmp_path), topology="cpu:8"))


def test_without_the_tpu_compiler_one_line_names_the_extra(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "libtpu" else found(name)
    )
    with pytest.raises(InputError) as raised:
        main(PlanConfig(model="llama-3-8b"))
    assert "pip install 'jax-klrlhf[tpu]'" in str(raised.value)
    assert "\n" not in str(raised.value)


@needs_libtpu
def test_the_tpu_compiler_counts_the_same_work_as_the_cpu(folder):
    """The sampler has no kernel of its own: products are the same whoever compiles them."""
    plans = [
        main(
            PlanConfig(model=str(folder), topology=name, mesh="fsdp=4", program="sample", **SIZES)
        )[0]
        for name in ("cpu:4", "v5e:2x2")
    ]
    assert plans[0].flops == plans[1].flops == expected_flops(backward=False) / 4
    fits = plans[1]
    assert report.verdict(fits).startswith("fits: ")
    assert fits.roofs is not None
    assert fits.mfu is not None
    assert 0 < fits.mfu < 1


@needs_libtpu
def test_the_tpu_compiler_refuses_what_does_not_fit(folder):
    topology = read_topology("v5e:2x2")
    (device, *_) = devices(topology)
    at = jax.sharding.SingleDeviceSharding(device)
    big = jax.ShapeDtypeStruct((2**16, 2**16), jnp.float32, sharding=at)  # 16 GiB, and its sine.
    too_big = known(lambda: jax.jit(jnp.sin).lower(big), array=big)
    plan = report.compile_program(too_big, topology)
    assert plan.refusal is not None
    assert 15 * GIB < plan.refusal.has < 16 * GIB
    assert plan.refusal.needs > 2 * 16 * GIB - 1
    with pytest.raises(InputError, match="the TPU compiler says"):
        devices(read_topology("v5e:3x5"))
