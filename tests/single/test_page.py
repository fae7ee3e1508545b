"""report.html: what it says of a real run, that it asks nothing of a network, and the network that runs in it."""

import io
import json
import re
import shutil
import subprocess
import sys
from html import escape

import numpy as np
import pytest
import scipy.stats
import yaml
from PIL import Image

from cnnopt.config import parse_args
from cnnopt.data import datasets
from cnnopt.distributed import host
from cnnopt.export import charts, page, tflite_file
from tests.helpers.browser import chromium, drop
from tests.helpers.exported_run import ENVIRONMENT, ROOT, quantize

pytestmark = pytest.mark.timeout(1200)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A network that really knows its digits, and its files."""
    folder = tmp_path_factory.mktemp("runs")
    flags = "--dataset digits --depth 8 --epochs 6 --batch-size 64 --precision float32 --name digits"
    command = [sys.executable, "train_hvd.py", *flags.split(), "--run-dir", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, env=ENVIRONMENT)
    done = quantize(folder / "digits", "--variants", "int8,clustered-int8", "--clusters", 16, "--pack")
    assert done.returncode == 0, done.stderr
    return folder / "digits"


@pytest.fixture(scope="module")
def content(run):
    return json.loads((run / "report.json").read_text())


@pytest.fixture(scope="module")
def driver(run, tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("chromium")) as driver:
        driver.get((run / "report.html").as_uri())
        yield driver


def wait(driver, script):
    """What ``script`` returns, once it returns something."""
    from selenium.webdriver.support.wait import WebDriverWait

    return WebDriverWait(driver, 20).until(lambda driver: driver.execute_script(script))


def logits(driver):
    """Those of the last picture that the page was given."""
    return json.loads(wait(driver, 'return document.getElementById("answer").dataset.logits'))


def evaluated(run, content, images):
    """What TFLite makes of them, and one step of its output."""
    host.prepare({**host.TENSORFLOW, **host.QUIET})
    from cnnopt.export import interpret

    path = run / page.best(content)["file"]
    network, _ = tflite_file.network(path.read_bytes(), path)
    found = interpret.logits(path.read_bytes(), path, images, threads=1)
    return found, network["tensors"][network["output"]]["scale"][0]


# ------------------------------------------------------------------------------------------- in the browser


def test_the_network_in_the_page_answers_as_the_file_does(run, content, driver):
    images = datasets.load("digits").test_images[-100:]
    expected, step = evaluated(run, content, images)
    found = []
    for pixels in images:
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        driver.execute_script('delete document.getElementById("answer").dataset.logits')
        drop(driver, "digit.png", "image/png", file.getvalue())
        found.append(logits(driver))
    assert len(set(expected.argmax(axis=1))) == 10
    np.testing.assert_array_equal(np.argmax(found, axis=1), expected.argmax(axis=1))
    assert np.abs(np.array(found) - expected).max() <= 1.01 * step


def test_a_test_image_beside_it_answers_when_clicked(run, content, driver):
    data = datasets.load("digits")
    samples = driver.find_elements("css selector", ".sample")
    assert [sample.text for sample in samples] == list(data.class_names)
    pixels = data.test_images[data.test_labels == 7][:1]
    driver.execute_script('delete document.getElementById("answer").dataset.logits')
    samples[7].click()
    expected, step = evaluated(run, content, pixels)
    assert np.abs(np.array(logits(driver)) - expected[0]).max() <= 1.01 * step
    assert driver.find_element("css selector", "#answer .bar span").text == data.class_names[expected[0].argmax()]


def test_what_is_no_picture_is_said(driver):
    drop(driver, "notes.txt", "text/plain", b"no picture")
    said = wait(driver, 'return document.getElementById("answer").textContent.match(/^notes.txt: .*/)')
    assert said[0].startswith("notes.txt: not a picture that this browser reads")


def test_it_asks_for_nothing_and_fits_a_telephone_in_light_and_dark(driver):
    loaded = driver.execute_script("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert [name for name in loaded if not name.startswith(("data:", "blob:"))] == []
    backs = set()
    for scheme in ("light", "dark"):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        backs.add(driver.execute_script("return getComputedStyle(document.body).backgroundColor"))
    assert len(backs) == 2
    narrow = {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": True}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", narrow)
    assert driver.execute_script("return document.documentElement.scrollWidth") <= 360
    assert [entry["message"] for entry in driver.get_log("browser")] == []


# ------------------------------------------------------------------------------------------- what it says


def test_the_page_holds_what_the_report_does(run, content):
    html = (run / "report.html").read_text()
    assert len(html) < 2_000_000
    assert page.headline(content) in html
    assert not re.findall(r"""(?:src|href)=["'](?!data:)|url\(|@import|https?://""", html)
    best = page.best(content)
    for entry in content["files"]:
        assert f">{100 * entry['test']['accuracy']:.2f}<" in html
        assert f">{entry['latency'][0]['median_ms']:.2f} ms<" in html
    for note in content["notes"]:
        assert escape(note) in html
    mistakes = best["test"]["mistakes"]
    assert html.count("<figcaption>") == len(mistakes) == min(20, best["test"]["images"] - best["test"]["correct"])
    shares = [wrong["probability"] for wrong in mistakes]
    assert shares == sorted(shares, reverse=True)
    labels = datasets.load("digits").test_labels
    assert all(labels[wrong["image"]] == wrong["label"] != wrong["predicted"] for wrong in mistakes)
    for i, row in enumerate(best["test"]["confusion"]):
        for j, count in enumerate(row):
            assert (f"<title>{i}, classified as {j}: {count}</title>" in html) == bool(count)


