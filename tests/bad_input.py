"""Ways to go wrong and the line that each one gets; test_bad_input.py tries them, this prints the table."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from PIL import Image
from runs import MODEL, state
from safetensors.torch import save_file

ANYTHING = "…"
"""In an expected line: what depends on the machine or on a library's own words."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One way to go wrong."""

    tried: str
    typed: str
    """After `scalefl train --cfg-path model.yaml --save_path run`, unless it begins with a command itself."""
    lines: str
    """What is printed, each line after `scalefl: `; paths are relative to the folder of the run."""
    prepare: Callable[[Path], None] = lambda folder: None
    on_old_run: bool = False
    """Whether `run` holds a finished run of two rounds."""
    on_full_disk: bool = False
    """Whether no weights can be written. The config, some kB, is there already."""


def knees(folder: Path) -> None:
    """Radiographs in the public layout, two patients for each split."""
    number = 9000000
    for split in ("train", "val", "test"):
        for grade in (0, 4):
            (place := folder / "knees" / split / str(grade)).mkdir(parents=True)
            number += 1
            for side in "LR":
                Image.new("L", (28, 28), 100).save(place / f"{number}{side}.png")


def without_test(folder: Path) -> None:
    knees(folder)
    shutil.rmtree(folder / "knees" / "test")


def with_a_corrupt_image(folder: Path) -> None:
    knees(folder)
    (folder / "knees" / "train" / "4" / "9000002L.png").write_bytes(b"no image")


def with_a_patient_in_two_splits(folder: Path) -> None:
    knees(folder)
    image = folder / "knees" / "train" / "0" / "9000001L.png"
    image.rename(folder / "knees" / "test" / "0" / image.name)


def records_file(*answers: str, image: str = "{}.png") -> Callable[[Path], None]:
    def prepare(folder: Path) -> None:
        (images := folder / "open" / "image").mkdir(parents=True)
        rows = []
        for i, answer in enumerate(answers):
            Image.new("L", (28, 28), 100).save(images / f"{i}.png")
            rows.append({"image": image.format(i), "question": "What?", "answer": answer, "patient": f"p{i}"})
        (folder / "open" / "knee_x_ray.json").write_text(json.dumps(rows))

    return prepare


def model_with(section: str, **values: object) -> Callable[[Path], None]:
    def prepare(folder: Path) -> None:
        content = {**MODEL, section: {**MODEL[section], **values}}
        (folder / "model.yaml").write_text(yaml.safe_dump(content))

    return prepare


def other_architecture(folder: Path) -> None:
    tensors = state(folder / "run", 2)
    tensors["projector.bias"] = torch.zeros(32)
    save_file(tensors, folder / "run" / "checkpoints" / "round-0002" / "model.safetensors")


def damaged(folder: Path) -> None:
    (folder / "run" / "checkpoints" / "round-0002" / "model.safetensors").write_bytes(b"")


def without_validation(folder: Path) -> None:
    knees(folder)
    shutil.rmtree(folder / "knees" / "val")


def a_file_in_the_way(folder: Path) -> None:
    (folder / "run").write_text("")


KNEES = "--data kneexray --data_root knees --partitioner iid --num_clients 2"
OPEN = "--data kneexray --data_root open --logit_adjustment off --partitioner iid --num_clients 2"

