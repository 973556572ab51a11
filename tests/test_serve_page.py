"""The page of `scalefl serve` in headless Chromium: it answers, refuses in a line, and keeps to itself."""

import base64
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request

import numpy as np
import psutil
import pytest
from PIL import Image
from runs import Job, environment, federation, start

from scalefl.cli import main

pytestmark = pytest.mark.slow

SERVER = os.environ.get("SCALEFL_SERVE_PYTHON", sys.executable)
"""gradio may want other versions than the rest: `launch/test.sh` names an environment that has it."""
RECORDER = """
import os, sys

def record(event, args):
    if event in ("socket.connect", "socket.bind", "socket.getaddrinfo", "socket.gethostbyname"):
        with open(os.environ["RECORD"], "a") as file:
            print(event, repr(args[1:] if event in ("socket.connect", "socket.bind") else args), file=file)

sys.addaudithook(record)
"""
"""A sitecustomize: whom a process calls, and where it listens."""


def missing():
    """What the page cannot be tried without, if anything."""
    look = "import sys, importlib.util as u; sys.exit(u.find_spec('gradio') is None)"
    if subprocess.run([SERVER, "-c", look], check=False).returncode:
        return f"no gradio in {SERVER}; `pip install .[serve]`, or name another by SCALEFL_SERVE_PYTHON"
    try:
        import selenium  # noqa: F401  # of the extra `dev`
    except ImportError:
        return "no selenium; `pip install .[dev]`"
    absent = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    return f"no {' and no '.join(absent)}; `apt-get install chromium chromium-driver`" if absent else None


@pytest.fixture(scope="module", autouse=True)
def all_there():
    if (reason := missing()) is not None:
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    checkpoint = start(folder, num_rounds=1) / "checkpoints" / "round-0001"
    assert main(["export", "--checkpoint", str(checkpoint), "--out", str(folder / "model")]) == 0
    example = federation(folder).data.splits["val"][0]
    federation(folder).data.read_image(example).save(folder / "patient-4711.png")
    return folder / "model"


def serving(folder, model, *typed):
    """The command as a process of its own; what it leaves in temporary folders is below `folder`/tmp."""
    (folder / "tmp").mkdir()
    (folder / "sitecustomize.py").write_text(RECORDER)
    (folder / "model").symlink_to(model)  # on the command line, by which the job is found and ended
    command = ["-m", "scalefl", "serve", "--model", str(folder / "model"), *typed]
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    variables = {"PYTHONPATH": f"{folder}{os.pathsep}{root}", "TMPDIR": str(folder / "tmp")}
    return Job(folder, command, python=SERVER, RECORD=str(folder / "calls"), **variables)


def address(job):
    """Of the page, as soon as it is there."""
    job.wait_for("(Ctrl-C ends it)", seconds=180)
    (found,) = re.findall(r"^page +(http://127\.0\.0\.1:\d+) ", job.output, re.MULTILINE)
    return found


@pytest.fixture(scope="module")
def job(tmp_path_factory, model):
    with serving(tmp_path_factory.mktemp("served"), model, "--port", "0", "--max_upload_mb", "1") as job:
        address(job)
        yield job


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    nowhere = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
    home = f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", nowhere, home):
        options.add_argument(argument)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    driver.implicitly_wait(60)
    yield driver
    driver.quit()


@pytest.fixture
def page(job, browser):
    browser.get(address(job))
    return browser


def find(page, selector):
    return page.find_element("css selector", selector)


def upload(page, path):
    find(page, "input[type=file]").send_keys(str(path))


def picture(page, name):
    """Pixels of an image that the page holds."""
    source = find(page, f"#{name}").get_attribute("src").removeprefix("data:image/png;base64,")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(source))), dtype=int)


def test_a_radiograph_is_answered(capsys, model, page):
    assert "research tool and no medical device" in find(page, "#statement").text
    image = model.parent / "patient-4711.png"
    upload(page, image)
    rows = [row.text.split() for row in find(page, "#exits").find_elements("css selector", "tr")]
    assert rows[0][0] == "exit" and rows[0][-1] == "answered"
    for exit in (1, 2):
        capsys.readouterr()
        typed = ["--model", str(model), "--max_exit", str(exit), "--json"]
        assert main(["predict", str(image), *typed]) == 0
        (record,) = json.loads(capsys.readouterr().out)
        expected = [f"{record[f'p({name})']:.4f}" for name in rows[0][1:-1]]
        assert rows[exit] == [str(exit), *expected, *(["yes"] if exit == 2 else [])]
    assert find(page, "#answer").text == f"Answer: {record['answer']}, by exit 2 of 2."
    radiograph, saliency = picture(page, "radiograph"), picture(page, "saliency")
    assert np.array_equal(radiograph[..., 0], np.asarray(Image.open(image)))
    assert saliency.shape == radiograph.shape and np.abs(saliency - radiograph).max() > 50
    assert find(page, "#saliency").size["width"] > 100


