"""Whose rows are whose, whatever the order of the mesh; with real processes: test_processes."""

import numpy as np
import pytest

from jax_klrlhf import placement
from jax_klrlhf.data import batch, buckets
from jax_klrlhf.data.rows import Row
from jax_klrlhf.errors import InputError
from jax_klrlhf.programs import batches
from jax_klrlhf.results import output_folder
from jax_klrlhf.training import mesh as meshes

SHAPES = [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4), (4, 1, 2)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(4))
def test_a_process_has_the_rows_of_its_devices_and_no_others(shape, seed, monkeypatch):
    owner = np.random.default_rng(seed).permutation(np.repeat(np.arange(4), 2))
    mesh = meshes.make(**dict(zip(meshes.AXES, shape, strict=True)))
    parts = shape[0] * shape[1]
    for process in range(4):
        mine = lambda device, process=process: owner[device.id] == process  # noqa: E731
        monkeypatch.setattr(placement, "_mine", mine)
        # Device by device: its place in the mesh says which rows it holds.
        wanted = set()
        for (data, fsdp, _), device in np.ndenumerate(mesh.devices):
            if mine(device):
                part = data * shape[1] + fsdp
                wanted |= set(range(3 * part, 3 * part + 3))
        assert placement.own_rows(mesh, 3 * parts).tolist() == sorted(wanted)
    with pytest.raises(ValueError, match=f"does not divide over the {parts} parts"):
        placement.own_rows(mesh, parts + 1)


@pytest.mark.parametrize("shape", SHAPES)
def test_groups_are_all_that_differ_along_some_axes_or_parts_of_them(shape):
    mesh = meshes.make(**dict(zip(meshes.AXES, shape, strict=True)))
    found = list(placement.groups(mesh.devices))
    assert len(set(found)) == len(found) == 3 * 4 + 3 * 2 * 2 + 6  # of two in 2 orders, 3 in 6
    # Devices whose places differ in no bit beyond those of a mask.
    place = dict(enumerate(mesh.devices.flat))
    wanted = {
        frozenset(device for at, device in place.items() if at | mask == begin | mask)
        for mask in range(1, 8)
        for begin in place
    }
    assert set(map(frozenset, found)) == wanted


def test_of_many_devices_whole_axes_make_the_groups():
    grid = lambda *shape: np.arange(np.prod(shape)).reshape(shape)  # noqa: E731
    assert list(placement.groups(grid(1, 32, 1))) == [tuple(range(32))]
    # Of one axis; of two, in two orders; of three, in six.
    one, two, three = 8 + 8 + 16, 2 * (2 + 4 + 4), 6
    assert len(list(placement.groups(grid(4, 4, 2)))) == one + two + three
    # An axis of twelve is one of 2 x 2 x 3: of the first two, of the second and the third, ...
    found = {frozenset(group) for group in placement.groups(grid(1, 12, 1))}
    assert {frozenset({0, 6}), frozenset({0, 3, 6, 9}), frozenset(range(6))} <= found
    assert frozenset({0, 4, 8}) not in found


@pytest.mark.parametrize("count", [1, 5, 9, 17])
def test_every_process_takes_as_many_batches_of_prompts(count):
    """Fill rows lie on one host alone, and the longest prompt on another."""
    rows = [Row([1] * (1 + n % 7), [[1], [2]], [1.0, 0.0], 1.0, 1.0, n) for n in range(17)]
    fetch, lengths = batch.from_rows(rows)
    shapes = buckets.fit(
        lengths.prompts, lengths.longest, responses=2, max_shapes=2, batch_size=4, divisor=4
    )
    hosts = [
        batch.Loader(
            fetch, lengths, shapes=shapes, seed=None,
            own=lambda n, h=h: np.arange(h * n // 4, (h + 1) * n // 4),
        )
        for h in range(4)
    ]  # fmt: skip
    found = [batches.first_prompts(loader, count) for loader in hosts]
    alone = batches.first_prompts(batch.Loader(fetch, lengths, shapes=shapes, seed=None), count)
    seen = [len(hosts[0].piece(step).rows) for step in range(len(alone.batches))]
    assert sum(seen) >= count > sum(seen[:-1])
    assert {len(one.batches) for one in found} == {len(alone.batches)}
    # Each row that was there counts once, on one host; what fills a batch does not.
    assert sum(int(keep.sum()) for one in found for keep in one.where) == sum(seen)
    longest = max(int(one.lengths.max()) for one in alone.batches)
    assert {one.longest for one in found} == {longest}


def test_a_bucket_is_no_folder_and_none_is_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"gs://b/run: not a folder .*mount"):
        output_folder("gs://b/run")
    assert not list(tmp_path.iterdir())
