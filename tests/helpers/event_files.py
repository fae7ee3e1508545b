"""A folder as TensorBoard shows it: its own readers, and its own answers of the HParams plugin."""

import io
from pathlib import Path

import numpy as np
from PIL import Image
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.hparams import api_pb2
from tensorboard.plugins.hparams.backend_context import Context
from tensorboard.plugins.hparams.list_session_groups import Handler
from tensorboard.util.tensor_util import make_ndarray


def curves(folder: Path) -> EventAccumulator:
    """All that is shown of an entry, a folder with event files."""
    return EventAccumulator(str(folder), size_guidance={"tensors": 0}).Reload()


def points(events: EventAccumulator, tag: str) -> dict[int, float]:
    """The value of each step; a step that is there twice fails."""
    found = [(event.step, float(make_ndarray(event.tensor_proto))) for event in events.Tensors(tag)]
    assert len(dict(found)) == len(found), f"{tag}: a step twice"
    return dict(found)


def image(events: EventAccumulator, tag: str) -> np.ndarray:
    """The last picture of a tag, uint8 [height, width, 3]."""
    width, height, content, *_ = make_ndarray(events.Tensors(tag)[-1].tensor_proto)
    pixels = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    assert pixels.shape == (int(height), int(width), 3)
    return pixels


def table(folder: Path) -> list[tuple[dict[str, object], dict[str, float]]]:
    """The rows of HParams for all runs below ``folder``: the settings, and the columns of results by tag."""
    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(folder)).Reload()
    context = Context(TBContext(data_provider=MultiplexerDataProvider(multiplexer, str(folder))))
    request = api_pb2.ListSessionGroupsRequest(
        allowed_statuses=[api_pb2.STATUS_UNKNOWN, api_pb2.STATUS_RUNNING, api_pb2.STATUS_SUCCESS],
        aggregation_type=api_pb2.AGGREGATION_AVG, slice_size=100, include_metrics=True,
    )  # fmt: skip
    answer = Handler(request_context=RequestContext(), backend_context=context, experiment_id="", request=request).run()
    return [
        (
            {name: getattr(value, value.WhichOneof("kind")) for name, value in group.hparams.items()},
            {found.name.tag: found.value for found in group.metric_values if not found.name.group},
        )
        for group in answer.session_groups
    ]
