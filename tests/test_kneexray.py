"""Laws of the folder data set: both layouts load, and whatever is wrong with one is said in one line."""

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from scalefl.contracts import SPLITS, DataSplits, InputError
from scalefl.data.kneexray import load

Run = Callable[..., Any]
IMAGES = ("train/0/9000001L.png", "train/3/9000001R.jpg", "val/1/p0002L.JPEG", "test/4/9000003R.png")


@pytest.fixture
def public(tmp_path: Path) -> Path:
    """The smallest public folder: three patients, one in each split."""
    root = tmp_path / "knees"
    for key in IMAGES:
        draw(root / key)
    draw(root / "auto_test" / "0" / "no patient.png")
    return root


@pytest.fixture
def annotated(tmp_path: Path) -> Path:
    """A folder image/ with 0.png .. 9.png; `annotate` adds the records."""
    for number in range(10):
        draw(tmp_path / "knees" / "image" / f"{number}.png")
    return tmp_path / "knees"


def draw(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (8, 8), 100).save(path)


def annotate(root: Path, records: Sequence[object], name: str = "knee_x_ray.json") -> Path:
    (root / name).write_text(json.dumps(records))
    return root


def graded(**more: object) -> list[dict[str, object]]:
    return [{"image": f"{number}.png", "label": number % 5, **more} for number in range(10)]


def refused(run: Any, *parts: str) -> None:
    """`load` raises one line that holds all `parts`."""
    with pytest.raises(InputError) as caught:
        load(run)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def patients(data: DataSplits) -> dict[str, set[str]]:
    return {split: {example.patient for example in data.splits[split]} for split in SPLITS}


def test_public_folder_gives_grades_and_patients_of_the_three_splits_only(
    public: Path, knee_run: Run
) -> None:
    run = knee_run(data_root=public)
    data = load(run)
    assert [e.image_key for split in SPLITS for e in data.splits[split]] == list(IMAGES)
    assert patients(data) == {"train": {"9000001"}, "val": {"p0002"}, "test": {"9000003"}}
    for example in data.splits["train"]:
        assert example.label == int(example.image_key.split("/")[1])
        assert (example.question, example.answer) == (run.question, run.answers[example.label])
        assert data.read_image(example).size == (8, 8)
    assert data.answers == run.answers


def test_validation_may_be_absent_but_not_training_or_test(public: Path, knee_run: Run) -> None:
    (public / "val/1/p0002L.JPEG").unlink()
    assert load(knee_run(data_root=public)).splits["val"] == ()
    (public / "test/4/9000003R.png").unlink()
    refused(knee_run(data_root=public), "test split has no images")


def test_metadata_names_patients_and_sites(public: Path, knee_run: Run) -> None:
    (public / "train/0/9000001L.png").rename(public / "train/0/scan.png")
    names = ["train/0/scan.png", *IMAGES[1:]]
    rows = [f"{name},{patient},north,x" for name, patient in zip(names, "aabc", strict=True)]
    rows.append("auto_test/0/no patient.png,d,,")
    (public / "metadata.csv").write_text("\n".join(["file_name,patient,site,other", *rows]))
    data = load(knee_run(data_root=public))
    assert patients(data) == {"train": {"a"}, "val": {"b"}, "test": {"c"}}
    assert {example.site for example in data.splits["train"]} == {"north"}


@pytest.mark.parametrize(
    ("rows", "parts"),
    [
        (["file_name,side"], ["metadata.csv", "no column patient"]),
        (["file_name,patient"], ["does not list 'test/4/9000003R.png'"]),
        (["file_name,patient", f"{IMAGES[0]},a", f"{IMAGES[0]},b"], ["line 3", "listed twice"]),
        (["file_name,patient", f"{IMAGES[0]},"], ["line 2", "needs both"]),
    ],
)
def test_bad_metadata_is_refused(public: Path, knee_run: Run, rows: list[str], parts: list[str]) -> None:
    (public / "metadata.csv").write_text("\n".join(rows))
    refused(knee_run(data_root=public), *parts)


def test_a_file_listed_in_metadata_but_absent_is_missing(public: Path, knee_run: Run) -> None:
    rows = [f"{key},{i // 2}{key[:2]}" for i, key in enumerate([*IMAGES, "train/2/lost.png"])]
    (public / "metadata.csv").write_text("\n".join(["file_name,patient", *rows]))
    refused(knee_run(data_root=public), "1 of 5 images", "train/2/lost.png (missing)")


def test_a_name_without_a_patient_asks_for_metadata(public: Path, knee_run: Run) -> None:
    draw(public / "train/0/scan.png")
    refused(knee_run(data_root=public), "train/0/scan.png", "metadata.csv", "file_name, patient")


def test_a_folder_of_no_known_grade_is_refused(public: Path, knee_run: Run) -> None:
    draw(public / "train/5/9000009L.png")
    refused(knee_run(data_root=public), "train/5", "expected 0..4")


