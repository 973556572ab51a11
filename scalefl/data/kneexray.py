"""Knee radiographs with Kellgren-Lawrence grades, or images with questions and answers, read from a folder.

Two layouts are read. The public one is {train,val,test}/{0..4}/*.png|jpg|jpeg, one folder per label, with an
optional metadata.csv (file_name, patient, and site where known). The other is an annotation file beside a
folder image/: a JSON list or JSONL of records with

    image, key or file_name        path inside image/ (or inside the data root where there is no image/)
    label or grade                 0..4; decides over an answer that stands beside it
    question or instruction        image tags in it are dropped: the prompt template sets them
    answer or caption
    split, patient, site           optional
"""

from __future__ import annotations

import csv
import functools
import io
import json
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from scalefl.contracts import SPLITS, DataSplits, Example, InputError
from scalefl.data.images import find_bad_images, read_image
from scalefl.data.partition import split_patients

if TYPE_CHECKING:
    from PIL.Image import Image

    from scalefl.config.options import RunConfig

logger = logging.getLogger("scalefl")

SUFFIXES = (".png", ".jpg", ".jpeg")
PUBLIC_NAME = re.compile(r"(p?\d+)[LR]", re.IGNORECASE)
"""Patient and side, as in 9003175L.png."""
IMAGE_TAGS = re.compile(r"<Img>.*?</Img>|<ImageHere>|<image>", re.IGNORECASE)
MAX_NAMED = 5
"""Files that an error names before it only counts."""

Splits = dict[str, tuple[Example, ...]]


def load(run: RunConfig) -> DataSplits:
    """Read the data set below `run.data_root`, having decoded every image once.

    Raises InputError for a folder in no known layout, an empty train or test split, a patient in two splits,
    and images that are missing or corrupt (left out with a warning under `run.skip_bad_images`).
    """
    root, annotations = _find_layout(run)
    answers: tuple[str, ...] | None = run.answers
    if annotations is None:
        image_root = root
        splits = _read_folders(root, run)
    else:
        image_root = root / "image" if (root / "image").is_dir() else root
        splits, answers = _read_annotations(annotations, image_root, run)
    _check_splits(splits, str(annotations or root), run)
    splits = _verify_images(splits, image_root, run)
    return DataSplits(
        name="kneexray",
        splits=splits,
        answers=answers,
        read_image=functools.partial(_read_below, image_root),
    )


def _read_below(image_root: Path, example: Example) -> Image:
    return read_image(image_root / example.image_key)


def _find_layout(run: RunConfig) -> tuple[Path, Path | None]:
    """The data root, and its annotation file if it has one."""
    last = len(run.answers) - 1
    layouts = (
        f"expected a folder with train/, val/ and test/ of grade folders 0..{last} of png or jpg images, "
        f"or a folder image/ with knee_x_ray.json (or --annotations FILE); "
        f"to run without data use --data synthetic."
    )
    if run.data_root is None:
        raise InputError(f"--data-root: nothing given; {layouts}")
    root = Path(run.data_root).expanduser()
    if not root.is_dir():
        raise InputError(f"--data-root: '{root}' is not a folder; {layouts}")
    root = root.resolve()
    if run.annotations is not None:
        candidates = (root / run.annotations, Path(run.annotations).expanduser())
        found = next((path for path in candidates if path.is_file()), None)
        if found is None:
            raise InputError(
                f"--annotations: no file '{run.annotations}' in '{root}' or the working folder; "
                f"expected a JSON list or JSONL; give its path relative to --data-root or in full."
            )
        return root, found.resolve()
    if any((root / split).is_dir() for split in SPLITS):
        return root, None
    if (root / "knee_x_ray.json").is_file():
        return root, root / "knee_x_ray.json"
    raise InputError(f"--data-root: '{root}' has no layout that is read here; {layouts}")


@dataclass(frozen=True, kw_only=True)
class _Origin:
    """Where an image comes from, as metadata.csv has it."""

    patient: str
    site: str | None


def _read_folders(root: Path, run: RunConfig) -> Splits:
    origins = _read_metadata(root / "metadata.csv")
    keys = set(_image_keys(root, len(run.answers)))
    # A file that metadata.csv lists in a grade folder belongs to the data, and is missing if it is not there.
    places = {f"{split}/{grade}" for split in SPLITS for grade in range(len(run.answers))}
    keys |= {key for key in origins or () if key.rpartition("/")[0] in places}
    splits: dict[str, list[Example]] = {split: [] for split in SPLITS}
    for key in sorted(keys):
        split, grade, _ = key.split("/")
        origin = _origin_of(key, origins, root)
        label = int(grade)
        example = Example(
            image_key=key,
            patient=origin.patient,
            site=origin.site,
            question=run.question,
            answer=run.answers[label],
            label=label,
        )
        splits[split].append(example)
    return {split: tuple(examples) for split, examples in splits.items()}