ROWS = (
    Row(
        tried="a folder of data that is not there",
        typed="--data kneexray --data_root nowhere",
        lines=(
            "--data-root: 'nowhere' is not a folder; expected a folder with train/, val/ and test/ "
            "of grade folders 0..4 of png or jpg images, or a folder image/ with knee_x_ray.json "
            "(or --annotations FILE); to run without data use --data synthetic."
        ),
    ),
    Row(
        tried="no folder of data",
        typed="--data kneexray",
        lines=(
            "--data-root: nothing given; expected a folder with train/, val/ and test/ of grade "
            "folders 0..4 of png or jpg images, or a folder image/ with knee_x_ray.json (or "
            "--annotations FILE); to run without data use --data synthetic."
        ),
    ),
    Row(
        tried="a split without images",
        typed=KNEES,
        prepare=without_test,
        lines="knees: the test split has no images; expected one or more; add some to test.",
    ),
    Row(
        tried="a corrupt image",
        typed=KNEES,
        prepare=with_a_corrupt_image,
        lines=(
            "knees: 1 of 12 images cannot be read: train/4/9000002L.png (not an image); mend or "
            "remove them, or pass --skip-bad-images."
        ),
    ),
    Row(
        tried="a patient in two splits",
        typed=KNEES,
        prepare=with_a_patient_in_two_splits,
        lines=(
            "knees: patient '9000001' is in train and in test ('test/0/9000001L.png'); expected "
            "one split per patient; move the images together."
        ),
    ),
    Row(
        tried="an image outside its folder",
        typed=OPEN,
        prepare=records_file("a", "b", "c", image="../{}.png"),
        lines=(
            "open/knee_x_ray.json record 1: '../0.png' leads out of open/image; expected a path "
            "inside; move the image there."
        ),
    ),
    Row(
        tried="an unknown data set",
        typed="--data kneexry",
        lines=(
            "--data: unknown name 'kneexry'; did you mean 'kneexray'? known: kneexray, synthetic, "
            "or package.module:Name for your own."
        ),
    ),
    Row(
        tried="an unknown option",
        typed="--batchsize 4",
        lines="--batchsize: unknown option; did you mean --batch_size? `scalefl train --help` lists them.",
    ),
    Row(
        tried="two mistakes at once",
        typed="--num_rounds five --sample_rate 2",
        lines=(
            "--num_rounds: got 'five'; expected a whole number.\n"
            "--sample_rate: got 2.0; expected a number above 0 and at most 1."
        ),
    ),
    Row(
        tried="an unknown key in the YAML file",
        typed="",
        prepare=model_with("vision", hiden_size=16),
        lines=(
            "model.yaml: vision.hiden_size: unknown key; did you mean 'hidden_size'? known: "
            "hidden_size, initializer_range, intermediate_size, layer_norm_eps, ln_vision_eps, "
            "num_attention_heads, num_hidden_layers, patch_size."
        ),
    ),
    Row(
        tried="a width ratio that keeps no head",
        typed="--vertical_scale_ratios 0.1 1",
        lines=(
            "level 1: width ratio 0.1 keeps 0 of 2 kv_heads in "
            "language_model.model.layers.0.self_attn.k_proj; the smallest ratio that keeps one is "
            "0.5."
        ),
    ),
    Row(
        tried="exits out of order",
        typed="--ee_locs 2 1 --horizontal_scale_ratios 1 3",
        lines="--ee_locs: exits out of order: 2 1; expected each layer once, rising, such as 1 2.",
    ),
    Row(
        tried="an exit after the last layer",
        typed="--ee_locs 2",
        lines=(
            "--ee_locs 2: expected rising layer numbers from 1 to 1 (the model has 2 layers; the "
            "last is an exit without being listed)."
        ),
    ),
    Row(
        tried="more exits than the model has",
        typed="--horizontal_scale_ratios 1 3",
        lines=(
            "--horizontal_scale_ratios: got 1 3; expected numbers of exits up to 2, for 1 "
            "--ee_locs and the last layer; lower it or add an exit."
        ),
    ),
    Row(
        tried="more clients than patients",
        typed="--num_clients 99",
        lines=(
            "--num_clients: 99 of 1 or more (--min_patients) need 99 training patients, got 16; "
            "ask for at most 16 clients."
        ),
    ),
    Row(
        tried="a learning rate that is not a number",
        typed="--lr nan",
        lines="--lr: got nan; expected a finite number at least 0.",
    ),
    Row(
        tried="Dirichlet with alpha 0",
        typed="--alpha 0",
        lines="--alpha: got 0.0; expected a number above 0.",
    ),
    Row(
        tried="a batch that micro-batches do not divide",
        typed="--batch-size 6 --micro_batch_size 4",
        lines="--batch_size: got 6, which --micro_batch_size 4 does not divide; expected a multiple of it.",
    ),
    Row(
        tried="momentum for AdamW",
        typed="--momentum 0.9 --optimizer adamw",
        lines="--momentum: adamw has no momentum; leave it out, or choose --optimizer sgd.",
    ),
    Row(
        tried="a frozen tower asked to train",
        typed="--tuning lora --freeze_vit 0",
        lines="--freeze_vit: got false; --tuning lora keeps the tower frozen; choose --tuning full.",
    ),
    Row(
        tried="8-bit weights asked to train",
        typed="",
        prepare=model_with("model", low_resource=True),
        lines=(
            "model.yaml: train.quantization: got int8, but --tuning full trains those weights; "
            "expected none, or --tuning lora."
        ),
    ),
    Row(
        tried="a partition by site without sites",
        typed=KNEES + " --partitioner natural",
        prepare=knees,
        lines=(
            "--partitioner natural: 2 of 2 training patients have no site; supply a 'site' for "
            "every image or use another partitioner."
        ),
    ),
    Row(
        tried="rank scoring of free-text answers",
        typed=OPEN,
        prepare=records_file("a", "b", "c", "d"),
        lines=(
            "--scoring rank: kneexray has free-text answers; expected a closed answer set, or "
            "--logit_adjustment off --scoring generate --partitioner iid."
        ),
    ),
    Row(
        tried="validation without a validation split",
        typed=KNEES,
        prepare=without_validation,
        lines=(
            "--use-valid: kneexray has no validation examples; expected a val split, or "
            "--no-use-valid to keep the last round instead of the best."
        ),
    ),
    Row(
        tried="a GPU where there is none",
        typed="--use_gpu",
        lines=(
            "--use_gpu: no CUDA GPU was found; leave the flag out (or --use_gpu 0) to run on the "
            "CPU, or check the driver and that torch was installed with CUDA."
        ),
    ),
    Row(
        tried="a tracker that is not installed",
        typed="--report_to aim",
        lines=(
            "--report_to: got aim, which is no installed tracker of Accelerate; installed: …; "
            "install it, or drop the option."
        ),
    ),
    Row(
        tried="a start from a folder without a model",
        typed="--init_from nothing",
        lines=(
            "--init_from nothing: no model there; expected a folder with config.json and "
            "model.safetensors or a checkpoint such as SAVE_PATH/checkpoints/round-0005; if it has moved, "
            "name its new place."
        ),
    ),
    Row(
        tried="a file where the run's folder would go",
        typed="",
        prepare=a_file_in_the_way,
        lines="run: File exists; give another path.",
    ),
    Row(
        tried="a full disk",
        typed="",
        on_full_disk=True,
        lines=(
            "run/checkpoints/round-0001: No space left on device; free some space, "
            "or write into another folder."
        ),
    ),
    Row(
        tried="a new run where one is already",
        typed="",
        on_old_run=True,
        lines=(
            "--save_path run: holds a run already (round-0002); expected --resume to go on with "
            "it, or another --save_path."
        ),
    ),
    Row(
        tried="resuming a folder that holds no run",
        typed="train --resume nowhere",
        lines=(
            "nowhere/run.json: No such file or directory; expected a run folder or checkpoint that "
            "`scalefl train` wrote."
        ),
    ),
    Row(
        tried="resuming with another batch size",
        typed="train --resume run --batch-size 8",
        on_old_run=True,
        lines="--batch_size: got 8, run has 4; a saved run keeps it: drop the option, or start a new run.",
    ),
    Row(
        tried="resuming into another folder",
        typed="train --resume run --save_path other",
        on_old_run=True,
        lines=(
            "--save_path: got other, but --resume goes on in run; drop --save_path, or start a new "
            "run from its weights with --init_from."
        ),
    ),
    Row(
        tried="a damaged checkpoint",
        typed="train --resume run",
        prepare=damaged,
        on_old_run=True,
        lines=(
            "run/checkpoints/round-0002: damaged checkpoint (…); remove the folder to go on from "
            "the one before."
        ),
    ),
    Row(
        tried="a checkpoint of another architecture",
        typed="evaluate run/checkpoints/round-0002",
        prepare=other_architecture,
        on_old_run=True,
        lines=(
            "run/checkpoints/round-0002: checkpoint of another architecture: projector.bias has "
            "shape (32,), this run's model expects (16,); use the --cfg-path, --tuning and "
            "--lora_r it was trained with."
        ),
    ),
    Row(
        tried="evaluating a folder that is no checkpoint",
        typed="evaluate run",
        on_old_run=True,
        lines=(
            "run: no checkpoint there (checkpoint.json is missing); expected a folder such as "
            "SAVE_PATH/checkpoints/round-0005."
        ),
    ),
)


def command(row: Row) -> list[str]:
    words = row.typed.split()
    start_of_a_run = ["train", "--cfg-path", "model.yaml", "--save_path", "run"]
    return words if words[:1] in (["train"], ["evaluate"]) else start_of_a_run + words


def rows() -> str:
    """The table in Markdown."""
    printed = ((row.tried, row.lines.replace("|", "\\|").replace("\n", "<br>")) for row in ROWS)
    lines = ["| what was tried | what is printed |", "|---|---|", *(f"| {a} | {b} |" for a, b in printed)]
    return "\n".join(lines)


if __name__ == "__main__":
    print(rows())