def test_a_patient_in_two_splits_is_named(public: Path, knee_run: Run) -> None:
    draw(public / "test/0/9000001R.png")
    refused(knee_run(data_root=public), "patient '9000001' is in train and in test")


def test_without_a_readable_root_the_layouts_and_the_synthetic_set_are_named(
    tmp_path: Path, knee_run: Run
) -> None:
    advice = ("train/, val/ and test/", "knee_x_ray.json", "--annotations", "--data synthetic")
    refused(knee_run(), "nothing given", *advice)
    refused(knee_run(data_root=tmp_path / "nowhere"), "nowhere", *advice)
    refused(knee_run(data_root=tmp_path), "no layout", *advice)


def test_bad_images_are_listed_up_to_five_and_counted(public: Path, knee_run: Run) -> None:
    for number in range(7):
        (public / f"train/0/{number}L.png").write_text("no image")
    refused(
        knee_run(data_root=public),
        "7 of 11 images",
        "train/0/4L.png (not an image) and 2 more",
        "--skip-bad-images",
    )


def test_bad_images_are_left_out_with_a_warning(
    public: Path, knee_run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    bad = public / "train/0/9000001L.png"
    bad.write_bytes(bad.read_bytes()[:-30])  # the last 30 bytes hold the pixels
    with caplog.at_level(logging.WARNING, logger="scalefl"):
        data = load(knee_run(data_root=public, skip_bad_images=True))
    assert [example.image_key for example in data.splits["train"]] == ["train/3/9000001R.jpg"]
    assert "leaving out 1 of 4 images: train/0/9000001L.png" in caplog.text


def test_a_split_that_loses_every_image_is_refused(public: Path, knee_run: Run) -> None:
    (public / "test/4/9000003R.png").write_text("no image")
    refused(knee_run(data_root=public, skip_bad_images=True), "test split has no images")


@pytest.mark.parametrize("image_field", ["image", "key", "file_name"])
@pytest.mark.parametrize("label_field", ["label", "grade"])
def test_labelled_records_are_closed(
    annotated: Path, knee_run: Run, image_field: str, label_field: str
) -> None:
    records = [
        {image_field: f"{i}.png", label_field: i % 5, "question": f"<Img><ImageHere></Img> q{i}"}
        for i in range(10)
    ]
    run = knee_run(data_root=annotate(annotated, records))
    data = load(run)
    examples = [example for split in SPLITS for example in data.splits[split]]
    assert data.answers == run.answers
    for example in examples:
        number = int(example.image_key[0])
        assert (example.label, example.answer) == (number % 5, run.answers[number % 5])
        assert (example.question, example.patient) == (f"q{number}", example.image_key)
    assert len(examples) == 10


@pytest.mark.parametrize("fields", [("question", "answer"), ("instruction", "caption")])
def test_answers_in_the_set_are_closed_and_others_open(
    annotated: Path, knee_run: Run, fields: tuple[str, str]
) -> None:
    run = knee_run(data_root=annotated)
    records = [{"image": f"{i}.png", fields[0]: "q", fields[1]: run.answers[i % 5]} for i in range(10)]
    annotate(annotated, records)
    closed = load(run)
    assert closed.answers == run.answers
    assert all(run.answers[e.label] == e.answer for e in closed.splits["train"])
    records[0][fields[1]] = "a fracture"
    annotate(annotated, records)
    opened = load(run)
    assert opened.answers is None
    assert {example.label for split in SPLITS for example in opened.splits[split]} == {None}


def test_labels_beside_foreign_answers_are_refused(annotated: Path, knee_run: Run) -> None:
    records = [*graded()[:9], {"image": "9.png", "question": "q", "answer": "a fracture"}]
    refused(knee_run(data_root=annotate(annotated, records)), "'a fracture'", "everywhere or nowhere")


def test_jsonl_elsewhere_and_given_splits_patients_and_sites(annotated: Path, knee_run: Run) -> None:
    split_of = ["train"] * 6 + ["val"] * 2 + ["test"] * 2
    records = [
        {**record, "split": split, "patient": i // 2, "site": "north"}
        for i, (record, split) in enumerate(zip(graded(), split_of, strict=True))
    ]
    (annotated / "mine.jsonl").write_text("\n\n".join(map(json.dumps, records)))
    for annotations in ("mine.jsonl", annotated / "mine.jsonl"):
        data = load(knee_run(data_root=annotated, annotations=annotations))
        assert patients(data) == {"train": {"0", "1", "2"}, "val": {"3"}, "test": {"4"}}
        assert data.splits["test"][0].site == "north"


def test_drawn_splits_keep_patients_whole_and_depend_on_the_seed_alone(
    annotated: Path, knee_run: Run
) -> None:
    records = [{**record, "patient": f"p{i // 2}"} for i, record in enumerate(graded())]
    drawn = [
        patients(load(knee_run(data_root=annotate(annotated, order), seed=3)))
        for order in (records, records[::-1])
    ]
    assert drawn[0] == drawn[1]
    assert sorted(patient for own in drawn[0].values() for patient in own) == [f"p{i}" for i in range(5)]
    others = [patients(load(knee_run(data_root=annotated, seed=seed))) for seed in range(4)]
    assert any(other != drawn[0] for other in others)


def test_several_questions_about_one_image_stay_in_one_split(annotated: Path, knee_run: Run) -> None:
    records = [{**record, "question": question} for record in graded() for question in ("a", "b")]
    data = load(knee_run(data_root=annotate(annotated, records)))
    assert sum(map(len, data.splits.values())) == 20
    refused(
        knee_run(data_root=annotate(annotated, [*records, records[0]])), "record 21", "same question again"
    )


def test_paths_may_not_leave_the_image_folder(annotated: Path, knee_run: Run, tmp_path: Path) -> None:
    draw(tmp_path / "secret.png")
    (annotated / "image" / "link.png").symlink_to(tmp_path / "secret.png")
    (annotated / "image" / "inside.png").symlink_to(annotated / "image" / "0.png")
    outside = (
        "../../secret.png",
        "../image/0.png",
        str(tmp_path / "secret.png"),
        str(annotated / "image/0.png"),
        "link.png",
    )
    for name in outside:
        records = [*graded(), {"image": name, "label": 0}]
        refused(knee_run(data_root=annotate(annotated, records)), "record 11", name, "leads out of")
    inside = [*graded()[1:], {"image": "inside.png", "label": 0}]
    assert load(knee_run(data_root=annotate(annotated, inside)))


@pytest.mark.parametrize(
    ("record", "parts"),
    [
        ({"image": "0.png", "label": 5}, ["label 5", "0 to 4"]),
        ({"image": "0.png", "label": True}, ["label True"]),
        ({"image": "0.png", "label": "3"}, ["label '3'"]),
        ({"image": "0.png", "question": "q"}, ["has image, question", "a question and an answer"]),
        ({"label": 1}, ["names no image"]),
        ({"image": ["0.png"], "label": 1}, ["image is", "expected text"]),
        ({"image": "0\0.png", "label": 1}, ["is no path"]),
        ({"image": "0.png", "label": 1, "split": "dev"}, ["unknown split 'dev'"]),
        (7, ["got '7'", "expected an object"]),
    ],
)
def test_a_bad_record_is_refused_by_its_place(
    annotated: Path, knee_run: Run, record: object, parts: list[str]
) -> None:
    refused(
        knee_run(data_root=annotate(annotated, [*graded()[1:], record])), "knee_x_ray.json record 10", *parts
    )


def test_bad_json_is_refused_by_its_line(annotated: Path, knee_run: Run) -> None:
    (annotated / "knee_x_ray.json").write_text('[\n{"image": "0.png", "label": 0},\n{"image": }\n]')
    refused(knee_run(data_root=annotated), "knee_x_ray.json line 3", "not JSON")
    (annotated / "lines.jsonl").write_text('{"image": "0.png", "label": 0}\n{"image"\n')
    refused(knee_run(data_root=annotated, annotations="lines.jsonl"), "lines.jsonl line 2", "not JSON")
    (annotated / "latin.json").write_bytes(b"[\xff]")
    refused(knee_run(data_root=annotated, annotations="latin.json"), "latin.json", "UTF-8")


def test_contradictory_records_are_refused(annotated: Path, knee_run: Run) -> None:
    run = knee_run(data_root=annotated)
    annotate(annotated, [{**graded()[0], "split": "train"}, *graded()[1:]])
    refused(run, "some records have a split")
    annotate(annotated, [{**graded()[0], "patient": p, "question": p} for p in "ab"])
    refused(run, "'0.png' is of patient 'b', earlier of 'a'")
    annotate(annotated, [{**r, "patient": "a", "split": s} for r, s in zip(graded(), SPLITS, strict=False)])
    refused(run, "patient 'a' is in train and in val")
    annotate(annotated, [])
    refused(run, "train split has no images")
    refused(knee_run(data_root=annotated, annotations="none.json"), "--annotations", "none.json")


def test_the_real_radiographs_load_as_their_readme_counts_them(kneexray_root: Path, knee_run: Run) -> None:
    data = load(knee_run(data_root=kneexray_root))
    counts = {split: [sum(e.label == g for e in data.splits[split]) for g in range(5)] for split in SPLITS}
    assert counts == {
        "train": [300, 300, 300, 300, 173],
        "val": [60, 60, 60, 60, 27],
        "test": [60, 60, 60, 60, 51],
    }
    image = data.read_image(data.splits["test"][0])
    assert (image.mode, image.size) == ("L", (128, 128))
