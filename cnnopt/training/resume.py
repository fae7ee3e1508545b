"""Resume a run from the newest checkpoint that verifies. Rank 0 reads it and broadcasts it to the others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from cnnopt.config import TrainConfig
from cnnopt.distributed import collectives
from cnnopt.distributed.world import World
from cnnopt.run import checkpoint
from cnnopt.run.run_folder import RunFolder, is_line, named_as_today
from cnnopt.training.step import SynchronousModel


def restore(
    model: SynchronousModel,
    config: TrainConfig,
    folder: RunFolder,
    world: World,
    say: Callable[[str], None],
) -> int:
    """Set ``model`` to the state that ``--resume`` names, on all ranks. Returns the number of steps done.

    Raises checkpoint.CheckpointError on every rank if a named checkpoint cannot be used.
    """
    outcome: int | str = 0
    if world.first:
        try:
            outcome = _restore_here(model, config, folder, say)
        except checkpoint.CheckpointError as error:
            outcome = str(error)
    # Horovod: rank 0 tells all ranks whether it could restore, before any of them waits for the state.
    outcome = collectives.broadcast_object(outcome)
    if isinstance(outcome, str):
        raise checkpoint.CheckpointError(outcome)
    # Horovod: all ranks start from rank 0's weights, masks and counters.
    collectives.broadcast([*model.named_state().values(), *model.epoch_sums])
    return outcome


def _restore_here(model: SynchronousModel, config: TrainConfig, folder: RunFolder, say: Callable[[str], None]) -> int:
    def unfit(found: checkpoint.Checkpoint) -> str | None:
        identity = found.state.get("identity")
        difference = config.difference(identity) if isinstance(identity, dict) else "it names none"
        if difference:
            return f"of another configuration: {difference}"
        here = {name: tuple(variable.shape) for name, variable in model.named_state().items()}
        there = {name: array.shape for name, array in found.arrays.items()}
        differing = sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name))
        if differing:
            return f"of another model: {differing[0]}"
        # A checkpoint that was saved at the end of an epoch has no epoch_sums.
        sums = found.state.get("epoch_sums", [0.0] * len(model.epoch_sums))
        fits = isinstance(sums, list) and list(map(type, sums)) == [float] * len(model.epoch_sums)
        if not fits:
            return "of another model: epoch_sums"
        # Checkpoints of earlier versions have no metrics: the lines are in metrics.jsonl alone.
        lines = found.state.get("metrics")
        if lines is None and "metric" in found.state and found.path.parent == folder.checkpoints:
            lost = all(line["step"] != found.step for line in folder.metrics())
            return f"{folder.metrics_file} has lost the line of step {found.step}" if lost else None
        fits = lines is None or (isinstance(lines, list) and all(map(is_line, lines)))
        return None if fits else "of another model: metrics"

    if config.resume == "never":
        folder.rewind(0)
        return 0
    named = None if config.resume == "auto" else Path(config.resume)
    back = named is not None and named.resolve().parent == folder.checkpoints.resolve()
    found, skipped = checkpoint.newest(folder.checkpoints, accept=unfit)
    if named and found and (not back or found.state.get("resume") == config.resume):
        # A requeued job has the same flags. Without this it would begin from the named checkpoint each time.
        say(f"--resume {named} was for the first start; this run goes on from its own checkpoints")
        named = None
    if not back:
        for path, reason in skipped:
            say(f"skipped {path}: {reason}")
        if skipped and found is None:
            # The skipped checkpoints may be readable again tomorrow. A run from its first step would overwrite the
            # records that belong to them.
            raise checkpoint.CheckpointError(
                f"no checkpoint in {folder.checkpoints} can be used: move that folder away to begin anew"
            )
    if named is None:
        if found is None:
            folder.rewind(0)
            return 0
    else:
        fresh = found is None and not skipped and not back
        try:
            found = checkpoint.load(named)
            objection = unfit(found)
            if objection:
                raise checkpoint.CheckpointError(f"--resume {config.resume}: {objection}")
            if found.step == len(model.learning_rates) and not back:
                raise checkpoint.CheckpointError(
                    f"--resume {config.resume}: is the last checkpoint of a complete run; give an earlier one"
                )
        except checkpoint.CheckpointError:
            if fresh:
                # The corrected command may have other settings.
                folder.forget()
            raise
        if back:
            checkpoint.set_aside(folder.checkpoints, after=found.step)
    before, now = found.state.get("precision", model.compute_dtype), model.compute_dtype
    for name, variable in model.named_state().items():
        # A loss scale fits its compute type only. With another type it starts from its initial value.
        if before == now or not name.startswith("loss_scale/"):
            variable.assign(found.arrays[name])
    if before != now:
        say(f"--precision {config.precision} was {before} until now, and is {now} on this machine")
    for variable, value in zip(model.epoch_sums, found.state.get("epoch_sums", []), strict=False):
        variable.assign(value)
    recorded: list[dict] | None = found.state.get("metrics")
    if recorded is not None:
        recorded = named_as_today(recorded, validation=config.validation)
    if recorded and (lost := len(recorded) - sum(line["step"] <= found.step for line in folder.metrics())) > 0:
        say(f"{folder.metrics_file} had lost lines: {lost} of {len(recorded)} written again from the checkpoint")
    folder.rewind(found.step, recorded)
    say(f"resumed after step {found.step} from {found.path}")
    return found.step