def test_a_file_that_cannot_be_used_gets_one_line_and_the_next_an_answer(tmp_path, model, page):
    (tmp_path / "bad.png").write_text("no image")
    upload(page, tmp_path / "bad.png")
    line = "the uploaded file: not an image; expected a readable PNG, JPEG, TIFF, BMP image; "
    assert find(page, "#problem").text == f"{line}replace or remove the file."
    Image.effect_noise((1100, 1100), 100).save(tmp_path / "large.png")
    upload(page, tmp_path / "large.png")
    said = find(page, "[data-testid=toast-text]").get_attribute("textContent")  # it fades in
    assert said == 'File(s) exceed the maximum allowed size of 1.0 Mb: "large.png"'
    upload(page, model.parent / "patient-4711.png")
    assert find(page, "#answer").text.startswith("Answer: ")


def test_a_large_file_is_refused_by_the_server_too(job):
    body = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
    body += bytes(2**20 + 1) + b"\r\n--x--\r\n"
    kind = {"Content-Type": "multipart/form-data; boundary=x"}
    request = urllib.request.Request(f"{address(job)}/gradio_api/upload", data=body, headers=kind)
    with pytest.raises(urllib.error.HTTPError, match="413"):
        urllib.request.urlopen(request)


def posted(job, path, content):
    body = json.dumps(content).encode()
    request = urllib.request.Request(
        f"{address(job)}{path}", data=body, headers={"Content-Type": "application/json"}
    )
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request)
    return refused.value.code


@pytest.mark.parametrize("is_stream", [True, False])
def test_no_file_but_an_upload_is_read_or_removed(job, model, is_stream):
    """gradio lets whoever sends a request name any file, or an address, in place of an upload."""
    image = model.parent / "patient-4711.png"
    named = {"path": str(image), "is_stream": is_stream, "meta": {"_type": "gradio.FileData"}}
    content = {"data": [named], "fn_index": 0, "session_hash": "x"}
    for path in ("run/predict", "api/predict", "call/lambda", "queue/join"):
        assert posted(job, f"/gradio_api/{path}", content) == 403
    named["path"] = "http://127.0.0.1:9/a.png"
    assert posted(job, "/gradio_api/queue/join", content) == 403
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(f"{address(job)}/gradio_api/file={image}")
    assert image.is_file()


def test_it_keeps_to_this_machine_and_keeps_nothing(model, job, page):
    upload(page, model.parent / "patient-4711.png")
    assert find(page, "#answer").text.startswith("Answer: ")
    loaded = page.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
    assert loaded and all(name.startswith(f"{address(job)}/") for name in loaded)
    port = int(address(job).rpartition(":")[2])
    process = psutil.Process(job.process.pid)
    listening = {c.laddr for c in process.net_connections() if c.status == psutil.CONN_LISTEN}
    assert listening == {("127.0.0.1", port)}
    calls = (job.folder / "calls").read_text().splitlines()
    assert "socket.bind (('127.0.0.1', 0),)" in calls
    assert [line for line in calls if "'127.0.0.1'" not in line] == []
    kept = [p for p in (job.folder / "tmp").rglob("*") if p.is_file() and p.stat().st_size]
    assert kept == [] and "patient" not in job.output


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=str)
def test_a_signal_ends_it_though_somebody_looks(tmp_path, model, browser, number, code):
    with serving(tmp_path, model, "--port", "0") as job:
        browser.get(address(job))
        find(browser, "#statement")
        job.process.send_signal(number)
        assert job.end(30) == code, job.last_lines
        said = job.output.splitlines()[1:]
        assert said == ([] if code == 130 else ["scalefl: stopped by signal 15; start again."])
        assert list((tmp_path / "tmp").glob("scalefl-serve-*")) == []


def test_a_port_in_use(model):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        command = [SERVER, "-m", "scalefl", "serve", "--model", str(model), "--port", str(port)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        f"scalefl: --host 127.0.0.1 --port {port}: Address already in use; expected an address of this "
        "machine and a free port; give another --port, or 0 for any."
    ]
