"""Configuration of ``klrlhf plan``."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from jax_klrlhf import defaults
from jax_klrlhf.programs.options import Count, When

_SAMPLING = When("program", "sample", "both")


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """Compile the real training step and sampler for a TPU slice, and print what they need."""

    model: str
    """A folder with config.json, or a preset (such as llama-3-8b, qwen3-8b, gemma-2-9b)."""
    topology: str = "v5e:8x8"
    """Chip and shape of the slice: v5e:8x8, v5p:4x4x4, v6e:4x4; cpu:8 for CPU devices."""
    mesh: str = ""
    """Sizes of the mesh axes data, fsdp and tensor, one of which may be -1: fsdp=16,tensor=4. By
    default as in `klrlhf dpo`: fsdp of at most 16, and data."""
    sampling_tensor: int | None = None
    """Devices that a copy of the weights is cut over in the sampler; by default, as in `klrlhf
    iterate`, the fewest on which it is 4 GiB and a quarter of the memory at most; 0: the mesh of
    training."""
    sampling_weights: Annotated[Literal["float", "int8"], _SAMPLING] = "float"
    """In the sampler, as in `klrlhf iterate`."""
    sampling_kv: Annotated[Literal["float", "int8"], _SAMPLING] = "float"
    """In the sampler, as in `klrlhf iterate`."""
    sampling_prefill_chunk: Annotated[Count | None, _SAMPLING] = None
    """In the sampler, as in `klrlhf iterate`."""
    program: Literal["train", "sample", "both"] = "both"
    """What to compile."""
    pairs: Count = 64
    """Preference pairs in the global batch."""
    prompt: Count = 1024
    """Padded prompt length, in tokens."""
    response: Count = 1024
    """Padded response length, in tokens."""
    micro_batches: Count = 1
    """Pieces that the batch is cut into."""
    optimizer: Literal["adamw", "adafactor"] = "adamw"
    """Of the trained parameters."""
    moments: Annotated[Literal["float32", "bfloat16"], When("optimizer", "adamw")] = "float32"
    """Of adamw, the first ones."""
    lora: Count | None = None
    """Rank of low-rank adapters on every projection; None trains all parameters."""
    reference: Literal["cached", "live"] = "cached"
    """Reference log-probabilities: computed before, or in the step (from a second copy; with
    --lora, from the frozen base)."""
    frozen_dtype: Literal["bfloat16", "float32"] | None = None
    """In which an adapter's base, or a live reference's second copy, lies in memory; by default,
    as in `klrlhf dpo`, a base in that of the computation and a second copy in float32."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of the computation; master parameters and moments are float32."""
    remat: str | None = defaults.REMAT
    """What the backward pass recomputes: full, a policy of jax.checkpoint_policies, or None."""
    chunk: Count | None = None
    """Tokens projected on the vocabulary at one time, over all devices; by default, as in `klrlhf
    dpo`, what fills 128 MiB of logits on each part of the batch, 1024 at most."""
    samples: Count = 8
    """Responses that the sampler draws for each prompt; it takes as many prompts as pairs."""
    search: bool = False
    """Compile candidates of --mesh and --remat for the training step, and of --sampling-tensor for
    the sampler, and print them in a table, the best first. Minutes each for a large model."""
    search_meshes: tuple[str, ...] = ()
    """Candidates; by default some of fsdp and tensor that the batch divides over."""
    search_remat: tuple[str, ...] = defaults.REMAT_TRIED
    """Candidates."""
    search_tensors: tuple[int, ...] = ()
    """Candidates; by default powers of two, 8 at most."""
    output: Path | None = None
    """Folder for results.json and the text of the compiled programs."""
