"""Which checkpoint a config names: directories, and the models in the box."""

from pathlib import Path

import pytest

from cluster import models
from cluster.models import cache_dir, find_model
from model import make
from model.checkpoint import Checkpoint
from model.errors import CheckpointInvalid
from tests.reference_data import checkpoint_dir
from wire.errors import ConfigError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "cache"
    monkeypatch.setenv("MORAY_CACHE_DIR", str(path))
    return path


def fake_model(path: Path) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    return path


def test_directory_is_taken_and_named_after_itself() -> None:
    source = find_model(str(checkpoint_dir("mtp")))
    assert (source.name, source.path) == ("mtp", checkpoint_dir("mtp").resolve())


def test_relative_directory_is_resolved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_model(tmp_path / "models" / "mine")
    monkeypatch.chdir(tmp_path / "models" / "mine")
    assert find_model(".") == models.ModelSource("mine", (tmp_path / "models" / "mine").resolve())


def test_home_directory_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_model(tmp_path / "mine")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_model("~/mine").path == (tmp_path / "mine").resolve()


@pytest.mark.parametrize("given", ["tinny", "/no/such/model", "", "huge"])
def test_unknown_name_says_what_there_is(given: str) -> None:
    with pytest.raises(ConfigError) as caught:
        find_model(given)
    assert caught.value.field == "model"
    assert "config.json" in caught.value.message
    assert "one of nano, tiny" in caught.value.message
    assert caught.value.message.endswith(f"got {given}")


def test_directory_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"a directory with config\.json"):
        find_model(str(tmp_path))


def test_trained_model_comes_with_the_checkout_and_is_whole() -> None:
    source = find_model("nano")
    assert (source.name, source.path) == ("nano", Path(models.__file__).parents[1] / "assets" / "nano")
    Checkpoint.open(source.path).check()


def test_trained_model_is_inside_the_package_where_there_is_no_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = fake_model(tmp_path / "cluster" / "assets" / "nano")
    monkeypatch.setattr(models, "__file__", str(tmp_path / "cluster" / "models.py"))
    assert find_model("nano").path == installed


def test_trained_model_that_is_missing_says_where_it_should_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "__file__", str(tmp_path / "cluster" / "models.py"))
    with pytest.raises(ConfigError, match="assets/nano"):
        find_model("nano")


def test_model_in_the_box_is_made_in_the_cache_and_whole(cache: Path) -> None:
    source = find_model("tiny")
    assert (source.name, source.path) == ("tiny", cache / "models" / "tiny")
    Checkpoint.open(source.path).check()


def test_model_in_the_box_is_made_once(cache: Path) -> None:
    kept = fake_model(cache / "models" / "tiny")
    assert find_model("tiny").path == kept
    assert [path.name for path in kept.iterdir()] == ["config.json"]


def test_model_made_by_another_process_meanwhile_will_do(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose_the_race(out_dir: Path, **_: object) -> None:
        fake_model(out_dir)
        raise CheckpointInvalid(str(out_dir), problem="cannot be put in place")

    monkeypatch.setattr(make, "make_checkpoint", lose_the_race)
    assert find_model("tiny").path == cache / "models" / "tiny"


def test_model_that_cannot_be_made_is_an_error(cache: Path) -> None:
    (cache / "models").mkdir(parents=True)
    (cache / "models" / "tiny").write_text("in the way")
    with pytest.raises(CheckpointInvalid, match="tiny"):
        find_model("tiny")


def test_model_in_the_box_is_the_same_on_every_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = []
    for host in ("h1", "h2"):
        monkeypatch.setenv("MORAY_CACHE_DIR", str(tmp_path / host))
        weights.append((find_model("tiny").path / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


def test_cache_is_in_the_home_directory_unless_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("MORAY_CACHE_DIR")
    assert cache_dir() == tmp_path / ".cache" / "moray"
