"""Images and texts of the user's: which file is in which split, as what, and what is refused."""

from __future__ import annotations

import errno
import glob
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from launching import DDPTRAIN, run, train
from own_files import EXAMPLES, write_example
from PIL import Image

from ddptrain.build import build_source, build_task
from ddptrain.compose import compose
from ddptrain.data import ImageFolder, TextFiles, TextFolder
from ddptrain.data.fetch import Source
from ddptrain.data.plan import Plan
from ddptrain.data.splits import SPLITS
from ddptrain.errors import DataAway, DataError, Refused
from ddptrain.models import TextClassifier

CPU = torch.device("cpu")
Files = dict[str, bytes]


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def png(value: int = 0, size: tuple[int, int] = (4, 4)) -> bytes:
    encoded = io.BytesIO()
    Image.new("L", size, value).save(encoded, "PNG")
    return encoded.getvalue()


def write(files: Files) -> None:
    for name, contents in files.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(contents)


def texts(count: int, *classes: str, below: str = "f") -> Files:
    return {f"{below}/{c}/{i:03}.txt": f"{c}{i}".encode() for c in classes for i in range(count)}


def images(count: int, below: str = "f") -> Files:
    return {f"{below}/{c}/{i}.png": png(i) for c in ("cat", "dog") for i in range(count)}


# Which file is in which split.


def test_splits_of_class_folders_are_disjoint_and_complete() -> None:
    files = texts(40, "a", "b", "c") | {"f/a/.hidden.txt": b"", "f/.git/x.txt": b"", "f/n.txt": b""}
    write(files | {"f/b/deeper/more.TXT": b"", "f/b/notes.md": b""})
    found = [TextFolder(split, "f", 4) for split in SPLITS]
    seen = [file for data in found for file in data.files]
    assert sorted(seen) == sorted([*texts(40, "a", "b", "c"), "f/b/deeper/more.TXT"])
    for data in found:
        assert data.class_names == ["a", "b", "c"]
        names = [data.class_names[label] for label in data.labels]
        assert names == [Path(file).parts[1] for file in data.files]


def test_order_is_that_of_names_whatever_the_file_system_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def found() -> list[Any]:
        folders = [TextFolder(split, "f", 4) for split in SPLITS]
        windows = [
            TextFiles(split, path, 2, split_by=by).bytes.tolist()
            for split in SPLITS
            for path in ("f", "f/**/*.txt")
            for by in ("file", "window")
        ]
        return [(data.files, data.labels) for data in folders] + windows

    write(texts(20, "b", "c", "a"))
    before = found()
    walk, iterate, match = os.walk, Path.iterdir, glob.glob

    def backwards(*arguments: Any, **more: Any) -> Any:
        for folder, below, files in walk(*arguments, **more):
            below.reverse()
            yield folder, below, files[::-1]

    monkeypatch.setattr(os, "walk", backwards)
    monkeypatch.setattr(Path, "iterdir", lambda path: reversed(list(iterate(path))))
    monkeypatch.setattr(glob, "glob", lambda *a, **k: match(*a, **k)[::-1])
    assert found() == before


def test_folders_may_say_the_split() -> None:
    write(images(3, "f/train") | images(1, "f/val"))
    training, val = (ImageFolder(split, "f", 4) for split in ("train", "val"))
    assert training.files == [f"f/train/{c}/{i}.png" for c in ("cat", "dog") for i in range(3)]
    assert val.files == ["f/val/cat/0.png", "f/val/dog/0.png"]
    assert val.labels == [0, 1]
    with pytest.raises(Refused, match=r"f: it has a folder train, and none for test; there is"):
        ImageFolder("test", "f", 4)


def test_train_may_also_be_a_class() -> None:
    write(texts(20, "train", "car"))
    assert TextFolder("val", "f", 4).class_names == ["car", "train"]