def test_the_command_of_the_page_makes_the_same_run(run):
    identity = json.loads((run / "config.json").read_text())["identity"]
    html = (run / "report.html").read_text()
    (line,) = re.findall(r"<code>python train_hvd.py (.*?)</code>", html)
    assert parse_args(line.split()).identity() == identity
    for preset in ("study-super-70", "baseline", "super"):
        wanted = parse_args(["--preset", preset]).identity()
        arguments = page.command(wanted).split()[2:]
        assert parse_args(arguments).identity() == wanted


def test_the_best_file_is_the_smallest_that_is_as_good_as_the_test_images_can_tell():
    def entry(name, correct, packed, gzip=500):
        return {
            "name": name, "test": {"correct": correct, "images": 10_000, "accuracy": correct / 10_000},
            "packed": packed and {"bytes": packed, "times_smaller": 1000 / packed}, "size": {"gzip": gzip},
            "times_smaller": {"gzip": 1000 / gzip}, "latency": [{"median_ms": 1.0}],
        }  # fmt: skip

    files = [entry("float32", 9160, None), entry("int8", 9170, 150), entry("clustered-int8", 8970, 100)]
    card = {"files": files, "reference": {"file": "float32"}}
    assert page.headline(card) == "int8: 6.7x smaller, 0.1 points gained, 1.0x faster"
    card["reference"]["kind"] = "self"
    assert page.headline(card) == "int8: 6.7x smaller, 0.1 points gained, 1.0x faster than its own float32 file"
    card["reference"]["kind"] = "baseline"
    files[1]["test"].update(correct=9000, accuracy=0.9)
    files[1]["latency"][0]["median_ms"] = 2.0
    assert page.headline(card) == "int8: 6.7x smaller, 1.6 points lost, 2.0x slower"
    # The file of the baseline holds another network, and is never the best of this run.
    files[1:] = [entry("dynamic", 8900, 200)]
    assert page.best(card)["name"] == "dynamic"
    card["reference"]["kind"] = "self"
    assert page.best(card)["name"] == "float32"


