"""Files as a user has them, and the configs that the guide shows for them."""

from __future__ import annotations

import random
import re
from pathlib import Path

from PIL import Image

GUIDE = (Path(__file__).parent.parent / "docs" / "guide.md").read_text()
SECTION = re.search(r"^## Your own files\n(.*?)^## ", GUIDE, re.DOTALL | re.MULTILINE)
assert SECTION is not None
EXAMPLES = {
    str(re.search(r"/data: (\w+)", text)[1]): text  # type: ignore[index]
    for text in re.findall(r"```yaml\n(.*?)```", SECTION[1], re.DOTALL)
}


def write_example(folder: Path, data: str) -> None:
    """Make ``experiment=mine`` of what the guide shows for ``data``, and the files it reads."""
    (folder / "conf" / "experiment").mkdir(parents=True)
    (folder / "conf" / "experiment" / "mine.yaml").write_text(EXAMPLES[data])
    WRITERS[data](folder)


def write_penguins(folder: Path) -> None:
    """60 rows of 3 classes; the mass on line 12 is missing."""
    draw = random.Random(0)
    rows = ["id,bill,mass,island,species"]
    for number in range(60):
        kind = draw.randrange(3)
        mass = "" if number == 10 else f"{draw.gauss(4000 + 500 * kind, 200):.0f}"
        bill = f"{draw.gauss(40 + 5 * kind, 1):.1f}"
        island = draw.choice(["Biscoe", "Dream"])
        species = ("Adelie", "Chinstrap", "Gentoo")[kind]
        rows.append(f"{number},{bill},{mass},{island},{species}")
    (folder / "penguins.csv").write_text("\n".join(rows) + "\n")


def write_photos(folder: Path) -> None:
    """60 images of two colours and of several sizes."""
    draw = random.Random(0)
    for kind, hue in (("cat", 40), ("dog", 200)):
        (folder / "photos" / kind).mkdir(parents=True)
        for number in range(30):
            size = (draw.randrange(30, 60), draw.randrange(30, 60))
            colour = (hue, draw.randrange(256), draw.randrange(256))
            suffix = draw.choice(["png", "jpg", "JPEG"])
            Image.new("RGB", size, colour).save(folder / "photos" / kind / f"{number}.{suffix}")


def write_notes(folder: Path) -> None:
    """Three files of text."""
    draw = random.Random(0)
    (folder / "notes" / "old").mkdir(parents=True)
    for name in ("b.txt", "a.txt", "old/c.txt"):
        words = draw.choices(["one", "two", "three"], k=2000)
        (folder / "notes" / name).write_text(" ".join(words))


def write_reviews(folder: Path) -> None:
    """60 short texts of two classes."""
    draw = random.Random(0)
    for kind, word in (("bad", "poor"), ("good", "fine")):
        (folder / "reviews" / kind).mkdir(parents=True)
        for number in range(30):
            words = [word, *draw.choices(["film", "plot", "end"], k=draw.randrange(1, 90))]
            (folder / "reviews" / kind / f"{number}.txt").write_text(" ".join(words))


def write_sales(folder: Path) -> None:
    """120 months of a number that grows, and moves with the season."""
    draw = random.Random(0)
    rows = ["month,sold"]
    for number in range(120):
        sold = 1000 + 5 * number + 100 * (number % 12 == 11) + draw.gauss(0, 10)
        rows.append(f"{2010 + number // 12}-{number % 12 + 1:02},{sold:.0f}")
    (folder / "sales.csv").write_text("\n".join(rows) + "\n")


def write_ratings(folder: Path) -> None:
    """30 people, each with 5 of 12 films, those of an even number or of an odd one."""
    draw = random.Random(0)
    rows = ["person,film,stars"]
    for person in range(30):
        films = draw.sample(range(person % 2, 12, 2), 5)
        rows += [f"{person},film{film},{draw.randint(1, 5)}" for film in films]
    (folder / "ratings.csv").write_text("\n".join(rows) + "\n")


WRITERS = {
    "interactions": write_ratings,
    "table": write_penguins,
    "series": write_sales,
    "images": write_photos,
    "text": write_notes,
    "text_folder": write_reviews,
}
