"""The main job as its users type it: the original's command line, the quickstart's, and their prompt."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from runs import environment, federation, records

from scalefl.config.flags import parse
from scalefl.config.resolve import resolve
from scalefl.config.saved import load_config

ROOT = Path(__file__).parents[1]
PROMPT = "[INST] <Img><ImageHere></Img> [vqa] What is the Kellgren-Lawrence grade of this knee? [/INST]"
ORIGINAL = (
    "train --data-root DIR --data kneexray --arch MiniGPTv2 --use-valid --cfg-path PRESET --num_rounds 5 "
    "--num_clients 4 --sample_rate 1.0 --batch-size 1 --lr 3e-5 --momentum 0.9 --weight-decay 5e-4"
)


def test_the_default_prompt_is_what_is_encoded(tmp_path):
    """Word for word, with the image's tokens in its place, before every answer that is trained."""
    fed = federation(tmp_path)
    processor, example = fed.processor, fed.data.splits["train"][0]
    before, after = PROMPT.split("<ImageHere>")
    tokenizer = processor.tokenizer
    image = [tokenizer.convert_tokens_to_ids("<ImageHere>")] * 4  # 28 / 7 squared is 16 patches, 4 a token
    expected = [
        tokenizer.bos_token_id,
        *tokenizer.encode(before, add_special_tokens=False),
        *image,
        *tokenizer.encode(after, add_special_tokens=False),
    ]
    assert processor.encode_question(fed.run.question) == expected
    assert tokenizer.decode([i for i in expected[1:] if i != image[0]]) == before + after
    row = fed.batchers["train"].training([0]).inputs["input_ids"][0].tolist()
    assert row == expected + processor.encode_answer(example.answer)
    assert processor(text=PROMPT)["input_ids"][0].tolist() == expected


def test_the_tiny_preset_distils_and_says_the_default_prompt():
    run, model_file = resolve({})
    assert (run.cfg_path, run.tuning, model_file.name) == (None, "full", "tiny")
    assert run.KD_gamma > 0 and run.KD_start < 1
    assert model_file.prompt_template.format(f"<Img><ImageHere></Img> {run.question}") == PROMPT


def scalefl(*arguments, cwd):
    command = [sys.executable, "-m", "scalefl", *arguments]
    variables = environment(PYTHONPATH=str(ROOT))
    return subprocess.run(command, env=variables, cwd=cwd, capture_output=True, text=True, timeout=600)


def named_files(output):
    """The last lines: what the run wrote."""
    found = re.findall(r"^(results|rounds|config|checkpoint) +(.+)$", output, re.M)
    assert [name for name, _ in found] == ["results", "rounds", "config", "checkpoint"]
    return [Path(path) for _, path in found]


@pytest.mark.slow
def test_the_originals_command_line_runs_on_the_real_radiographs(tmp_path, kneexray_root):
    typed = shlex.split(ORIGINAL.replace("DIR", shlex.quote(str(kneexray_root))).replace("PRESET", "tiny"))
    added = ["--local_steps", "2", "--eval_limit", "40", "--save_path", str(tmp_path / "run")]
    done = scalefl(*typed, *added, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rounds = records(tmp_path / "run")
    assert [len(record["clients"]) for record in rounds] == [4] * 5
    assert {client["steps"] for record in rounds for client in record["clients"]} == {2}
    run, _ = load_config(tmp_path / "run")
    assert (rounds[0]["lr"], run.optimizer, run.momentum, run.weight_decay) == (3e-5, "sgd", 0.9, 5e-4)
    for record in rounds:
        assert record["evaluation"]["split"] == "val"
        assert [len(record["evaluation"]["levels"][level]) for level in "1234"] == [1, 2, 3, 4]
        assert {e["count"] for exits in record["evaluation"]["levels"].values() for e in exits} == {40}
    assert all(path.exists() for path in named_files(done.stdout))


def quickstart():
    """The arguments of launch/quickstart.sh, without where it saves."""
    text = (ROOT / "launch" / "quickstart.sh").read_text().replace("\\\n", " ")
    (line,) = re.findall(r"-m scalefl (train .*)$", text, re.M)
    typed = [part for part in shlex.split(line) if part != "$@"]
    at = typed.index("--save_path")
    assert "$root/runs/quickstart" in typed[at + 1]
    return typed[:at] + typed[at + 2 :]


def test_the_quickstart_needs_no_data_and_no_gpu():
    typed = "train --data synthetic --cfg_path tiny --num_clients 8 --num_rounds 5 --num_epoch 10"
    assert quickstart() == typed.split()
    command = parse(quickstart())
    run, _ = resolve(command.flags, *command.config_files)
    assert run.use_gpu is None and run.data_root is None and run.use_valid


@pytest.mark.slow
def test_the_quickstart_runs_and_names_what_it_wrote(tmp_path):
    done = scalefl(*quickstart(), "--local_steps", "2", "--save_path", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    files = [tmp_path / path for path in named_files(done.stdout)]
    assert all(path.exists() for path in files)
    assert len(re.findall(r"^round \d/5  ", done.stdout, re.M)) == 5
    table = done.stdout.partition("synthetic test, round ")[2]
    assert len(re.findall(r"^ *level [1-4] +[1-4] ", table, re.M)) == 1 + 2 + 3 + 4