def _image_keys(root: Path, num_grades: int) -> Iterator[str]:
    for split in SPLITS:
        folders = sorted((root / split).iterdir()) if (root / split).is_dir() else []
        for folder in folders:
            if not folder.is_dir() or folder.name.startswith("."):
                continue
            if folder.name not in map(str, range(num_grades)):
                raise InputError(
                    f"{folder}: a folder for no known grade; expected 0..{num_grades - 1}; "
                    f"rename it, or move it out of {split}/."
                )
            for path in folder.iterdir():
                if path.suffix.lower() in SUFFIXES and not path.name.startswith("."):
                    yield f"{split}/{folder.name}/{path.name}"


def _origin_of(key: str, origins: dict[str, _Origin] | None, root: Path) -> _Origin:
    if origins is not None:
        if key not in origins:
            raise InputError(
                f"{root / 'metadata.csv'}: does not list '{key}'; expected a row for every image; add it."
            )
        return origins[key]
    patient = _patient_in_name(key)
    if patient is None:
        raise InputError(
            f"{root / key}: no patient can be read from this name; expected digits and a side, "
            f"as in 9003175L.png; supply {root / 'metadata.csv'} with columns file_name, patient."
        )
    return _Origin(patient=patient, site=None)


def _patient_in_name(key: str) -> str | None:
    match = PUBLIC_NAME.fullmatch(PurePosixPath(key).stem)
    return match[1] if match else None


def _read_metadata(path: Path) -> dict[str, _Origin] | None:
    """File name below the data root -> origin; None without the file."""
    if not path.is_file():
        return None
    origins: dict[str, _Origin] = {}
    reader = csv.DictReader(io.StringIO(_read_text(path), newline=""))
    missing = {"file_name", "patient"} - set(reader.fieldnames or ())
    if missing:
        raise InputError(
            f"{path}: no column {', '.join(sorted(missing))}; expected file_name, patient[, site]."
        )
    for row in reader:
        key, patient = (row["file_name"] or "").strip(), (row["patient"] or "").strip()
        key = key.removeprefix("./")
        if not key or not patient or key in origins:
            problem = "is listed twice" if key in origins else "needs both file_name and patient"
            raise InputError(
                f"{path} line {reader.line_num}: '{key}' {problem}; expected one full row per image; mend it."
            )
        origins[key] = _Origin(patient=patient, site=(row.get("site") or "").strip() or None)
    return origins


def _read_annotations(path: Path, image_root: Path, run: RunConfig) -> tuple[Splits, tuple[str, ...] | None]:
    examples: list[Example] = []
    named_splits: list[str | None] = []
    patient_of: dict[str, str] = {}
    asked: set[tuple[str, str]] = set()
    for where, record in _records(path):
        example = _example(record, where, image_root, run)
        key, patient = example.image_key, example.patient
        if patient_of.setdefault(key, patient) != patient:
            raise InputError(
                f"{where}: '{key}' is of patient '{patient}', earlier of '{patient_of[key]}'; mend it."
            )
        if (key, example.question) in asked:
            raise InputError(f"{where}: asks '{key}' the same question again; remove one.")
        asked.add((key, example.question))
        examples.append(example)
        named_splits.append(_split_name(record, where))
    if None in named_splits and any(named_splits):
        raise InputError(
            f"{path}: some records have a split and some have none; expected all or none; complete it."
        )
    examples, answers = _close(examples, run.answers, path)
    drawn = {} if any(named_splits) else split_patients([example.patient for example in examples], run.seed)
    splits: dict[str, list[Example]] = {split: [] for split in SPLITS}
    for example, name in zip(examples, named_splits, strict=True):
        splits[name or drawn[example.patient]].append(example)
    return {split: tuple(own) for split, own in splits.items()}, answers


def _split_name(record: dict[str, Any], where: str) -> str | None:
    name = _text(record, ("split",), where)
    if name is not None and name not in SPLITS:
        raise InputError(f"{where}: unknown split {name!r}; expected {', '.join(SPLITS)}; rename it.")
    return name


def _close(
    examples: list[Example], answers: tuple[str, ...], path: Path
) -> tuple[list[Example], tuple[str, ...] | None]:
    """Label every example if all answers are in the closed set; leave answers open if none has a label."""
    label_of = {answer: label for label, answer in enumerate(answers)}
    foreign = next((example.answer for example in examples if example.answer not in label_of), None)
    if foreign is None:
        return [replace(example, label=label_of[example.answer]) for example in examples], answers
    if all(example.label is None for example in examples):
        return examples, None
    raise InputError(
        f"{path}: some records have a label, and others an answer outside --answers, "
        f"such as {foreign[:60]!r}; expected labels (or one of {', '.join(answers)}) everywhere or nowhere; "
        f"complete or remove them."
    )