def test_validation_images_choose_the_best_file_if_there_are_any():
    def entry(name, val, test, packed):
        accuracies = {"validation": val, "test": test}
        return {
            "name": name, "packed": packed and {"bytes": packed, "times_smaller": 1000 / packed},
            "size": {"gzip": 500}, "times_smaller": {"gzip": 2},
            **{split: correct and {"correct": correct, "images": 10_000, "accuracy": correct / 10_000}
               for split, correct in accuracies.items()},
        }  # fmt: skip

    files = [entry("dense-float32", None, 9500, None), entry("float32", 9160, 9160, None),
             entry("int8", 9150, 8000, 150), entry("clustered-int8", 8970, 9160, 100)]  # fmt: skip
    card = {"files": files, "reference": {"file": "dense-float32"}}
    assert page.best(card)["name"] == "int8"
    assert page.best({**card, "files": files[:2]})["name"] == "float32"
    for each in files:
        each["validation"] = None
    files[0]["test"].update(correct=9160, accuracy=0.916)
    assert page.best(card)["name"] == "clustered-int8"


def test_names_cannot_become_part_of_the_page(run, content):
    images = datasets.load("digits")
    named = datasets.Dataset(
        images.name, images.train_images, images.train_labels, images.test_images, images.test_labels,
        ("</script><b>", *images.class_names[1:]),
    )  # fmt: skip
    changed = {**content, "run": {**content["run"], "classes": list(named.class_names)}}
    html = page.run_page(changed, run, named)
    assert "</script><b>" not in html
    assert "&lt;/script&gt;&lt;b&gt;" in html
    assert html.count("</script>") == 3


# ------------------------------------------------------------------------------------------- the model card


def test_the_header_of_the_model_card_is_what_hubs_read(run, content):
    card = (run / "export/README.md").read_text()
    _, header, text = card.split("---\n", 2)
    metadata = yaml.safe_load(header)
    assert metadata["pipeline_tag"] == "image-classification"
    (model,) = metadata["model-index"]
    measured = {result["metrics"][0]["name"]: result["metrics"][0]["value"] for result in model["results"]}
    assert measured == {entry["name"]: entry["test"]["accuracy"] for entry in content["files"]}
    for entry in content["files"]:
        assert f"| `{entry['name']}.tflite` | {entry['size']['raw']:,} |" in text
        assert (run / "export" / f"{entry['name']}.tflite").exists()


def test_the_code_of_the_model_card_runs(run, content, tmp_path):
    pytest.importorskip("ai_edge_litert", reason="ai-edge-litert is optional")
    card = (run / "export/README.md").read_text()
    code = "\n".join(line[4:] for line in card.splitlines() if line.startswith("    "))
    pixels = datasets.load("digits").test_images[:1]
    Image.fromarray(pixels[0]).save(tmp_path / "image.png")
    shutil.copytree(run / "export", tmp_path, dirs_exist_ok=True)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    expected, _ = evaluated(run, content, pixels)
    assert done.stdout.strip() == content["run"]["classes"][expected[0].argmax()], done.stderr


# ------------------------------------------------------------------------------------------- charts


def test_intervals_and_the_front():
    for correct, total in ((9162, 10_000), (360, 360), (0, 20)):
        expected = scipy.stats.binomtest(correct, total).proportion_ci(method="wilson")
        assert charts.wilson(correct, total) == pytest.approx(expected, abs=1e-5)
    points = [charts.Point(x, y, y, y, "", "") for x, y in ((4, 90), (1, 80), (2, 85), (3, 84), (2, 70))]
    assert [(p.x, p.y) for p in charts.pareto(points)] == [(1, 80), (2, 85), (4, 90)]
    assert charts.ticks(0, 30) == [0, 5, 10, 15, 20, 25, 30]
    assert charts.ticks(0, 100) == [0, 20, 40, 60, 80, 100]


def test_noise_looks_like_noise():
    """Two files that differ by a tenth of their interval are drawn within a tenth of the height."""
    points = [charts.Point(size, y, y - 0.5, y + 0.5, "", "") for size, y in ((10, 91.0), (100, 91.1))]
    svg = charts.scatter(points, "", "", fronts=[points])
    heights = [float(y) for y in re.findall(r'<circle cx="[\d.]+" cy="([\d.]+)"', svg)]
    assert 0 < abs(heights[0] - heights[1]) < 24
    assert all(0 < y < 240 for y in heights)
