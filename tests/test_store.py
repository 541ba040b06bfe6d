"""Checkpoints on disk: whole or not there, believed only if every bit is right, never executed."""

from __future__ import annotations

import contextlib
import json
import logging
import pickle
import random
import shutil
import threading
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from ddptrain.checkpoint.checkpoints import Checkpoints
from ddptrain.checkpoint.media import Disk
from ddptrain.checkpoint.memory import Memory
from ddptrain.checkpoint.retention import Retention
from ddptrain.checkpoint.saved import MODEL, OPTIMIZER, capture
from ddptrain.checkpoint.store import MANIFEST, Store
from ddptrain.errors import CheckpointError

FLIPS = 334
"""Of each of three files."""
FACTS: dict[str, Any] = {"config": {"seed": 3, "optim": {"lr": 1e-5}}, "versions": {"torch": "2"}}


class Trained:
    """A small model with buffers and an optimiser that has a state, as they are in a run."""

    def __init__(self, steps: int = 3, features: int = 4) -> None:
        torch.manual_seed(steps)
        self.model = nn.Sequential(nn.Linear(features, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        for _ in range(steps):
            self.model(torch.randn(8, features)).square().sum().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    def tensors(self) -> dict[str, torch.Tensor]:
        named = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            for key, value in self.optimizer.state[parameter].items():
                named[f"{name}/{key}"] = value.clone()
        return named


def checkpoints(root: Path, keep_last: int = 10, keep_best: int = 0) -> Checkpoints:
    memory = Memory([root.with_name(f"{root.name}-memory")])
    retention = Retention(keep_last, keep_best)
    return Checkpoints(Store(Disk(root)), memory, retention, "val/accuracy", FACTS)


def folder(kept: Checkpoints | Store, step: int) -> Path:
    return Path((kept.store if isinstance(kept, Checkpoints) else kept).where(step))


def put_back(kept: Checkpoints, step: int, trained: Trained) -> None:
    kept.read(step).put_back(trained.model, trained.optimizer)


def save(kept: Checkpoints, step: int, trained: Trained | None = None, **metrics: float) -> None:
    trained = trained or Trained(step % 5 + 1)
    named = {name.replace("_", "/"): value for name, value in metrics.items()}
    numbers = {"skipped_steps": 0.0, "loss_scale": 4096.0}
    kept.save(capture(step, trained.model, trained.optimizer, numbers, named), durable=True)
    kept.settle()


def write(store: Store, step: int, files: dict[str, str | bytes], **more: Any) -> None:
    """Write a checkpoint of files with these contents."""
    with TemporaryDirectory() as name:
        sources = {file: Path(name) / file for file in files}
        for file, content in files.items():
            sources[file].write_bytes(content if isinstance(content, bytes) else content.encode())
        digests = {file: Disk(Path(name)).digest("", file) for file in files}
        store.write(step, sources, {"step": step, "files": digests, **more})


def flip(file: Path, position: int, bit: int) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 1 << bit
    file.write_bytes(content)


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


# --- the store ---------------------------------------------------------------------------------


def test_what_is_written_is_found(tmp_path: Path) -> None:
    store = Store(Disk(tmp_path / "checkpoints"))
    assert store.steps() == []
    for step in (200, 5, 1000):
        write(store, step, {"a": f"a{step}", "b": "b"}, more=[step])
        assert (tmp_path / "checkpoints" / "latest").read_text() == f"step-{step:08d}\n"
    assert store.steps() == [5, 200, 1000]
    assert names(tmp_path / "checkpoints") == [
        "latest",
        "step-00000005",
        "step-00000200",
        "step-00001000",
    ]
    assert names(folder(store, 200)) == ["a", "b", MANIFEST]
    assert (folder(store, 200) / "a").read_text() == "a200"
    manifest = store.verify(200)
    assert (manifest["step"], manifest["more"]) == (200, [200])
    store.delete(200)
    assert store.steps() == [5, 1000]
    assert not folder(store, 200).exists()


def test_steps_are_in_the_order_of_numbers_also_past_eight_digits(tmp_path: Path) -> None:
    store = Store(Disk(tmp_path))
    for step in (10**9, 5, 99_999_999):
        write(store, step, {})
    assert store.steps() == [5, 99_999_999, 10**9]


def test_a_write_that_fails_leaves_no_checkpoint(tmp_path: Path) -> None:
    store = Store(Disk(tmp_path))
    write(store, 1, {"a": "a"})
    source, gone = tmp_path / "a", tmp_path / "gone"
    source.write_text("a")
    digest = Disk(tmp_path).digest("", "a")
    files = {"a": digest, "b": digest}
    with pytest.raises(OSError, match="gone"):
        store.write(2, {"a": source, "b": gone}, {"step": 2, "files": files})
    wrong = {"a": digest | {"bytes": 2}}
    with pytest.raises(OSError, match="read back as"):
        store.write(2, {"a": source}, {"step": 2, "files": wrong})
    assert store.steps() == [1]
    assert (tmp_path / "latest").read_text() == "step-00000001\n"
    write(store, 2, {"a": "second"})
    assert names(folder(store, 2)) == ["a", MANIFEST]


def test_what_a_crash_has_left_is_no_checkpoint_and_is_removed(tmp_path: Path) -> None:
    kept = checkpoints(tmp_path / "checkpoints")
    save(kept, 1)
    shutil.copytree(folder(kept, 1), folder(kept, 2))
    (folder(kept, 2) / MANIFEST).unlink()
    assert kept.store.steps() == [1]
    save(kept, 3)
    assert names(tmp_path / "checkpoints") == ["latest", "step-00000001", "step-00000003"]


def test_a_good_checkpoint_of_the_same_step_is_kept_a_damaged_one_replaced(tmp_path: Path) -> None:
    store = Store(Disk(tmp_path))
    write(store, 1, {"a": "first"})
    write(store, 1, {"a": "again"})
    assert (folder(store, 1) / "a").read_text() == "first"
    (folder(store, 1) / "a").write_text("FIRST")
    write(store, 1, {"a": "again"})
    assert (folder(store, 1) / "a").read_text() == "again"
    store.verify(1)


def test_latest_moves_also_where_the_crash_came_just_before_it(tmp_path: Path) -> None:
    """The checkpoint was renamed into place, `latest` not yet moved; the run saves it again."""
    store = Store(Disk(tmp_path))
    write(store, 1, {"a": "a"})
    before = (tmp_path / "latest").read_text()
    write(store, 2, {"a": "a"})
    (tmp_path / "latest").write_text(before)
    write(store, 2, {"a": "a"})
    assert (tmp_path / "latest").read_text() == "step-00000002\n"


def test_a_folder_without_a_manifest_is_written_over(tmp_path: Path) -> None:
    """As a copy that was cut off leaves it."""
    store = Store(Disk(tmp_path))
    write(store, 1, {"a": "a"})
    (folder(store, 1) / MANIFEST).unlink()
    assert store.steps() == []
    write(store, 1, {"a": "again"})
    assert (folder(store, 1) / "a").read_text() == "again"
    store.verify(1)


def test_folders_that_are_no_checkpoints_are_left_alone(tmp_path: Path) -> None:
    store = Store(Disk(tmp_path))
    write(store, 1, {"a": "a"})
    shutil.copytree(folder(store, 1), tmp_path / "step-00000001-copy")
    assert store.steps() == [1]
    write(store, 2, {"a": "a"})
    assert "step-00000001-copy" in names(tmp_path)


# --- damage ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [MODEL, OPTIMIZER, MANIFEST])
def test_every_flipped_bit_is_noticed(tmp_path: Path, name: str) -> None:
    """Noticed, or of no consequence: 1e-05 and 1E-05 in the manifest are one number."""
    kept = checkpoints(tmp_path)
    save(kept, 7, val_accuracy=0.5)
    file = folder(kept, 7) / name
    whole, manifest = file.read_bytes(), kept.store.verify(7)
    chance = random.Random(0)
    unnoticed = []
    for _ in range(FLIPS):
        position, bit = chance.randrange(len(whole)), chance.randrange(8)
        flip(file, position, bit)
        with contextlib.suppress(CheckpointError):
            if kept.store.verify(7) != manifest or name != MANIFEST:
                unnoticed.append(file.read_bytes()[max(0, position - 20) : position + 20])
        file.write_bytes(whole)
    assert not unnoticed, f"{len(unnoticed)} of {FLIPS} flips unnoticed, such as {unnoticed[0]!r}"
    assert kept.store.verify(7) == manifest


@pytest.mark.parametrize("name", [MODEL, OPTIMIZER, MANIFEST])
def test_truncated_grown_and_missing_files_are_noticed(tmp_path: Path, name: str) -> None:
    kept = checkpoints(tmp_path)
    save(kept, 7)
    file = folder(kept, 7) / name
    whole = file.read_bytes()
    for content in (b"", whole[:-1], whole[: len(whole) // 2], whole + b"x", whole + whole):
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match="step-00000007"):
            kept.store.verify(7)
    file.unlink()
    with pytest.raises(CheckpointError, match="step-00000007"):
        kept.store.verify(7)


def test_a_manifest_of_another_step_is_no_manifest(tmp_path: Path) -> None:
    store = Store(Disk(tmp_path))
    write(store, 1, {"a": "a"})
    folder(store, 1).rename(folder(store, 2))
    with pytest.raises(CheckpointError, match="step 2"):
        store.verify(2)


@pytest.mark.parametrize("content", ["[]", "null", "{}", '{"step": 1}', '{"step": 1, "files": 3}'])
def test_json_that_is_no_manifest_is_damage_too(tmp_path: Path, content: str) -> None:
    store = Store(Disk(tmp_path))
    write(store, 1, {"a": "a"})
    (folder(store, 1) / MANIFEST).write_text(content)
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        store.verify(1)


def damage_model(folder: Path) -> None:
    flip(folder / MODEL, 100, 0)


def damage_manifest(folder: Path) -> None:
    (folder / MANIFEST).write_bytes((folder / MANIFEST).read_bytes()[:-10])


def lose_optimizer(folder: Path) -> None:
    (folder / OPTIMIZER).unlink()


DAMAGES = [(damage_model, MODEL), (damage_manifest, MANIFEST), (lose_optimizer, OPTIMIZER)]


@pytest.mark.parametrize(("damage", "name"), DAMAGES)
def test_a_damaged_newest_is_passed_over_with_a_warning(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    damage: Callable[[Path], None],
    name: str,
) -> None:
    kept = checkpoints(tmp_path)
    for step in (10, 20, 30):
        save(kept, step)
    damage(folder(kept, 30))
    with caplog.at_level(logging.WARNING):
        found = kept.newest()
    assert found is not None
    assert found.step == 20
    (warning,) = caplog.messages
    assert str(folder(kept, 30) / name) in warning


@pytest.mark.parametrize(("damage", "name"), DAMAGES)
def test_when_all_are_damaged_the_run_does_not_begin_again(
    tmp_path: Path, damage: Callable[[Path], None], name: str
) -> None:
    kept = checkpoints(tmp_path)
    for step in (10, 20):
        save(kept, step)
    for step in (10, 20):
        damage(folder(kept, step))
    with pytest.raises(CheckpointError, match="none of the 2 checkpoints is whole") as raised:
        kept.newest()
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("keep_last", [1, 2])
@pytest.mark.parametrize(("damage", "name"), DAMAGES)
def test_a_damaged_checkpoint_takes_no_place_of_a_whole_one(
    tmp_path: Path, damage: Callable[[Path], None], name: str, keep_last: int
) -> None:
    """Resumed from 20 because 40 is damaged: what is saved at 30 is now the newest."""
    kept = checkpoints(tmp_path, keep_last)
    for step in (20, 40):
        save(checkpoints(tmp_path), step)
    damage(folder(kept, 40))
    save(kept, 30)
    found = kept.newest()
    assert found is not None
    assert found.step == 30
    whole = {30} if keep_last == 1 else {20, 30}
    assert whole <= set(kept.store.steps())


@pytest.mark.parametrize(("damage", "name"), DAMAGES)
def test_one_that_another_start_has_written_counts_only_if_it_is_whole(
    tmp_path: Path, damage: Callable[[Path], None], name: str
) -> None:
    """Also where nobody had to read it, for the run went on from a snapshot in memory."""
    for step in (10, 20):
        save(checkpoints(tmp_path, keep_last=2), step)
    damage(folder(checkpoints(tmp_path), 20))
    next_start = checkpoints(tmp_path, keep_last=2)
    next_start.scrub()
    for thread in threading.enumerate():
        if thread.name == "scrub":
            thread.join()
    save(next_start, 30)
    assert checkpoints(tmp_path).store.steps() == [10, 30]


def test_no_checkpoint_is_a_new_run(tmp_path: Path) -> None:
    assert checkpoints(tmp_path / "none").newest() is None
    assert checkpoints(tmp_path).newest() is None


# --- what is in them ---------------------------------------------------------------------------


def test_restored_is_bit_for_bit_what_was_saved(tmp_path: Path) -> None:
    kept, trained = checkpoints(tmp_path), Trained(steps=4)
    save(kept, 4, trained, val_accuracy=0.25)
    found = kept.newest()
    assert found is not None
    manifest = found.manifest
    other = Trained(steps=1)
    found.put_back(other.model, other.optimizer)
    expected, restored = trained.tensors(), other.tensors()
    assert restored.keys() == expected.keys()
    for name, tensor in expected.items():
        assert restored[name].dtype == tensor.dtype
        assert torch.equal(restored[name], tensor), name
    assert manifest["step_numbers"] == {"skipped_steps": 0.0, "loss_scale": 4096.0}
    assert manifest["metrics"] == {"val/accuracy": 0.25}
    assert {key: manifest[key] for key in FACTS} == FACTS


def test_restored_trains_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    kept, trained, other = checkpoints(tmp_path), Trained(steps=4), Trained(steps=1)
    save(kept, 4, trained)
    put_back(kept, 4, other)
    batch = torch.randn(8, 4, generator=torch.Generator().manual_seed(9))
    for one in (trained, other):
        one.optimizer.zero_grad()
        one.model(batch).square().sum().backward()
        one.optimizer.step()
    for name, tensor in trained.tensors().items():
        assert torch.equal(other.tensors()[name], tensor), name


def test_a_checkpoint_of_another_model_is_told_by_name(tmp_path: Path) -> None:
    kept = checkpoints(tmp_path)
    save(kept, 4, Trained(features=5))
    saved = kept.read(4)
    wider = Trained()
    with pytest.raises(CheckpointError, match=r"0\.weight is \(3, 5\) there, \(3, 4\) here"):
        saved.put_back(wider.model, None)
    with pytest.raises(CheckpointError, match=r"2\.weight"):
        saved.put_back(nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3)), None)


class Exploit:
    """Makes a file when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.canary,)


def _pickled(canary: Path) -> bytes:
    return pickle.dumps(Exploit(canary))


def _torch_saved(canary: Path) -> bytes:
    torch.save({"0.weight": Exploit(canary)}, content := BytesIO())
    return content.getvalue()


@pytest.mark.parametrize("kind", [_pickled, _torch_saved])
@pytest.mark.parametrize("name", [MODEL, OPTIMIZER])
def test_a_checkpoint_is_data_and_never_executed(
    tmp_path: Path, kind: Callable[[Path], bytes], name: str
) -> None:
    """The manifest vouches for the file, so only the way it is read stands between."""
    canary, trained = tmp_path / "canary", Trained()
    kept = checkpoints(tmp_path / "checkpoints")
    files: dict[str, str | bytes] = {MODEL: safetensors.torch.save(trained.model.state_dict())}
    files[name] = kind(canary)
    write(kept.store, 1, files, metrics={}, step_numbers={}, optimizer_numbers={})
    found = kept.newest()
    assert found is not None
    with pytest.raises(CheckpointError, match=name):
        found.put_back(trained.model, trained.optimizer)
    assert not canary.exists()
    pickle.loads(pickle.dumps(Exploit(canary)))
    assert canary.exists(), "the exploit must be one"


# --- which are kept ----------------------------------------------------------------------------


def test_three_resumes_later_the_best_and_the_last_are_there(tmp_path: Path) -> None:
    scores = {1: 0.1, 2: 0.9, 3: 0.3, 4: 0.8, 5: 0.2, 6: 0.9, 7: 0.5, 8: 0.4}
    for first in (1, 3, 5, 7):  # each a process that knows only what is on disk
        kept = checkpoints(tmp_path, keep_last=1, keep_best=2)
        for step in (first, first + 1):
            save(kept, step, val_accuracy=scores[step])
            best = sorted(range(1, step + 1), key=lambda s: (-scores[s], s))[:2]
            assert kept.store.steps() == sorted({*best, step})
    assert kept.store.steps() == [2, 6, 8]
    assert kept.best_step() == 2
    assert kept.best_metrics() == {"val/accuracy": 0.9}


def test_a_checkpoint_between_evaluations_has_no_score(tmp_path: Path) -> None:
    kept = checkpoints(tmp_path, keep_last=1, keep_best=1)
    save(kept, 1, val_accuracy=0.5)
    save(kept, 2)
    save(kept, 3, val_accuracy=float("nan"))
    assert kept.store.steps() == [1, 3]
    assert kept.best_step() == 1


def test_only_what_would_be_kept_is_among_the_best(tmp_path: Path) -> None:
    kept = checkpoints(tmp_path, keep_last=1, keep_best=2)
    for step, score in ((1, 0.5), (2, 0.7), (3, 0.6)):
        assert kept.is_among_best(step, {"val/accuracy": score})
        save(kept, step, val_accuracy=score)
    assert not kept.is_among_best(4, {"val/accuracy": 0.55})
    assert not kept.is_among_best(4, {"val/accuracy": float("nan")})
    assert kept.is_among_best(4, {"val/accuracy": 0.65})
    assert not checkpoints(tmp_path, keep_best=0).is_among_best(4, {})


def test_the_manifest_is_readable_by_people_and_other_programs(tmp_path: Path) -> None:
    kept = checkpoints(tmp_path)
    save(kept, 3, val_accuracy=0.5)
    content = json.loads((folder(kept, 3) / MANIFEST).read_text())
    assert content["step"] == 3
    assert set(content["files"]) == {MODEL, OPTIMIZER}


def test_a_checkpoint_that_cannot_be_read_now_is_not_deleted(tmp_path: Path) -> None:
    """Its disk may be away for a moment only, and it may be the best."""
    kept = checkpoints(tmp_path, keep_last=1)
    save(kept, 10)
    manifest = folder(kept, 10) / MANIFEST
    away = manifest.rename(manifest.with_name("away"))
    manifest.mkdir()  # reading it is an OSError
    save(kept, 20)
    manifest.rmdir()
    away.rename(manifest)
    assert kept.store.steps() == [10, 20]
    kept.store.verify(10)


def test_a_checkpoint_whose_manifest_is_spoilt_goes_with_the_next_one(tmp_path: Path) -> None:
    kept = checkpoints(tmp_path, keep_last=3)
    save(kept, 10)
    save(kept, 20)
    manifest = folder(kept, 10) / MANIFEST
    manifest.write_text(manifest.read_text()[:-200])
    save(kept, 30)
    assert kept.store.steps() == [20, 30]


def test_a_config_with_keys_that_json_changes_is_kept_whole(tmp_path: Path) -> None:
    """YAML has integer keys and JSON has not, and their order differs: 2 < 10 but "10" < "2"."""
    names = {"names": {2: "cat", 10: "dog"}, "range": (0, 1)}
    kept = checkpoints(tmp_path)
    kept.facts = {"config": names}
    save(kept, 5)
    assert kept.store.verify(5)["config"] == {"names": {"2": "cat", "10": "dog"}, "range": [0, 1]}


def test_tied_weights_are_saved_and_stay_tied(tmp_path: Path) -> None:
    def tied() -> tuple[nn.ModuleDict, torch.optim.Optimizer]:
        model = nn.ModuleDict({"tokens": nn.Embedding(5, 3), "head": nn.Linear(3, 5, bias=False)})
        model["head"].weight = model["tokens"].weight
        return model, torch.optim.AdamW(model.parameters())

    kept = checkpoints(tmp_path)
    model, optimizer = tied()
    kept.save(capture(1, model, optimizer, {}, {}), durable=True)
    kept.settle()
    other, its_optimizer = tied()
    kept.read(1).put_back(other, its_optimizer)
    assert torch.equal(other["head"].weight, model["tokens"].weight)
    assert other["head"].weight is other["tokens"].weight


def test_what_an_optimiser_counts_in_its_groups_is_restored_but_not_the_rate(
    tmp_path: Path,
) -> None:
    kept, trained, other = checkpoints(tmp_path), Trained(), Trained()
    group = trained.optimizer.param_groups[0]
    group |= {"calls": 7, "distance": torch.tensor(0.5), "lr": 0.01}
    save(kept, 3, trained)
    put_back(kept, 3, other)
    (restored,) = other.optimizer.param_groups
    assert restored["calls"] == 7
    assert restored["distance"] == 0.5
    assert restored["lr"] == 0.1