@given(
    length=st.integers(0, 400),
    context=st.integers(1, 12),
    parts=st.lists(st.integers(1, 9), min_size=3, max_size=3),
)
def test_each_byte_of_a_text_is_predicted_once(length: int, context: int, parts: list[int]) -> None:
    """All splits together predict each byte but the first, and what fills no window, once."""
    text = bytes(i % 251 for i in range(length))
    write({"f/a.txt": text[: length // 3], "f/b.txt": text[length // 3 :]})
    predicted = []
    for split in SPLITS:
        fractions = [part / sum(parts) for part in parts]
        try:
            data = TextFiles(split, "f", context, split_by="window", fractions=fractions)
        except Refused:
            continue  # no window is in this split
        for index in range(len(data)):
            window = data[index]
            assert window.dtype == torch.int64
            assert bytes(window.tolist()) in text
            predicted += window[1:].tolist()
        indices = list(range(len(data)))[::-1]
        together = torch.stack([data[i] for i in indices])
        assert torch.equal(data.__getitems__(indices), together)
    windows = max(length - 1, 0) // context
    assert sorted(predicted) == sorted(text[1 : windows * context + 1])


def test_whole_files_go_to_one_split() -> None:
    write({f"notes/{i}/{i}.md": bytes([i]) * 20 for i in range(20)})
    found = [TextFiles(split, "notes/**/*.md", 4, fractions=[0.8, 0.1, 0.1]) for split in SPLITS]
    parts = [set(data.bytes.tolist()) for data in found]
    assert [len(part) for part in parts] == [16, 2, 2]
    assert set.union(*parts) == set(range(20))
    paths = {"train": "notes/1", "val": "notes/2/2.md"}
    with pytest.raises(Refused, match=r"notes/1: no such file, and no folder with \*\.txt in it"):
        TextFiles("train", paths, 4)
    assert set(TextFiles("val", paths, 4).bytes.tolist()) == {2}
    with pytest.raises(Refused, match="path: it names nothing for test, only for train, val"):
        TextFiles("test", paths, 4)


# What a sample is.


def test_an_image_covers_a_square_of_numbers_from_0_to_1() -> None:
    wide = Image.new("RGB", (80, 40), (255, 0, 51))
    wide.paste((0, 0, 0), (0, 0, 16, 40))  # of the 40 columns in the middle none is
    write(images(2, "f/train"))
    wide.save("f/train/dog/0.png")
    data = ImageFolder("train", "f", 20, colour=True)
    image, label = data[data.files.index("f/train/dog/0.png")]
    assert (image.shape, image.dtype, label) == ((3, 20, 20), torch.float32, 1)
    torch.testing.assert_close(image.amax((1, 2)), torch.tensor([1, 0, 0.2]))
    assert torch.equal(image.amax((1, 2)), image.amin((1, 2)))
    grey, _ = ImageFolder("train", "f", 20)[data.files.index("f/train/cat/1.png")]
    assert torch.equal(grey, torch.full((1, 20, 20), 1 / 255))


def test_an_image_is_turned_as_its_camera_says_and_keeps_16_bits() -> None:
    write(images(2, "f/train"))
    upper = Image.new("L", (40, 40), 0)
    upper.paste(255, (0, 0, 40, 20))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    upper.save("f/train/cat/0.jpg", exif=exif)
    Image.fromarray(np.full((4, 4), 1 << 15, np.uint16)).save("f/train/cat/1.png")
    data = ImageFolder("train", "f", 4)
    turned, deep = (data[data.files.index(f"f/train/cat/{name}")][0] for name in ("0.jpg", "1.png"))
    assert turned[0, 0].max() < 0.1
    assert turned[0, 3].min() > 0.9
    assert torch.equal(deep, torch.full((1, 4, 4), 128 / 255))


def test_a_text_is_cut_or_filled_up() -> None:
    write({"f/train/a/1.txt": b"abcdef", "f/train/b/1.txt": b"\xff"})
    data = TextFolder("train", "f", 3)
    assert [(text.tolist(), label) for text, label in (data[0], data[1])] == [
        ([97, 98, 99], 0),
        ([255, 0, 0], 1),
    ]
    assert data[0][0].dtype == torch.int64


def fetched(data: ImageFolder, seed: int, epoch: int, micro: int) -> torch.Tensor:
    """All samples of an epoch, in the data set's order, in micro-batches of ``micro``."""
    source = Source("train", data, Plan(len(data), len(data), micro, seed, shuffled=False))
    return torch.cat([source.batch(m)[0] for m in source.plan.micro_batches(epoch)])


def test_augmentation_is_of_training_and_comes_from_the_key_of_a_sample() -> None:
    ramp = Image.fromarray(np.tile(np.arange(0, 240, 30, dtype=np.uint8), (8, 1)))
    for name in (f"f/{s}/{c}/{i}.png" for s in ("train", "val") for c in "ab" for i in range(20)):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        ramp.save(name)
    plain = ImageFolder("train", "f", 8)[0][0]
    data = ImageFolder("train", "f", 8, flip=True)
    flipped = fetched(data, seed=0, epoch=0, micro=7)
    is_flipped = [torch.equal(image, plain.flip(2)) for image in flipped]
    assert 5 < sum(is_flipped) < 35
    assert all(f or torch.equal(i, plain) for i, f in zip(flipped, is_flipped, strict=True))
    assert torch.equal(fetched(data, seed=0, epoch=0, micro=3), flipped)
    assert not torch.equal(fetched(data, seed=0, epoch=1, micro=3), flipped)
    assert not torch.equal(fetched(data, seed=1, epoch=0, micro=3), flipped)
    moved = fetched(ImageFolder("train", "f", 8, shift=2), seed=0, epoch=0, micro=7)
    columns = (torch.arange(8) + torch.arange(-2, 3)[:, None]).clamp(0, 7) * 30 / 255
    by = [int((columns - image[0, 0]).abs().sum(1).argmin()) for image in moved]
    assert set(by) == set(range(5))
    torch.testing.assert_close(moved[:, 0, 0], columns[by])
    with pytest.raises(Refused, match="flip, shift: they are for training, not for split val"):
        ImageFolder("val", "f", 8, flip=True)


def test_filling_up_does_not_change_what_a_text_is_taken_for() -> None:
    torch.manual_seed(0)
    model = TextClassifier(classes=3, width=8)
    text = torch.randint(1, 256, (5, 30))
    longer = torch.nn.functional.pad(text, (0, 40))
    torch.testing.assert_close(model(text), model(longer))
    assert model(torch.zeros(2, 9, dtype=torch.int64)).isfinite().all()


# What is refused, and what an error in training names.


REFUSED: list[tuple[Files, Callable[[], Any], str]] = [
    ({}, lambda: ImageFolder("train", "f", 8), "f: no such folder (looked for from /"),
    ({"f/1.png": b""}, lambda: ImageFolder("train", "f", 8), "f: there are no folders in it"),
    (
        images(9) | {"f/owl/1.gif": b""},
        lambda: ImageFolder("train", "f", 8),
        "f/owl: no file that ends in .png, .jpg, .jpeg; put some there, or take the folder away",
    ),
    (
        texts(9, "a"),
        lambda: TextFolder("train", "f", 8),
        "f: the training split has one class only, 'a'",
    ),
    (
        texts(2, "a", "b", below="f/train") | texts(1, "b", below="f/val"),
        lambda: TextFolder("val", "f", 8),
        "f: split val has one class only, 'b'",
    ),
    (
        texts(2, "a", "b", below="f/train") | texts(1, "a", "c", below="f/val"),
        lambda: TextFolder("val", "f", 8),
        "f/val/c/000.txt is of class 'c', of which the training split has none",
    ),
    (
        texts(3, "a", "b"),
        lambda: TextFolder("test", "f", 8, fractions=[0.9, 0.1, 0]),
        "f: fractions=[0.9, 0.1, 0] of 6 files leave none for test; choose others, or set "
        "data.test=null",
    ),
    (
        images(9),
        lambda: ImageFolder("train", "f", 8, classes=10),
        "f: there are 2 classes (cat, dog), but task.classes=10; set task.classes=2",
    ),
    (
        images(9),
        lambda: ImageFolder("train", "f", 8, outputs=10),
        "f: there are 2 classes (cat, dog), but the model has 10 outputs; give it 2",
    ),
    (
        images(9),
        lambda: ImageFolder("train", "f", 8, colour=True, inputs=1),
        "colour=true: images have 3 channels, but model.inputs=1",
    ),
    (images(9), lambda: ImageFolder("train", "f", 0), "size: expected a number of pixels above 0"),
    (images(9), lambda: ImageFolder("train", "f", 4, shift=4), "shift: expected 0 to 3 pixels"),
    (images(9), lambda: ImageFolder("tain", "f", 4), "split: expected one of train, val, test"),
    (texts(9, "a", "b"), lambda: TextFolder("train", "f", 0), "length: expected a number of bytes"),
    (texts(9, "a", "b"), lambda: TextFiles("train", "f", 0), "context: expected a number of bytes"),
    (
        texts(9, "a", "b"),
        lambda: TextFiles("train", "f", 3, split_by="line"),
        "split_by: expected file or window, got 'line'",
    ),
    (
        {"f/a.txt": b"x" * 99},
        lambda: TextFiles("val", "f/a.txt", 8),
        "f/a.txt: fractions=[0.7, 0.15, 0.15] of 1 files leave none for val; choose others, or set "
        "data.val=null; or set split_by=window to divide the files themselves",
    ),
    (
        {"f/a.txt": b"x" * 9},
        lambda: TextFiles("train", "f/a.txt", 9),
        "f/a.txt: 9 bytes in 1 files of split train are 0 windows of context=9, too few",
    ),
]


@pytest.mark.parametrize(
    ("files", "make", "message"), REFUSED, ids=[message[:40] for *_, message in REFUSED]
)
def test_what_is_wrong_is_said_in_one_line(
    files: Files, make: Callable[[], Any], message: str
) -> None:
    write(files)
    with pytest.raises(Refused) as refused:
        make()
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("damage", [lambda b: b"", lambda b: b[:-30], lambda b: b"GIF89a" + b])
def test_an_image_that_cannot_be_read_is_named(damage: Callable[[bytes], bytes]) -> None:
    write(images(2, "f/train"))
    data = ImageFolder("train", "f", 8)
    source = Source("train", data, Plan(4, 4, 4, shuffled=False))
    Path(data.files[2]).write_bytes(damage(png(9, (50, 50))))
    with pytest.raises(
        DataError, match=r"data.train \(ImageFolder\): sample 2: .*f/train/dog/0.png"
    ):
        source.of_indices([0, 1, 2, 3], source.plan.micro_batches(0)[0])


def test_a_disk_that_is_away_is_not_taken_for_a_damaged_image(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def away(path: Path) -> bytes:
        raise OSError(errno.ESTALE, "stale file handle", str(path))

    write(images(2, "f/train"))
    source = Source("train", ImageFolder("train", "f", 8), Plan(4, 4, 4, shuffled=False))
    monkeypatch.setattr(Path, "read_bytes", away)
    with pytest.raises(DataAway, match=r"sample 0: OSError: .*f/train/cat/0.png"):
        source.of_indices([0], source.plan.micro_batches(0)[0])


# What the guide shows.


@pytest.mark.parametrize("data", EXAMPLES)
def test_what_the_guide_shows_fits_together(tmp_path: Path, data: str) -> None:
    """All three splits and the model; and no config has more than fifteen lines."""
    write_example(tmp_path, data)
    assert len(EXAMPLES[data].splitlines()) < 15
    config = compose(["experiment=mine"])
    task = build_task(config, CPU)
    for split in SPLITS:
        source = build_source(config, split)
        loss = task(source.batch(source.plan.micro_batches(0)[0]))
        assert (loss.sum / loss.count).isfinite()


@pytest.mark.long
def test_images_give_the_same_bits_on_one_rank_and_on_two_with_workers(tmp_path: Path) -> None:
    write_example(tmp_path, "images")
    short = [
        *("experiment=mine", "parallel.reduction=exact", "train.max_steps=4"),
        *("model.channels=8", "data.val=null", "data.test=null"),
    ]
    alone = train(tmp_path / "alone", 1, *short, folder=tmp_path)
    both = train(tmp_path / "both", 2, *short, "data.workers=1", folder=tmp_path)
    assert alone["weights_sha256"] == both["weights_sha256"]


def test_a_training_of_other_classes_is_refused(tmp_path: Path) -> None:
    write_example(tmp_path, "images")
    finished = run([*DDPTRAIN, "experiment=mine", "task.classes=3"], tmp_path)
    assert finished.returncode == 2
    message = "data.train: photos: there are 2 classes (cat, dog), but task.classes=3; set"
    assert message in finished.stderr.strip().splitlines()[-1]
