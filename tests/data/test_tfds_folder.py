"""A folder of data cannot run code: TFDS would import the module of any class that it names."""

import contextlib
import importlib
import json
import sys

import pytest

from jax_klrlhf.data import prepare, sources, tfds_folder
from jax_klrlhf.errors import InputError

OWN = "tensorflow_datasets.core.features"


@pytest.fixture
def evil(tmp_path, monkeypatch):
    """A module on the path whose import leaves a trace: as in the folder a command starts in."""
    (tmp_path / "code").mkdir()
    trace = tmp_path / "it-ran"
    (tmp_path / "code" / "evil_features.py").write_text(
        f"""
import tensorflow_datasets as tfds
open({str(trace)!r}, "w").close()
class Evil(tfds.features.Text): ...
class Tree(tfds.features.FeaturesDict): ...
"""
    )
    monkeypatch.syspath_prepend(str(tmp_path / "code"))
    yield trace
    sys.modules.pop("evil_features", None)
    registered = importlib.import_module(f"{OWN}.feature").FeatureConnector._registered_features
    for name in ("Evil", "Tree"):
        registered.pop(f"evil_features.{name}", None)


@pytest.fixture
def folder(tmp_path):
    """A healthy TFDS data set."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.dataset_info import DatasetIdentity

    folder = tmp_path / "words" / "1.0.0"
    folder.mkdir(parents=True)
    info = tfds.core.DatasetInfo(
        builder=DatasetIdentity(
            name="words",
            version=tfds.core.Version("1.0.0"),
            data_dir=str(folder),
            module_name="words",
        ),
        features=tfds.features.FeaturesDict(
            {"prompt": tfds.features.Text(), "response": tfds.features.Text()}
        ),
    )
    writer = tfds.core.SequentialWriter(info, 100, file_format="array_record")
    writer.initialize_splits(["train"])
    writer.add_examples({"train": [{"prompt": "p", "response": "r"}]})
    writer.close_all()
    return folder


def rewrite(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def deep(features):
    return features["featuresDict"]["features"]["prompt"]


def legacy(name):
    inner = {"type": name, "content": {}}
    return {
        "type": f"{OWN}.features_dict.FeaturesDict",
        "content": {"prompt": inner, "response": inner},
    }


def replaced(features, by):
    features.clear()
    features.update(by)


EVIL = "evil_features.Evil"
# How a file can name a class.
NAMED = {
    "at the top": lambda f: f.update(pythonClassName="evil_features.Tree"),
    "inside": lambda f: deep(f).update(pythonClassName=EVIL),
    "in the protocol buffer's own spelling": lambda f: replaced(
        deep(f), {"python_class_name": EVIL, "text": {}}
    ),
    "in the older form": lambda f: replaced(f, legacy(EVIL)),
    "in JSON within text": lambda f: replaced(
        f,
        {
            "pythonClassName": f"{OWN}.features_dict.FeaturesDict",
            "jsonFeature": {"json": json.dumps({"prompt": legacy(EVIL)["content"]["prompt"]})},
        },
    ),
}


@pytest.mark.parametrize("how", NAMED)
def test_source_folder_that_names_code_is_refused_and_nothing_runs(folder, evil, how):
    rewrite(folder / "features.json", NAMED[how])
    with pytest.raises(InputError, match=r"features\.json: names the class 'evil_features"):
        list(sources.open_source(folder).records())
    assert not evil.exists()
    # The danger is real: TFDS alone runs it.
    import tensorflow_datasets as tfds

    with contextlib.suppress(Exception):
        tfds.builder_from_directory(folder)
    assert evil.exists()


def test_features_within_dataset_info_are_looked_at_too(folder, evil):
    features = json.loads((folder / "features.json").read_text())
    deep(features)["pythonClassName"] = EVIL
    rewrite(folder / "dataset_info.json", lambda info: info.update(features=features))
    with pytest.raises(InputError, match=r"dataset_info\.json: names the class 'evil_features"):
        sources.open_source(folder)
    assert not evil.exists()


@pytest.mark.parametrize(
    "name", ["this.s", "antigravity.X", f"{OWN}.X", f"{OWN}.os.path.X", "Text", 5, None]
)
def test_modules_of_the_standard_library_and_odd_names_are_refused(folder, name):
    rewrite(folder / "features.json", lambda f: deep(f).update(pythonClassName=name))
    with pytest.raises(InputError, match="names the class"):
        sources.open_source(folder)
    assert "antigravity" not in sys.modules


def test_folder_by_name_is_read_without_its_builders_code(folder, evil):
    import tensorflow_datasets as tfds

    tfds.core.add_data_dir(folder.parents[1])
    for name in ("words", "words:1.0.0"):
        assert tfds_folder.find(name) == folder
        (example,) = sources.open_source(f"tfds:{name}").examples()
        assert (example.prompt, example.responses) == ("p", ["r"])
    rewrite(folder / "features.json", NAMED["inside"])
    with pytest.raises(InputError, match="names the class"):
        sources.open_source("tfds:words")
    for name in ("huggingface:owner/evil", "evil_features:words", "../words", "a/b/c"):
        with pytest.raises(InputError, match="is no name of a TFDS data set"):
            sources.open_source(f"tfds:{name}")
    assert not evil.exists()


def test_the_newest_version_and_the_only_configuration_are_found(tmp_path):
    import tensorflow_datasets as tfds

    for place in ("found/1.9.0", "found/1.10.0", "split/one/1.0.0", "split/two/1.0.0"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "features.json").write_text("{}")
    tfds.core.add_data_dir(tmp_path)
    assert tfds_folder.find("found") == tmp_path / "found/1.10.0"
    assert tfds_folder.find("found:1.9.0") == tmp_path / "found/1.9.0"
    assert tfds_folder.find("split/two") == tmp_path / "split/two/1.0.0"
    with pytest.raises(InputError, match="give one of these folders"):
        tfds_folder.find("split")


def test_folder_that_names_files_elsewhere_is_refused(folder):
    def change(info):
        info["splits"][0]["filepathTemplate"] = "../{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_INDEX}"

    rewrite(folder / "dataset_info.json", change)
    with pytest.raises(InputError, match="which lies elsewhere"):
        sources.open_source(folder)


def test_prepared_folder_that_names_code_is_refused_and_nothing_runs(tmp_path, byte_level, evil):
    records = [{"prompt": "p", "chosen": " a", "rejected": " b"}]
    home = tmp_path / "prepared"
    prepare.build(records, byte_level, home, max_prompt_length=8, max_response_length=8)
    rewrite(home / "features.json", NAMED["inside"])
    with pytest.raises(InputError, match=r"features\.json is not what was written"):
        prepare.load(home)
    assert not evil.exists()
