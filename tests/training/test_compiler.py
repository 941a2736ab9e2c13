"""What the compiler is told, what is kept of its work, and names to find in its programs."""

import functools
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.experimental.compilation_cache import compilation_cache
from rich.console import Console

from jax_klrlhf.core import objectives
from jax_klrlhf.core.sequence import Ragged
from jax_klrlhf.errors import InputError
from jax_klrlhf.models import sampling
from jax_klrlhf.models.logits import Warp
from jax_klrlhf.programs import fit as fits
from jax_klrlhf.programs import iterate_config, iterate_parts
from jax_klrlhf.programs.config import DpoConfig, check
from jax_klrlhf.training import compiler, loop, state, step, tasks
from jax_klrlhf.training import mesh as meshes
from tests.training import toy

MODEL = toy.language_model()
TASK = tasks.preference(MODEL, functools.partial(objectives.sigmoid, kl_coef=0.3), report_coef=0.3)


def started(**options):
    carried = state.init(jax.random.key(1), MODEL.init(jax.random.key(0)), optax.sgd(0.1))
    return step.make_step(TASK, optax.sgd(0.1), **options), carried


def test_options_are_the_devices_and_reach_the_compiler(monkeypatch):
    tpu = MagicMock(spec=jax.sharding.Mesh)
    tpu.local_devices = [SimpleNamespace(device_kind="TPU v6 lite")]
    assert compiler.options(None) is None
    assert compiler.options(meshes.make(data=8)) is None
    # One that the installed compiler does not have is left out, and said.
    options = {"xla_no_such_option": True, "xla_embed_ir_in_executable": True}
    monkeypatch.setitem(compiler.OPTIONS, "cpu", options)
    with pytest.warns(UserWarning, match="cpu has no option xla_no_such_option"):
        assert compiler.options(None) == {"xla_embed_ir_in_executable": True}
    monkeypatch.setattr(compiler, "_known", lambda *_: True)
    assert compiler.options(tpu) == compiler.OPTIONS["TPU v6 lite"]
    # Handed over all the same it is refused, on one device and on a mesh: so all are handed over.
    one, carried = started()
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_no_such_option"):
        one.lower(carried, toy.batch(0)).compile()
    mesh = meshes.make(data=8)
    whole = jax.tree.map(lambda _: jax.NamedSharding(mesh, jax.P()), carried.params)
    carried, laid = meshes.init(
        jax.random.key(1), MODEL.init(jax.random.key(0)), optax.sgd(0.1), shardings=whole
    )
    many, _ = started(shardings=laid)
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_no_such_option"):
        many.lower(carried, toy.batch(0)).compile()


def test_compiled_programs_are_kept_where_it_is_said(tmp_path, monkeypatch):
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    assert compiler.remember("none") is None
    assert compiler.remember("auto") is None  # a CPU
    assert jax.config.jax_compilation_cache_dir == before[names[0]]
    try:
        jax.config.update(names[1], 0.0)
        assert compiler.remember(str(tmp_path / "kept")) == tmp_path / "kept"
        compilation_cache.reset_cache()
        jax.jit(lambda x: jnp.tan(x) + 1)(jnp.zeros(3))
        assert list((tmp_path / "kept").iterdir())
        monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
        monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        assert compiler.remember("auto") == tmp_path / "cache" / "jax_klrlhf" / "compiled"
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "own"))
        assert compiler.remember("auto") == tmp_path / "own"
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"--compilation-cache .*name another"):
        compiler.remember(str(tmp_path / "file" / "inside"))


def test_a_profile_has_three_steps_that_compile_nothing(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: calls.append(folder))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    train, carried = started()

    def told(*given):
        calls.append("step")
        return train.jitted(*given)

    batches = loop.Repeat([toy.batch(seed) for seed in range(2)])
    watched = step.TrainStep(told, None)
    loop.train(
        watched, carried, batches, steps=6, names=TASK.names, profile=tmp_path, sinks=(),
        console=Console(quiet=True),
    )  # fmt: skip
    assert calls == ["step", str(tmp_path), "step", "step", "step", "stop", "step", "step"]


def test_a_trace_is_written(tmp_path):
    trace = loop.Trace(tmp_path)
    for number in range(2):
        with trace.step(number, True):
            found = jnp.square(jnp.arange(3.0))
        trace.end(found, last=number == 1)
    assert list(tmp_path.rglob("*.xplane.pb"))


@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
def test_first_moments_are_in_the_type_that_was_asked_for(moments):
    folder = Path("nowhere")
    given = {"model": "m", "data": "d", "output": folder, "moments": moments}
    config = DpoConfig(**given)
    check(config)
    optimizer, _ = fits.make_optimizer(config, 10)
    fit = iterate_parts._optimizer(iterate_config.FitConfig(moments=moments))
    for made in (optimizer, fit):
        states = jax.eval_shape(made.init, {"w": jnp.zeros((3, 2))})
        (adam,) = (
            x
            for x in jax.tree.leaves(states, is_leaf=lambda x: hasattr(x, "mu"))
            if hasattr(x, "mu")
        )
        assert adam.mu["w"].dtype == moments
        assert adam.nu["w"].dtype == jnp.float32
    with pytest.raises(InputError, match=r"--moments .*adafactor"):
        check(DpoConfig(**given | {"optimizer": "adafactor", "moments": "bfloat16"}))


def test_the_parts_of_a_program_are_named():
    train, carried = started()
    text = train.lower(carried, toy.batch(0)).as_text(debug_info=True)
    for name in ("loss", "vocabulary", "optimizer"):
        assert f"{name}/" in text or f"({name})" in text, name
    prompts = Ragged(jnp.ones((2, 3), jnp.int32), jnp.full(2, 3, jnp.int32))
    keys = jax.random.split(jax.random.key(0), 2)
    draw = jax.jit(
        functools.partial(sampling.sample, samples=1, max_new_tokens=3), static_argnums=1
    )
    text = draw.lower(keys, MODEL, carried.params, prompts, Warp()).as_text(debug_info=True)
    for name in ("prefill", "decode", "draw"):
        assert f"/{name}/" in text, name
