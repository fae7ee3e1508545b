"""Notes that answer a reader's likely questions about a report. A note appears only if the figures support it."""

from __future__ import annotations

from typing import Any


def notes(content: dict[str, Any]) -> list[str]:
    """The notes for the content of a report.json."""
    files = {entry["name"]: entry for entry in content["files"]}
    return [
        *_choice(files),
        *_reference(content),
        *_raw_size(content, files),
        *_speed(content, files),
        *_int8_speed(content, files),
        *_fine_tuning(files),
        *_ledgers(files),
        *_delegates(files),
        *_load(content),
    ]


def _choice(files: dict[str, Any]) -> list[str]:
    found = {name: entry["validation"] for name, entry in files.items() if entry.get("validation")}
    if not found:
        return []
    accuracies = ", ".join(f"{name} {measured['accuracy']:.2%}" for name, measured in found.items())
    return [
        f"The best file is chosen on {next(iter(found.values()))['images']:,} validation images, which no training has "
        f"seen: {accuracies}. The test images had no part in the choice."
    ]


def _reference(content: dict[str, Any]) -> list[str]:
    if content["reference"]["kind"] == "baseline":
        return []
    return [
        "No --baseline was given, so there is no dense run to compare accuracy and latency with. Sizes are compared "
        "with this run's own float32 file. It stores its zeros, so it is as large as that of a dense run."
    ]


def _raw_size(content: dict[str, Any], files: dict[str, Any]) -> list[str]:
    sparsity = content["run"]["sparsity"]
    if sparsity < 0.01 or "int8" not in files:
        return []
    int8, count = files["int8"]["size"], files["int8"]["weights"]["weights"]
    sentence = (
        f"The raw size of int8 ({int8['raw']:,} bytes) does not depend on sparsity: int8 weights are stored dense, one "
        f"byte for each of {count:,} weights, zero or not. The {sparsity:.0%} zeros show once the file is "
        f"compressed: {int8['gzip']:,} bytes by gzip -9. An ideal coder needs {int8['weights_entropy']:,} bytes for "
        "the weights alone."
    )
    return [sentence]


def _speed(content: dict[str, Any], files: dict[str, Any]) -> list[str]:
    sparsity = content["run"]["sparsity"]
    if sparsity < 0.01 or "float32" not in files:
        return []
    sentence = (
        f"{sparsity:.0%} zeros buy no speed here: XNNPACK's sparse kernels take float32 1x1 convolutions only, and "
        "all convolutions of this network are 3x3, so zeros are multiplied like any other weight."
    )
    if "sparse-float32" in files:
        dense, sparse = (files[name]["latency"][0]["median_ms"] for name in ("float32", "sparse-float32"))
        sentence += f" Measured at one thread: float32 {dense:.2f} ms, sparse-float32 {sparse:.2f} ms."
    return [sentence]


def _int8_speed(content: dict[str, Any], files: dict[str, Any]) -> list[str]:
    if not {"int8", "float32"} <= files.keys():
        return []
    exact, int8 = (files[name]["latency"][0]["median_ms"] for name in ("float32", "int8"))
    # Readers wonder only if int8 is about as slow as float32. Even a small gain needs no explanation.
    if int8 < 0.8 * exact:
        return []
    sentence = (
        f"int8 is hardly faster than float32, or slower, at one thread ({int8:.2f} and {exact:.2f} ms): it is fast by "
        "instructions that multiply four pairs of int8 numbers and add them up at once (VNNI; dot product on ARM)."
    )
    if (has := content["machine"]["int8_instructions"]) is None:
        return [sentence]
    if has:
        return [f"{sentence} This CPU has {', '.join(has)}, so measure again on an idle machine."]
    return [
        f"{sentence} This CPU has none. With AVX2 alone, XNNPACK widens int8 to int16 first, and then needs two "
        "instructions for 16 products, as float32 does (FMA)."
    ]


def _fine_tuning(files: dict[str, Any]) -> list[str]:
    tuned = [name for name, entry in files.items() if entry["fine_tuned"]]
    if not tuned:
        return []
    verb, epochs = "has" if len(tuned) == 1 else "have each", files[tuned[0]]["fine_tuned"]["epochs"]
    return [
        f"{' and '.join(tuned)} {verb} been trained for {epochs} more epoch(s) than the other files. A gain over them "
        "may come from these epochs, and not only from training with the rounding of the file."
    ]


def _ledgers(files: dict[str, Any]) -> list[str]:
    lost = [
        f"{name}: {line['lost']:,} of {entry['ledger']['pruned']:,} pruned weights are not zero any more; the first "
        f"stage that lost some is '{line['stage']}'."
        for name, entry in files.items()
        if entry["ledger"]
        for line in entry["ledger"]["stages"]
        if line["stage"] == entry["ledger"]["first_loss"]
    ]
    if lost:
        return lost
    pruned = max((entry["ledger"]["pruned"] for entry in files.values() if entry["ledger"]), default=0)
    return [f"All {pruned:,} pruned weights are zero in every file."] if pruned else []


def _delegates(files: dict[str, Any]) -> list[str]:
    refused = [name for name, entry in files.items() if entry["latency"][0]["delegate"] == "none"]
    if not refused:
        return []
    return [
        f"XNNPACK does not run {', '.join(refused)}. TFLite's own kernels run instead, which are slower. report.json "
        "has the reason (latency, delegate_refused)."
    ]


def _load(content: dict[str, Any]) -> list[str]:
    load, cores = content["machine"]["load"], content["machine"]["cores"]
    if load <= cores + 1:
        return []
    return [f"The machine was busy (load {load:.1f} on {cores} cores): on an idle machine, latencies are shorter."]