def _records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each record with its place, for errors."""
    text = _read_text(path)
    if text.lstrip().startswith("["):
        records = enumerate(_parse(text, path, first_line=1), start=1)
        numbered = ((f"{path} record {number}", record) for number, record in records)
    else:
        lines = enumerate(text.split("\n"), start=1)
        numbered = (
            (f"{path} line {i}", _parse(line, path, first_line=i)) for i, line in lines if line.strip()
        )
    for where, record in numbered:
        if not isinstance(record, dict):
            raise InputError(
                f"{where}: got {str(record)[:40]!r}; expected an object with an image and an answer."
            )
        yield where, record


def _parse(text: str, path: Path, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path} line {first_line + error.lineno - 1}: not JSON ({error.msg}, column {error.colno}); "
            f"expected a list of records, or one record per line; mend the file."
        ) from error


def _example(record: dict[str, Any], where: str, image_root: Path, run: RunConfig) -> Example:
    key = _image_key(record, where, image_root)
    label = next((record[name] for name in ("label", "grade") if record.get(name) is not None), None)
    question = _text(record, ("question", "instruction"), where)
    answer = _text(record, ("answer", "caption"), where)
    if label is not None:
        if type(label) is not int or not 0 <= label < len(run.answers):
            raise InputError(
                f"{where}: label {label!r}; expected a whole number from 0 to {len(run.answers) - 1}."
            )
        answer = run.answers[label]
    elif question is None or answer is None:
        raise InputError(
            f"{where}: has {', '.join(sorted(record))}; expected a label, or a question and an answer; "
            f"complete it."
        )
    question = " ".join(IMAGE_TAGS.sub(" ", question).split()) if question else ""
    return Example(
        image_key=key,
        patient=_text(record, ("patient",), where) or _patient_in_name(key) or key,
        site=_text(record, ("site",), where),
        question=question or run.question,
        answer=answer,
        label=label,
    )


def _image_key(record: dict[str, Any], where: str, image_root: Path) -> str:
    """The image's path below `image_root`, with links resolved, so that one file has one key."""
    name = _text(record, ("image", "key", "file_name"), where)
    if name is None:
        raise InputError(f"{where}: names no image; expected a path under image, key or file_name.")
    folder = image_root.resolve()
    try:
        path = (folder / name).resolve()
    except (ValueError, RuntimeError) as error:  # a zero byte; a loop of links
        raise InputError(
            f"{where}: {name!r} is no path ({error}); expected a path inside {folder}."
        ) from error
    if (
        PurePosixPath(name).is_absolute()
        or ".." in PurePosixPath(name).parts
        or not path.is_relative_to(folder)
    ):
        raise InputError(
            f"{where}: {name!r} leads out of {folder}; expected a path inside; move the image there."
        )
    return path.relative_to(folder).as_posix()


def _text(record: dict[str, Any], names: Sequence[str], where: str) -> str | None:
    """The first of these fields that is set. Numbers serve as names (a patient 9003175)."""
    for name in names:
        value = record.get(name)
        if isinstance(value, str) and value.strip():
            return value.strip()
        if type(value) is int:
            return str(value)
        if value is not None and not isinstance(value, str):
            raise InputError(f"{where}: {name} is {str(value)[:40]!r}; expected text; mend the record.")
    return None


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path}: cannot be read ({error}); expected UTF-8 text; mend or remove the file."
        ) from error


def _check_splits(splits: Splits, where: str, run: RunConfig) -> None:
    needed = {"all": ("train", "test"), "train": ("train",), "held_out": ("test",)}[run.data_here]
    for split in ("test",) if run.evaluate_from else needed:
        if not splits[split]:
            raise InputError(
                f"{where}: the {split} split has no images; expected one or more; add some to {split}."
            )
    split_of: dict[str, str] = {}
    for split, examples in splits.items():
        for example in examples:
            other = split_of.setdefault(example.patient, split)
            if other != split:
                raise InputError(
                    f"{where}: patient '{example.patient}' is in {other} and in {split} "
                    f"('{example.image_key}'); expected one split per patient; move the images together."
                )


def _verify_images(splits: Splits, image_root: Path, run: RunConfig) -> Splits:
    """Decode every image; raise for bad ones, or drop them where the run asks for it."""
    keys = {example.image_key for examples in splits.values() for example in examples}
    bad = find_bad_images({key: image_root / key for key in sorted(keys)}, run.workers)
    if not bad:
        return splits
    named = ", ".join(f"{key} ({reason})" for key, reason in list(bad.items())[:MAX_NAMED])
    more = f" and {len(bad) - MAX_NAMED} more" if len(bad) > MAX_NAMED else ""
    if not run.skip_bad_images:
        raise InputError(
            f"{image_root}: {len(bad)} of {len(keys)} images cannot be read: {named}{more}; "
            f"mend or remove them, or pass --skip-bad-images."
        )
    logger.warning("%s: leaving out %d of %d images: %s%s", image_root, len(bad), len(keys), named, more)
    kept = {split: tuple(e for e in examples if e.image_key not in bad) for split, examples in splits.items()}
    _check_splits(kept, f"{image_root} without its bad images", run)
    return kept
