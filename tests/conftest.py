"""Session settings: every run of the suite is strict, in float32, on eight fake CPU devices."""

import os

# Before jax is imported anywhere: the flags are read once. Compiling is what the suite costs, and
# unpolished machine code of the same program takes 40 % less of it.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",
    ]
).strip()
# Arrays are small and workers several: more threads in each would only stand in each other's way.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import shutil
from pathlib import Path

import jax
import pytest
from hypothesis import settings

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

# A first call compiles, so a per-example deadline would time the compiler.
settings.register_profile("klrlhf", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("klrlhf")

# Real data lies beside a checkout, never in it; see CONTRIBUTING.md.
DATA = Path(os.environ.get("KLRLHF_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


def pytest_collection_modifyitems(items):
    """Whole experiments, notebooks, and what takes half a minute each: `make slow`, and so CI."""
    if os.environ.get("KLRLHF_SLOW") != "1":
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="slow: make slow (KLRLHF_SLOW=1)"))


@pytest.fixture(autouse=True, scope="module")
def _forget_programs():
    """Free the compiled programs of a module: a worker would hold gigabytes of them by the end."""
    yield
    jax.clear_caches()


@pytest.fixture
def x64():
    """Run a test in float64."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data, or a skip that says what is missing."""
    if not DATA.is_dir():
        pytest.skip(f"real data absent: no folder {DATA} (set KLRLHF_DATA to it)")
    return DATA


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium, playwright's own or the system's; or a skip that says what is missing.

    One a module: while it lives the main thread has an event loop, which others may not expect.
    """
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    system = shutil.which("chromium") or shutil.which("google-chrome")
    with playwright.sync_playwright() as run:
        try:
            browser = run.chromium.launch(executable_path=system, args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"no browser: {str(error).splitlines()[0]}")
        yield browser
        browser.close()


@pytest.fixture
def pages(browser):
    """``pages()`` is a page of a visitor of its own; at the end none may have had an error.

    ``page.problems`` are what the console and the scripts complained of: a test that expects one
    takes it out.
    """
    opened = []

    def opener():
        page = browser.new_context().new_page()
        page.problems = []
        page.on("pageerror", lambda error: page.problems.append(str(error)))
        page.on(
            "console",
            lambda said: page.problems.append(said.text) if said.type == "error" else None,
        )
        opened.append(page)
        return page

    yield opener
    for page in opened:
        page.context.close()
    assert [problem for page in opened for problem in page.problems] == []


@pytest.fixture
def page(pages):
    """A page of one visitor."""
    return pages()


@pytest.fixture(scope="session")
def stories_model(data_dir: Path) -> Path:
    """The real pretrained model tinystories656k, or a skip."""
    folder = data_dir / "models" / "tinystories656k"
    if not (folder / "model.safetensors").is_file():
        pytest.skip(f"real model absent: {folder}")
    return folder
