"""export/README.md: a model card with the metadata header that model hubs read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cnnopt.export import page
from cnnopt.run import atomic_files
from cnnopt.run.run_folder import RunFolder

#: The names of the data sets on model hubs.
HUB_NAMES = {"cifar10": "uoft-cs/cifar10", "cifar100": "uoft-cs/cifar100"}

USE = """\
    import numpy as np
    from ai_edge_litert.interpreter import Interpreter
    from PIL import Image

    classes = {classes}
    interpreter = Interpreter(model_path="{file}")
    interpreter.allocate_tensors()
    source, sink = interpreter.get_input_details()[0], interpreter.get_output_details()[0]
    pixels = np.asarray(Image.open("image.png").convert("RGB").resize((32, 32)), np.float32)[None]
    if source["dtype"] == np.int8:
        scale, zero = source["quantization"]
        pixels = np.clip(np.rint(pixels / scale) + zero, -128, 127).astype(np.int8)
    interpreter.set_tensor(source["index"], pixels)
    interpreter.invoke()
    print(classes[interpreter.get_tensor(sink["index"])[0].argmax()])
"""
#: How to read the other formats. All take float32 [n, 32, 32, 3], 0 to 255.
FORMAT_USE = {
    "saved-model": '`tf.saved_model.load("saved_model").signatures["serving_default"](pixels=images)["logits"]`',
    "keras": '`tf_keras.models.load_model("model.keras").predict(images)`',
    "onnx": '`onnxruntime.InferenceSession("model.onnx").run(None, {"pixels": images})[0]`',
    "safetensors": '`safetensors.numpy.load_file("model.safetensors")`: weights and masks by name, no network',
}


def save(content: Mapping[str, Any], folder: Path) -> None:
    """Write the card beside the files of the run in ``folder``. Raises UserError, WriteError."""
    identity = RunFolder(folder).identity("restore it from a copy")
    atomic_files.replace(folder / "export" / "README.md", markdown(content, page.command(identity)))


def markdown(content: Mapping[str, Any], command: str) -> str:
    """The card for the content of a report.json. ``command`` is the command that trained the network."""
    run, machine = content["run"], content["machine"]
    name = Path(run["path"]).name
    rows = [
        (
            f"`{Path(entry['file']).name}`",
            f"{entry['size']['raw']:,}",
            f"{entry['packed']['bytes']:,}" if entry["packed"] else "",
            f"{entry['weights']['sparsity']:.1%}",
            f"{100 * entry['test']['accuracy']:.2f}",
            f"{entry['latency'][0]['median_ms']:.2f}",
            f"`{entry['sha256'][:16]}`",
        )
        for entry in page.own(content)
    ]
    rows += [
        (
            f"`{Path(entry['file']).name}`",
            f"{entry['size']['raw']:,}",
            "",
            f"{run['sparsity']:.1%}",
            f"{100 * entry['test']['accuracy']:.2f}",
            "",
            f"`{entry['sha256'][:16]}`",
        )
        for entry in content.get("formats", [])
    ]
    columns = ("file", "bytes", "packed", "zeros", "top-1 %", "ms", "SHA-256")
    return "\n".join(
        [
            "---",
            *header(content, name),
            "---",
            "",
            f"# {name}",
            "",
            f"ResNet-{run['depth']} (He et al. 2016, section 4.2) for {run['dataset']}, {run['parameters']:,} "
            f"parameters, {run['sparsity']:.0%} of the weights zero, trained by `{command}`.",
            "",
            *("| " + " | ".join(cells) + " |" for cells in (columns, ["---"] * len(columns), *rows)),
            "",
            f"Top-1 over {content['files'][0]['test']['images']:,} test images, each file in its own runtime; ms: "
            f"median of one image at one thread of {machine['cpu']}. Packed: `python -m cnnopt.quantize unpack` "
            "restores the file.",
            "",
            "## Use",
            "",
            f"Input: one RGB image of 32 x 32 pixels, 0 to 255, [1, 32, 32, 3]; standardization is inside. Output: "
            f"logits [1, {len(run['classes'])}]. int8 files take and give int8, by scale and zero point.",
            "",
            USE.format(file=Path(page.best(content)["file"]).name, classes=json.dumps(run["classes"])).rstrip(),
            "",
            *(f"`{Path(entry['file']).name}`: {FORMAT_USE[entry['name']]}\n" for entry in content.get("formats", [])),
            "## Limits",
            "",
            f"It knows the {len(run['classes'])} classes of {run['dataset']} and names one of them for any image. Its "
            "accuracy was measured on that data set's own test images; other photographs are harder.",
            "",
        ]
    )


def header(content: Mapping[str, Any], name: str) -> list[str]:
    """The lines of YAML between the rules. The values are JSON, which is a part of YAML."""
    data = content["run"]["dataset"]
    results = [
        {
            "task": {"type": "image-classification"},
            "dataset": {"name": data, "type": HUB_NAMES.get(data, data), "split": "test"},
            "metrics": [{"type": "accuracy", "value": entry["test"]["accuracy"], "name": entry["name"]}],
        }
        for entry in (*page.own(content), *content.get("formats", []))
    ]
    fields: dict[str, Any] = {
        "pipeline_tag": "image-classification",
        "tags": [
            "tflite",
            *(entry["name"] for entry in content.get("formats", [])),
            "resnet",
            "pruning",
            "quantization",
        ],
        "metrics": ["accuracy"],
        "model-index": [{"name": name, "results": results}],
    }
    if data in HUB_NAMES:
        fields["datasets"] = [HUB_NAMES[data]]
    return [f"{key}: {json.dumps(value)}" for key, value in fields.items()]
